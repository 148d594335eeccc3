"""Test-time search (section 4.1): best-of-N by a score, majority vote, and step-level beam search.

The unit of every budget is policy tokens generated a problem. Curves over N use all the samples there are: the accuracy
of best-of-N is its exact expectation over the subsets of size N, not that of the first N samples.
"""
from dataclasses import dataclass

import torch

from minipav.advantage import effective_reward, newline, q_best_of_k
from minipav.model import KVCache
from minipav.sampler import decode, prefill
from minipav.tokenizer import decode_rows, encode_rows, pad_token
from minipav.verifier import start_values


def best_of_n(scores, reward, N):
    """Expected reward (P,) of the best-scored of N of the M samples, over all subsets: scores, reward (P, M).

    The sample with r others below it is the best of C(r, N-1) of the C(M, N) subsets; ties share equally.
    """
    P, M = scores.shape
    ranked = reward.gather(1, scores.argsort(1)).double()
    # equal scores are in no order: each of them gets the mean reward of its group
    group = torch.cat([torch.zeros(P, 1), (scores.sort(1).values.diff(dim=1) > 0).float()], 1).cumsum(1).long()
    total = torch.zeros(P, M, dtype=torch.double).scatter_add(1, group, ranked)
    size = torch.zeros(P, M, dtype=torch.double).scatter_add(1, group, torch.ones(P, M, dtype=torch.double))
    ranked = (total / size.clamp(min=1)).gather(1, group)
    r = torch.arange(M, dtype=torch.double)
    log_c = torch.lgamma(r + 1) - torch.lgamma(torch.tensor(float(N), dtype=torch.double)) - torch.lgamma(r - N + 2)
    ways = torch.where(r >= N - 1, (log_c - _log_binomial(M, N)).exp(), 0.0)
    return (ranked * ways).sum(1).float()


def pass_at_n(reward, N):
    """Chance (P,) that at least one of N of the M samples is right: best-of-N by the oracle. reward (P, M)."""
    return best_of_n(reward, reward, N)


def _log_binomial(n, k):
    n, k = (torch.tensor(float(x), dtype=torch.double) for x in (n, k))
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def majority_vote(answers, reward, N):
    """Accuracy (P,) of the commonest answer among N samples, averaged over the M // N disjoint groups of samples: the mean
    reward of the samples that gave it. answers: P lists of M answers, None never wins; reward (P, M). Ties go to the
    answer that came first."""
    out = []
    for row, right in zip(answers, reward.tolist()):
        hits = []
        for i in range(0, len(row) - N + 1, N):
            votes = [a for a in row[i:i + N] if a is not None]
            winner = max(dict.fromkeys(votes), key=votes.count, default=None)
            behind = [r for a, r in zip(row[i:i + N], right[i:i + N]) if a == winner and votes]
            hits.append(sum(behind) / max(1, len(behind)))
        out.append(sum(hits) / len(hits))
    return torch.tensor(out)


# What a beam ranks its candidates by: Q^pi and Q^mu after the step, Q^mu before it -> score. The search keeps the highest.
SCORES = {
    "effective": lambda q_pi, q_mu, before, alpha: effective_reward(q_pi, q_mu - before, alpha),    # Eq. 5: the PAV beam
    "advantage": lambda q_pi, q_mu, before, alpha: q_mu - before,                                   # Eq. 2: A^mu alone
    "bonus": lambda q_pi, q_mu, before, alpha: q_pi + alpha * q_mu}                                 # App. G's control


@dataclass
class BeamResult:
    """P problems, beam width B."""
    reward: torch.Tensor            # (P,) Rex of the final pick
    solved: torch.Tensor            # (P,) whether any finished trace of the final beam is right: pass@N of the beam
    tokens: torch.Tensor            # (P,) policy tokens generated for each problem, duplicates and losers included
    scored: torch.Tensor            # (P,) tokens that the verifiers read, prompt included, each verifier counted
    responses: list                 # P texts, the final picks ('' where no trace finished)


@torch.no_grad()
def beam_search(policy, q_pi_model, task, enc, problems, *, width, alpha, K=1, q_mu_model=None, rule="effective", C=3, seed=0,
                top_p=None, max_tokens_in_flight=1 << 18, log=None):
    """Step-level beam search with the effective reward Q^pi + alpha A^mu, or another of SCORES (section 4.1). -> BeamResult

    The prover mu is best-of-K of pi in closed form (Eq. 30), or has a verifier of its own, q_mu_model. alpha = 0 is the
    beam by Q^pi. Each step samples C next steps for every prefix of the beam (width * C at the first level), drops
    duplicates, scores, and keeps the best `width` of each problem. A finished trace stays with its score frozen. The
    answer is the finished trace with the highest Q^pi. All problems are searched in one batch, or in as few as keep
    rows x slots of the KV buffers within max_tokens_in_flight. q_pi_model may be an Oracle. log: a list that gets, for
    each level of each batch, its candidates with their values (see `_search`).
    Raises ValueError if width or C < 1 or alpha < 0.
    """
    if width < 1 or C < 1 or alpha < 0:
        raise ValueError(f"beam search needs width >= 1, C >= 1 and alpha >= 0, not {width}, {C}, {alpha}")
    texts = [task.prompt(p) for p in problems]
    prompts, lengths = (x.to(policy.device) for x in encode_rows(enc, texts))
    u = torch.rand(task.max_steps, len(problems), width * C, task.max_step_tokens,
                   generator=torch.Generator().manual_seed(seed)).to(policy.device)     # one for each token
    slots = prompts.shape[1] + task.max_steps * task.max_step_tokens
    batch = max(1, max_tokens_in_flight // (slots * width * C))
    responses, reward = [""] * len(problems), torch.zeros(len(problems))
    solved, spent = torch.zeros(len(problems)), []
    for i in range(0, len(problems), batch):
        rows = slice(i, i + batch)
        values = [v and start_values(v, problems[rows], prompts[rows], lengths[rows], slots) for v in (q_pi_model, q_mu_model)]
        levels = [] if log is not None else None
        finished, *tokens = _search(policy, values, task, enc, prompts[rows], lengths[rows], u[:, rows], slots, width,
                                    lambda *x: SCORES[rule](*x, alpha), K, C, dict(top_p=top_p), levels)
        spent.append(torch.stack(tokens))
        if log is not None:
            log += [level | {"owner": level["owner"] + i} for level in levels]
        best = set(_top(finished["q_pi"], finished["owner"], 1).tolist())
        for r, text in enumerate(decode_rows(enc, finished["tokens"], finished["lengths"])):
            p = i + int(finished["owner"][r])
            text = text.removeprefix(texts[p])
            right = float(task.outcome(problems[p], text))
            solved[p] = max(solved[p], right)
            if r in best:
                responses[p], reward[p] = text, right
    return BeamResult(reward, solved, *torch.cat(spent, 1), responses)


def _search(policy, values, task, enc, prompts, lengths, u, slots, width, rule, K, C, how, log=None):
    """The search of one batch. values: of Q^pi and, if the prover has a verifier, of Q^mu, at the prompts. -> the finished
    traces of the last beams (a dict of tensors), policy tokens (P,), verifier tokens (P,)."""
    P, device = len(prompts), policy.device
    stop = torch.tensor([newline(enc), enc.eot_token], device=device)
    cache = KVCache(policy.config, P, slots, device, policy.embed.weight.dtype)
    hidden = prefill(policy, cache, prompts, lengths)                           # (P, C)
    readers = sum(v is not None for v in values)

    def q_mu(values):
        return q_best_of_k(values[0].q, K) if values[1] is None else values[1].q
    live = {"tokens": torch.nn.functional.pad(prompts, (0, slots - prompts.shape[1]), value=pad_token(enc)), "lengths": lengths,
            "owner": torch.arange(P, device=device)}                            # rows are ordered by owner throughout
    finished = {k: v[:0] for k, v in live.items()} | {"q_pi": values[0].q[:0], "score": values[0].q[:0]}
    spent, scored = torch.zeros(P, dtype=torch.long, device=device), readers * lengths
    for level in range(task.max_steps):
        rows = torch.arange(len(live["owner"]), device=device)
        if len(rows) == 0:
            break
        n = width * C if level == 0 else C
        parent = rows.repeat_interleave(n)
        rank = rows - torch.searchsorted(live["owner"], live["owner"])          # place in the beam of its problem
        draw = u[level, live["owner"][parent], (C * rank[:, None] + torch.arange(n, device=device)).flatten()]
        grown = cache[parent]
        new, count, _, reason = decode(policy, grown, hidden[parent], live["lengths"][parent], draw, task.max_step_tokens,
                                       stop, how, pad_token(enc))
        spent.index_add_(0, live["owner"][parent], count)

        kept = _distinct(parent, new, reason)
        if len(kept) == 0:                                                      # no step of any problem came to its end
            break
        parent, new, count = parent[kept], new[kept], count[kept]
        scored = scored.index_add(0, live["owner"][parent], readers * count)
        children = [v and v.children(parent, new, count) for v in values]
        after, before = q_mu(children), q_mu(values)[parent]
        child = {"tokens": _append(live["tokens"][parent], live["lengths"][parent], new, count),
                 "lengths": live["lengths"][parent] + count, "owner": live["owner"][parent], "q_pi": children[0].q,
                 "score": rule(children[0].q, after, before)}
        ended = reason[kept] == enc.eot_token

        both = {k: torch.cat([finished[k], child[k]]) for k in finished}        # finished traces stay in the running
        top = _top(both["score"], both["owner"], width)
        is_live = torch.cat([torch.zeros(len(finished["owner"]), dtype=torch.bool, device=device), ~ended])[top]
        if log is not None:                                                     # every candidate of this level
            log.append({k: v.cpu() for k, v in child.items()} | {"q_mu": after.cpu(), "adv_mu": (after - before).cpu(),
                       "kept": torch.isin(torch.arange(len(ended), device=device) + len(finished["owner"]), top).cpu()})
        rows = top[is_live] - len(finished["owner"])
        finished = {k: v[top[~is_live]] for k, v in both.items()}
        live = {k: child[k][rows] for k in live}
        cache, values = grown[kept[rows]], [v and v[rows] for v in children]
        last = live["lengths"][:, None] - 1                                     # the delimiter has not been read yet
        if len(rows):
            hidden = policy.trunk(live["tokens"].gather(1, last), cache, last, span=int(last.max()) + 1)[:, 0]
    return {k: v.cpu() for k, v in finished.items()}, spent.cpu(), scored.cpu()


def _append(tokens, lengths, new, count):
    """tokens (N, S) with the first count (N,) of new (N, T) written at lengths (N,)."""
    row, t = (torch.arange(new.shape[1], device=new.device) < count[:, None]).nonzero(as_tuple=True)
    tokens[row, lengths[row] + t] = new[row, t]
    return tokens


def _distinct(parent, new, reason):
    """Indices of the children without duplicates (same parent, same step) and without steps that never ended."""
    salt = torch.randint(-2**62, 2**62, (new.shape[1] + 1,), generator=torch.Generator().manual_seed(0)).to(new.device)
    key = (torch.cat([parent[:, None], new + 1], 1) * salt).sum(1)              # a 64-bit hash of the row
    order = key.argsort(stable=True)
    first = torch.ones(len(key), dtype=torch.bool, device=new.device)
    first[order[1:]] = key[order].diff() != 0
    return (first & (reason >= 0)).nonzero()[:, 0]


def _top(value, owner, k):
    """Row indices of the k highest values of each owner, ordered by owner and then by value."""
    order = value.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    o = owner[order]
    rank = torch.arange(len(o), device=o.device) - torch.searchsorted(o, o)     # place within the owner's run
    return order[rank < k]

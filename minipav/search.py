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
from minipav.verifier import Values


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


@dataclass
class BeamResult:
    """P problems, beam width B."""
    reward: torch.Tensor            # (P,) Rex of the final pick
    solved: torch.Tensor            # (P,) whether any finished trace of the final beam is right: pass@N of the beam
    tokens: torch.Tensor            # (P,) policy tokens generated for each problem, duplicates and losers included
    responses: list                 # P texts, the final picks ('' where no trace finished)


@torch.no_grad()
def beam_search(policy, q_pi_model, task, enc, problems, *, width, alpha, K=1, q_mu_model=None, C=3, seed=0,
                max_tokens_in_flight=1 << 18):
    """Step-level beam search with the effective reward Q^pi + alpha A^mu (section 4.1). -> BeamResult

    The prover mu is best-of-K of pi in closed form (Eq. 30), or has a verifier of its own, q_mu_model. alpha = 0 is the
    beam by Q^pi. Each step samples C next steps for every prefix of the beam (width * C at the first level), drops
    duplicates, scores, and keeps the best `width` of each problem. A finished trace stays with its score frozen. The
    answer is the finished trace with the highest Q^pi. All problems are searched in one batch, or in as few as keep
    rows x slots of the KV buffers within max_tokens_in_flight. Raises ValueError if width or C < 1 or alpha < 0.
    """
    if width < 1 or C < 1 or alpha < 0:
        raise ValueError(f"beam search needs width >= 1, C >= 1 and alpha >= 0, not {width}, {C}, {alpha}")
    texts = [task.prompt(p) for p in problems]
    prompts, lengths = encode_rows(enc, texts)
    u = torch.rand(task.max_steps, len(problems), width * C, task.max_step_tokens,
                   generator=torch.Generator().manual_seed(seed))               # one number for each token that may come
    slots = prompts.shape[1] + task.max_steps * task.max_step_tokens
    batch = max(1, max_tokens_in_flight // (slots * width * C))
    responses, reward = [""] * len(problems), torch.zeros(len(problems))
    solved, spent = torch.zeros(len(problems)), []
    for i in range(0, len(problems), batch):
        rows = slice(i, i + batch)
        finished, tokens = _search(policy, (q_pi_model, q_mu_model), task, enc, prompts[rows], lengths[rows], u[:, rows],
                                   slots, width, alpha, K, C)
        spent.append(tokens)
        best = set(_top(finished["q_pi"], finished["owner"], 1).tolist())
        for r, text in enumerate(decode_rows(enc, finished["tokens"], finished["lengths"])):
            p = i + int(finished["owner"][r])
            text = text.removeprefix(texts[p])
            right = float(task.outcome(problems[p], text))
            solved[p] = max(solved[p], right)
            if r in best:
                responses[p], reward[p] = text, right
    return BeamResult(reward, solved, torch.cat(spent), responses)


def _search(policy, verifiers, task, enc, prompts, lengths, u, slots, width, alpha, K, C):
    """The search of one batch. -> the finished traces of the last beams (a dict of tensors), tokens spent (P,)."""
    P, device = len(prompts), policy.device
    prompts, lengths, u = prompts.to(device), lengths.to(device), u.to(device)
    stop = torch.tensor([newline(enc), enc.eot_token], device=device)
    cache = KVCache(policy.config, P, slots, device, policy.embed.weight.dtype)
    hidden = prefill(policy, cache, prompts, lengths)                           # (P, C)
    values = [v and Values(v, prompts, lengths, slots) for v in verifiers]      # of the prompts: V(x)

    def q_mu(values):
        return values[1].q if values[1] else q_best_of_k(values[0].q, K)
    live = {"tokens": torch.nn.functional.pad(prompts, (0, slots - prompts.shape[1]), value=pad_token(enc)), "lengths": lengths,
            "owner": torch.arange(P, device=device)}                            # rows are ordered by owner throughout
    finished = {k: v[:0] for k, v in live.items()} | {"q_pi": values[0].q[:0], "score": values[0].q[:0]}
    spent = torch.zeros(P, dtype=torch.long, device=device)
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
                                       stop, {}, pad_token(enc))
        spent.index_add_(0, live["owner"][parent], count)

        kept = _distinct(parent, new, reason)
        parent, new, count = parent[kept], new[kept], count[kept]
        children = [v and v.children(parent, new, count) for v in values]
        adv_mu = q_mu(children) - q_mu(values)[parent]                          # Eq. 2
        child = {"tokens": _append(live["tokens"][parent], live["lengths"][parent], new, count),
                 "lengths": live["lengths"][parent] + count, "owner": live["owner"][parent], "q_pi": children[0].q,
                 "score": effective_reward(children[0].q, adv_mu, alpha)}       # Eq. 5
        ended = reason[kept] == enc.eot_token

        both = {k: torch.cat([finished[k], child[k]]) for k in finished}        # finished traces stay in the running
        top = _top(both["score"], both["owner"], width)
        is_live = torch.cat([torch.zeros(len(finished["owner"]), dtype=torch.bool, device=device), ~ended])[top]
        rows = top[is_live] - len(finished["owner"])
        finished = {k: v[top[~is_live]] for k, v in both.items()}
        live = {k: child[k][rows] for k in live}
        cache, values = grown[kept[rows]], [v and v[rows] for v in children]
        last = live["lengths"][:, None] - 1                                     # the delimiter has not been read yet
        if len(rows):
            hidden = policy.trunk(live["tokens"].gather(1, last), cache, last, span=int(last.max()) + 1)[:, 0]
    return {k: v.cpu() for k, v in finished.items()}, spent.cpu()


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

"""Test-time search (section 4.1): best-of-N by a score, majority vote, and step-level beam search.

The unit of every budget is policy tokens generated a problem. Curves over N use all the samples there are: the accuracy
of best-of-N is its exact expectation over the subsets of size N, not that of the first N samples.
"""
from dataclasses import dataclass

import torch

from minipav.advantage import effective_reward, join, newline, q_best_of_k
from minipav.sampler import sample
from minipav.tokenizer import decode_rows, encode_rows, pad_token
from minipav.verifier import score


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
    """Accuracy (P,) of the commonest answer among N samples, averaged over the M // N disjoint groups of samples.
    answers: P lists of M answers, None never wins; reward (P, M). Ties go to the answer that came first."""
    out = []
    for row, right in zip(answers, reward.tolist()):
        hits = []
        for i in range(0, len(row) - N + 1, N):
            votes = [a for a in row[i:i + N] if a is not None]
            winner = max(dict.fromkeys(votes), key=votes.count, default=None)
            hits.append(right[i + row[i:i + N].index(winner)] if votes else 0.0)
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
def beam_search(policy, q_pi_model, task, enc, problems, *, width, alpha, K=None, q_mu_model=None, C=3, seed=0,
                max_tokens_in_flight=1 << 18):
    """Step-level beam search with the effective reward Q^pi + alpha A^mu (section 4.1), all problems in one batch.

    The prover mu is best-of-K of pi in closed form (Eq. 30), or has a verifier of its own, q_mu_model. alpha = 0 is the
    beam by Q^pi. Each step samples C next steps for every prefix of the beam (width * C at the first level), drops
    duplicates, scores, and keeps the best `width` of each problem. A finished trace stays with its score frozen. The
    answer is the finished trace with the highest Q^pi.
    """
    if width < 1 or C < 1 or alpha < 0:
        raise ValueError(f"beam search needs width >= 1, C >= 1 and alpha >= 0, not {width}, {C}, {alpha}")
    P, pad, delimiters = len(problems), pad_token(enc), [newline(enc), enc.eot_token]
    tokens, lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    spent = torch.zeros(P, dtype=torch.long)

    def values(tokens, lengths):
        """Q^pi and Q^mu (rows,) at the last token of each row."""
        q_pi = score(q_pi_model, tokens, lengths[:, None] - 1)[:, 0]
        if q_mu_model is not None:
            return q_pi, score(q_mu_model, tokens, lengths[:, None] - 1)[:, 0]
        return q_pi, q_pi if K is None else q_best_of_k(q_pi, K)

    owner = torch.arange(P)                                                     # the problem of each row
    q_pi, q_mu = values(tokens, lengths)                                        # V(x) of both
    effective, done = torch.full((P,), -1.0), torch.zeros(P, dtype=torch.bool)
    for level in range(task.max_steps):
        live = (~done).nonzero()[:, 0]
        if len(live) == 0:
            break
        n = C * width if level == 0 else C
        new = sample(policy, tokens[live], lengths[live], n, max_new_tokens=task.max_step_tokens, stop=delimiters,
                     seed=seed + level, pad=pad, max_tokens_in_flight=max_tokens_in_flight)
        parent = live.repeat_interleave(n)
        spent.index_add_(0, owner[parent], new.lengths)
        parent, new_tokens, new_lengths, reason = _distinct(parent, new)
        child_tokens, child_lengths = join(tokens[parent], lengths[parent], new_tokens, new_lengths, pad)
        child_pi, child_mu = values(child_tokens, child_lengths)
        child_score = effective_reward(child_pi, child_mu - q_mu[parent], alpha)            # Eq. 5, Eq. 2
        ended = reason == enc.eot_token
        rows = done.nonzero()[:, 0]                                             # finished traces stay in the running
        kept, kept_lengths = tokens[rows], lengths[rows]
        width_t = max(kept.shape[1], child_tokens.shape[1])
        tokens = torch.cat([_pad_to(kept, width_t, pad), _pad_to(child_tokens, width_t, pad)])
        lengths = torch.cat([kept_lengths, child_lengths])
        owner = torch.cat([owner[rows], owner[parent]])
        q_pi, q_mu = torch.cat([q_pi[rows], child_pi]), torch.cat([q_mu[rows], child_mu])
        effective, done = torch.cat([effective[rows], child_score]), torch.cat([done[rows], ended])
        keep = _top(effective, owner, width)
        tokens, lengths, owner, q_pi, q_mu, effective, done = (
            x[keep] for x in (tokens, lengths, owner, q_pi, q_mu, effective, done))

    answers = torch.where(done, q_pi, -1.0)
    pick = _top(answers, owner, 1)
    texts = decode_rows(enc, tokens, lengths)
    prompts = [task.prompt(p) for p in problems]
    responses, reward, solved = [""] * P, torch.zeros(P), torch.zeros(P)
    right = torch.tensor([task.outcome(problems[i], t.removeprefix(prompts[i])) for i, t in zip(owner.tolist(), texts)])
    solved.scatter_reduce_(0, owner, right.float(), "amax")
    for r in pick[done[pick]].tolist():
        i = int(owner[r])
        responses[i], reward[i] = texts[r].removeprefix(prompts[i]), float(right[r])
    return BeamResult(reward, solved, spent, responses)


def _pad_to(tokens, width, pad):
    return torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=pad)


def _distinct(parent, new):
    """The children without duplicates (same parent, same step) and without steps that never ended."""
    salt = torch.randint(-2**62, 2**62, (new.tokens.shape[1] + 1,), generator=torch.Generator().manual_seed(0))
    key = (torch.cat([parent[:, None], new.tokens + 1], 1) * salt).sum(1)       # a 64-bit hash of the row
    order = key.argsort(stable=True)
    first = torch.ones(len(key), dtype=torch.bool)
    first[order[1:]] = key[order].diff() != 0
    rows = (first & (new.reason >= 0)).nonzero()[:, 0]
    return parent[rows], new.tokens[rows], new.lengths[rows], new.reason[rows]


def _top(value, owner, k):
    """Row indices of the k highest values of each owner, in order of owner and then value."""
    order = value.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]
    o = owner[order]
    rank = torch.arange(len(o)) - torch.searchsorted(o, o)                      # place within the owner's run
    return order[rank < k]

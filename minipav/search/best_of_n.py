"""Search over whole samples: best-of-N by a score, votes (weighted by one or not), pass@N, greedy decoding.

All but greedy use the same M = max(N) samples a problem. pass@N and best-of-N are exact expectations over the
subsets of size N, not of the first N samples; votes are means over disjoint groups.
"""
import time
from collections import Counter

import torch

from minipav.advantage import q_best_of_k, seed_rollouts
from minipav.search.score import Result, Step
from minipav.traces import responses
from minipav.utils import progress
from minipav.verifier import exact_q, score


def expected_best(scores, reward, N):
    """Expected reward (P,) of the best-scored of N of the M samples, over all subsets: scores, reward (P, M).

    The sample with r others below it is the best of C(r, N-1) of the C(M, N) subsets; ties share equally.
    """
    P, M = scores.shape
    value, order = scores.sort(1)
    ranked = reward.gather(1, order).double()
    # equal scores are in no order: each of them gets the mean reward of its group
    group = (value.diff(dim=1, prepend=value[:, :1]) > 0).cumsum(1)
    total, size = torch.zeros(2, P, M, dtype=torch.double)
    total.scatter_add_(1, group, ranked), size.scatter_add_(1, group, torch.ones_like(ranked))
    ranked = (total / size.clamp(min=1)).gather(1, group)
    r = torch.arange(M, dtype=torch.double)
    ways = torch.where(r >= N - 1, (log_binomial(r, N - 1) - log_binomial(M, N)).exp(), 0.0)
    return (ranked * ways).sum(1).float()


def log_binomial(n, k):
    n, k = (torch.as_tensor(x, dtype=torch.double) for x in (n, k))
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def pass_at_n(reward, N):
    """Chance (P,) that at least one of N of the M samples is right: reward (P, M)."""
    return expected_best(reward, reward, N)


def majority_vote(answers, reward, N, weight=None):
    """Accuracy (P,) of the answer with the most votes among N samples, averaged over the M // N disjoint
    groups of samples: the mean reward of those that gave it. answers: P lists of M answers, None never wins;
    reward (P, M); weight (P, M) of each sample's vote, none: 1. Ties go to the answer that came first."""
    weight = torch.ones_like(reward) if weight is None else weight
    out = []
    for row, right, weights in zip(answers, reward.tolist(), weight.tolist()):
        hits = []
        for i in range(0, len(row) - N + 1, N):
            group, votes = slice(i, i + N), Counter()
            for a, w in zip(row[group], weights[group]):
                if a is not None:
                    votes[a] += w
            winner = max(votes, key=votes.get, default=None)
            behind = [r for a, r in zip(row[group], right[group]) if a is not None and a == winner]
            hits.append(sum(behind) / max(1, len(behind)))
        out.append(sum(hits) / len(hits))
    return torch.tensor(out)


# ---- methods: (Search, problems, budgets, seed) -> a Result for each budget

def draw(s, problems, M, seed):
    """(traces, seconds) of M samples a problem, drawn once for all methods."""
    def make():
        start = time.time()
        with progress("samples", len(problems) * M) as bar:
            t = seed_rollouts(s.policy, s.env, problems, M, seed, progress=bar.to)
        return t, time.time() - start
    return s.remember(("samples", M, seed), make)


def over_samples(s, problems, ns, seed, right, read=0, reading=0.0):
    """Results at each budget N of `right`(traces, reward (P, M), N) -> (P,). read (P, M): verifier tokens."""
    P, M = len(problems), max(ns)
    t, seconds = draw(s, problems, M, seed)
    reward, spent = t.reward.view(P, M), t.cost.float().view(P, M).mean(1)
    read = torch.as_tensor(read).float().expand(P, M).mean(1)
    solved = {n: s.remember(("pass", M, seed, n), lambda n=n: pass_at_n(reward, n)) for n in ns}
    return [Result(right(t, reward, n), solved[n], n * spent, n * read, seconds=(seconds + reading) * n / M)
            for n in ns]


def at_n(s, problems, ns, seed):
    """pass@N: the oracle that picks a right sample if there is one. At N = 1: one sample."""
    return over_samples(s, problems, ns, seed, lambda t, reward, n: pass_at_n(reward, n))


def voting(s, P, M, seed, weight=None):
    """-> `right` of over_samples: the vote of P problems' M samples."""
    def right(t, reward, n):
        answers = s.remember(("answers", M, seed), lambda: [s.env.task.answer(x) for x in responses(
            s.env.enc, t.tokens, t.lengths, t.ends[:, 0] + 1)])
        return majority_vote([answers[i * M:(i + 1) * M] for i in range(P)], reward, n, weight)
    return right


def majority(s, problems, ns, seed):
    return over_samples(s, problems, ns, seed, voting(s, len(problems), max(ns), seed))


def values(s, model, t, problems):
    """Q at every step end of these samples, by a verifier or exactly."""
    def read():
        with progress("their values", len(t)) as bar:
            return score(model, t.tokens, t.ends, bar.to, s.env.sampling.get("partial_folder"))
    return exact_q(s.env, problems, t) if model is None else s.remember(("q", id(model), id(t)), read)


def scored(s, problems, M, seed):
    """The score of each of the M samples' last step (its Step has no logprob: zeros), -inf if it never ended.
    -> (P, M), verifier tokens read (P, M), seconds"""
    P = len(problems)
    t, _ = draw(s, problems, M, seed)
    start = time.time()
    q = values(s, s.verifier, t, problems)
    q_mu = q_best_of_k(q, s.K) if s.mu_verifier is None else values(s, s.mu_verifier, t, problems)
    row, last = torch.arange(len(t)), t.last
    before = (last - 1).clamp(min=0)  # a sample without a step: V(x) itself
    path = torch.where(torch.arange(q.shape[1]) < last[:, None], q, q[row, before][:, None])
    value = s.score.of(Step(q[row, last], q_mu[row, last], q[row, before], q_mu[row, before], path, last,
                            torch.zeros(len(t)), s.alpha))
    ended = t.tokens[row, t.lengths - 1] == s.env.enc.eot_token                 # what never ended ranks last
    return (torch.where(ended, value, -torch.inf).view(P, M), (t.lengths * s.readers).view(P, M),
            time.time() - start)


def best_of_n(s, problems, ns, seed):
    """The sample with the highest score."""
    value, *cost = scored(s, problems, max(ns), seed)
    return over_samples(s, problems, ns, seed, lambda t, reward, n: expected_best(value, reward, n), *cost)


def weighted_vote(s, problems, ns, seed):
    """The answer with the highest sum of scores; one below 0 counts 0."""
    value, *cost = scored(s, problems, max(ns), seed)
    right = voting(s, len(problems), max(ns), seed, value.clamp(min=0))
    return over_samples(s, problems, ns, seed, right, *cost)


def greedy(s, problems, ns, seed):
    t = seed_rollouts(s.policy, s.env, problems, 1, seed, temperature=0)
    return [Result(t.reward, t.reward, t.cost.float(), torch.zeros(len(t)),
                   responses(s.env.enc, t.tokens, t.lengths, t.ends[:, 0] + 1))] * len(ns)

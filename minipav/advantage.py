"""The idea: process advantages, first as equations, then estimated from Monte-Carlo rollouts.

The upper half is pure functions over tensors, one an equation, in the paper's symbols. The lower half
samples: seed rollouts, completions of prefixes, and the values that their outcomes estimate (section 4.2).
"""
from dataclasses import replace

import torch

from minipav.sampler import sample
from minipav.tokenizer import encode_rows, join, pad_token
from minipav.traces import label_with_outcome


def advantage(q):
    """Eq. 2: A(s_h, a_h) = Q(s_h, a_h) - Q(s_{h-1}, a_{h-1}), q (..., S + 1), the first V(x). -> (..., S)"""
    return q[..., 1:] - q[..., :-1]


def q_best_of_k(q, K):
    """Eq. 30: the value of the prover that samples K continuations of pi and keeps a right one if any is."""
    return 1 - (1 - q) ** K


def effective_reward(q_pi, adv_mu, alpha):
    """Eq. 5: Q^pi(s_h, a_h) + alpha A^mu(s_h, a_h), for each step by itself: never summed along a trace."""
    return q_pi + alpha * adv_mu


def standard_error(q, n):
    """Of a Monte-Carlo mean q of n outcomes in {0, 1}; with half a success and half a failure added, so that
    0 of n and n of n do not claim to be exact."""
    p = (q * n + 0.5) / (n + 1)
    return (p * (1 - p) / n).sqrt()


def first_pit(q, reward, threshold):
    """The first pit of each trace (App. D): the first step with Q = 0 after a step end with Q > threshold, in
    a trace that ends wrong. q (N, S + 1) with NaN where there is no estimate, reward (N,). -> index (N,); -1:
    none."""
    high = (q > threshold).cumsum(1) > 0
    pit = high & (q == 0) & (reward[:, None] == 0)
    return torch.where(pit.any(1), pit.int().argmax(1), -1)


# ---- Monte-Carlo estimates

def _sample(policy, env, rows, lengths, n, seed, **sampling):
    return sample(policy, rows, lengths, n, max_new_tokens=env.task.max_new_tokens, stop=[env.enc.eot_token],
                  seed=seed, pad=pad_token(env.enc), **env.sampling | sampling)


def seed_rollouts(policy, env, problems, n_cov, seed, **sampling):
    """n_cov seed rollouts a problem, each labelled with its own outcome. -> Traces (problem-major)"""
    prompts, prompt_lengths = encode_rows(env.enc, [env.task.prompt(p) for p in problems])
    s = _sample(policy, env, prompts, prompt_lengths, n_cov, seed, **sampling)
    which = torch.arange(len(problems)).repeat_interleave(n_cov)
    prompt_lengths = prompt_lengths[which]
    tokens, lengths = join(prompts[which], prompt_lengths, s.tokens, s.lengths, pad_token(env.enc))
    return label_with_outcome(env, problems, which, tokens, lengths, prompt_lengths)


def rollout_from(mu, env, problems, traces, rows, h, n_mc, seed, **sampling):
    """n_mc completions by mu of each prefix of traces[rows[i]] up to its step end h[i] (0: the bare prompt).
    A response is cut at max_new_tokens. -> Traces (prefix-major), labelled with their outcomes from h[i] on,
    the mean of which estimates Q^mu (Eq. 1)."""
    t = traces[rows]
    if len(rows) == 0:
        return t
    prefix_lengths, prompt_lengths = t.ends.gather(1, h[:, None])[:, 0] + 1, t.ends[:, 0] + 1
    s = _sample(mu, env, traces.tokens, prefix_lengths, n_mc, seed, which=rows, **sampling)
    of = torch.arange(len(rows)).repeat_interleave(n_mc)                        # each completion's prefix
    prefix, room = t.tokens[:, :int(prefix_lengths.max())], prompt_lengths + env.task.max_new_tokens
    new = torch.minimum(s.lengths, (room - prefix_lengths).clamp(min=0)[of])
    tokens, lengths = join(prefix[of], prefix_lengths[of], s.tokens, new, pad_token(env.enc))
    done = label_with_outcome(env, problems, t.problem[of], tokens, lengths, prompt_lengths[of], h[of])
    return replace(done, cost=s.lengths)


def monte_carlo(mu, env, problems, traces, wanted, n_mc, seed):
    """Traces whose labels at the step ends marked in `wanted` (N, S + 1) are the means of n_mc completions by
    mu. The end of a trace is known: its outcome, and no completion is spent on it."""
    row, last = torch.arange(len(traces)), traces.last
    q, n, cost = torch.zeros_like(traces.q), torch.zeros_like(traces.n), torch.zeros_like(traces.cost)
    q[row, last], n[row, last] = traces.reward, 1
    ask = wanted & (traces.ends >= 0)
    ask[row, last] = False
    rows, h = ask.nonzero(as_tuple=True)
    done = rollout_from(mu, env, problems, traces, rows, h, n_mc, seed)
    q[rows, h], n[rows, h] = done.reward.view(-1, n_mc).mean(1), n_mc
    cost.index_add_(0, rows, done.cost.view(-1, n_mc).sum(1))
    return replace(traces, q=q, n=n, labelled=n > 0, cost=cost)

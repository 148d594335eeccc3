"""What a step is worth: exact gradients on a tabular policy, the weight of each token, where Q^mu is from."""
import argparse

import numpy as np
import pytest
import torch
from conftest import WalkPolicy, q_best_of_k_error

from minipav import rewards
from minipav.advantage import q_best_of_k, seed_rollouts
from minipav.rewards import (
    REWARDS,
    VALUES,
    by_rollouts,
    check_trial,
    close,
    step_baseline,
    step_of_token,
    to_tokens,
    with_terminal_values,
)
from minipav.tasks.calculator import dp, parse, transitions
from minipav.utils import Fail

H = 3                               # of the tabular trees: all traces are enumerated


def step_returns(name, *args):
    return rewards.step_returns(REWARDS[name], *args)


@pytest.fixture
def tree():
    """A softmax policy on a binary tree: (logits of each state, its 8 traces' actions, states before each
    step, Rex, Q^mu)."""
    g = torch.Generator().manual_seed(0)
    actions = torch.tensor([[(i >> (H - 1 - h)) & 1 for h in range(H)] for i in range(2 ** H)])
    states = torch.stack([2 ** h - 1 + (torch.arange(2 ** H) >> (H - h)) for h in range(H)], 1)
    reward = torch.tensor([0., 1, 0, 0, 1, 1, 0, 1])
    values = torch.rand(2 ** (H + 1), generator=g)              # of the prover, any numbers
    before = [values[2 ** h - 1 + (torch.arange(2 ** H) >> (H - h))] for h in range(H)]
    q_mu = torch.stack([*before, reward], 1)
    theta = torch.randn(2 ** H - 1, 2, generator=g, dtype=torch.double)
    return theta, actions, states, reward.double(), q_mu.double()


def gradient(tree, weight):
    """Exact E over traces of sum_h weight_h grad log pi(a_h | s_h)."""
    theta, actions, states, *_ = tree
    theta = theta.clone().requires_grad_()
    logp = theta.log_softmax(-1)[states, actions]                               # (traces, H)
    (logp.sum(1).exp().detach()[:, None] * weight * logp).sum().backward()
    return theta.grad


def q_of_pi(tree):
    """Exact Q^pi (traces, H + 1) of the tabular policy."""
    theta, actions, states, reward, _ = tree
    p = theta.log_softmax(-1)[states, actions].exp()
    after, out = reward, [reward]
    for h in reversed(range(H)):
        each = (p[:, h] * after).view(-1, 2, 2 ** (H - h - 1))[:, :, 0]
        after = each.sum(1).repeat_interleave(2 ** (H - h))
        out.insert(0, after)
    return torch.stack(out, 1)


def test_summed_advantages_are_outcome_reward(tree):
    """Trap 1, and mu = pi: both gradients are 1 + alpha times that of outcome reward; Eq. 5 has another."""
    *_, reward, q_mu = tree
    outcome = gradient(tree, step_returns("outcome", reward, q_mu, 0.7))
    q_pi = q_of_pi(tree)
    for name, q, times in (("pav_sum", q_mu, 1.7), ("pav_pi", q_pi, 1.7), ("vine", q_pi, 1)):
        g = gradient(tree, step_returns(name, reward, q, 0.7))
        assert torch.allclose(g, times * outcome, atol=1e-12), name
        assert REWARDS[name].scaled == (times != 1) and REWARDS[name].baseline == (name != "vine")
    for name in ("pav", "pav_rollout", "pav_exact"):
        assert torch.equal(step_returns(name, reward, q_mu, 0.0), step_returns("outcome", reward, q_mu, 0.7))
        effective = gradient(tree, step_returns(name, reward, q_mu, 0.7))
        assert not torch.allclose(effective, 1.7 * outcome, atol=1e-3) and not REWARDS[name].scaled


def test_a_state_baseline_has_no_gradient(tree):
    """E over actions of b(s) grad log pi is 0; and the advantage and the Q bonus differ by such a baseline
    only (section 2)."""
    _, _, states, reward, q_mu = tree
    b = torch.rand(2 ** H - 1, generator=torch.Generator().manual_seed(1), dtype=torch.double)[states]
    assert gradient(tree, b).abs().max() < 1e-15
    a, q = (gradient(tree, step_returns(rule, reward, q_mu, 2.0)) for rule in ("pav", "q_bonus"))
    assert torch.allclose(a, q, atol=1e-12)


def test_the_group_baseline_leaves_its_own_trace_out():
    ends = torch.tensor([[1, 3, 5], [1, 3, -1], [1, 2, 4], [1, 3, 6]])
    returns = torch.tensor([[1., 2], [3, 0], [5, 6], [7, 8]])
    b = step_baseline("group", returns, ends, 2, 0.0)
    assert b.tolist() == [[3, 0], [1, 2], [7, 8], [5, 6]]
    assert (step_baseline("mean", returns, ends, 2, 0.5) == 0.5).all()
    assert not step_baseline("none", returns, ends, 2, 0.5).any()


def test_each_token_gets_its_own_step(batch):
    t = close(batch)
    assert t.ends.tolist() == [[1, 3, 6], [1, 4, -1], [1, 3, 7]]
    step = step_of_token(t.tokens, t.ends)
    assert step.tolist() == [[-1, -1, 0, 0, 1, 1, 1, -1], [-1, -1, 0, 0, 0, -1, -1, -1],
                             [-1, -1, 0, 0, 1, 1, 1, 1]]
    assert not t.labelled.any() and not t.exact.any()
    q = with_terminal_values(torch.full((3, 3), 0.5), t, H=9)
    assert q.nan_to_num(-1).tolist() == [[.5, .5, 1], [.5, 0, -1], [.5, .5, 0]]
    after_1 = with_terminal_values(torch.full((3, 3), 0.5), t, H=1)
    assert after_1[:, 1].tolist() == [0, 0, 0]                  # no step is left, and it goes on
    w = to_tokens(step_returns("pav", t.reward, q, 2.0), step)
    assert w.tolist() == [[0, 0, 1, 1, 2, 2, 2, 0], [0, 0, -1, -1, -1, 0, 0, 0], [0, 0, 0, 0, -1, -1, -1, -1]]


def test_q_by_rollouts_is_unbiased_and_exact_q_is_dynamic_programming(calculator):
    """Rollouts of the uniform walk against its exact values, for best-of-1 and best-of-3."""
    env, problems = calculator[0], calculator[1][:3]
    walk = WalkPolicy(env, problems)
    traces = seed_rollouts(walk, env, problems, 1, 0)
    loop = argparse.Namespace(run=env, mu=argparse.Namespace(K=1))
    exact, _ = VALUES["exact"](loop, problems, traces, 0)
    _, V = dp(transitions(problems), np.array([p.target for p in problems]), env.task.H)
    for i, p in enumerate(problems):
        response = env.enc.decode(traces.tokens[i, traces.ends[i, 0] + 1:traces.lengths[i]].tolist())
        values = [p.start, *(parse(ln)[2] for ln in env.task.steps(response))]
        assert exact[i, :len(values)].tolist() == pytest.approx([V[i, h, v] for h, v in enumerate(values)])
    ask = (traces.ends >= 0) & (torch.arange(traces.ends.shape[1]) < traces.last[:, None])
    for K in (1, 3):
        q, tokens = by_rollouts(walk, K, env, problems, traces, 240, 1)
        loop.mu.K, want = K, q_best_of_k(exact, K)
        z = ((q - want) / q_best_of_k_error(exact, 240, K))[ask]
        assert z.abs().max() < 5 and z.pow(2).mean() < 2        # in standard errors
        assert 240 * ask.sum() <= tokens <= 240 * ask.sum() * env.task.max_new_tokens
        assert torch.equal(VALUES["exact"](loop, problems, traces, 0)[0], want)
    assert ((want - exact)[ask] > 5 * q_best_of_k_error(exact, 240, K)[ask]).any()      # and K is seen
    loop.mu_policy = loop.policy = walk
    loop.a = argparse.Namespace(n_mc=8)
    for name, K in (("rollouts", 3), ("current", 1)):
        got, spent = VALUES[name](loop, problems, traces, 1)
        want, tokens = by_rollouts(walk, K, env, problems, traces, 8, 1)
        assert torch.equal(got, want) and spent == tokens and 0 < got.mean() < 1


def test_provers_that_a_reward_cannot_have_are_refused():
    """Before the first training, not after it."""
    def check(reward, mu, K, **flags):
        a = argparse.Namespace(**{"policy": "base", "prover": "it", "refresh": 0, "n_mc": 4,
                                     "group": 4, "baseline": "value", **flags})
        check_trial(reward, argparse.Namespace(policy=mu, K=K), a)
    for reward, mu, K, flags, word in (("pav_exact", "strong", 1, {}, "exact values"),
                                       ("pav", "weak", 1, {"refresh": 2}, "--refresh"),
                                       ("pav_rollout", "base", 16, {}, "--n_mc 4")):
        with pytest.raises(Fail, match=word):
            check(reward, mu, K, **flags)
    for reward, mu, K in (("pav", "weak", 1), ("pav_exact", "base", 16), ("pav_rollout", "strong", 4),
                          ("vine", "base", 16)):
        check(reward, mu, K)
    check("pav", "weak", 1, refresh=2, policy="weak")

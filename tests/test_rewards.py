"""What a step is worth: exact gradients on a tabular policy, the weight of each token, where Q^mu comes from."""
import argparse

import pytest
import torch
from conftest import WalkPolicy

from minipav.advantage import q_best_of_k, q_best_of_k_error, seed_rollouts
from minipav.rewards import (
    close,
    known_values,
    q_by_rollouts,
    q_exact,
    step_baseline,
    step_of_token,
    step_returns,
    to_tokens,
)

H = 3                                                                           # of the tabular trees: all traces are enumerated


@pytest.fixture
def tree():
    """A softmax policy on a binary tree: (logits of each state, its 8 traces' actions, states before each step, Rex, Q^mu)."""
    g = torch.Generator().manual_seed(0)
    actions = torch.tensor([[(i >> (H - 1 - h)) & 1 for h in range(H)] for i in range(2 ** H)])
    states = torch.stack([2 ** h - 1 + (torch.arange(2 ** H) >> (H - h)) for h in range(H)], 1)
    reward = torch.tensor([0., 1, 0, 0, 1, 1, 0, 1])
    values = torch.rand(2 ** (H + 1), generator=g)                              # of the prover, any numbers
    q_mu = torch.stack([values[2 ** h - 1 + (torch.arange(2 ** H) >> (H - h))] for h in range(H)] + [reward], 1)
    return torch.randn(2 ** H - 1, 2, generator=g, dtype=torch.double), actions, states, reward.double(), q_mu.double()


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
        after = (p[:, h] * after).view(-1, 2, 2 ** (H - h - 1))[:, :, 0].sum(1).repeat_interleave(2 ** (H - h))
        out.insert(0, after)
    return torch.stack(out, 1)


def test_summed_advantages_are_outcome_reward(tree):
    """Trap 1, and mu = pi: both gradients are 1 + alpha times that of outcome reward; that of Eq. 5 is another one."""
    *_, reward, q_mu = tree
    outcome = gradient(tree, step_returns("outcome", reward, q_mu, 0.7))
    assert torch.allclose(gradient(tree, step_returns("sum", reward, q_mu, 0.7)), 1.7 * outcome, atol=1e-12)
    assert torch.allclose(gradient(tree, step_returns("effective", reward, q_of_pi(tree), 0.7)), 1.7 * outcome, atol=1e-12)
    assert torch.allclose(gradient(tree, step_returns("alone", reward, q_of_pi(tree), 0.7)), outcome, atol=1e-12)
    effective = gradient(tree, step_returns("effective", reward, q_mu, 0.7))
    assert not torch.allclose(effective, 1.7 * outcome, atol=1e-3)
    assert torch.equal(step_returns("effective", reward, q_mu, 0.0), step_returns("outcome", reward, q_mu, 0.7))


def test_a_state_baseline_has_no_gradient(tree):
    """E over actions of b(s) grad log pi is 0; and the advantage and the Q bonus differ by such a baseline only (section 2)."""
    _, _, states, reward, q_mu = tree
    b = torch.rand(2 ** H - 1, generator=torch.Generator().manual_seed(1), dtype=torch.double)[states]
    assert gradient(tree, b).abs().max() < 1e-15
    a, q = (gradient(tree, step_returns(rule, reward, q_mu, 2.0)) for rule in ("effective", "bonus"))
    assert torch.allclose(a, q, atol=1e-12)


def test_the_group_baseline_leaves_its_own_trace_out():
    ends = torch.tensor([[1, 3, 5], [1, 3, -1], [1, 2, 4], [1, 3, 6]])
    returns = torch.tensor([[1., 2], [3, 0], [5, 6], [7, 8]])
    b = step_baseline("group", returns, ends, 2, 0.0)
    assert b.tolist() == [[3, 0], [1, 2], [7, 8], [5, 6]]
    assert (step_baseline("mean", returns, ends, 2, 0.5) == 0.5).all() and not step_baseline("none", returns, ends, 2, 0.5).any()


def test_each_token_gets_its_own_step(batch):
    t = close(batch)
    assert t.ends.tolist() == [[1, 3, 6], [1, 4, -1], [1, 3, 7]]
    step = step_of_token(t.tokens, t.ends)
    assert step.tolist() == [[-1, -1, 0, 0, 1, 1, 1, -1], [-1, -1, 0, 0, 0, -1, -1, -1], [-1, -1, 0, 0, 1, 1, 1, 1]]
    q = known_values(torch.full((3, 3), 0.5), t, H=9)
    assert q.nan_to_num(-1).tolist() == [[.5, .5, 1], [.5, 0, -1], [.5, .5, 0]]
    assert known_values(torch.full((3, 3), 0.5), t, H=1)[:, 1].tolist() == [0, 0, 0]           # no step is left, and it goes on
    w = to_tokens(step_returns("effective", t.reward, q, 2.0), step)
    assert w.tolist() == [[0, 0, 1, 1, 2, 2, 2, 0], [0, 0, -1, -1, -1, 0, 0, 0], [0, 0, 0, 0, -1, -1, -1, -1]]


def test_q_by_rollouts_is_unbiased_and_q_exact_is_dynamic_programming(calculator):
    """Rollouts of the uniform walk against its exact values, for best-of-1 and best-of-3."""
    task, enc, problems = calculator
    run = argparse.Namespace(task=task, enc=enc, how={"max_tokens_in_flight": 1 << 18})
    walk = WalkPolicy(task, enc, problems)
    traces = seed_rollouts(walk, task, enc, problems[:3], 1, 0)
    exact = q_exact(1, run, problems[:3], traces)
    ask = (traces.ends >= 0) & (torch.arange(traces.ends.shape[1]) < (traces.ends >= 0).sum(1, keepdim=True) - 1)
    for K in (1, 3):
        q, tokens = q_by_rollouts(walk, K, run, problems[:3], traces, 240, 1)
        want = q_best_of_k(exact, K)
        z = ((q - want) / q_best_of_k_error(exact, 240, K))[ask]
        assert z.abs().max() < 5 and z.pow(2).mean() < 2                                       # in standard errors
        assert 240 * ask.sum() <= tokens <= 240 * ask.sum() * task.max_new_tokens              # every completion has one
        assert torch.equal(q_exact(K, run, problems[:3], traces), want)
    assert ((want - exact)[ask] > 5 * q_best_of_k_error(exact, 240, K)[ask]).any()             # and K is seen

"""The RL loop: exact gradients on a tabular policy, what has a part in the loss, resume."""
import argparse

import pytest
import torch
from conftest import SMALL, WalkPolicy, tiny
from safetensors.torch import load_file

import rl as cli
from minipav.advantage import Traces, complete, q_best_of_k, q_best_of_k_error, seed_rollouts
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
from minipav.rl import RL, policy_loss, value_loss
from minipav.run import Run
from minipav.utils import Fail

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


@pytest.fixture
def batch():
    """Three traces: two steps ended by 2, one step ended by 3 (end of text), one cut off in its second step. 0 pads."""
    tokens = torch.tensor([[5, 6, 7, 2, 8, 9, 3, 0], [5, 6, 7, 8, 3, 0, 0, 0], [5, 6, 7, 2, 8, 9, 9, 9]])
    ends = torch.tensor([[1, 3, 6], [1, 4, -1], [1, 3, -1]])
    return Traces(torch.arange(3), tokens, torch.tensor([7, 5, 8]), ends, torch.zeros(3, 3), torch.zeros(3, 3).long(),
                  torch.tensor([1., 0, 0]))


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


def test_only_the_response_and_its_end_token_are_in_the_loss(batch):
    """Loss, KL and entropy against a sum over those tokens; the gradient of the logits is 0 everywhere else."""
    t, model, ref = close(batch), tiny(), tiny(seed=1)
    step, weight, seen = step_of_token(t.tokens, t.ends), torch.rand(3, 8), []
    head = model.head.forward
    model.head.forward = lambda hidden: seen.append(head(hidden)) or seen[-1]
    loss, kl, entropy, n = policy_loss(model, ref, t.tokens, step, weight, 0.3)
    seen[0].retain_grad()
    loss.backward()
    inside = step[:, 1:] >= 0
    assert n == inside.sum() == len(seen[0]) and (seen[0].grad.abs().sum(1) > 1e-4).all()  # END too
    model.head.forward = head
    with torch.no_grad():
        a, b = (m(t.tokens).log_softmax(-1)[:, :-1] for m in (model, ref))
    chosen = a.gather(2, t.tokens[:, 1:, None])[..., 0]
    want_kl = (a.exp() * (a - b)).sum(-1)[inside].sum()
    assert torch.isclose(kl, want_kl, rtol=1e-4) and torch.isclose(entropy, -(a.exp() * a).sum(-1)[inside].sum(), rtol=1e-4)
    assert torch.isclose(loss, -(weight[:, 1:] * chosen)[inside].sum() + 0.3 * want_kl, rtol=1e-4)
    t.tokens[t.tokens == 0] = 13                                                               # other padding
    assert torch.equal(policy_loss(model, ref, t.tokens, step, weight, 0.3)[0], loss)


def test_the_value_network_does_not_see_the_token_it_is_a_baseline_for(batch):
    t = close(batch)
    step, value, target = step_of_token(t.tokens, t.ends), tiny(head="scalar"), torch.ones(3, 8)
    _, v = value_loss(value, t.tokens, step, target)
    other = t.tokens.clone()
    other[:, 4] = 11
    _, w = value_loss(value, other, step, target)
    assert torch.allclose(v[:, :5], w[:, :5], atol=1e-6) and not torch.allclose(v[:, 5:], w[:, 5:], atol=1e-3)


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


def flags(**kw):
    a = cli.get_args([*SMALL, "--group", "2", "--n_mc", "2", "--prover", "bo2"])
    a.split, a.reward = "test", "pav"
    vars(a).update(kw)
    return a


@pytest.fixture(scope="module")
def smoke(smoke_run):
    return Run.open(smoke_run[0], "cpu")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(run, folder, **kw):
    rl = RL(run, run.model("base"), folder, flags(**kw))
    folder.mkdir(parents=True, exist_ok=True)
    rl.train()
    return rl


@pytest.fixture
def mixed(smoke, monkeypatch):
    """The smoke run with another outcome, a text of even length; by the task's own outcome its policy is never right."""
    monkeypatch.setattr(type(smoke.task), "outcome", lambda self, problem, response: len(response) % 2 == 0)
    return smoke


@pytest.mark.parametrize("reward", list(cli.REWARDS))
def test_every_reward_trains(mixed, tmp_path, reward):
    rl = trained(mixed, tmp_path / reward, reward=reward, iterations=2, baseline="none", kl=0.0)
    assert [r["iteration"] for r in rl.rows] == [0, 2] and torch.isfinite(weights(rl.policy)).all()
    assert not torch.equal(weights(rl.policy), weights(rl.ref)) and 0 < rl.rows[1]["train_reward"] < 1
    assert rl.curve.shape == (2, 5) and (tmp_path / reward / "log.csv").exists()


def test_alpha_0_is_outcome_reward_to_the_last_bit(mixed, tmp_path):
    a, b, c = (trained(mixed, tmp_path / f"{r}{x}", reward=r, alpha=x) for r, x in (("outcome", 0.0), ("pav", 0.0), ("pav", 1.0)))
    assert torch.equal(weights(a.policy), weights(b.policy)) and not torch.equal(weights(a.policy), weights(c.policy))


def test_no_known_believes_the_verifier_to_the_end(smoke, tmp_path, monkeypatch):
    """With a verifier that says 0.5 everywhere, no step has progress but for what is known: the last one, of every trace."""
    from minipav import rl as module
    monkeypatch.setattr(module, "score", lambda model, tokens, ends: torch.full(ends.shape, 0.5))
    seen = []
    monkeypatch.setattr(module, "step_returns", lambda *args: seen.append(step_returns(*args)) or seen[-1])
    for no_known in (False, True):
        trained(smoke, tmp_path / str(no_known), iterations=1, no_known=no_known, prover="bo1", alpha=2.0)
    known, believed = seen
    assert believed.unique().tolist() == [0] and known.sum(1).tolist() == [-1] * 8            # no trace of these is right


@pytest.mark.parametrize("baseline", ["value", "group"])
def test_micro_batches_change_nothing(smoke, tmp_path, monkeypatch, baseline):
    """The gradients before they are clipped, of the policy and of the value network."""
    from minipav import rl as module
    grads = {}
    monkeypatch.setattr(module, "apply_step", lambda model, *_: grads.setdefault(size, []).append(
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for size in (0, 1, 7, 64):
        trained(smoke, tmp_path / str(size), batch=64, iterations=1, micro_batch=size, baseline=baseline)
    for size in (1, 7, 64):
        assert len(grads[size]) == (2 if baseline == "value" else 1)
        for part, whole in zip(grads[size], grads[0]):
            assert whole.norm() > 1e-3 and (part - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("how", [dict(refresh=2), dict(reward="outcome", baseline="mean")])
def test_resumed_equals_uninterrupted(smoke, tmp_path, monkeypatch, how):
    """Killed at every iteration, with a verifier that is trained on and, in the other reward, a running mean."""
    whole = trained(smoke, tmp_path / "whole", **how)
    iterate = RL.iterate
    for at in range(4):
        def killed(self, i, at=at):
            if i == at:
                raise KeyboardInterrupt
            return iterate(self, i)
        monkeypatch.setattr(RL, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(smoke, tmp_path / str(at), **how)
        monkeypatch.setattr(RL, "iterate", iterate)
        again = trained(smoke, tmp_path / str(at), **how)
        assert torch.equal(weights(again.policy), weights(whole.policy)) and torch.equal(again.curve, whole.curve)
        same = [k for k in whole.rows[0] if k not in ("seconds", "tokens_per_s")]
        assert [[r[k] for k in same] for r in again.rows] == [[r[k] for k in same] for r in whole.rows]


def test_refresh_learns_what_the_present_policy_is_worth(smoke, tmp_path, monkeypatch):
    """Its hot samples are only prefixes: their labels are the outcomes of completions that are not hot."""
    from minipav import rl as module
    hot, asked, learned = [], [], []

    def seeds(*args, **how):
        out = seed_rollouts(*args, **how)
        if how.get("temperature") == 2.0:
            hot.append(out)
        return out

    def completions(mu, *args, **how):
        asked.append((mu, how.get("temperature", 1.0), complete(mu, *args, **how)))
        return asked[-1][2]

    def cat(parts, pad):
        learned.append(parts)
        return Traces.cat(parts, pad)
    monkeypatch.setattr(module, "seed_rollouts", seeds)
    monkeypatch.setattr(module, "complete", completions)
    monkeypatch.setattr(module, "Traces", argparse.Namespace(cat=cat))
    rl = trained(smoke, tmp_path / "run", refresh=1, iterations=1)
    assert len(hot) == len(asked) == len(learned) == 1 and asked[0][:2] == (rl.policy, 1.0)
    assert any(part is asked[0][2] for part in learned[0]) and not any(part is hot[0] for part in learned[0])


@pytest.mark.parametrize("what", ["loss", "gradient", "verifier", "refresh"])
def test_a_number_that_is_not_finite_stops_the_run(smoke, tmp_path, monkeypatch, what):
    from minipav import rl as module
    calls = []

    def breaks(*args):
        calls.append(1)
        out = original(*args)
        if len(calls) != 4:
            return out
        if what == "loss":
            return (out[0] * float("nan"), *out[1:])
        if what == "gradient":
            out[0].register_hook(lambda g: g * float("inf"))
            return out
        return out * float("nan")
    name = {"verifier": "score", "refresh": "verifier_loss"}.get(what, "policy_loss")
    how = dict(refresh=int(what == "refresh"))
    original = getattr(module, name)
    monkeypatch.setattr(module, name, breaks)
    with pytest.raises(Fail, match="iteration 3.*bad_batch.*iteration 2") as e:
        trained(smoke, tmp_path / "run", **how)
    assert "\n" not in str(e.value)
    bad = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert bad["tokens"].shape[0] == 8 and bad["q_mu"].shape == bad["ends"].shape
    monkeypatch.setattr(module, name, original)
    assert trained(smoke, tmp_path / "run", **how).state["iteration"] == 4                   # the last checkpoint is good

"""The RL loop: what has a part in the loss, micro-batches, resume, what stops it."""
import argparse

import pytest
import torch
from conftest import SMALL, tiny
from safetensors.torch import load_file

import rl as cli
from minipav import rl as loop
from minipav.advantage import Traces, complete, seed_rollouts
from minipav.rewards import close, step_of_token, step_returns
from minipav.rl import RL, policy_loss, value_loss
from minipav.run import Run
from minipav.utils import Fail


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
    monkeypatch.setattr(loop, "score", lambda model, tokens, ends: torch.full(ends.shape, 0.5))
    seen = []
    monkeypatch.setattr(loop, "step_returns", lambda *args: seen.append(step_returns(*args)) or seen[-1])
    for no_known in (False, True):
        trained(smoke, tmp_path / str(no_known), iterations=1, no_known=no_known, prover="bo1", alpha=2.0)
    known, believed = seen
    assert believed.unique().tolist() == [0] and known.sum(1).tolist() == [-1] * 8            # no trace of these is right


@pytest.mark.parametrize("baseline", ["value", "group"])
def test_micro_batches_change_nothing(smoke, tmp_path, monkeypatch, baseline):
    """The gradients before they are clipped, of the policy and of the value network."""
    grads = {}
    monkeypatch.setattr(loop, "apply_step", lambda model, *_: grads.setdefault(size, []).append(
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
    monkeypatch.setattr(loop, "seed_rollouts", seeds)
    monkeypatch.setattr(loop, "complete", completions)
    monkeypatch.setattr(loop, "Traces", argparse.Namespace(cat=cat))
    rl = trained(smoke, tmp_path / "run", refresh=1, iterations=1)
    assert len(hot) == len(asked) == len(learned) == 1 and asked[0][:2] == (rl.policy, 1.0)
    assert any(part is asked[0][2] for part in learned[0]) and not any(part is hot[0] for part in learned[0])


@pytest.mark.parametrize("what", ["loss", "gradient", "verifier", "refresh"])
def test_a_number_that_is_not_finite_stops_the_run(smoke, tmp_path, monkeypatch, what):
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
    original = getattr(loop, name)
    monkeypatch.setattr(loop, name, breaks)
    with pytest.raises(Fail, match="iteration 3.*bad_batch.*iteration 2") as e:
        trained(smoke, tmp_path / "run", **how)
    assert "\n" not in str(e.value)
    bad = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert bad["tokens"].shape[0] == 8 and bad["q_mu"].shape == bad["ends"].shape
    monkeypatch.setattr(loop, name, original)
    assert trained(smoke, tmp_path / "run", **how).state["iteration"] == 4                   # the last checkpoint is good

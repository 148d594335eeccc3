"""The RL loop: what has a part in the loss, micro-batches, resume, what stops it."""
import argparse

import pytest
import torch
from conftest import even, tiny
from safetensors.torch import load_file

import rl
from minipav import advantage, dpo, reinforce, rewards, selftrain
from minipav.advantage import rollout_from, seed_rollouts
from minipav.reinforce import COLUMNS, Reinforce, policy_loss, value_loss
from minipav.rewards import REWARDS, close, step_of_token
from minipav.run import Run
from minipav.sampler import WHOLE
from minipav.traces import Traces
from minipav.utils import Fail, apply_step, schedule
from minipav.verifier import verifier_loss

TRIAL = dict(iterations=4, batch=8, group=2, eval_every=2, problems=5, eval_n=2, n=4, n_mc=2, prover="bo2",
             lr=1e-3)


# ---- losses

def test_only_the_response_and_its_end_token_are_in_the_loss(batch):
    """Loss, KL and entropy against a sum over those tokens; the gradient of other logits is 0."""
    t, model, ref = close(batch), tiny(), tiny(seed=1)
    step, weight, seen = step_of_token(t.tokens, t.ends), torch.rand(3, 8), []
    head = model.head.forward
    model.head.forward = lambda hidden: seen.append(head(hidden)) or seen[-1]
    loss, kl, entropy, n = policy_loss(model, ref, t.tokens, step, weight, 0.3)
    seen[0].retain_grad()
    loss.backward()
    inside = step[:, 1:] >= 0
    assert n == inside.sum() == len(seen[0]) and (seen[0].grad.abs().sum(1) > 1e-4).all()       # END too
    model.head.forward = head
    with torch.no_grad():
        a, b = (m(t.tokens).log_softmax(-1)[:, :-1] for m in (model, ref))
    chosen = a.gather(2, t.tokens[:, 1:, None])[..., 0]
    want_kl, want_entropy = ((a.exp() * x).sum(-1)[inside].sum() for x in (a - b, -a))
    assert torch.isclose(kl, want_kl, rtol=1e-4) and torch.isclose(entropy, want_entropy, rtol=1e-4)
    assert torch.isclose(loss, -(weight[:, 1:] * chosen)[inside].sum() + 0.3 * want_kl, rtol=1e-4)
    t.tokens[t.tokens == 0] = 13                                # other padding
    assert torch.equal(policy_loss(model, ref, t.tokens, step, weight, 0.3)[0], loss)


def test_the_value_network_does_not_see_the_token_it_is_a_baseline_for(batch):
    t = close(batch)
    step, value, target = step_of_token(t.tokens, t.ends), tiny(head="scalar"), torch.ones(3, 8)
    _, v = value_loss(value, t.tokens, step, target)
    other = t.tokens.clone()
    other[:, 4] = 11
    _, w = value_loss(value, other, step, target)
    assert torch.allclose(v[:, :5], w[:, :5], atol=1e-6) and not torch.allclose(v[:, 5:], w[:, 5:], atol=1e-3)


def test_the_value_loss_is_the_squared_error_at_the_tokens_of_the_response(batch):
    """Of predictions made one position before each token; a head of shape (..., 1) must not be broadcast."""
    t, value = close(batch), tiny(head="scalar")
    step, target = step_of_token(t.tokens, t.ends), torch.rand(3, 8)
    loss, v = value_loss(value, t.tokens, step, target)
    want = value(t.tokens)[:, :-1, 0]
    inside = step[:, 1:] >= 0
    assert torch.allclose(v[:, 1:][inside], want[inside], atol=1e-5) and not v[:, 1:][~inside].any()
    assert torch.isclose(loss, ((want - target[:, 1:]) ** 2)[inside].sum(), rtol=1e-4)


# ---- the loop

@pytest.fixture(scope="module")
def smoke(smoke_run):
    return Run.open(smoke_run[0], "cpu")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(run, folder, reward="pav", micro_batch=0, **kw):
    trial = rl.Trial(**{**TRIAL, **kw})
    Loop = rl.LOOPS.get(reward, Reinforce)
    loop = Loop(run, run.model("base"), folder, reward, trial, "test", micro_batch)
    loop.train()
    return loop


@pytest.fixture
def mixed(smoke, monkeypatch):
    """The smoke run with an outcome by which its policy is right at times."""
    monkeypatch.setattr(type(smoke.task), "outcome", even)
    return smoke


@pytest.mark.parametrize("reward", list(REWARDS))
def test_every_reward_trains(mixed, tmp_path, reward):
    loop = trained(mixed, tmp_path / reward, reward, iterations=2, baseline="none", kl=0.0)
    assert [r["iteration"] for r in loop.rows] == [0, 2] and torch.isfinite(weights(loop.policy)).all()
    assert not torch.equal(weights(loop.policy), weights(loop.ref)) and 0 < loop.rows[1]["train_reward"] < 1
    assert "value" not in loop.optimizers, "no baseline is learned"
    header, *rows = (tmp_path / reward / "log.csv").read_text().splitlines()
    assert loop.curve.shape == (2, 5) and header == ",".join(COLUMNS) and len(rows) == 2


def test_alpha_0_is_outcome_reward_to_the_last_bit(mixed, tmp_path):
    a, b, c = (trained(mixed, tmp_path / f"{r}{x}", r, alpha=x)
               for r, x in (("outcome", 0.0), ("pav", 0.0), ("pav", 1.0)))
    assert torch.equal(weights(a.policy), weights(b.policy))
    assert not torch.equal(weights(a.policy), weights(c.policy))


def test_trust_verifier_believes_it_to_the_end(smoke, tmp_path, monkeypatch):
    """With a verifier that says 0.5 everywhere, no step has progress but for what is known: the last one, of
    every trace."""
    monkeypatch.setattr(rewards, "score", lambda model, tokens, ends: torch.full(ends.shape, 0.5))
    seen, credit = [], Reinforce.credit
    monkeypatch.setattr(Reinforce, "credit", lambda *args: seen.append(credit(*args)) or seen[-1])
    for trust in (False, True):
        trained(smoke, tmp_path / str(trust), iterations=1, trust_verifier=trust, prover="bo2", alpha=2.0)
    (_, known), (_, believed) = seen                            # Q^Bo2 is .75
    assert believed.unique().tolist() == [0] and known.sum(1).tolist() == [-1.5] * 8    # none is right


def test_grpos_steps_return_the_score_within_their_group(mixed, tmp_path, monkeypatch):
    """The last one too, and nothing is subtracted from it."""
    seen, credit = [], Reinforce.credit

    def credited(loop, i, problems, traces):
        seen.append((traces, credit(loop, i, problems, traces)))
        return seen[-1][1]
    monkeypatch.setattr(Reinforce, "credit", credited)
    loop = trained(mixed, tmp_path / "run", "grpo", iterations=1, group=4, baseline="value")
    [(traces, (_, returns))] = seen
    r = traces.reward.view(-1, 4)
    z = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(returns, z.flatten()[:, None] * (traces.ends[:, 1:] >= 0)) and z.abs().max() > 0.5
    assert "value" not in loop.optimizers


@pytest.mark.parametrize("how", [dict(baseline="value"), dict(baseline="group"), dict(reward="dpo")])
def test_micro_batches_change_nothing(smoke, tmp_path, monkeypatch, how):
    """The gradients before they are clipped, of the policy and of the value network."""
    grads = {}
    for module in (reinforce, dpo):
        monkeypatch.setattr(module, "apply_step", lambda model, *_: grads.setdefault(size, []).append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for size in (0, 1, 7, 64):
        trained(smoke, tmp_path / str(size), batch=64, iterations=1, micro_batch=size, **how)
    for size in (1, 7, 64):
        assert len(grads[size]) == (2 if how == dict(baseline="value") else 1)
        for part, whole in zip(grads[size], grads[0]):
            assert whole.norm() > 1e-3 and (part - whole).norm() < 1e-5 * whole.norm()


def test_the_log_says_means_a_trace_and_a_token(smoke, tmp_path, monkeypatch):
    """Of sums of KL, entropy, tokens and squared error; pass@n is that of any sample."""
    problems = smoke.task.problems("test", 3, 0)
    traces = close(seed_rollouts(smoke.model("base"), smoke, problems, 1, 0))
    returns, sums = torch.tensor([[0., 0], [0, 1], [0, 0]]), torch.tensor([6., 8, 4, 2])
    facts = Reinforce.seen(argparse.Namespace(run=smoke), problems, traces, returns, sums)
    want = dict(kl=2, entropy=2, length=4 / 3, value_error=0.5, zero_return=2 / 3)
    assert {k: facts[k] for k in want} == pytest.approx(want)
    monkeypatch.setattr(reinforce, "outcomes", lambda *args, **kw: torch.tensor([[1., 0]] * 5))
    [row] = trained(smoke, tmp_path / "run", "outcome", iterations=0).rows
    assert (row["accuracy"], row["pass_n"]) == (0.5, 1)


def test_dpo_prefers_the_best_sibling(mixed, tmp_path, monkeypatch):
    asked, step_logp = [], dpo.step_logp
    monkeypatch.setattr(dpo, "step_logp", lambda *args: asked.append(args) or step_logp(*args))
    loop = trained(mixed, tmp_path / "run", "dpo", batch=32, iterations=1)
    gained = []
    for _, *rows in asked[::2]:
        best, worst = (step_logp(loop.policy, *rows) - step_logp(loop.ref, *rows)).chunk(2)
        gained.append((best - worst).detach())
    assert len(torch.cat(gained)) > 3 and torch.cat(gained).mean() > 0


def test_selftraining_learns_the_outcome_of_a_finished_node(mixed, tmp_path, monkeypatch):
    """And of the others what the search backed up."""
    seen = []
    monkeypatch.setattr(selftrain, "verifier_loss", lambda *args: seen.append(args) or verifier_loss(*args))
    trained(mixed, tmp_path / "run", "selftrain", batch=32, iterations=1)
    [(_, tokens, ends, q, *_)] = seen
    ended = tokens.gather(1, ends)[:, 0] == mixed.enc.eot_token
    assert set(q[ended].flatten().tolist()) == {0, 1} and not set(q[~ended].flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize("how", [dict(refresh=2), dict(reward="outcome", baseline="mean"),
                                 dict(reward="selftrain"), dict(reward="dpo")])
def test_resumed_equals_uninterrupted(mixed, tmp_path, monkeypatch, how):
    """Killed at every iteration; with a verifier that is trained on, and with a running mean."""
    whole = trained(mixed, tmp_path / "whole", **how)
    assert how.get("baseline") != "mean" or whole.state["running"] > 0
    Loop = rl.LOOPS.get(how.get("reward"), Reinforce)
    iterate = Loop.iterate
    for at in range(4):
        def killed(self, i, at=at):
            if i == at:
                raise KeyboardInterrupt
            return iterate(self, i)
        monkeypatch.setattr(Loop, "iterate", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(mixed, tmp_path / str(at), **how)
        monkeypatch.setattr(Loop, "iterate", iterate)
        again = trained(mixed, tmp_path / str(at), **how)
        assert torch.equal(weights(again.policy), weights(whole.policy))
        assert torch.equal(again.curve, whole.curve)
        same = [k for k in whole.rows[0] if k not in ("seconds", "tokens_per_s")]
        assert [[r[k] for k in same] for r in again.rows] == [[r[k] for k in same] for r in whole.rows]


@pytest.mark.parametrize("how", [{}, dict(reward="pav_rollout"), dict(refresh=1)])
def test_training_samples_the_whole_distribution_and_evaluation_the_runs(smoke, tmp_path, monkeypatch, how):
    asked, sample = [], advantage.sample

    def spy(*args, **kw):
        asked.append((kw["temperature"], kw["top_p"]))
        return sample(*args, **kw)
    monkeypatch.setattr(advantage, "sample", spy)
    monkeypatch.setitem(smoke.sampling, "temperature", 0.5)
    trained(smoke, tmp_path / "run", iterations=1, **how)
    assert {(1.0, None), (0.5, 0.98)} <= set(asked) <= {(1.0, None), (2.0, None), (0.5, 0.98), (0.0, 0.98)}


def test_refresh_learns_what_the_present_policy_is_worth(smoke, tmp_path, monkeypatch):
    """Its hot samples are only prefixes: their labels are the outcomes of completions that are not hot."""
    hot, asked, learned = [], [], []

    def seeds(*args, **how):
        out = seed_rollouts(*args, **how)
        if how.get("temperature") == 2.0:
            hot.append(out)
        return out

    def completions(mu, *args, **how):
        asked.append((mu, how.get("temperature", 1.0), rollout_from(mu, *args, **how)))
        return asked[-1][2]

    def cat(parts, pad):
        learned.append(parts)
        return Traces.cat(parts, pad)
    monkeypatch.setattr(reinforce, "seed_rollouts", seeds)
    monkeypatch.setattr(reinforce, "rollout_from", completions)
    monkeypatch.setattr(reinforce, "Traces", argparse.Namespace(cat=cat))
    loop = trained(smoke, tmp_path / "run", refresh=1, iterations=1)
    assert len(hot) == len(asked) == len(learned) == 1 and asked[0][:2] == (loop.policy, 1.0)
    _, branches, wrong, old = learned[0]
    assert branches is asked[0][2] and not any(part is hot[0] for part in learned[0])
    assert [len(x) for x in learned[0]] == [8, 8, 4, 16] and not wrong.q.any() and not old.q.isnan().any()


@pytest.mark.parametrize("how", [{}, dict(reward="pav_rollout"), dict(reward="vine"), dict(refresh=1)])
def test_the_log_counts_the_tokens_that_were_sampled(smoke, tmp_path, monkeypatch, how):
    """Of the traces, of the completions that give Q^mu, and of those that the verifier is refreshed with; not
    those of the evaluation."""
    spent, sample, log = [], advantage.sample, Reinforce.log

    def counting(*args, **kw):
        s = sample(*args, **kw)
        spent.append(int(s.lengths.sum()))
        return s

    def uncounted(self, problems):
        before = len(spent)
        row = log(self, problems)
        del spent[before:]
        return row
    monkeypatch.setattr(advantage, "sample", counting)
    monkeypatch.setattr(Reinforce, "log", uncounted)
    loop = trained(smoke, tmp_path / "run", iterations=2, **how)
    assert [r["tokens"] for r in loop.rows] == [0, sum(spent)]
    assert len(spent) == 2 * (1 + ("reward" in how) + 2 * ("refresh" in how))


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
    at, name = {"verifier": (rewards, "score"), "refresh": (reinforce, "verifier_loss")}.get(
        what, (reinforce, "policy_loss"))
    how, original = dict(refresh=int(what == "refresh")), getattr(at, name)
    monkeypatch.setattr(at, name, breaks)
    with pytest.raises(Fail, match="iteration 3.*bad_batch.*iteration 2") as e:
        trained(smoke, tmp_path / "run", **how)
    assert "\n" not in str(e.value)
    bad = load_file(tmp_path / "run" / "bad_batch.safetensors")
    assert bad["tokens"].shape[0] == 8 and bad["q_mu"].shape == bad["ends"].shape
    monkeypatch.setattr(at, name, original)
    assert trained(smoke, tmp_path / "run", **how).state["iteration"] == 4      # the last checkpoint is good


def test_a_checkpoint_of_another_training_is_refused(smoke, tmp_path):
    """Damaged, of other modules, or not there at all: one line, and no half-loaded policy."""
    loop = trained(smoke, tmp_path / "run", "outcome", iterations=2)
    path = tmp_path / "run" / "checkpoint.safetensors"
    with pytest.raises(Fail, match="checkpoint.safetensors") as e:
        trained(smoke, tmp_path / "run", refresh=1)
    assert "\n" not in str(e.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Fail, match="checkpoint.safetensors"):
        loop.train()


@pytest.mark.parametrize("baseline", ["value", "group", "mean", "none"])
def test_a_token_weighs_its_return_minus_the_baseline(mixed, tmp_path, monkeypatch, baseline):
    """With the KL to the initial policy; it trains on training problems and is evaluated on test problems."""
    seen, credit, asked, problems = [], Reinforce.credit, [], type(mixed.task).problems

    def credited(loop, i, problems, traces):
        out = credit(loop, i, problems, traces)
        seen.append({"loop": loop, "ends": traces.ends, "returns": out[1], "running": loop.state["running"]})
        return out

    def valued(*args):
        loss, seen[-1]["b"] = value_loss(*args)
        return loss, seen[-1]["b"]

    def weighted(policy, ref, tokens, step, weight, kl):
        x = seen[-1]
        if baseline != "value":
            b = rewards.step_baseline(baseline, x["returns"], x["ends"], 2, x["running"])
            x["b"] = rewards.to_tokens(b, step)
        assert torch.equal(weight, rewards.to_tokens(x["returns"], step) - x["b"]) and kl == 0.03
        assert policy is x["loop"].policy and ref is x["loop"].ref
        return policy_loss(policy, ref, tokens, step, weight, kl)
    monkeypatch.setattr(Reinforce, "credit", credited)
    monkeypatch.setattr(reinforce, "value_loss", valued)
    monkeypatch.setattr(reinforce, "policy_loss", weighted)
    monkeypatch.setattr(type(mixed.task), "problems", lambda *a: asked.append(a[1:3]) or problems(*a))
    trained(mixed, tmp_path / "run", iterations=2, baseline=baseline)
    assert len(seen) == 2 and bool(seen[1]["b"].any()) == (baseline != "none")
    assert set(asked) == {("train", 4), ("test", 5)}


@pytest.mark.parametrize("reward, who", [("vine", "policy"), ("pav_pi", "policy"),
                                         ("pav_rollout", "mu_policy")])
def test_who_completes(smoke, tmp_path, monkeypatch, reward, who):
    asked = []

    def spy(*args, **how):
        asked.append((args[0], how))
        return rollout_from(*args, **how)
    monkeypatch.setattr(rewards, "rollout_from", spy)
    loop = trained(smoke, tmp_path / "run", reward, iterations=2)
    assert asked and all(x == (getattr(loop, who), WHOLE if who == "policy" else {}) for x in asked)


def test_learning_rates_and_the_clipped_step(smoke, tmp_path):
    model = tiny()
    sgd, before = torch.optim.SGD(model.parameters(), 0.5), weights(model)
    for factor in (0.2, 1.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        apply_step(model, [sgd], factor)
        assert (weights(model) - before).norm() == pytest.approx(0.5 * factor, rel=1e-3)
        before = weights(model)
    assert [schedule(s, 100) for s in (0, 4, 49, 99)] == pytest.approx([0.2, 1, 1, 0.05])
    loop = trained(smoke, tmp_path / "run", "outcome", iterations=1)
    loop.a.iterations, loop.a.warmup = 100, 0.1
    assert [loop.rate(i) for i in (0, 50, 75, 100)] == pytest.approx([0.1, 0.5, (1 - 0.5 ** 0.5) / 2, 0])

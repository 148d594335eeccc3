"""rl.py from the outside, and what its report says."""
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import SMALL, call
from safetensors.torch import load_file

import rl as cli
from minipav.advantage import KNOWN, Traces
from minipav.rl_report import control, cost_before, first_reach, sample_efficiency, sampled, verdicts
from minipav.run import Run
from minipav.sft import own_rollouts, rft, sft_loss
from minipav.utils import Fail


def test_a_training_is_named_by_the_flags_that_its_reward_uses():
    args = cli.get_args(["--no_known", "--alpha", "3"])
    assert [cli.arm_flags(args, reward=r)[0] for r in ("pav", "outcome")] == ["pav", "outcome"]
    plain = cli.get_args([])
    assert [cli.arm_flags(plain, reward=r, no_known=True, alpha=3.0)[1] for r in ("pav", "outcome", "pav-pi")] == [
        "pav-no_known-alpha3.0", "outcome", "pav-pi-alpha3.0"]


def test_what_was_sampled_before_the_first_iteration():
    """A prompt of 2 tokens and two steps of 3: a rollout is 6 tokens; a completion of its first step 3; four completions of both
    places 4 (6 + 3), and no completion starts at the last one."""
    ends = torch.tensor([[1, 4, 7]] * 3)
    n = torch.tensor([[1, 1, KNOWN], [0, 1, KNOWN], [4, 4, KNOWN]])
    t = Traces(torch.zeros(3).long(), torch.zeros(3, 8).long(), torch.full((3,), 8), ends, torch.zeros(3, 3), n, torch.zeros(3))
    assert [sampled(t[i:i + 1]) for i in range(3)] == [6, 3, 36] and sampled(t) == 45


def test_a_verifier_costs_its_data_and_outcome_reward_what_rft_needs(searched):
    run = Run.open(searched, "cpu")

    def tokens(**flags):
        return cost_before(run, {"reward": "pav", "policy": "base", "prover": "bo4", "no_rft": False} | flags)[0]
    data = {who: sum(sampled(run.traces(f"{who}_{split}")) for split in ("train", "validation")) for who in ("base", "strong")}
    assert tokens(reward="outcome") == sampled(own_rollouts(run, "base")) > 0 == tokens(reward="outcome", no_rft=True)
    assert tokens() == data["base"] + sampled(own_rollouts(run, "strong")) < tokens(prover="strong") == sum(data.values())
    assert tokens(policy="strong") == sum(data.values())


def test_rft_makes_right_seeds_likelier(searched):
    run = Run.open(searched, "cpu")
    seeds = own_rollouts(run, "base")
    right, sft = seeds[seeds.reward == 1], run.model("base")
    batch = right.tokens, right.lengths, right.ends[:, 0] + 1
    losses = [sft_loss(m, *batch).item() for m in (sft, rft(run, "base", sft, epochs=8))]
    assert len(seeds) == 600 and 40 <= len(right) < 60 and losses[1] < losses[0] - 0.01


def test_verdicts():
    def x(mean, lo, hi):
        return {"mean": mean, "lo": lo, "hi": hi}
    s = {"pav_minus_orm_points": x(9, 6, 12), "sample_efficiency": x(2.9, 2, 3.1), "pav_sum_minus_outcome_points": x(.2, -1, 1.5),
         "pav_pi_minus_outcome_points": x(3.8, 1.5, 6), "q_bonus_minus_outcome_points": x(-8, -11, -5)}
    assert [v.partition(":")[0] for v in verdicts(s).values()] == ["reproduced", "partly", "reproduced", "not reproduced",
                                                                     "reproduced"]
    s = {"pav_minus_orm_points": x(9, -1, 12), "sample_efficiency": None, "pass64_pav_minus_orm_points": x(5, 2, 8),
         "pass64_pav_minus_sft_points": x(4, 1, 7), "pass64_orm_minus_sft_points": x(-1, -4, 2)}
    assert [v.partition(":")[0] for v in verdicts(s).values()] == ["not reproduced", "not reproduced", "partly"]


def test_sample_efficiency():
    """ORM-RL is best (.3) at iteration 40; PAV-RL has .3 at 15, half way between .2 and .4: 2.67 times fewer."""
    x = np.array([0., 10, 20, 40])
    orm, pav = np.array([[.1, .2, .2, .3]]), np.array([[.1, .2, .4, .4]])
    assert first_reach(x, pav, np.array([.3])) == pytest.approx(15) and np.isnan(first_reach(x, orm, np.array([.5]))[0])
    assert sample_efficiency((x, orm), (x, pav)) == pytest.approx(40 / 15) and sample_efficiency((x, pav), (x, orm)) == 0
    assert np.isnan(sample_efficiency((x, orm[:, ::-1]), (x, pav)))                            # best at the start


def test_each_training_is_held_against_its_own_control():
    flags = {"outcome": dict(reward="outcome", kl=0.03, alpha=1.0, policy="base"), "pav": dict(reward="pav", kl=0.03, alpha=1.0,
             policy="base"), "sft": dict(policy="base")}
    flags |= {"outcome-kl0.015": flags["outcome"] | {"kl": 0.015}, "pav-sum": flags["pav"] | {"reward": "pav-sum"},
              "pav-alpha3.0": flags["pav"] | {"alpha": 3.0}, "outcome-policyweak": flags["outcome"] | {"policy": "weak"},
              "pav-policyweak": flags["pav"] | {"policy": "weak"}, "pav-kl0.001": flags["pav"] | {"kl": 0.001}}
    assert [control(n, flags) for n in ("pav", "pav-alpha3.0", "pav-kl0.001")] == ["outcome"] * 3
    assert control("pav-sum", flags) == "outcome-kl0.015" and control("pav-policyweak", flags) == "outcome-policyweak"


@pytest.fixture(scope="module")
def searched(smoke_run, tmp_path_factory):
    """A smoke run of train.py whose base policy was right at times."""
    out = tmp_path_factory.mktemp("rl") / "run"
    shutil.copytree(smoke_run[0], out)
    run = Run.open(out, "cpu")
    traces = run.traces("base_train")
    traces.reward[:40] = 1
    run.save_traces("base_train", traces)
    return out


def test_rl_from_the_outside(searched, tmp_path):
    """No --reward: ORM-RL and PAV-RL side by side, a table, figures, a summary; and again: nothing is trained twice."""
    out = tmp_path / "out"
    done = call("rl.py", "--run", searched, *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert {"sample_efficiency", "pav_minus_orm_points", "orm_minus_rft_points", "verdicts", "command", "seeds"} <= set(summary)
    assert {"fig7.png", "fig8.csv", "curves.csv", "table.txt"} <= {p.name for p in out.iterdir()} and "PAV-RL" in done.stdout
    logs = {p: p.stat().st_mtime for p in searched.glob("rl/*/log.csv")}
    again = call("rl.py", "--run", searched, *SMALL, "--out", out)
    assert again.returncode == 0 and logs and logs == {p: p.stat().st_mtime for p in searched.glob("rl/*/log.csv")}
    assert json.loads((out / "summary.json").read_text()) == summary
    sft = [load_file(p / "final.safetensors")["reward"] for p in searched.glob("rl/sft*")]
    assert sft[0].shape == (5, 16)


def test_a_sweep_is_drawn_beside_the_default(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "SWEEPS", [{"reward": "pav", "alpha": 3.0}, {"reward": "pav", "no_known": True}])
    monkeypatch.setattr(sys, "argv", ["rl.py", "--run", str(searched), *SMALL, "--sweep", "--out", str(tmp_path)])
    cli.main()
    rows = [line.split(",")[:3] for line in (tmp_path / "sweeps.csv").read_text().splitlines()[1:]]
    assert rows == [[panel, line, x] for panel, change in (("alpha", "3.0"), ("the rest", "no_known"))
                    for line in ("ORM-RL", "PAV-RL") for x in ("default", change)]
    assert {"outcome": "outcome", "pav-alpha3.0": "outcome"}.items() <= json.loads(
        (tmp_path / "summary.json").read_text())["controls"].items()


def test_tuning_is_on_validation_problems(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "GRID", {"lr": (1e-3, 2e-3)})
    monkeypatch.setattr(sys, "argv", ["rl.py", "--run", str(searched), *SMALL, "--n", "3", "--tune", "lr", "--reward", "outcome",
                                      "--out", str(tmp_path / "out")])
    cli.main()
    rows = [line.split(",")[:2] for line in (tmp_path / "out" / "tune_lr.csv").read_text().splitlines()[1:]]
    assert rows == [["outcome", "0.001"], ["outcome", "0.002"]]
    assert not list(searched.glob("rl/sft*n3/final.json")), "SFT is judged on test problems, and not while tuning"
    assert len(list(searched.glob("rl/tune/outcome*"))) == 2


def test_bad_calls_are_one_line_errors(smoke_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(smoke_run[0], run)
    shutil.rmtree(run / "q_weak")
    for args, words in (((tmp_path / "nothing",), "python train.py"), ((run, "--alpha", -1), "--alpha"),
                        ((run, "--lr", 0), "--lr"), ((run, "--prover", "bo0"), "--prover bo0"),
                        ((run, "--batch", 7), "--batch 7"), ((run, "--group", 1, "--baseline", "group"), "--group 1"),
                        ((run, run), "--out"),
                        ((run, "--no_rft", *SMALL, "--reward", "pav", "--prover", "weak"), "q_weak"),
                        ((run, "--no_rft", *SMALL, "--reward", "pav-rollout", "--prover", "bo16"), "--n_mc 4"),
                        ((run, "--no_rft", *SMALL, "--reward", "pav-oracle", "--prover", "strong"), "exact values")):
        monkeypatch.setattr(sys, "argv", ["rl.py", "--run", *map(str, args)])
        with pytest.raises(Fail, match=words) as e:
            cli.main()
        assert "\n" not in str(e.value)

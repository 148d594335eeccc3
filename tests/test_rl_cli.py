"""rl.py from the outside: its trainings by name, its files, its errors."""
import csv
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, fails, run_main

import rl
from minipav.paper import experiments
from minipav.reinforce import Reinforce
from minipav.run import Run
from minipav.sft import rft, sft_loss
from minipav.tasks.calculator import Calculator
from minipav.utils import Fail

pytestmark = pytest.mark.usefixtures("right_at_times")


@pytest.fixture(scope="module")
def searched(smoke_run, right_at_times, tmp_path_factory):
    """A smoke run of train.py whose base policy was right at times."""
    out = tmp_path_factory.mktemp("rl") / "run"
    shutil.copytree(smoke_run[0], out)
    run = Run.open(out, "cpu")
    traces = run.traces("seeds_base_train")
    traces.reward[:40] = 1
    run.save_traces("seeds_base_train", traces)
    return out


def records(run, pattern):
    return {p.stem: json.loads(p.read_text()) for p in (run / "stages" / "rl").glob(f"{pattern}.json")}


# ---- what a training is

def test_a_training_is_named_by_the_flags_that_its_reward_uses():
    """Else what is the same would be trained twice, and what differs would share a folder."""
    trust = rl.Trial(trust_verifier=True, alpha=3.0)
    assert [rl.label(r, rl.plain(r, trust), trust) for r in ("pav", "outcome")] == ["pav", "outcome"]
    plain = rl.Trial()
    assert [rl.label(r, rl.plain(r, trust), plain) for r in ("pav", "outcome", "pav_pi")] == [
        "pav-alpha3.0-trust_verifier", "outcome", "pav_pi-alpha3.0"]
    for reward, uses in (("outcome", set()), ("pav", {"alpha", "prover", "refresh", "trust_verifier"}),
                         ("pav_rollout", {"alpha", "prover", "n_mc"}), ("vine", {"n_mc"})):
        special = {"alpha", "prover", "n_mc", "refresh", "trust_verifier", "baseline"}
        got = special & rl.used(reward, plain, "test").keys()
        assert got - {"baseline"} == uses and ("baseline" in got) == (reward != "vine")
    assert rl.plain("outcome", plain) == rl.plain("outcome", trust)
    assert rl.label("dpo", rl.plain("dpo", plain), plain) == "dpo", "its own lr goes without saying"
    assert rl.plain("pav", rl.Trial(lr=0.5)).lr == 0.5 != rl.plain("pav", plain).lr == rl.REWARDS["pav"].lr
    assert rl.used("pav", plain, "test") != rl.used("pav", plain, "validation")


def test_rewards_of_another_scale_bring_their_control():
    """pav_sum and pav_pi have 1 + alpha times the gradient: they are held against ORM-RL at so small a KL."""
    a = rl.Flags(reward=["pav_sum"])
    assert [r for r, _ in rl.trials(a, rl.Trial())] == ["pav_sum", "outcome"]
    assert rl.trials(a, rl.Trial(kl=0.03, alpha=2.0))[1][1].kl == pytest.approx(0.01)
    both = rl.trials(rl.Flags(), rl.Trial(alpha=2.0, kl=0.09))
    assert [(r, t.kl) for r, t in both] == [("outcome", 0.09), ("pav", 0.09), ("outcome", 0.09 / 9)]
    assert len(rl.trials(rl.Flags(all=True), rl.Trial())) == len(rl.REWARDS) + 2
    assert len(rl.trials(rl.Flags(all=True, no_control=True), rl.Trial())) == len(rl.REWARDS)
    tuned = rl.trials(rl.Flags(tune="kl", reward=["pav"]), rl.Trial())
    assert [t.kl for _, t in tuned] == list(experiments.GRID["kl"])
    for lr, grid in ((None, [1e-4, 3e-4, 1e-3, 2e-3]), (1e-5, [1e-6, 3e-6, 1e-5, 2e-5])):
        tuned = rl.trials(rl.Flags(tune="lr", reward=["pav"]), rl.Trial(lr=lr))
        assert [t.lr for _, t in tuned] == grid


def test_rft_makes_right_seeds_likelier(searched):
    run = Run.open(searched, "cpu")
    seeds = run.traces("seeds_base_train")
    right, sft = seeds[seeds.reward == 1], run.model("base")
    batch = right.tokens, right.lengths, right.ends[:, 0] + 1
    losses = [sft_loss(m, *batch).item() / 250 for m in (sft, rft(sft, seeds, 0, epochs=8))]
    assert len(seeds) == 600 and 40 <= len(right) < 60 and losses[1] < losses[0] - 0.01
    with pytest.raises(Fail, match="--no_rft"):
        rft(sft, seeds[seeds.reward == 0], 0, "base")


def test_rl_starts_in_the_precision_that_is_asked_for(searched, tmp_path):
    shutil.copytree(searched, tmp_path / "run")
    run = Run.open(tmp_path / "run", "cpu", "bf16")
    policy, stages = rl.start(run, rl.Trial(no_rft=True), "validation", 0)
    assert policy.bf16 and policy.as_verifier().bf16 and list(stages) == ["sft"]


# ---- what it leaves

@pytest.fixture(scope="module")
def done(searched, tmp_path_factory):
    """(run, folder of the report, what it printed) of rl.py without --reward: ORM-RL and PAV-RL."""
    out = tmp_path_factory.mktemp("rl_report")
    done = run_main(rl, "--run", searched, *SMALL, "--out", out)
    return searched, out, done


def test_it_leaves_a_table_figures_and_a_summary(done):
    run, out, told = done
    summary = json.loads((out / "summary.json").read_text())
    assert {"command", "seeds", "claims", "controls", "before", "accuracy_by_seed", "minutes"} <= set(summary)
    assert summary["controls"]["pav"] == "outcome" and summary["before"]["pav"]["tokens"] > 0
    files = {p.name for p in out.iterdir()}
    assert {"fig7.png", "fig8.csv", "curves.csv", "table.txt", "table.csv", "kl.csv"} <= files
    assert "PAV-RL" in told and {c["where"] for c in summary["claims"]} >= {"Fig. 7a"}
    table = list(csv.DictReader((out / "table.csv").open()))
    assert [row["training"] for row in table] == ["sft", "rft", "outcome", "pav", "outcome-kl0.006"]
    for row in table:
        assert 0 <= float(row["lo"]) <= float(row["accuracy"]) <= float(row["hi"]) <= 1
    for name, r in records(run, "*").items():
        folder = run / "rl" / name
        assert (folder / "model.safetensors").exists() and not (folder / "checkpoint.safetensors").exists()
        rows = list(csv.DictReader((folder / "rows.csv").open()))
        end = [row for row in rows if row["iteration"] == "end"]
        n = 4 * (4 if name.startswith("sft") else 1)
        assert [row["problem"] for row in end] == list("01234") and {row["n"] for row in end} == {str(n)}
        assert sum(int(row["right"]) for row in end) / (5 * n) == pytest.approx(r["accuracy"], abs=1e-4)
        trained = not name.startswith(("sft", "rft"))
        assert len(rows) == 5 * (1 + 3 * trained) and (folder / "log.csv").exists() == trained


def test_nothing_is_trained_twice(done):
    run, out, _ = done
    logs = {p: p.stat().st_mtime_ns for p in run.glob("rl/*/log.csv")}
    summary = json.loads((out / "summary.json").read_text())
    again = run_main(rl, "--run", run, *SMALL, "--out", out)
    assert len(logs) == 3 and logs == {p: p.stat().st_mtime_ns for p in run.glob("rl/*/log.csv")}
    assert again.count("done before") == 9 and json.loads((out / "summary.json").read_text()) == summary


def test_training_on_a_search_stands_in_the_same_table(done, tmp_path):
    """Beside rewards, though it has no KL in its loss and a learning rate of its own."""
    run_main(rl, "--run", done[0], *SMALL, "--reward", "outcome", "dpo", "--out", tmp_path)
    table = {row["training"]: row for row in csv.DictReader((tmp_path / "table.csv").open())}
    assert list(table) == ["sft", "rft", "outcome", "dpo"] and float(table["dpo"]["tokens"]) > 0
    over = 100 * (float(table["dpo"]["accuracy"]) - float(table["outcome"]["accuracy"]))
    assert float(table["dpo"]["over_outcome"]) == pytest.approx(over, abs=0.02)
    assert json.loads((tmp_path / "summary.json").read_text())["controls"]["dpo"] is None


def test_a_sweep_is_drawn_beside_the_default(done, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "SWEEPS", [("pav", {"alpha": 3.0}), ("pav", {"trust_verifier": True})])
    run_main(rl, "--run", done[0], *SMALL, "--sweep", "--out", tmp_path)
    rows = [line.split(",")[:3] for line in (tmp_path / "sweeps.csv").read_text().splitlines()[1:]]
    changes = (("alpha", "3.0"), ("trust_verifier", "True"))
    assert sorted(r for r in rows if r[0] != "kl") == sorted(
        [panel, line, x] for panel, change in changes for line in ("ORM-RL", "PAV-RL")
        for x in ("default", change))
    assert ["kl", "ORM-RL", "0.006"] in rows
    controls = json.loads((tmp_path / "summary.json").read_text())["controls"]
    assert controls == {"outcome": None, "outcome-kl0.006": None, "pav": "outcome", "pav-alpha3.0": "outcome",
                        "pav-trust_verifier": "outcome"}


def test_another_policys_verifier_may_be_the_prover(done, tmp_path):
    """A folder with a saved verifier of its Q: trained with it, and reported."""
    run, mu = done[0], tmp_path / "mu"
    shutil.copytree(run / "q_weak", mu)
    run_main(rl, "--run", run, *SMALL, "--reward", "pav", "--prover", mu, "--out", tmp_path / "out")
    specs = [r["spec"] for r in records(run, "*").values()]
    assert [s["reward"] for s in specs if s.get("prover") == str(mu)] == ["pav"]
    assert "pav," in (tmp_path / "out" / "table.csv").read_text()


def test_tuning_is_on_validation_problems(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "GRID", {"lr": (1, 2)})
    asked, problems = set(), Calculator.problems
    monkeypatch.setattr(Calculator, "problems", lambda *a: asked.add(a[1]) or problems(*a))
    flags = ("--n", 3, "--tune", "lr", "--reward", "outcome", "--out", tmp_path / "out")
    run_main(rl, "--run", searched, *SMALL, *flags)
    assert asked == {"train", "validation"}
    rows = [line.split(",")[:2] for line in (tmp_path / "out" / "tune_lr.csv").read_text().splitlines()[1:]]
    assert rows == [["outcome", "0.001"], ["outcome", "0.002"]]
    tuned = [(k, r) for k, r in records(searched, "*").items() if r["spec"]["split"] == "validation"]
    assert sorted(k.partition("-")[0] for k, _ in tuned) == ["outcome", "outcome", "rft", "sft"]
    for k, r in tuned:
        assert ("accuracy" in r) == k.startswith("outcome"), "SFT is judged on test problems alone"


def test_the_best_of_a_grid_is_told(searched, tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "GRID", {"lr": (1, 2, 3)})
    monkeypatch.setattr(rl, "train", lambda run, r, t, *_: ({}, "", {1e-3: .2, 2e-3: .4, 3e-3: .3}[t.lr]))
    flags = "--tune", "lr", "--reward", "outcome", "--out", tmp_path
    assert "the best of outcome: --lr 0.002 (0.4)" in run_main(rl, "--run", searched, *SMALL, *flags)


def test_rft_is_of_the_policy_and_its_own_seeds(searched, tmp_path, monkeypatch):
    run = Run.open(shutil.copytree(searched, tmp_path / "run"), "cpu")
    monkeypatch.setattr(rl, "rft", lambda model, *a, **how: got.append((model, *a, how)) or model)
    got = []
    rl.start(run, rl.Trial(policy="weak", rft_lr=0.5), "validation", 8)
    [(model, seeds, _, name, how)] = got
    assert how == {"lr": 0.5, "micro_batch": 8} and name == "weak"
    assert torch.equal(seeds.tokens, run.traces("seeds_weak_train").tokens)
    assert torch.equal(model.embed.weight, run.model("weak").embed.weight)


def test_a_stopped_training_goes_on_and_ends_as_an_uninterrupted_one(searched, tmp_path, monkeypatch):
    """The same command goes on from the checkpoint, which is gone in the end."""
    out = tmp_path / "run"
    shutil.copytree(searched, out, ignore=shutil.ignore_patterns("rl"))
    flags = (*SMALL, "--no_rft", "--reward", "outcome", "--seed", 3, "--out", tmp_path / "out")
    run_main(rl, "--run", searched, *flags)
    iterate, begun = Reinforce.iterate, []

    def killed(self, i):
        begun.append(i)
        if len(begun) == 4:
            raise KeyboardInterrupt
        return iterate(self, i)
    monkeypatch.setattr(Reinforce, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_main(rl, "--run", out, *flags)
    assert [p.name for p in out.glob("rl/outcome-*/checkpoint*")] == ["checkpoint.safetensors"]
    run_main(rl, "--run", out, *flags)
    assert begun == [0, 1, 2, 3, 2, 3], "from the evaluation at iteration 2"
    [folder] = out.glob("rl/outcome-*")
    assert not list(folder.glob("checkpoint*"))
    for name in ("model.safetensors", "rows.csv"):
        assert (folder / name).read_bytes() == (searched / folder.relative_to(out) / name).read_bytes(), name


# ---- what is wrong

@pytest.fixture(scope="module")
def lacks_q_weak(smoke_run, tmp_path_factory):
    run = tmp_path_factory.mktemp("lacking") / "run"
    shutil.copytree(smoke_run[0], run)
    shutil.rmtree(run / "q_weak")
    return run


@pytest.mark.parametrize("args, words", [
    (("--group", 1, "--sweep"), "--group 1"),
    (("--no_rft", *SMALL, "--reward", "pav", "--prover", "weak"), "q_weak"),
    ((*SMALL, "--reward", "outcome"), "--no_rft"),
])
def test_bad_calls_are_one_line_errors(lacks_q_weak, args, words):
    assert words in fails(rl, "--run", lacks_q_weak, *args)


def test_bad_runs_are_one_line_errors(lacks_q_weak, tmp_path):
    assert "python train.py" in fails(rl, "--run", tmp_path / "nothing")
    other = shutil.copytree(lacks_q_weak, tmp_path / "other")
    assert "--out" in fails(rl, "--run", lacks_q_weak, other)
    assert "differ in their seed" in fails(rl, "--run", lacks_q_weak, other, "--out", tmp_path / "out")


def test_a_sweep_leaves_out_what_the_run_has_no_verifier_for(tmp_path):
    """As of tasks in words, whose runs have no other policies."""
    (tmp_path / "q_pi").mkdir()
    (tmp_path / "q_weak").mkdir()                               # but of no right seed: no RFT of that policy
    traces = {"seeds_weak_train": SimpleNamespace(reward=torch.zeros(3))}
    run = SimpleNamespace(out=tmp_path, traces=traces.__getitem__)
    weak = [(r, x) for r, x in rl.SWEEPS if x.get("policy") == "weak" or x.get("prover") == "weak"]
    found = rl.sweeps([run], rl.Trial())
    assert [x for x in weak if x in found] == [x for x in weak if "policy" not in x[1]] != weak
    (tmp_path / "q_weak").rmdir()
    swept = rl.sweeps([run], rl.Trial())
    other = [(r, x) for r, x in rl.SWEEPS if x.get("prover") in ("weak", "strong") or "policy" in x]
    assert 0 < len(other) and swept == [x for x in rl.SWEEPS if x not in other]
    plain = rl.trials(rl.Flags(), rl.Trial())
    assert len(rl.trials(rl.Flags(), rl.Trial(), swept)) == len(plain) + len(swept)

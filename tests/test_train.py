"""train.py from the outside: it runs, it resumes, both recipes run, and it says in one line what is wrong."""
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ONE_CORE, ROOT, SMOKE, fails, run_main
from safetensors.torch import load_file

import train
from minipav import budget, files
from minipav.cache import tokens_in_flight
from minipav.model import GPT
from minipav.paper import report
from minipav.run import Run, differ
from minipav.search.inspect import explain
from minipav.search.measure import Bench
from minipav.tasks import make_task
from minipav.tokenizer import decode_rows
from minipav.verifier import outcome_only

TRAINED = ["policies", "rollouts", "q_pi", "orm", "q_weak", "q_strong"]
MODELS = ["base", "weak", "strong", "q_pi", "orm", "q_weak", "q_strong"]
# every stage, in a second or two
LESS = ("--smoke --device cpu --batch_size 8 --sft_steps 4 --strong_steps 2 --problems 24 --branches 40 "
        "--pit_traces 8 --prover_rollouts 40 --orm_steps 2 --q_steps 4 --mu_steps 2 --test_problems 8 "
        "--max_n 4").split()


def stages(out):
    folder = out / "stages"
    return {str(p.relative_to(folder)).removesuffix(".json") for p in folder.rglob("*.json")}


def record(out, stage):
    return json.loads((out / "stages" / f"{stage}.json").read_text())


def table(path):
    """A table of a search, without the columns that name it."""
    return [row[7:] for row in csv.reader(path.open())][1:]


# Runs train.py in child processes, the k-th killed soon after the k-th stage began (or was found to be done),
# until one comes to its end. Prints, of each, its exit status and the stages that are done.
KILLS = """
import json, os, pathlib, re, sys, time, train
out = pathlib.Path(sys.argv[1])
code, k = -9, 0
while code == -9:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        sys.argv = ["train.py", *sys.argv[2:], "--out", str(out), *["--resume"] * out.exists()]
        train.main()
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    begun = (line for line in os.fdopen(read) if re.fullmatch(r"[\\w/-]+(: done before)?\\n", line))
    for stage, _ in enumerate(begun):
        if stage == k:
            time.sleep(0.05)
            os.kill(child, 9)
            break
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = out / "stages"
    print(json.dumps([code, [str(p.relative_to(done))[:-5] for p in done.rglob("*.json")]]), flush=True)
    k += 1
"""


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory, request):
    """(folder, process) of runs that are killed in every stage, begun in the background; None if no test
    wants it."""
    if not any("killed_in_every_stage" in item.name for item in request.session.items):
        yield None
        return
    out = tmp_path_factory.mktemp("run") / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLS, str(out), *SMOKE], cwd=ROOT, env=ONE_CORE,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    yield out, process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)                  # and the run that it was about to kill
    process.wait()


pytestmark = pytest.mark.usefixtures("killed_run")      # begun with the first test


# ---- what it leaves

def test_smoke_run_writes_all_it_promises_and_fast(smoke_run):
    out, stdout = smoke_run
    summary = json.loads((out / "summary.json").read_text())
    assert {"command", "commit", "hardware", "seeds", "minutes", "config", "base_sampled", "base_greedy",
            "planning_failure_share", "corrupted_step_auc", "claims"} <= set(summary)
    assert summary["minutes"]["mean"] < 1
    assert {c["where"] for c in summary["claims"]} == {"Fig. 4", "Fig. 5a", "Fig. 6a"}
    for name in ("table.txt", "curves.csv", "paired.csv", "rows.csv.gz", "accuracy.png", "example.txt"):
        assert (out / name).stat().st_size > 0
    for m in ("greedy decoding", "majority vote", "best-of-n, orm", "beam, pav", "pass@n", "next:", "brier"):
        assert m in stdout.lower()
    for name in MODELS:
        assert {p.name for p in (out / name).iterdir()} >= {"config.json", "model.safetensors"}
        assert (out / name / "held_out.csv").exists() == (name in ("q_pi", "orm", "q_weak", "q_strong"))
    searches = {s for s in stages(out) if s.startswith("search/")}
    assert {f"{s}.csv" for s in searches} == {str(p.relative_to(out)) for p in out.glob("search/*")}
    assert stages(out) == {*TRAINED, "example", *searches} and len(searches) == 9
    for name in stages(out):
        r = record(out, name)
        assert r["seconds"] >= 0 and 0 < r["peak_memory_gb"] < 4 and r["command"].startswith("python ")
        assert {"spec", "commit", "hardware"} <= set(r)
    assert {p.name for p in (out / "logs").iterdir()} == {f"{s}.csv" for s in TRAINED if s != "rollouts"}
    assert not list(out.rglob("*.tmp"))
    with (out / "orm" / "held_out.csv").open() as f:            # the ORM is asked of ends alone
        labels = sum(int(row["labels"]) for row in csv.DictReader(f))
    held_out = Run.open(out, "cpu").traces("base_validation")
    assert labels == int(outcome_only(held_out).labelled.sum()) < int(held_out.labelled.sum())


def test_the_example_is_the_equations_by_hand(smoke_run):
    """Each step's Q^pi, Q^Bo4 (Eq. 30), A^mu (Eq. 2) and Q + alpha A (Eq. 5), as they are printed."""
    run = Run.open(smoke_run[0], "cpu")
    [problem] = run.problems("test", 1)
    [response] = run.task.demonstrations([problem], 1.0, np.random.default_rng(0))
    lines = explain(Bench(run), problem, response, 0.5, 4, 0, n_mc=8).splitlines()
    rows = [[float(x) for x in re.findall(r"(?<!\+-) (-?\d\.\d{3})(?! [(+])", line)] for line in lines[2:]]
    assert len(rows) == 1 + response.count("\n") + 1 and len(rows[0]) == 2
    for (_, before, *_), (q, q_mu, adv, effective) in zip(rows, rows[1:]):
        assert q_mu == pytest.approx(1 - (1 - q) ** 4, abs=3e-3)
        assert adv == pytest.approx(q_mu - before, abs=2e-3)
        assert effective == pytest.approx(q + 0.5 * adv, abs=2e-3)


def test_the_weaker_prover_is_neither_the_untrained_model_nor_the_base_policy(smoke_run):
    run = Run.open(smoke_run[0], "cpu")
    torch.manual_seed(run.seed("policies"))
    models = [GPT(run.model("base").config), run.model("weak"), run.model("base")]
    one, two, three = (m.blocks[0].attn.wq.weight for m in models)
    assert not torch.equal(one, two) and not torch.equal(two, three)
    assert (two - one).norm() < (three - one).norm(), "on the way"


def test_the_table_has_each_search_once(smoke_run):
    """That claims do not name the prover of the PAV beam does not make it another search."""
    rows = [tuple(row) for row in csv.reader((smoke_run[0] / "curves.csv").open())][1:]
    assert sum(row[1] == "beam:effective" for row in rows) == 2 * 3 and len(rows) == 1 + 4 * 4 + 4 * 2


def test_what_a_run_cost_is_in_its_records(smoke_run):
    """Tokens of all seeds and of all labelled traces: the reports of RL count with them."""
    run, tokens = Run.open(smoke_run[0], "cpu"), record(smoke_run[0], "rollouts")["tokens"]
    names = [f"{p}_{s}" for p in ("base", "weak", "strong") for s in ("train", "validation")]
    assert tokens.keys() == {*names, *(f"seeds_{p}" for p in ("base", "weak", "strong"))}
    for name in names:
        t = run.traces(name)
        assert tokens[name] == int(t.cost.sum()) > 0 and t.labelled.any() and (t.cost >= 0).all()
    seeds, data = run.traces("seeds_base_train"), run.traces("base_train")
    assert tokens["seeds_base"] == int((seeds.lengths - seeds.ends[:, 0] - 1).sum()) and len(seeds) == 600
    for field in ("problem", "lengths", "reward", "cost"):
        assert torch.equal(getattr(data[:600], field), getattr(seeds, field))


def test_traces_are_of_the_problems_of_their_split(smoke_run):
    run = Run.open(smoke_run[0], "cpu")
    for split, n in (("train", 150), ("validation", 20)):
        problems = run.problems(split, n)
        for policy in ("base", "weak", "strong"):
            t = run.traces(f"{policy}_{split}")
            prompts = [run.task.prompt(problems[i]) for i in t.problem]
            assert decode_rows(run.enc, t.tokens, t.ends[:, 0] + 1) == prompts


def test_problems_are_of_the_runs_seed(smoke_run):
    run = Run.open(smoke_run[0], "cpu")
    here = run.problems("test", 5)
    run.config = run.config | {"seed": 1}
    assert run.problems("test", 5) != here == Run.open(smoke_run[0], "cpu").problems("test", 5)


def test_countdown_runs_too(tmp_path, monkeypatch):
    """Every stage on the other task, whose lines and steps are longer. Each policy has its own share of
    demonstrations, each verifier its own data and start."""
    shares, got, train_policy, train_verifier = [], [], train.train_policy, train.train_verifier
    monkeypatch.setattr(train, "train_policy", lambda *a, **how: (
        shares.append(a[2]) or train_policy(*a, **how)))
    monkeypatch.setattr(train, "train_verifier", lambda *a, **how: (
        got.append((*a, how)) or train_verifier(*a, **how)))
    flags = "--task", "countdown", "--q_from", "strong", "--quota", "parent"
    told = run_main(train, *LESS, *flags, "--out", out := tmp_path / "x")
    assert "pass@N" in told and {*TRAINED, "example"} <= stages(out)
    run = Run.open(out, "cpu")
    assert shares == [run.config["expert_fraction"], 1.0]
    for (init, data, held_out, how), start, of in zip(
            got, ("strong", "q_pi", "q_pi", "q_pi"), ("base", "base", "weak", "strong"), strict=True):
        assert torch.equal(init.embed.weight, run.model(start).embed.weight)
        assert torch.equal(data.tokens, run.traces(f"{of}_train").tokens)
        assert torch.equal(held_out.tokens, run.traces(f"{of}_validation").tokens)
        assert all(how[k] == run.config[f"{k}_verifier"] != run.config[k] for k in ("lr_muon", "lr_adamw"))
    assert {record(out, s)["spec"]["quota"] for s in stages(out) if s.startswith("search/beam")} == {"parent"}


def test_the_papers_recipe_runs_too(tmp_path):
    run_main(train, *LESS, "--recipe", "paper", "--balance", "--lr_muon", 0, "--out", tmp_path / "x")
    t = Run.open(tmp_path / "x", "cpu").traces("base_train")
    assert "example" in stages(tmp_path / "x") and set(t.n[t.labelled & ~t.exact].tolist()) <= {1, 2, 8}
    assert len(t) >= 24 * 4 and t.labelled[:96].sum() == (t.ends[:96] >= 0).sum()


def test_a_count_of_0_leaves_it_out(tmp_path):
    """No SFT, no stronger policy, branches, pits, corrupted steps or provers."""
    out = tmp_path / "x"
    zeros = ("sft_steps", "strong_steps", "branches", "pit_traces", "corrupted_fraction", "prover_rollouts")
    told = run_main(train, *LESS, *(x for k in zeros for x in (f"--{k}", 0)), "--out", out)
    assert told.count("no SFT") == 2 and not list(out.glob("weak_*")) and not list(out.glob("strong_*"))
    assert {s for s in stages(out) if "/" not in s} == {"policies", "rollouts", "q_pi", "orm", "example"}
    a, b, c = (load_file(out / name / "model.safetensors") for name in ("weak", "base", "strong"))
    assert all(torch.equal(a[k], b[k]) and torch.equal(b[k], c[k]) for k in a)
    run = Run.open(out, "cpu")
    assert len(run.traces("base_train")) == len(run.traces("seeds_base_train")) == 24 * 4


# ---- resuming

def test_killed_in_every_stage_and_resumed_equals_uninterrupted(smoke_run, killed_run):
    """SIGKILL soon after each stage has begun; the next process goes on from the files of those before it."""
    whole, (out, killer) = smoke_run[0], killed_run
    stdout, stderr = killer.communicate(timeout=300)
    r = record(whole, "example")
    order = [*r["stages"], *(t.removesuffix(".csv") for t in r["tables"]), "example"]
    deaths = [json.loads(line) for line in stdout.splitlines()]
    assert [code for code, _ in deaths] == [-9] * len(order) + [0], stderr
    for k, (_, done) in enumerate(deaths):
        assert set(done) == set(order[:len(done)]) and len(done) >= k, "in this order, and none is lost"
        assert len(done) <= k + 1 or k >= len(TRAINED), "it was killed in this stage"
    for pattern in ("search/*.csv", "logs/*.csv", "table.txt", "curves.csv", "example.txt", "*/held_out.csv"):
        names = {p.relative_to(whole) for p in whole.glob(pattern)}
        assert names == {p.relative_to(out) for p in out.glob(pattern)} and names
        for name in names:
            assert (out / name).read_text() == (whole / name).read_text(), name
    for name in (*(f"{m}/model.safetensors" for m in MODELS), "base_train.safetensors"):
        a, b = load_file(out / name), load_file(whole / name)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), name
    assert not list(out.rglob("*.tmp"))


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(smoke_run):
    out = smoke_run[0]
    assert "--resume" in fails(train, *SMOKE, "--out", out)
    assert "--seed" in fails(train, *SMOKE, "--out", out, "--resume", "--seed", 5)
    assert "--min_steps" in fails(train, *SMOKE, "--out", out, "--resume", "--min_steps", 4)


def test_a_run_is_resumed_with_other_flags_of_memory(smoke_run, tmp_path):
    """And keeps them, for search.py and rl.py."""
    shutil.copytree(smoke_run[0], out := tmp_path / "run")
    (out / "stages" / "orm.json").unlink()
    memory = "--micro_batch", 8, "--checkpointing", "--max_tokens_in_flight", 5000
    assert "\norm\n" in run_main(train, *SMOKE, "--out", out, "--resume", *memory)
    run = Run.open(out, "cpu")
    assert run.config["micro_batch"] == 8 and run.model("orm").checkpointing
    assert run.sampling["max_tokens_in_flight"] == 5000


def test_runs_are_averaged_that_differ_in_seed_and_memory_alone():
    one = {"seed": 0, "micro_batch": 4, "H": 8}
    assert not differ(one, {"seed": 1, "micro_batch": 8, "H": 8, "checkpointing": True})
    assert differ(one, one | {"H": 9}) and differ(one, one | {"alpha": 1.0})


def test_a_run_of_another_device_is_searched_with_this_ones_memory(smoke_run, tmp_path):
    shutil.copytree(smoke_run[0], out := tmp_path / "run")
    config = files.read_json(out / "config.json")
    files.write_json(out / "config.json", config | {"device": "cuda", "max_tokens_in_flight": 1 << 40})
    run = Run.open(out, "cpu")
    fits = tokens_in_flight(run.model("base").config, "cpu", "fp32")
    assert run.sampling["max_tokens_in_flight"] == fits < 1 << 40
    assert Run.open(smoke_run[0], "cpu").sampling["max_tokens_in_flight"] == config["max_tokens_in_flight"]


# ---- several seeds

@pytest.fixture
def other_seed(smoke_run, tmp_path):
    """A second seed, by changing the files of the first: half of its single samples are right."""
    out = tmp_path / "other"
    shutil.copytree(smoke_run[0], out)
    changed(out / "config.json", seed=1)
    [samples] = out.glob("search/pass-*.csv")
    samples.write_text(re.sub(r"^((?:[^,]*,){9}1,\d+),[^,]*,", r"\1,0.5,", samples.read_text(), flags=re.M))
    changed(out / "stages" / "search" / f"{samples.stem}.json",
            files={f"search/{samples.name}": files.file_checksum(samples)})
    return out


def changed(path, **fields):
    """A JSON file with other fields, as the code itself would have written it."""
    files.write_json(path, files.read_json(path) | fields)


def test_seeds_are_averaged_into_one_report(smoke_run, other_seed, tmp_path):
    run, merged = smoke_run[0], tmp_path / "merged"
    same = shutil.copytree(run, tmp_path / "same")
    assert "same seed" in fails(report, "--runs", run, same, "--out", merged)
    told = run_main(report, "--runs", run, other_seed, "--out", merged)
    one, two = (json.loads((x / "summary.json").read_text()) for x in (run, merged))
    assert two["seeds"] == [0, 1] and "pass@N" in told
    sampled = two["base_sampled"]
    assert sampled["hi"] == 0.5 and sampled["lo"] == one["base_sampled"]["mean"]
    assert sampled["mean"] == pytest.approx((sampled["lo"] + sampled["hi"]) / 2, abs=1e-4)
    assert {"rows.csv.gz", "curves.csv", "base", "q_pi", "accuracy.png"} <= {p.name for p in merged.iterdir()}
    changed(other_seed / "config.json", alpha=0.5)
    assert "differ" in fails(report, "--runs", run, other_seed, "--out", merged)


def test_minutes_cut_the_counts_once_and_for_all(tmp_path):
    flags = [*SMOKE, "--minutes", "0.0001", "--out", tmp_path / "a"]
    said = run_main(train, *flags)
    config = files.read_json(tmp_path / "a" / "config.json")
    assert "--q_steps" in said and 6 <= config["q_steps"] < 12 and config["test_problems"] == 20
    again = run_main(train, *flags, "--resume")
    assert "of it all" not in again and files.read_json(tmp_path / "a" / "config.json") == config


def test_minutes_are_those_of_all_counts(tmp_path, monkeypatch):
    """1,680 optimizer steps of a second each, of which 14 minutes are the half."""
    monkeypatch.setattr(budget, "speeds", lambda *a: (1.0, 0.0))
    flags = train.Flags(minutes=14)
    budget.fit(flags, None, make_task("calculator", {}), tmp_path)
    assert (flags.sft_steps, flags.q_steps, flags.mu_steps, flags.problems) == (200, 400, 25, 5000)


def test_help_shows_the_defaults_that_are_used(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--smoke", "--help"])
    with pytest.raises(SystemExit):
        train.main()
    told = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps of the base policy (60)" in told and "of the beams (1 2)" in told

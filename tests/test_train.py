"""train.py from the outside: it runs, it resumes, and it says in one line what is wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
STAGES = ["policies", "rollouts", "q_pi", "orm", "q_weak", "q_strong", "evaluation"]


def command(*args):
    return [sys.executable, str(ROOT / "train.py"), "--smoke", "--device", "cpu", *map(str, args)]


def train(*args):
    return subprocess.run(command(*args), capture_output=True, text=True, cwd="/")


@pytest.fixture(scope="module")
def run(smoke_run):
    return smoke_run


def test_smoke_run_writes_all_it_promises_and_fast(run):
    out, stdout = run
    summary = json.loads((out / "summary.json").read_text())
    for key in ("command", "commit", "hardware", "seeds", "minutes", "peak_memory_gb", "base_sampled", "base_greedy",
                "planning_failure_share", "pav_minus_orm_points", "token_ratio_to_match_best_orm"):
        assert key in summary
    assert summary["minutes"] < 0.5 and summary["peak_memory_gb"] < 4
    for name in ("table.txt", "curves.csv", "accuracy.png", "example.txt", "log.csv", "eval.safetensors"):
        assert (out / name).stat().st_size > 0
    assert all(m in stdout for m in ("greedy decoding", "majority vote", "best-of-N, ORM", "beam, PAV", "pass@N", "next:"))
    assert not list(out.rglob("*.tmp"))


def test_countdown_runs_too(tmp_path):
    """Every stage on the other task, whose lines and steps are longer."""
    done = train("--task", "countdown", "--sft_steps", 5, "--out", tmp_path / "x")
    assert done.returncode == 0 and "pass@N" in done.stdout, done.stderr


def test_killed_in_every_stage_and_resumed_equals_uninterrupted(run, tmp_path):
    """SIGKILL soon after each stage has begun; the next process goes on from the files of the stages before it."""
    whole, _ = run
    out = tmp_path / "b"
    for stage in STAGES:
        p = subprocess.Popen(command("--out", out, *(["--resume"] if out.exists() else [])), stdout=subprocess.PIPE,
                             stderr=subprocess.DEVNULL, text=True, cwd="/")
        for line in p.stdout:
            if line.strip() == stage:
                time.sleep(0.3)
                os.kill(p.pid, signal.SIGKILL)
                break
        assert p.wait() == -signal.SIGKILL, f"never reached {stage}"
        p.stdout.close()
        done = list(json.loads((out / "stages.json").read_text())) if (out / "stages.json").exists() else []
        assert STAGES.index(stage) <= len(done) <= STAGES.index(stage) + 1 and done == STAGES[:len(done)]
    last = train("--out", out, "--resume")
    assert last.returncode == 0, last.stderr
    for name in ("table.txt", "curves.csv", "example.txt", "log.csv"):
        assert (out / name).read_text() == (whole / name).read_text(), name
    a, b = (load_file(x / "eval.safetensors") for x in (out, whole))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a if not k.endswith("/seconds"))
    assert not list(out.rglob("*.tmp"))


def one_line_error(done, *words):
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert all(w in done.stderr for w in words), done.stderr


@pytest.mark.parametrize("args, words", [
    (("--task", "chess"), ("--task chess", "calculator")),
    (("--problems", "0"), ("--problems 0",)),
    (("--alpha", "-1"), ("--alpha",)),
    (("--directed", "2"), ("--directed",)),
    (("--H", "3", "--min_steps", "4"), ("--min_steps",)),
    (("--task", "countdown", "--H", "3"), ("--H",)),
    (("--out", "/dev/null/run"), ("--out /dev/null/run",)),
])
def test_bad_flags_are_one_line_errors(args, words, tmp_path):
    one_line_error(train(*(() if "--out" in args else ("--out", tmp_path / "x")), *args), *words)


def test_an_impossible_size_is_a_one_line_error(tmp_path):
    one_line_error(train("--size", "gigantic", "--out", tmp_path / "x"), "--size gigantic", "mini")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_flags(run):
    out, _ = run
    one_line_error(train("--out", out), "--resume")
    one_line_error(train("--out", out, "--resume", "--seed", 5), "--seed")


def test_damaged_weights_in_a_run_are_a_one_line_error(run, tmp_path):
    out = tmp_path / "c"
    shutil.copytree(run[0], out)
    stages = json.loads((out / "stages.json").read_text())
    (out / "stages.json").write_text(json.dumps({k: v for k, v in stages.items() if k != "evaluation"}))
    weights = out / "q_pi" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    one_line_error(train("--out", out, "--resume"), "q_pi/model.safetensors")


def test_seeds_are_averaged_into_one_report(run, tmp_path):
    merged = tmp_path / "merged"
    other = tmp_path / "other"                                                   # a second seed, by changing the first's files
    shutil.copytree(run[0], other)
    one = json.loads((other / "summary.json").read_text())
    one["config"]["seed"], one["base_sampled"] = 1, one["base_sampled"] + 0.5
    (other / "summary.json").write_text(json.dumps(one))

    def merge(*runs):
        return subprocess.run([sys.executable, "-m", "minipav.report", *runs, "--out", merged], capture_output=True, text=True,
                              cwd=ROOT)
    one_line_error(merge(run[0], run[0]), "same seed")
    done = merge(run[0], other)
    assert done.returncode == 0, done.stderr
    two = json.loads((merged / "summary.json").read_text())
    assert two["seeds"] == [0, 1] and abs(two["base_sampled"]["hi"] - two["base_sampled"]["lo"] - 0.5) < 1e-6
    assert {"seed0.curves.csv", "seed1.curves.csv", "q_pi", "accuracy.png"} <= {p.name for p in merged.iterdir()}

"""search.py from the outside, on the smoke run of train.py: its files, its claims, its errors."""
import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import call

import search as cli
from minipav import experiments
from minipav.advantage import theorem_terms
from minipav.report import Curves
from minipav.utils import Fail
from minipav.verdicts import efficiency, spearman

SMALL = ("--problems", "20", "--validation", "2", "--n", "8", "--widths", "1", "2")


def measured(run):
    """The folder of what was measured with these flags (the default ones have run/search)."""
    [folder] = run.glob("search-*")
    return folder


@pytest.fixture(scope="module")
def run(smoke_run, tmp_path_factory):
    """A smoke run of train.py, searched."""
    out = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(smoke_run[0], out)
    done = call("search.py", "--run", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def test_it_leaves_tables_figures_and_a_summary(run):
    out, done = measured(run[0]), run[1]
    files = {p.name for p in out.iterdir()}
    assert {"table.txt", "curves.csv", "by_seed.csv", "summary.json", "main.safetensors", "fig4.png", "fig5a.csv", "fig6a.csv",
            "fig10.csv", "alpha.csv"} <= files
    summary = json.loads((out / "summary.json").read_text())
    assert summary["test_problems"] == 20 and summary["alpha"][0] in [i / 10 for i in range(11)] and summary["verdicts"]
    assert str(out) in done.stdout and "beam, exact Q" in done.stdout
    for row in csv.DictReader((out / "curves.csv").open()):
        assert 0 <= float(row["lo"]) <= float(row["accuracy"]) + 1e-9 <= float(row["hi"]) + 2e-9 <= 1 + 3e-9


def test_budgets_hold_for_every_method(run):
    """N samples cost N times one; a re-ranker is never above pass@N; a beam's answer is among its candidates."""
    curves = Curves.load(measured(run[0]) / "main.safetensors")
    n, best, tokens = curves.by["base:pass"]
    assert np.allclose(tokens, n[:, None] * tokens[:1], rtol=1e-5) and (np.diff(best.mean(1)) >= -1e-6).all()
    for m, (_, acc, _) in curves.by.items():
        assert (acc <= curves.also[m]["passed"] + 1e-6).all() if "majority" not in m else True
        assert (curves.also[m]["scored"] > 0).all() == (m not in ("base:pass", "base:greedy", "base:sample", "base:majority",
                                                                   "base:oracle_beam")) or "oracle" in m


def test_what_was_measured_is_not_measured_again(run):
    out, _ = run
    before = (measured(out) / "summary.json").read_text()
    again = call("search.py", "--run", out, *SMALL)
    assert again.returncode == 0 and again.stdout.count("measured before") == 3
    assert json.loads((measured(out) / "summary.json").read_text())["verdicts"] == json.loads(before)["verdicts"]


def test_all_makes_every_figure(run, tmp_path, monkeypatch):
    """But for the verifiers that are trained on other data, which take minutes; and few provers at few states."""
    out = tmp_path / "run"
    shutil.copytree(run[0], out)
    monkeypatch.delitem(cli.EXPERIMENTS, "data")
    monkeypatch.setattr(experiments, "KS", (1, 2, 4))
    monkeypatch.setattr(experiments.logged_values, "__defaults__", (10, 4))
    monkeypatch.setattr(sys, "argv", ["search.py", "--run", str(out), *SMALL, "--problems", "5", "--all",
                                      "--out", str(tmp_path / "out")])
    cli.main()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"best_k", "prover_rank_correlation", "gain_by_prover_points", "compute_efficiency"} <= set(summary)
    assert {"fig5bc.png", "theorem.csv"} <= {p.name for p in (tmp_path / "out").iterdir()} and len(summary["verdicts"]) == 8


def test_alpha_zero_is_the_q_beam_to_the_token(run, tmp_path):
    """With any prover."""
    out = tmp_path / "run"
    shutil.copytree(run[0], out, ignore=shutil.ignore_patterns("search*"))
    done = call("search.py", "--run", out, *SMALL, "--alpha", 0, "--prover", "strong", "--method", "q_beam", "pav_beam")
    assert done.returncode == 0, done.stderr
    curves = Curves.load(measured(out) / "main.safetensors")
    for a, b in zip(curves.by["base:q_beam"], curves.by["base:pav_beam"]):
        assert np.array_equal(a, b)


def test_show_prints_every_candidate_with_its_values(run):
    done = call("search.py", "--run", run[0], "--show", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Q^mu") == 2 and done.stdout.count("answer: ") == 2 and "  *" in done.stdout


def test_bad_calls_are_one_line_errors(run, tmp_path, monkeypatch):
    half, foreign, damaged = (tmp_path / name for name in ("half", "foreign", "damaged"))
    half.mkdir()
    (half / "config.json").write_text((run[0] / "config.json").read_text())
    (half / "stages.json").write_text(json.dumps({"policies": {}}))
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model": "other"}')
    (foreign / "stages.json").write_text('{"evaluation": {}}')
    shutil.copytree(run[0], damaged)
    (damaged / "q_pi" / "model.safetensors").write_bytes(b"no weights")
    (measured(damaged) / "main.json").unlink()
    for args, words in (((tmp_path / "nothing",), "python train.py"), ((half,), "has not finished"), ((foreign,), "config.json"),
                        ((damaged, *SMALL), "q_pi"), ((run[0], "--prover", "bo0"), "--prover bo0"),
                        ((run[0], "--alpha", -1), "--alpha"), ((run[0], "--n", 0), "--n 0"), ((run[0], run[0]), "--out"),
                        ((run[0], run[0], "--out", tmp_path / "o"), "differ in their seed"),
                        ((run[0], "--out", "/dev/null/x"), "cannot make")):
        monkeypatch.setattr(sys, "argv", ["search.py", "--run", *map(str, args)])
        with pytest.raises(Fail, match=words) as e:
            cli.main()
        assert "\n" not in str(e.value)


def test_compute_efficiency_in_both_readings():
    """The ORM is right .1 .2 .3 of the time at 10, 20, 40 tokens and does not get better by 80; the beam of width 1 .2 at 15, of
    width 2 .3 at 30, which N = 4 needs 40 tokens for and N = 8 80."""
    orm = np.array([1, 2, 4, 8]), np.array([[.1, .2, .3, .3]]), np.array([[10., 20, 40, 80]])
    pav = np.array([1, 2]), np.array([[.2, .3]]), np.array([[15., 30]])
    e = efficiency(orm, pav)
    assert e["largest N"] == {"best_of": 8, "tokens": 2.67, "N": 1.33} and e["where it saturates"]["tokens"] == 1.33
    assert efficiency(orm, (pav[0], pav[1] / 2, pav[2]))["largest N"]["tokens"] is None


def test_rank_correlation_and_theorem_terms():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1) and spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)       # ties share their rank
    q, pi = torch.rand(50, 6), torch.full((50, 6), 1 / 6)
    d, al, _ = theorem_terms(q, q, pi)
    assert torch.isclose(d, al) and theorem_terms(q * 0 + 0.3, q, pi)[0] < 1e-12

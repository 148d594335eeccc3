"""The mechanism: what a beam's candidates say, gains by hand, and the whole of it on the smoke run."""
import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import WalkPolicy, even, fails, run_main

from minipav.paper import mechanism, mechanism_report, noise, prediction
from minipav.paper.claims import MECHANISM
from minipav.paper.mechanism import GRID
from minipav.paper.mechanism_report import COLUMNS, gains, read
from minipav.run import Run
from minipav.search.measure import Bench, Cell
from minipav.search.score import SCORES, Search
from minipav.tasks.calculator import Calculator, apply
from minipav.tokenizer import encode_rows, synthetic_encoding
from minipav.traces import Env
from minipav.verifier import ExactValues, train_verifier


def test_sums_of_squares():
    x, by = pd.Series([1.0, 3.0, 5.0, 5.0, 8.0]), [pd.Series([0, 0, 1, 1, 2])]
    assert prediction.spread_within(x, by) == (2.0, 2.0)
    squares, free = prediction.spread_within(x, [pd.Series([0] * 5)])
    assert squares / free == pytest.approx(np.var(x, ddof=1))


def test_a_beam_by_exact_values_makes_no_error():
    """Then the child's value says all, and the parent's nothing."""
    task = Calculator(H=5, min_steps=3)
    env, problems = Env(task, synthetic_encoding(task.phrases)), task.problems("validation", 10, 0)
    env.problems = lambda split, n: problems
    s = Search(env, WalkPolicy(env, problems), SCORES["exact"])
    bench = SimpleNamespace(run=env, search=lambda cell: s)
    found = prediction.describe_beam(bench, Cell("beam", "exact", (4,), split="validation", problems=10))
    assert found["error"] == found["optimism"] == 0 and found["r2"] == pytest.approx(1, abs=1e-3)
    assert found["parent_weight"] == pytest.approx(0, abs=1e-3) and 1 <= found["ancestors"] <= 4


def test_shared_errors_are_found(monkeypatch):
    """Candidates of two parents a level: the error is the parent's, or each child's own."""
    rng, n = np.random.default_rng(0), 4000
    c = pd.DataFrame({"owner": np.arange(n) // 8, "parent": np.arange(n) // 4, "grandparent": 0, "batch": 0,
                      "depth": 3, "true": rng.random(n), "q_before": rng.random(n), "kept": True})
    own, parents = rng.normal(size=n), rng.normal(size=n // 4).repeat(4)
    for error, low, high in ((own, -0.05, 0.05), (parents, 0.99, 1.0), (own + parents, 0.4, 0.6)):
        monkeypatch.setattr(prediction, "candidates", lambda *_, e=error: c.assign(q=c.true + e))
        assert low <= prediction.describe_beam(None, None)["shared_error"] <= high
    c["q"], c["kept"], c["grandparent"] = rng.random(n), rng.random(n) < 0.5, (np.arange(n) % 4 == 0) * 1
    c["true"] = c.q - 0.5 * c.q_before
    monkeypatch.setattr(prediction, "candidates", lambda *_: c.copy())
    found, error = prediction.describe_beam(None, None), 0.5 * c.q_before
    assert found["parent_weight"] == pytest.approx(-0.5, abs=1e-3)
    assert found["optimism"] == pytest.approx(error[c.kept].mean() - error.mean(), abs=1e-4)
    c["kept"] = True
    assert prediction.describe_beam(None, None)["ancestors"] == 1.6             # 2 and 6 of 8: 64 / 40


def test_rollouts_stand_in_for_exact_values(smoke_run, monkeypatch):
    bench = Bench(Run.open(smoke_run[0], "cpu"))
    cell = Cell("beam", "q_pi", (2,), split="validation", problems=20)
    exact = prediction.candidates(bench, cell)
    monkeypatch.setattr(type(bench.run.task), "exact", None)
    monkeypatch.setattr(type(bench.run.task), "outcome", even)
    sampled = prediction.candidates(bench, cell, n_mc=4)
    assert len(exact) == len(sampled) and (sampled.true * 4 % 1 == 0).all()
    assert 0 < sampled.true.mean() < 1 and (sampled.true[sampled.ended] % 1 == 0).all()


def test_errors_are_inherited_up_to_a_step():
    """Brothers share their parent's error and no fresh one; without errors the values are exact."""
    task = Calculator(H=6, min_steps=5)
    env, problems = Env(task, synthetic_encoding(task.phrases)), task.problems("validation", 30, 0)

    def children(**sigma):
        values = noise.Noisy(env, problems, "cpu", **sigma, seed=0)
        exact = ExactValues(env, problems, "cpu")
        for step in range(1, 6):
            rows = torch.arange(len(values.rows)).repeat_interleave(2 if step < 3 else 1)
            lines = []
            for r in rows.tolist():                             # the first legal operation, or the second
                i, text = values.rows[r]
                v = task.values(problems[i], task.steps(text)[:-1] if text else [])[-1]
                ways = [(s, x, apply(s, v, x)) for s, x in zip("+-*/", problems[i].ops) if apply(s, v, x)]
                s, x, y = ways[len(lines) % len(ways)]
                lines.append(f"{s}{x} = {y}\n")
            tokens, lengths = encode_rows(env.enc, lines)
            values, exact = values.children(rows, tokens, lengths), exact.children(rows, tokens, lengths)
            known = (exact.q < 1e-4) | (exact.q > 0.999)        # hardly any error there
            yield step, torch.where(known, torch.nan, values.q.logit() - exact.q.logit())

    def both(a, b):
        rows = ~(a.isnan() | b.isnan())
        assert rows.sum() > 20
        return a[rows], b[rows]
    for _, error in children(inherited=0.0, fresh=0.0):
        assert error.nan_to_num().abs().max() < 1e-2
    steps = dict(children(inherited=1.0, fresh=0.0))
    three, four = both(steps[3], steps[4])
    assert torch.allclose(three, four, atol=1e-2) and 1.2 < three.std() < 2.3
    assert 0.6 < steps[1][~steps[1].isnan()].std() < 1.4
    three, four = both(*[dict(children(inherited=0.0, fresh=1.0))[h] for h in (3, 4)])
    assert abs(np.corrcoef(three, four)[0, 1]) < 0.4 and 0.6 < four.std() < 1.4


def test_noise_is_told_as_it_was_put_in(tmp_path, monkeypatch):
    """And gains are over the beam by Q^pi with the same errors."""
    seen = []
    monkeypatch.setattr(noise, "search_width", lambda s, *_: seen.append(s) or SimpleNamespace(right=[1.0]))
    bench = SimpleNamespace(run=SimpleNamespace(problems=lambda *a: a, seed=hash),
                            search=lambda cell: SimpleNamespace(cell=cell))
    rows = [*noise.noise(bench, 2, 3)]
    for (inherited, fresh, *how, right), s in zip(rows, seen, strict=True):
        assert (inherited, fresh) == tuple(s.exact.keywords[k] for k in ("inherited", "fresh"))
        assert how == [s.cell.score, s.cell.alpha, s.cell.quota] and right == "1" and s.verifier is None
    assert {r[:2] for r in rows} == {(x, y / 2) for x in noise.SIGMAS for y in noise.SIGMAS}
    (tmp_path / "mechanism").mkdir()
    with (tmp_path / "mechanism" / "n.csv").open("w") as f:
        csv.writer(f).writerows([mechanism_report.NOISE, *(
            (*x, *how, right) for x, both in (((0., 0.), ("1100", "1110")), ((3., 1.5), ("0000", "1000")))
            for how, right in zip((("q_pi", 0., "none"), ("effective", .5, "none")), both))])
    gained = mechanism_report.noise_gains([(SimpleNamespace(out=tmp_path), None)], "n")
    assert [max(x["mean"] for x in g.values()) for g in gained.values()] == [25, 25]


def test_a_gain_is_the_mean_over_verifiers_of_a_range():
    m = object.__new__(mechanism_report.Mechanism)
    m.facts = {"a": {"auc": 0.8}, "b": {"auc": 0.7}, "c": {"auc": 0.9}}
    m.by = {k: {"alpha": np.full(1001, x)} for k, x in zip("abc", (1.0, 3.0, 10.0))}
    assert m.mean("log-odds") is None
    [claim] = [c for c in MECHANISM if c.key == "weak_verifier_alpha_gain"]
    assert {k: x["mean"] for k, x in claim.measure(m).items()} == {"": 2, "above .86": 10}


def test_gains_by_hand(tmp_path):
    """alpha is that of the most right on validation; gains are test outcomes less those of Q^pi."""
    def row(split, score, alpha, quota, right, method="beam"):
        return split, method, score, alpha, quota, 8, right.count("1") / 4, 0, right
    rows = []
    for split in ("validation", "test"):
        for quota in ("none", "parent", "state"):
            rows.append(row(split, "q_pi", 0.0, quota, "1000" if quota == "none" else "1100"))
            for x in GRID["effective"]:
                good = x == 2.0 if split == "validation" else True
                rows.append(row(split, "effective", x, quota, "1110" if good else "1000"))
            rows += [row(split, "log_odds", x, quota, "0000") for x in GRID["log_odds"]]
        rows += [row(split, "advantage", 0.0, "none", "0001"), row(split, "q_pi", 0.0, "", "1111", "dvts")]
    for name, quotas in (("v", ("none", "parent", "")), ("v-state", ("state",))):
        with (tmp_path / f"{name}.csv").open("w") as f:
            csv.writer(f).writerows([COLUMNS, *(r for r in rows if r[4] in quotas)])
    found, alphas, gained, q = gains(read(tmp_path, "v"))
    with_quota = {f"{k}quota": [0, 1, 0, 0] for k in ("", "state ")} | {
        f"{name} given {k}quota": x for k in ("", "state ")
        for name, x in (("alpha", [0, 0, 1, 0]), ("log-odds", [0, 0, 0, 0]))}
    assert {k: v.tolist() for k, v in found.items()} == with_quota | {
        "alpha": [0, 1, 1, 0], "log-odds": [0, 0, 0, 0], "sub-trees": [0, 1, 1, 1],
        "A^mu alone": [-1, 0, 0, 1]}
    assert alphas["alpha"] == alphas["alpha given quota"] == 2.0 and alphas["log-odds"] == 0
    assert gained == 0.5 and q.tolist() == [1, 0, 0, 0]


def test_it_trains_searches_and_reports(smoke_run, tmp_path, monkeypatch):
    got, asked, problems = [], [], Run.problems
    monkeypatch.setattr(Run, "problems", lambda *a: asked.append(a[1:]) or problems(*a))
    monkeypatch.setattr(mechanism, "train_verifier", lambda *a, **k: got.append(a) or train_verifier(
        *a, **k | {"steps": 2}))
    run = shutil.copytree(smoke_run[0], tmp_path / "run")
    names = ("q_pi", "base-10", "base-150-1000traces", "strong-60", "nano-500", "base-250-seer")
    flags = ("--run", run, "--device", "cpu", "--width", 2, "--problems", 6, "--validation", 6, "--noise",
             "--verifiers")
    monkeypatch.setattr(noise, "SIGMAS", (0.0, 3.0))
    monkeypatch.setattr(noise, "SCORES", noise.SCORES[:5:2])
    told = run_main(mechanism, *flags, *names)
    summary = json.loads((run / "mechanism" / "summary.json").read_text())
    assert set(summary["verifiers"]) == set(names) and "mechanism.png" in told
    assert {p.name for p in (run / "mechanism").iterdir()} >= {
        "mechanism.csv", "mechanism_verifiers.csv", *(f"{n}-w2.csv" for n in names)}
    rows = list(csv.DictReader((run / "mechanism" / "base-10-w2.csv").open()))
    assert sum(r["split"] == "validation" for r in rows) == 2 * (1 + sum(map(len, GRID.values())))
    assert all(len(r["right"]) == 6 for r in rows)
    assert set(asked) == {("validation", 6), ("test", 6)}
    assert asked.count(("validation", 6)) == 6 * (2 * 8 + 8 + 2), "what alpha is chosen on"
    opened = Run.open(run, "cpu")
    assert [len(a[1]) for a in got[:2]] == [len(opened.traces("base_train")), 1000]
    assert torch.equal(got[2][0].embed.weight, opened.model("strong").embed.weight)
    assert opened.model("mechanism/base-250-seer").config.target == "seer"
    opened.close()
    assert run_main(mechanism, *flags, *names).count("done before") == 19
    assert {r["x"] for r in csv.DictReader((run / "mechanism" / "noise.csv").open())} == {"0.0", "3.0"}
    assert "--verifiers" in fails(mechanism, *flags, "base-4")


def test_a_prediction_is_judged_on_the_run_that_did_not_choose_it():
    """The feature that ranks the gains of the other runs best, with its sign there."""
    m = object.__new__(mechanism_report.Mechanism)
    gain, good, bad = [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 3.0, 2.0, 1.0]
    m.facts = {k: {"before": [{"good": g, "bad": b}] * 2, "by_seed": [{"alpha": x}, {"alpha": x}]}
               for k, (x, g, b) in enumerate(zip(gain, good, bad))}
    assert m.correlations()["good"] == pytest.approx([-1, -1])
    assert m.predicted() == {"mean": 1.0, "lo": 1.0, "hi": 1.0}
    for f, x in zip(m.facts.values(), reversed(gain)):
        f["by_seed"][1] = {"alpha": x}                          # the second run is the other way round
    assert m.predicted() == {"mean": -1.0, "lo": -1.0, "hi": -1.0}
    for f in m.facts.values():
        f["before"], f["by_seed"] = f["before"][:1], f["by_seed"][:1]
    assert m.predicted() is None, "of one run nothing can be said"

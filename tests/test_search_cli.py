"""search.py from the outside, on the smoke run of train.py: its files, its claims, its errors."""
import csv
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import fails, run_main

import search
from minipav.model import GPT, GPTConfig
from minipav.paper import experiments
from minipav.prover import weights_of
from minipav.run import Run
from minipav.search import measure
from minipav.search.measure import COLUMNS, Bench, Cell, orders_as_q, rights, simplest_of_the_best
from minipav.search.score import SCORES, Result
from minipav.utils import Fail
from minipav.verifier import train_verifier

pytestmark = pytest.mark.usefixtures("right_at_times")
SMALL = "--device cpu --problems 20 --validation 10 --tuned_at 2 --n 8 --widths 1 2".split()


def records(run):
    return {f"search/{p.stem}": json.loads(p.read_text()) for p in (run / "stages" / "search").glob("*.json")}


def rows(path):
    return list(csv.DictReader(path.open()))


@pytest.fixture(scope="module", autouse=True)
def small_grid():
    with pytest.MonkeyPatch.context() as m:
        m.setattr(search, "ALPHAS", (0.5, 2.0))
        m.setattr(search, "QUOTAS", ("none", "state"))
        yield


@pytest.fixture(scope="module")
def run(smoke_run, right_at_times, small_grid, tmp_path_factory):
    """(a smoke run of train.py, searched; what search.py printed)"""
    out = tmp_path_factory.mktemp("searched") / "run"
    shutil.copytree(smoke_run[0], out)
    return out, run_main(search, "--run", out, *SMALL, "--predict")


# ---- what it leaves

def test_it_leaves_tables_figures_and_a_summary(run):
    out, told = run[0] / "search", run[1]
    assert {"table.txt", "curves.csv", "rows.csv.gz", "summary.json", "fig4.png", "fig5a.csv", "fig6a.csv",
            "tune.csv"} <= {p.name for p in out.iterdir()}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["seeds"] == [0] and len(summary["claims"]) == 7
    assert set(summary["chosen"][0]) == {"q_pi", "effective"}
    assert {"command", "commit", "hardware", "minutes"} <= set(summary)
    assert str(out) in told and "best-of-n, pav" in told.lower(), told
    curves = rows(out / "curves.csv")
    assert len(curves) == 1 + 5 * 4 + 2 * 2 * 2, "each search once, at each of its budgets"
    for row in curves:
        assert 0 <= float(row["lo"]) <= float(row["accuracy"]) + 1e-9 <= float(row["hi"]) + 2e-9 <= 1 + 3e-9
    assert len({row["accuracy"] for row in curves}) > 10


def test_budgets_hold_for_every_method(run):
    """One row for each problem and budget. N samples cost N times one; a re-ranker is never above pass@N; a
    beam's answer is among its candidates; only a score needs a verifier."""
    samples = set()
    for name, record in records(run[0]).items():
        table, spec = rows(run[0] / f"{name}.csv"), record["spec"]
        assert tuple(table[0]) == COLUMNS and len(table) == len(spec["ns"]) * spec["problems"]
        assert [(int(r["n"]), int(r["problem"])) for r in table] == [
            (n, i) for n in spec["ns"] for i in range(spec["problems"])]
        for r in table:
            assert all(r[k] == str(spec[k]) for k in COLUMNS[:8])
            assert (r["split"], r["sample_seed"]) == (spec["split"], str(spec["seed"]))
            right, solved, tokens = (float(r[k]) for k in ("right", "solved", "tokens"))
            assert 0 <= right <= 1 and 0 <= solved <= 1 and tokens >= 1
            assert right <= solved + 1e-6 or spec["method"] == "majority"
            assert (float(r["verifier_tokens"]) > 0) == bool(spec["score"])
            assert bool(r["text"]) <= (spec["method"] in ("beam", "dvts", "greedy"))
        if spec["method"] in ("pass", "majority", "best_of_n"):
            by = {(int(r["n"]), r["problem"]): (float(r["tokens"]), float(r["solved"])) for r in table}
            assert all(t == pytest.approx(n * by[1, i][0]) for (n, i), (t, _) in by.items())
            assert all(s >= by[n // 2, i][1] - 1e-6 for (n, i), (_, s) in by.items() if n > 1)
            samples.add((spec["problems"], spec["seed"], tuple(t for t, _ in by.values())))
    assert len(samples) == 2, "of train.py and of search.py: the same samples for all methods"


def test_what_was_measured_is_not_measured_again(run):
    out, summary = run[0], json.loads((run[0] / "search" / "summary.json").read_text())
    before = {p: p.stat().st_mtime_ns for p in out.glob("search/*-*.csv")}
    again = run_main(search, "--run", out, *SMALL, "--predict")
    after = json.loads((out / "search" / "summary.json").read_text())
    tried = len(search.QUOTAS) * (2 + len(search.ALPHAS))
    assert again.count("done before") >= tried + 8 and before == {p: p.stat().st_mtime_ns for p in before}
    assert all(after[k] == summary[k] for k in ("claims", "chosen", "minutes"))


def test_alpha_and_quota_are_chosen_on_validation_problems(run):
    """Every score with the same grid; first alpha without a quota, then both. No test problem has a part."""
    chosen = json.loads((run[0] / "search" / "summary.json").read_text())["chosen"][0]
    for score, how in chosen.items():
        tried = {}
        for name, r in records(run[0]).items():
            spec = r["spec"]
            if (spec["split"], spec["score"]) == ("validation", score):
                assert (spec["ns"], spec["problems"]) == ([2], 10)
                tried[spec["alpha"], spec["quota"]] = run[0] / f"{name}.csv"
        alphas = [0.0, *search.ALPHAS] if score != "q_pi" else [0.0]
        tried = {(x, q): tried[x, q] for x, q in [
            *((0.0, q) for q in search.QUOTAS), *((x, q) for q in search.QUOTAS for x in alphas[1:])]}
        plain = {k: v for k, v in tried.items() if k[1] == "none"}
        assert [tuple(x) for x in how] == [simplest_of_the_best(plain), simplest_of_the_best(tried)]


def test_the_prediction_is_made_on_validation_problems(run):
    found = json.loads((run[0] / "search" / "summary.json").read_text())["prediction"][0]
    [record] = [json.loads(p.read_text()) for p in (run[0] / "stages").glob("prediction*")]
    assert record["spec"]["cell"]["split"] == "validation" and record["prediction"] == found
    right = {float(r[0]["alpha"]): [float(x["right"]) for x in r] for r in (
        rows(run[0] / "search" / f"{name}.csv") for name in record["spec"]["tables"])
        if (r[0]["score"], r[0]["quota"]) == ("effective", "none")}
    gains = {f"alpha = {x:g}": 100 * (sum(r) - sum(right[0])) / len(r) for x, r in right.items() if x}
    assert gains == {k: pytest.approx(mean, abs=0.01) for k, (mean, _) in found["points"].items()}
    assert found["ancestors"] >= 1 and -1 <= found["shared_error"] <= 1


def test_the_choice_is_the_simplest_within_a_standard_error_of_the_best(tmp_path):
    def table(name, right):
        path = tmp_path / f"{name}.csv"
        with path.open("w") as f:
            w = csv.DictWriter(f, COLUMNS)
            w.writeheader()
            w.writerows(dict.fromkeys(COLUMNS, 0) | {"right": x} for x in right)
        return path
    simple, same = table("simple", [0, 1, 0, 1] * 25), table("same", [1, 0, 1, 0] * 25)
    luck, better = table("luck", [1, 0] * 49 + [1, 1]), table("better", [1, 1, 0, 1] * 25)
    assert rights(luck).mean() == 0.51 and simplest_of_the_best({0: simple, 1: luck}) == 0, ".01 +- .10"
    assert simplest_of_the_best({0: simple, 1: luck, 2: better, 3: same}) == 2
    almost = table("almost", [1, 1, 0, 1] * 24 + [0, 1, 0, 1])
    assert simplest_of_the_best({0: simple, 1: almost, 2: better}) == 1, "one problem of a hundred behind"


def test_equal_searches_are_one():
    """What has no part in the result is in no name: a prover at alpha 0, or where the score uses none."""
    def cell(text, **fields):
        return Cell.parse(text, **fields)
    assert cell("beam:q_pi", prover="bo4", alpha=0.2) == cell("beam:q_pi", prover="weak", alpha=3.0)
    assert cell("beam:effective", prover="bo4") == cell("beam:effective", prover="strong", alpha=0)
    assert cell("beam:effective", alpha=0.2) != cell("beam:effective", alpha=0.2, prover="weak")
    assert cell("beam:advantage", alpha=1.0) == cell("beam:advantage")
    assert cell("beam:advantage") != cell("beam:advantage", prover="weak")
    assert cell("pass", alpha=1.0, prover="weak") == cell("pass")
    assert orders_as_q(cell("beam:effective")) and orders_as_q(cell("beam:log_odds", quota="parent"))
    assert not orders_as_q(cell("mcts:log_odds")) and not orders_as_q(cell("beam:effective", alpha=0.2))
    for text in ("chess", "beam:chess", ":q_pi", ""):
        with pytest.raises(Fail, match="--search") as e:
            cell(text)
        assert all(s in str(e.value) for s in SCORES)


def test_all_makes_every_figure(run, tmp_path, monkeypatch):
    """At toy size: few provers at few states, one data size, and verifiers of two training steps."""
    out, logged = tmp_path / "run", experiments.logged_values
    shutil.copytree(run[0], out)
    monkeypatch.setattr(experiments, "KS", (1, 4, 8))
    monkeypatch.setattr(experiments, "logged_values", partial(logged, states=10, actions=4))
    monkeypatch.setattr(experiments, "train_verifier", lambda *a, **k: train_verifier(*a, **k | {"steps": 2}))
    monkeypatch.setitem(search.EXPERIMENTS, "data", partial(experiments.data_sizes, sizes=(60,), width=1))
    flags = ("--problems", 4, "--n", 4, "--all", "--out", tmp_path / "out")
    run_main(search, "--run", out, *SMALL, *flags)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"fig4.png", "fig5a.png", "fig5bc.png", "fig6a.png", "fig6b.csv", "fig10.csv", "theorem.csv"} <= {
        p.name for p in (tmp_path / "out").iterdir()}
    assert len(summary["claims"]) >= 10 and "stronger" in (tmp_path / "out" / "fig4.csv").read_text()
    where = {c["where"] for c in summary["claims"]}
    assert {"Fig. 5b", "Fig. 5c", "Theorem 3.1"} <= where, where
    terms = {(t["base"], t["prover"]): t for t in summary["experiments"][0]["provers"]["theorem"]}
    d = {k: t["distinguishability"] for k, t in terms.items()}
    assert len({d["base", mu] for mu in ("bo1", "bo4", "bo8", "weak")}) == 4, "of the prover"
    assert terms["base", "bo1"]["alignment"] == pytest.approx(d["base", "bo1"]), "mu = pi"
    assert d["weak", "bo4"] != d["weak", "base"], "best-of-4 of the weaker policy"
    assert not {"Fig. 11", "Fig. 6b", "Fig. 10"} & where, "one run has no spread"


def test_show_prints_every_candidate_with_its_values(run):
    told = run_main(search, "--run", run[0], "--show", 2)
    assert told.count("Q^mu") == 2 and told.count("answer: ") == 2 and "  *" in told


def test_a_cell_has_the_models_that_it_names(run):
    bench = Bench(Run.open(run[0], "cpu"))
    s = bench.search(Cell("beam", "effective", prover="bo8", alpha=0.7, spread=5, quota="parent"))
    assert (s.K, s.alpha, s.spread, s.quota, s.mu_verifier) == (8, 0.7, 5, "parent", None)
    assert s.policy is bench.model("base") and s.verifier is bench.model("q_pi")
    s = bench.search(Cell("beam", "effective", policy="strong", prover="weak", alpha=1.0))
    assert s.policy is bench.model("strong") and s.verifier is bench.model("q_strong")
    assert s.mu_verifier is bench.model("q_weak")
    assert bench.search(Cell("best_of_n", "orm")).verifier is bench.model("orm")
    assert bench.search(Cell("beam", "exact")).verifier is None
    assert bench.search(Cell("beam", "q_pi", verifier="orm")).verifier is bench.model("orm")
    s = bench.search(Cell("beam", "effective", policy="strong", prover="bo8", alpha=1.0))
    assert (s.K, s.mu_verifier) == (8, None), "best-of-8 of the policy itself"


def test_a_cell_is_searched_on_its_own_problems_and_samples(run, tmp_path, monkeypatch):
    out, asked, problems = shutil.copytree(run[0], tmp_path / "run"), [], Run.problems
    monkeypatch.setattr(Run, "problems", lambda *a: asked.append(a[1:]) or problems(*a))
    bench = Bench(Run.open(out, "cpu"))
    bench.measure(Cell("pass", split="validation", problems=7))
    assert asked == [("validation", 7)]
    assert len({id(bench.search(Cell("pass", policy=p, split=s)).memo) for p in ("base", "weak")
                for s in ("test", "validation")}) == 4


def test_each_search_is_measured_as_it_was_tuned(monkeypatch):
    """Best-of-N by PAV with the beam's alpha; the plain group without a quota."""
    monkeypatch.setattr(search, "tune", lambda *a: ([(0.5, "none"), (2.0, "state")], []))
    monkeypatch.setattr(search, "Bench", lambda run: SimpleNamespace(run=run, models={}, measure=lambda c: c))
    run = SimpleNamespace(out="x", config={"K": 7, "alpha": 0.2})
    searches = [Cell.parse(x) for x in ("beam:effective", "best_of_n:effective")]
    tables, _ = search.measure(run, search.Flags(), searches)
    assert [(g, c.method, c.alpha, c.quota, c.prover) for g, c in tables] == [
        ("main", "beam", 0.5, "none", "bo7"), ("tuned", "beam", 2.0, "state", "bo7"),
        ("main", "best_of_n", 0.5, "", "bo7")]


def test_the_flags_are_those_of_the_searches(run, monkeypatch):
    seen = []
    monkeypatch.setattr(search, "measure", lambda run, a, wanted: seen.append(wanted) or ([], {}))
    monkeypatch.setattr(search, "report_search", lambda *a: None)
    flags = "--run", run[0], *SMALL, "--search", "beam:q_pi", "--spread", 5
    run_main(search, *flags, "--policy", "weak", "--seeds", 3, 4)
    run_main(search, *flags, "--verifier", "q_weak")
    assert [[(c.policy, c.spread, c.seed, c.verifier, c.ns) for c in cells] for cells in seen] == [
        [("weak", 5, 3, "", (1, 2)), ("weak", 5, 4, "", (1, 2))], [("base", 5, 0, "q_weak", (1, 2))]]


def test_the_errors_of_fig_10_are_at_thresholds_of_validation_problems(monkeypatch):
    """By Q^pi the test problems' values all lie below the threshold; with A^mu they are told apart."""
    q = {"validation": [0.6, 0.8, 0.2, 0.4], "test": [0.3, 0.3, 0.1, 0.1]}
    right = torch.tensor([1., 1, 0, 0])
    q = {k: torch.stack([right, torch.tensor(x)], 1) for k, x in q.items()}
    monkeypatch.setattr(experiments, "seed_rollouts", lambda _, run, split, *a: SimpleNamespace(
        tokens=split, ends=None, reward=right))
    monkeypatch.setattr(experiments, "values", lambda _, policy, mus, split, ends: (
        q[split], {"bo2": torch.stack([torch.zeros(4), right], 1)}))
    task = SimpleNamespace(max_steps=9)
    bench = SimpleNamespace(model=str, run=SimpleNamespace(problems=lambda split, n: split, task=task))
    flags = SimpleNamespace(problems=4, seeds=[0])
    assert experiments.errors_by_step(bench, flags, "bo2", 1.0)[1] == {"effective": [0.0], "q_pi": [0.5]}


def test_n_samples_are_a_budget_whatever_n_is_and_what_is_given_is_not_tuned(run, tmp_path):
    flags = "--n", 6, "--quota", "none", "--search", "pass", "beam:q_pi"
    run_main(search, "--run", run[0], *SMALL, *flags, "--out", tmp_path)
    found = [*csv.DictReader((tmp_path / "curves.csv").open())]
    assert {r["n"] for r in found if r["search"] == "pass"} == {"1", "2", "4", "6"}
    assert {r["search"] for r in found} == {"pass", "beam:q_pi"} and {r["group"] for r in found} == {"main"}


def test_a_table_of_rows_has_no_nul():
    assert [*measure.rows(Cell("greedy"), [Result(*torch.zeros(4, 1), ["a\0"])])][0][-1] == "a\ufffd"


# ---- what is wrong

def test_a_verifier_is_one_and_of_this_task(run, tmp_path):
    assert "--verifier" in fails(search, "--run", run[0], *SMALL, "--verifier", "base")
    other = GPT(GPTConfig(300, 128, n_layer=1, n_head=2, n_embd=16)).as_verifier("bce", 1)
    other.save(tmp_path / "mu")
    assert "300 tokens" in fails(search, "--run", run[0], *SMALL, "--alpha", 0.5, "--prover", tmp_path / "mu")


def test_a_result_depends_on_the_weights_of_a_prover_that_is_a_folder(run, tmp_path):
    assert weights_of("bo4") == weights_of("weak") == weights_of("") == {}
    (tmp_path / "model.safetensors").write_bytes(b"one")
    one = weights_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert one and weights_of(tmp_path) != one
    mu = shutil.copytree(run[0] / "q_pi", tmp_path / "mu")
    cell = Cell("beam", "q_mu", (2,), prover=str(mu), problems=20)
    first = Bench(Run.open(run[0], "cpu")).measure(cell)
    shutil.copytree(run[0] / "orm", mu, dirs_exist_ok=True)
    second = Bench(Run.open(run[0], "cpu")).measure(cell)
    assert second != first and rows(second) != rows(first)


def test_bad_runs_are_one_line_errors(run, tmp_path):
    half, foreign, damaged = (tmp_path / name for name in ("half", "foreign", "damaged"))
    (half / "stages").mkdir(parents=True)
    (half / "config.json").write_text((run[0] / "config.json").read_text())
    (half / "stages" / "policies.json").write_text("{}")
    shutil.copytree(half, foreign)
    (foreign / "config.json").write_text('{"model": "other"}')
    shutil.copytree(run[0], damaged)
    (damaged / "q_pi" / "model.safetensors").write_bytes(b"no weights")
    for path in [*damaged.glob("stages/search/beam-q_pi*"), *damaged.glob("search/beam-q_pi*")]:
        path.unlink()
    other = Path(shutil.copytree(run[0], tmp_path / "other"))
    for args, words in (((tmp_path / "nothing",), "python train.py"), ((half,), "has not finished"),
                        ((foreign,), "config.json"), ((damaged, *SMALL), "q_pi"), ((run[0], other), "--out"),
                        ((run[0], other, "--out", tmp_path / "o"), "differ in their seed"),
                        ((run[0], run[0]), "--run")):
        assert words in fails(search, "--run", *args), args

"""Statistics and claims: curves with paired intervals, comparisons by hand, and what each verdict means."""
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_main
from matplotlib.axes import Axes

from minipav.files import write_json
from minipav.paper import figures, quantities, report, rl_report
from minipav.paper.claims import DIDACTIC, RL, SEARCH, THEORY, Claim, judge, sentence
from minipav.paper.statistics import (
    Curve,
    Curves,
    at_tokens,
    bootstrap,
    first_reach,
    interval,
    load,
    pass_at_n,
    spearman,
    spread,
    tokens_to_reach,
)
from minipav.search.measure import COLUMNS
from minipav.utils import Fail


def x(mean, lo, hi):
    return {"mean": mean, "lo": lo, "hi": hi}


BY_HAND = {"best_of_n:orm": ([.3, .6], [100, 200]), "best_of_n:q_pi": ([.3, .6], [100, 200]),
           "beam:q_pi": ([.5, .7], [50, 100]), "beam:effective": ([.6, .8], [50, 100]),
           "pass": ([.5, .7], [100, 200])}


def table(path, shift=0.0, problems=50, curves=BY_HAND, **fixed):
    """A table of rows as a search writes them: these accuracies at these tokens for every problem."""
    rows = []
    for search, (acc, tokens) in curves.items():
        method, _, score = search.partition(":")
        row = {"method": method, "score": score, "policy": "base", "prover": "", "alpha": 0.0,
               "spread": 12, "quota": "", "split": "test", "sample_seed": 0, "verifier_tokens": 0, "text": "",
               **fixed}
        rows += [{**row, "n": n, "problem": i, "right": a + shift, "solved": a + shift, "tokens": t}
                 for n, a, t in zip((4, 8), acc, tokens) for i in range(problems)]
    pd.DataFrame(rows)[list(COLUMNS)].to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Two made-up runs: ORM .3 and .6 at 100 and 200 tokens, PAV .6 and .8 at half of them, on average; one
    run is .1 below and the other .1 above that."""
    tmp = tmp_path_factory.mktemp("rows")
    tables = {k: [("main", table(tmp / f"{k}.csv", shift))] for k, shift in enumerate((-.1, .1))}
    return report.Searched(tables, [{}, {}])


def test_paired_rows_by_hand(searched):
    """At the tokens of N samples, where a search's budgets go so far; without a beam there, no points over
    it."""
    found = {tuple(r[1:4]): r[4:] for r in searched.paired()}
    assert set(found) == {(f"best_of_n:{v}", "", n) for v in ("orm", "q_pi") for n in (4, 8)} | {
        (f"beam:{v}", "", 4) for v in ("q_pi", "effective")}
    acc, _, _, over_orm, lo, hi, over_beam, _, _ = found["beam:effective", "", 4]
    assert [acc, over_orm, lo, hi, over_beam] == pytest.approx([.8, 50, 50, 50, 10], abs=1e-3)
    assert found["best_of_n:q_pi", "", 8][3:] == pytest.approx((0, 0, 0, None, None, None))


def test_each_claim_measures_what_it_says(tmp_path):
    """Plain claims the plain beam, those of tuned beams the tuned one, each against its own rival."""
    plain = BY_HAND | {"pass": ([.5, .95], [100, 200]), "greedy": ([.2, .2], [9, 9])}
    tuned = {"beam:q_pi": ([.5, .85], [50, 100]), "beam:effective": ([.4, .9], [50, 100])}
    s = report.Searched({0: [(group, table(tmp_path / f"{group}.csv", curves=curves))
                             for group, curves in (("main", plain), ("tuned", tuned))]}, [{}])
    got = {c.key: v["mean"] for c in SEARCH[:7] for v in c.measure(s).values() if v}
    assert got == pytest.approx(dict(
        search_plain_minus_orm=50, search_plain_token_ratio=4, search_pav_minus_q=10, search_exploration=30,
        search_pav_minus_orm=60, search_token_ratio=3.03, search_pav_minus_q_tuned=5), abs=0.02)
    h = report.headline(s)
    assert [h["best_search"][k] for k in ("what", "n", "mean")] == ["beam, PAV, tuned", 8, 0.9], "no oracle"
    assert [h[k]["mean"] for k in ("sft_greedy", "sft_sampled", "pass_at_8")] == [0.2, 0.5, 0.95]


# ---- statistics

def test_comparisons_at_equal_tokens(searched):
    orm, pav = searched.main("best_of_n:orm"), searched.main("beam:effective")
    assert orm.acc.shape == (1001, 2) and orm.n.tolist() == [4, 8] and np.allclose(orm.acc[0], [.3, .6])
    assert orm.acc[1:, 1].std() > 0.03, "the runs are resampled too"
    assert np.allclose(np.diff(orm.acc, axis=1), .3), "in pairs: the same runs for every point"
    for base in ("best_of_n:orm", "best_of_n:q_pi"):
        ahead = quantities.ahead(searched, "beam:effective", base)
        assert ahead == {"N = 4": x(50.0, 50.0, 50.0), "N = 8": None}, "200 tokens: no beam"
    assert quantities.token_ratio()(searched) == {"": x(4.0, 4.0, 4.0)}
    level = np.full(1001, 50 * 2 ** 0.5)
    assert np.allclose(at_tokens(pav, level)[0], 0.7) and np.isnan(at_tokens(pav, np.full(1001, 49.)))[0]
    assert np.isclose(at_tokens(pav, np.full(1001, 104.))[0], 0.8)
    assert np.isnan(at_tokens(pav, np.full(1001, 106.))[0])
    falls = pav._replace(acc=pav.acc[:, ::-1])
    assert np.isclose(at_tokens(falls, np.full(1001, 100.))[0], 0.8), "it need not spend its whole budget"
    assert np.isnan(tokens_to_reach(orm, np.full(1001, 0.9))[0])
    assert np.isclose((tokens_to_reach(orm, pav.acc[:, 0]) / pav.tokens[:, 0])[0], 4)  # .6: 200, not 50
    assert np.isnan(tokens_to_reach(orm, pav.acc[:, 1])[0])     # .8 is out of the ORM's reach
    found = quantities.exploration(searched)
    assert found["width 8"]["mean"] == pytest.approx(30) and found["width 4"] is None   # 50 tokens: no sample


def test_token_ratio_where_the_orm_does_not_get_better():
    """The ORM is right .1 .2 .3 of the time at 10, 20, 40 tokens and not more often at 80; the beam .2 at 15
    and .3 at 30: at the largest N it needs 80 / 30 times fewer tokens, where the curve saturates 40 / 30."""
    def two(rows):
        return np.array([rows, rows])
    orm = Curve(np.array([1, 2, 4, 8]), two([.1, .2, .3, .3]), two([10., 20, 40, 80]), None)
    pav = Curve(np.array([1, 2]), two([.2, .3]), two([15., 30]), None)

    class Made:
        curves = {"best_of_n:orm": orm, "beam:effective": pav}

        def main(self, search):
            return self.curves.get(search)
        tuned = main
    s = Made()
    assert 80 / tokens_to_reach(pav, orm.acc[:, -1])[0] == pytest.approx(2.67, abs=0.005)

    assert quantities.token_ratio()(s)[""]["mean"] == pytest.approx(1.33, abs=0.005)
    s.curves["beam:effective"] = pav._replace(acc=pav.acc / 2)
    assert quantities.token_ratio()(s) == {"": x(0.0, 0.0, 0.0)}      # the beam never gets there
    s.curves["best_of_n:orm"] = orm._replace(acc=0 * orm.acc)
    assert quantities.token_ratio()(s) == {"": None}                  # nor does anything else get anywhere
    s.curves.pop("beam:effective")
    assert not quantities.token_ratio()(s) and not quantities.ahead(s, "beam:effective", "best_of_n:orm")


def test_intervals():
    """A resample in which a number is not defined counts as infinite, and an infinite bound is no bound."""
    assert interval(np.array([1.0] + [0.5] * 90 + [np.nan] * 10)) == {"mean": 1.0, "lo": 0.5, "hi": None}
    assert interval(np.array([np.nan, 1, 1, 1])) is None
    assert interval(np.r_[500.0, np.arange(1001)]) == {"mean": 500.0, "lo": 25.0, "hi": 975.0}
    assert spread([1, 2, 6]) == {"mean": 3.0, "lo": 1.0, "hi": 6.0}


def test_the_bootstrap_covers_the_mean_of_problems_and_pairs_its_columns():
    """The spread over resamples of one run is the standard error over its problems; equal columns stay so."""
    y = np.random.default_rng(5).random(400)
    boot = bootstrap([pd.DataFrame({"a": y, "b": y, "c": 1 - y})])
    assert boot.shape == (1001, 3) and np.isclose(boot["a"][0], y.mean())
    assert boot["a"][1:].std() == pytest.approx(y.std() / 20, rel=0.1)
    assert np.allclose(boot["a"], boot["b"]) and np.allclose(boot["a"], 1 - boot["c"])


def test_curves_are_of_the_searches_that_were_made(tmp_path):
    """A prover or an alpha that a rule chose for each run does not split a curve; one asked for does."""
    one = table(tmp_path / "a.csv", prover="bo4", alpha=0.2)
    two = table(tmp_path / "b.csv", 0.1, prover="bo1", alpha=0.6)
    main = Curves(load({0: [("main", one)], 1: [("main", two)]}))
    assert set(main.by) == {("main", "base", *k.partition(":")[::2], "", "") for k in BY_HAND}
    assert main.get("main", "beam:effective").acc[0] == pytest.approx([.65, .85])
    exact = Curves(load({0: [("exact", one), ("exact", two)]}))
    assert exact.by["exact", "base", "beam", "effective", "bo1", "0.6"].acc[0] == pytest.approx([.7, .9])
    assert exact.get("exact", "beam:effective") is None


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"a,b\n1,2\n", lambda b: b"\x00\xff",
                                    lambda b: b[:700], lambda b: b.replace(b"0.3", b"?")])
def test_damaged_rows_are_one_line_errors(tmp_path, damage):
    """Empty, another table, no text, cut off within a line, a word for a number."""
    rows = table(tmp_path / "rows.csv")
    rows.write_bytes(damage(rows.read_bytes()))
    with pytest.raises(Fail, match="rows.csv") as e:
        report.Searched({0: [("main", rows)]}, [{}])
    assert "\n" not in str(e.value)


def test_pass_at_n_of_counts():
    """1 - C(wrong, N) / C(n, N)."""
    want = 1 - np.prod([(59 - i) / (64 - i) for i in range(8)])
    assert pass_at_n(64, np.array([5., 0, 64]), 8) == pytest.approx([want, 0, 1])
    assert pass_at_n(64, np.array([1., 0]), 64).tolist() == [1, 0]


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 99]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1) and spearman([1, 1, 1], [1, 2, 3]) == 0
    assert spearman([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)   # ties share a rank


def test_sample_efficiency():
    """ORM-RL is best (.3) at iteration 40; PAV-RL has .3 at 15, half way between .2 and .4: 2.67 times."""
    n = np.array([0., 10, 20, 40])
    orm, pav = (Curve(n, np.array([acc]), None, None) for acc in ([.1, .2, .2, .3], [.1, .2, .4, .4]))
    assert first_reach(n, pav.acc, np.array([.3])) == pytest.approx(15)
    assert np.isnan(first_reach(n, orm.acc, np.array([.5]))[0])
    times, falling = quantities.sample_efficiency, orm._replace(acc=orm.acc[:, ::-1])
    assert times(orm, pav) == pytest.approx(40 / 15) and times(pav, orm) == 0
    assert np.isnan(times(falling, pav)), "best at the start"


# ---- verdicts

def verdict(where, measured, of=RL, says=""):
    """The verdict of the claim of this figure or section (with these words) if this was measured."""
    [claim] = [c for c in of if c.where == where and says in c.says]
    found = judge(replace(claim, measure=lambda _: measured), None)
    return found and found["verdict"]


def test_verdicts_of_rl():
    """Each by its own range: above 0, at least 5 times, within 2 points of no difference, below 0."""
    assert verdict("Fig. 7a", {"": x(9, 6, 12)}) == "reproduced"
    assert verdict("Fig. 7a", {"": x(9, -1, 12)}) == "not reproduced"
    assert verdict("Fig. 7b", {"": x(2.9, 2, 3.1)}) == "not reproduced"
    assert verdict("Fig. 7b", {"": x(7, 5.5, None)}) == "reproduced"
    assert verdict("Fig. 7b", {"": None}) is None
    assert verdict("derived", {"": x(.2, -1, 1.5)}) == "reproduced"
    assert verdict("section 3", {"": x(3.8, 1.5, 6)}) == "not reproduced"
    assert verdict("section 3", {"": x(.1, -2.5, .2)}) == "not reproduced"
    assert verdict("App. G", {"": x(-8, -11, -5)}) == "reproduced"
    assert verdict("App. G", {"": x(-1, -3, 1)}) == "not reproduced"
    three = {"PAV-RL over ORM-RL": x(5, 2, 8), "PAV-RL over SFT": x(4, 1, 7), "SFT over ORM-RL": x(1, -2, 4)}
    assert verdict("Fig. 8a", three, RL, "the higher") == "partly"


def test_verdicts_of_searches_the_example_and_the_theory():
    points = {"N = 4": x(14, 12, 16), "N = 128": x(1, -1, 3)}
    assert verdict("Fig. 4", points, SEARCH, "beats") == "partly"
    assert verdict("Fig. 4", {"": x(1.5, 0, 2.2)}, SEARCH, "fewer tokens") == "not reproduced"
    assert verdict("Fig. 4", {"": x(2.3, 1.8, 2.8)}, SEARCH, "fewer tokens") == "reproduced"
    assert verdict("Fig. 5b", {"bo4 over bo1": x(2, 1, 3), "bo4 over bo32": None}, SEARCH) == "reproduced"
    assert verdict("Fig. 3b", {"a": x(11, 8, 15), "b": x(11, 5, 15)}, DIDACTIC) == "partly"
    assert verdict("Remark 3.1", {"": x(1.98, 1.98, 1.98)}, THEORY, "K^2") == "reproduced"


def test_an_interval_that_touches_a_bound_or_has_none_shows_nothing():
    claim = Claim("it is so", "Fig. 0", lambda m: m)
    margin = replace(claim, lo=-2, hi=2)
    assert judge(claim, {"": x(1, 0.0, 2)})["verdict"] == "not reproduced"
    assert judge(claim, {"": x(1, None, 2)})["verdict"] == "not reproduced"
    assert judge(margin, {"": x(1, -1, None)})["verdict"] == "not reproduced"
    assert judge(claim, None) is judge(claim, {}) is judge(claim, {"a": None}) is None, "not measured"
    told = sentence(judge(claim, {"N = 4": x(1.25, 0.5, None)}))
    assert told == "it is so (Fig. 0)\n    reproduced: N = 4: +1.2 [+0.50, -] points"


def test_what_the_search_claims_measure(monkeypatch):
    """Points of provers over their Q^pi beam, exact values, the rank of the provers, other data, errors by
    step: small tables by hand."""
    def curve(*acc):
        return Curve(np.array([4, 8]), np.array([acc, acc]), None, None)
    theorem = [{"base": "base", "prover": m, "distinguishability": d, "alignment": a}
               for m, d, a in (("bo1", 0.1, 0.1), ("bo4", 0.2, 0.3), ("bo32", 0.3, 0.1))]
    data = [{"rollouts": n, "way": w, "accuracy": a} for w, accs in (
        ("first pits", (.5, .6)), ("n_mc = 4", (.4, .4)), ("n_mc = 16", (.3, .7)))
        for n, a in zip((2000, 16000), accs)]

    class Made:
        curves, fact = object.__new__(Curves), report.Searched.fact
        facts = [{"provers": {"theorem": theorem}, "data": {"rows": data},
                  "steps": {"q_pi": [0.4, 0.3], "effective": [0.3, 0.35]}}] * 2
    Made.curves.by = {("provers", "base", "beam", "q_pi", "", ""): curve(.5, .7),
                      ("provers", "strong", "beam", "q_pi", "", ""): curve(.6, .6),
                      ("provers", "strong", "beam", "effective", "weak", ""): curve(.6, .7),
                      ("exact", "base", "beam", "exact", "", "0.0"): curve(.5, .5),
                      ("exact", "base", "beam", "exact", "bo4", "0.5"): curve(.4, .5)}
    for mu, acc in (("bo1", (.5, .7)), ("bo4", (.6, .8)), ("bo32", (.6, .7))):
        Made.curves.by["provers", "base", "beam", "effective", mu, ""] = curve(*acc)
    s = Made()

    def means(where):
        [claim] = [c for c in SEARCH if c.where == where]
        return {k: v["mean"] for k, v in (claim.measure(s) or {}).items() if v}
    gains = {k: v[0] for k, v in quantities.prover_gains(s).items()}
    assert gains == pytest.approx({"bo1": 0, "bo4": 10, "bo32": 5})
    assert means("Fig. 5b") == pytest.approx({"bo4 over bo1": 10, "bo4 over bo32": 5})
    assert means("Fig. 5c") == pytest.approx({"": 5}) and means("not in the paper") == {"bo4 alpha 0.5": -5}
    assert means("Theorem 3.1") == pytest.approx({"": 1})
    assert means("Fig. 11") == pytest.approx({"2,000 rollouts": 20, "16,000 rollouts": -10})
    assert means("Fig. 6b") == pytest.approx({"few at the smallest size": 10, "many at the largest": 30})
    assert means("Fig. 10") == pytest.approx({"step 1": 10, "step 2": -5})
    drawn = {}
    monkeypatch.setattr(figures, "draw", lambda path, title, panels: drawn.update({path.name: panels}))
    figures.prover_figures(s, Path())
    assert drawn.keys() == {"fig5bc", "theorem"} and not drawn["fig5bc"][2][3], "no ORM to be ahead of"
    Made.facts = Made.facts[:1]
    assert means("Theorem 3.1"), "of which problems are resampled, not runs alone"
    assert not any(means(f) for f in ("Fig. 11", "Fig. 6b", "Fig. 10")), "one run has no spread"
    Made.facts = [{}]
    assert not means("Theorem 3.1")


# ---- trainings

def trained(specs):
    """A Trained of one run that knows these trainings by their flags alone."""
    t = object.__new__(rl_report.Trained)
    t.records = {n: [{"spec": f}] for n, f in specs.items()}
    t.labels, t.trained = list(specs), [n for n in specs if n not in ("sft", "rft")]
    return t


def test_each_training_is_held_against_its_own_control():
    """All flags alike but for the reward and what it alone uses; for a gradient that is 1 + alpha times as
    large, a KL that counts so much less."""
    outcome = dict(reward="outcome", kl=0.03, policy="base", lr=0.1)
    pav = outcome | dict(reward="pav", alpha=1.0, prover="bo4", refresh=0)
    t = trained({
        "outcome": outcome, "pav": pav, "sft": dict(policy="base"), "outcome-kl0.015": outcome | {"kl": .015},
        "pav_sum": pav | {"reward": "pav_sum"}, "pav-alpha3.0": pav | {"alpha": 3.0},
        "outcome-policyweak": outcome | {"policy": "weak"}, "pav-policyweak": pav | {"policy": "weak"},
        "pav-lr0.2": pav | {"lr": 0.2}, "pav_exact": outcome | dict(reward="pav_exact", alpha=1.0)})
    assert [t.control(n) for n in ("pav", "pav-alpha3.0", "pav_exact")] == ["outcome"] * 3
    assert t.control("pav_sum") == "outcome-kl0.015" and t.control("pav-policyweak") == "outcome-policyweak"
    assert t.control("pav-lr0.2") is t.control("sft") is None, "nothing else is alike"
    assert trained({"outcome": outcome, "dpo": dict(reward="dpo", policy="base")}).control("dpo") is None
    assert t.differs("pav-policyweak", "pav") == {"policy"} and t.differs("pav", "outcome") == set()
    assert trained({"pav": pav, "o": outcome | {"kl": 0.006}}).fair("pav") == "o"
    weak = pav | dict(prover="weak")
    assert trained({"pav": weak, "o": outcome | {"kl": 0.015}}).fair("pav") is None, "not boK"


def test_what_the_rl_claims_measure():
    """pass@N in the end, over the control, one with a KL that weighs as little, the best one, the start."""
    outcome = dict(reward="outcome", kl=0.03, policy="base")
    pav = outcome | dict(reward="pav", alpha=1.0, prover="bo4")
    t = trained({"outcome": outcome, "fair": outcome | {"kl": 0.006}, "weak": outcome | {"policy": "weak"},
                 "pav": pav, "sft": dict(policy="base")})
    ends = {("pav", 1): .3, ("outcome", 1): .2, ("fair", 1): .25, ("weak", 1): .9, ("pav", 64): .5,
            ("outcome", 64): .6, ("sft", 64): .9}
    t.end = lambda n, N=1: np.full(9, ends[n, N]) if (n, N) in ends else None
    of = [quantities.over("pav"), quantities.over("pav", "fair"), quantities.over_best]
    assert [f(t)[""]["mean"] for f in of] == pytest.approx([10, 5, 5])
    assert quantities.over("pav", "rft")(t) == {}, "not measured"
    assert {k: v["mean"] for k, v in quantities.pass_64(t).items()} == pytest.approx(
        {"PAV-RL over ORM-RL": -10, "PAV-RL over SFT": -40, "SFT over ORM-RL": 30})
    points = dict(rl_pav_minus_orm=10, rl_pav_minus_orm_fair=5, rl_pass64_pav_minus_orm=-10,
                  rl_pav_over_best_orm=5)
    assert {c.key: c.measure(t)[""]["mean"] for c in RL if c.key in points} == pytest.approx(points)
    t.curve = lambda n: Curve(np.array([0, 8]), np.full((9, 2), 0.5), None, None)
    t.before = lambda n: (1000.0, 5.0)
    t.logs = {"pav": [pd.DataFrame({"tokens": [0, x], "seconds": [0, 55]}) for x in (50, 70)]}
    assert t.by_tokens("pav").n.tolist() == [1000, 1060], "the data of its verifier included"
    _, tokens, minutes = figures.spent(t, ["pav"])
    assert tokens[3]["PAV-RL"][0] == pytest.approx([1e-3, 1.06e-3]) and minutes[3]["PAV-RL"][0][1] == 1


def test_points_in_no_order_have_no_line(tmp_path, monkeypatch):
    kinds, real = [], Axes.plot

    def plot(ax, x, y, kind, **how):
        kinds.append(kind)
        return real(ax, x, y, kind, **how)
    monkeypatch.setattr(Axes, "plot", plot)
    y = [1, 2, 3], None, None
    figures.draw(tmp_path / "x", "", [("", "", "", {"curve": ([1, 2, 3], *y), "cloud": ([2, 3, 1], *y)})])
    assert kinds == ["o-", "o"]


def test_a_verifier_costs_its_data_and_outcome_reward_what_rft_needs(tmp_path):
    """Tokens and seconds before the first iteration, from the records of train.py."""
    tokens = {"seeds_base": 100, "seeds_weak": 30, "seeds_strong": 40,
              "base_train": 1000, "base_validation": 50, "weak_train": 200, "weak_validation": 10,
              "strong_train": 300, "strong_validation": 20}
    write_json(tmp_path / "config.json", {"q_from": "strong"})
    for name, seconds in (("rollouts", 158.0), ("q_pi", 60.0), ("q_weak", 5.0), ("q_strong", 7.0),
                          ("orm", 3.0)):
        record = dict(seconds=seconds, command="", commit="", hardware="", spec={}, tokens=tokens)
        write_json(tmp_path / "stages" / f"{name}.json", record)
    outcome = dict(reward="outcome", policy="base", no_rft=False)
    pav = outcome | dict(reward="pav", prover="bo4", refresh=0)

    def before(f, **flags):
        t = trained({"it": f | flags})
        t.runs = [tmp_path]
        return t.before("it").tolist()
    share = 158.0 / 1580                                        # seconds a token of the labelled traces
    assert before(outcome) == pytest.approx([100, 100 * share]) and before(outcome, no_rft=True) == [0, 0]
    assert before(pav) == pytest.approx([1050 + 40, 60 + 1090 * share])     # branches start at strong seeds
    assert before(pav, prover="strong") == pytest.approx([1050 + 320, 67 + 1370 * share])
    assert before(pav, policy="strong") == before(pav, prover="strong")
    assert before(pav, policy="weak", prover="base", no_rft=True) == before(pav, no_rft=True)
    assert before(pav, prover="weak") == pytest.approx([1050 + 210 + 40, 65 + 1300 * share])
    abc = before(outcome | dict(reward="abc"), policy="weak", no_rft=True)       # the ORM starts from Q^pi
    assert abc == pytest.approx([1050 + 40, 63 + 1090 * share])
    rollouts = outcome | dict(reward="pav_rollout", prover="bo4", n_mc=4)
    assert before(rollouts) == before(outcome), "it has no verifier"


def test_all_claims_are_collected_in_one_file(tmp_path):
    """Each quantity under its key, that of a folder NAME_OTHER with _OTHER behind it; the didactic example's
    and the theory's, which are plain files, too."""
    two = {"N = 8": x(1, 0.5, 2), "N = 16": x(1, -1, 2)}
    one = judge(Claim("so", "Fig. 4", lambda m: m, key="ahead"), two)
    write_json(tmp_path / "search" / "summary.json", {"claims": [one]})
    write_json(tmp_path / "search_weak" / "summary.json", {"claims": [one]})
    write_json(tmp_path / "bench" / "summary.json", {"rows": 3})
    for name in ("summary.json", "theory.json"):
        (tmp_path / "didactic").mkdir(exist_ok=True)
        shutil.copy(ROOT / "results" / "didactic" / name, tmp_path / "didactic")
    found = json.loads(run_main(report, "--collect", tmp_path) and (tmp_path / "claims.json").read_text())
    assert {"ahead_n8", "ahead_n16", "ahead_n8_weak", "ahead_n16_weak"} < set(found)
    assert found["ahead_n8"] == {"verdict": "reproduced", **x(1, 0.5, 2), "unit": "points", "claim": "so"}
    assert found["ahead_n16"]["verdict"] == "not reproduced" and one["verdict"] == "partly"
    assert {"distinguishability_exponent", "improvement_exponent"} < set(found)
    for name in ("bo8", "alpha_3"):
        shutil.copytree(tmp_path / "search", tmp_path / name)
    run_main(report, "--collect", tmp_path)
    assert {"ahead_n8_bo8", "ahead_n8_alpha_3"} < set(json.loads((tmp_path / "claims.json").read_text()))
    shutil.copytree(tmp_path / "search", tmp_path / "rl")
    with pytest.raises(Fail, match="ahead_n8"):
        run_main(report, "--collect", tmp_path)

"""What does A^mu do in a beam? Verifiers from bad to good, and for each the beam by Q^pi, by Q^pi + alpha
A^mu and by log-odds progress, with and without a quota of relatives, beside independent sub-trees.

    python -m minipav.paper.mechanism                                       # runs/calculator-seed0
    python -m minipav.paper.mechanism --run runs/calculator-seed? --out results/mechanism

Of each verifier, RUN/mechanism/NAME.csv has a row for each search (`right`: a digit a problem), and its stage
what prediction.py measures on validation problems. alpha is chosen there too; gains are on test problems.
"""
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from minipav.data import RECIPES, Collect
from minipav.files import make_folder, write_csv, write_json
from minipav.flags import flag, parse
from minipav.model import GPT
from minipav.paper.figures import draw
from minipav.paper.prediction import describe_beam
from minipav.paper.report import provenance
from minipav.paper.statistics import bootstrap, interval, read_table, spearman
from minipav.run import open_runs
from minipav.search.beam import search_all
from minipav.search.dvts import dvts
from minipav.search.measure import Bench, Cell
from minipav.utils import Fail, main_guard, pick_device, progress, tune_process
from minipav.verifier import train_verifier

COLUMNS = ["split", "method", "score", "alpha", "quota", "width", "accuracy", "tokens", "right"]
ALPHAS, ODDS = (0.5, 1.0, 2.0, 5.0, 10.0), (0.5, 1.0, 3.0)


@dataclass(frozen=True)
class Recipe:
    """How a verifier of Q^pi is trained."""
    init: str                       # a policy, "scratch", or "nano" (scratch and small)
    steps: int
    traces: int = 0                 # of the data; 0: all
    data: str = "base"              # traces of the run, or "paper": fresh ones by that recipe
    seed: int = 0

    @property
    def name(self):
        parts = [self.init, str(self.steps), f"{self.traces}traces" * bool(self.traces),
                 self.data * (self.data != "base"), f"seed{self.seed}" * bool(self.seed)]
        return "-".join(filter(None, parts))


VERIFIERS = [*(Recipe("base", s) for s in (10, 30, 60, 120, 250, 800)), Recipe("base", 120, seed=1),
             Recipe("base", 150, 1000), Recipe("base", 150, 3000), Recipe("base", 250, data="paper"),
             Recipe("strong", 60), Recipe("strong", 250), Recipe("scratch", 250), Recipe("scratch", 800),
             Recipe("nano", 500)]


def cells(a, split):
    """Every search of a verifier."""
    fixed = dict(ns=(a.width,), split=split, problems=a.problems if split == "test" else a.validation)
    for quota in ("none", "parent"):
        yield Cell("beam", "q_pi", quota=quota, **fixed)
        for score, grid in (("effective", ALPHAS), ("log_odds", ODDS)):
            yield from (Cell("beam", score, alpha=x, quota=quota, **fixed) for x in grid)
    yield Cell("beam", "advantage", **fixed)
    yield Cell("dvts", "q_pi", **fixed)


def data_of(run, recipe):
    """Labelled traces that a verifier is trained on."""
    c = run.config
    if recipe.data == "paper":                                  # as many rollouts as the run's own
        problems = run.problems("train", max(2, c["problems"] // 12))
        seeds = {"base": run.traces("seeds_base_train")}
        seeds["base"] = seeds["base"][(seeds["base"].problem < len(problems)).nonzero()[:, 0]]
        collect = Collect(run, problems, n_mc=c["n_mc"], branches=0, q_from="base", prover_rollouts=0,
                          corrupted_fraction=0, pit_traces=c["pit_traces"], pit_threshold=c["pit_threshold"],
                          seed=run.seed("mechanism"), rng=np.random.default_rng(run.seed("mechanism")))
        return RECIPES["paper"](collect, {"base": run.model("base")}, seeds)["base"]
    traces = run.traces("base_train")
    few = torch.randperm(len(traces), generator=torch.Generator().manual_seed(recipe.seed))[:recipe.traces]
    return traces[few] if recipe.traces else traces


def verifier(run, recipe):
    """-> (model, held-out AUC)"""
    c, seed = run.config, run.seed("mechanism", recipe.name)
    init = run.model(recipe.init if recipe.init in ("base", "strong") else "base")
    if recipe.init in ("scratch", "nano"):
        torch.manual_seed(seed)
        small = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=128) if recipe.init == "nano" else {}
        fresh = GPT(replace(init.config, **small)).to(init.device)
        fresh.bf16, init = init.bf16, fresh
    model, report = train_verifier(
        init, data_of(run, recipe), run.traces("base_validation"), steps=recipe.steps,
        batch_size=c["batch_size"], lr_muon=c["lr_muon_verifier"], lr_adamw=c["lr_adamw_verifier"], seed=seed,
        log=run.logger(recipe.name, recipe.steps))
    return model, report.auc


def measure(run, recipe, a):
    """One verifier's searches and what is known beforehand. -> its facts"""
    bench, path = Bench(run), run.out / "mechanism" / f"{recipe.name}.csv"
    bench.models["q_pi"], auc = verifier(run, recipe)
    before = describe_beam(bench, Cell("beam", "q_pi", (a.width,), split="validation", problems=a.validation))
    rows, every = [], [*cells(a, "validation"), *cells(a, "test")]
    with progress(f"{recipe.name} (AUC {auc:.3f}), beams", len(every)) as bar:
        for cell in every:
            how = bench.search(cell), run.problems(cell.split, cell.problems)
            r = search_all(*how, a.width, 0) if cell.method == "beam" else dvts(*how, cell.ns, 0)[0]
            rows.append((cell.split, cell.method, cell.score, cell.alpha, cell.quota, a.width,
                         round(float(r.right.mean()), 4), round(float(r.tokens.mean()), 1),
                         "".join(str(int(x)) for x in r.right)))
            bar.update()
    write_csv(path, COLUMNS, rows)
    return {"auc": round(auc, 4), "before": before, "files": [path]}


# ---- what came of it

def right_of(rows, method, score, alpha=0.0, quota="none"):
    """Right or not (P,) of one search."""
    rows = rows[(rows.method == method) & (rows.score == score)]
    return np.array(list(rows[(rows.alpha == alpha) & (rows.quota == quota)].right.iloc[0]), float)


def gains(path):
    """{name: gain of each test problem}, alphas chosen on the validation problems."""
    rows = read_table(path, COLUMNS, ("split", "method", "score", "quota", "right"))
    by = {s: rows[rows.split == s] for s in ("validation", "test")}

    def chosen(score, grid, quota):
        """The test problems' outcomes with the alpha that is best on validation; 0 is Q^pi."""
        tried = {0.0: "q_pi", **dict.fromkeys(grid, score)}
        best = max(tried, key=lambda x: right_of(by["validation"], "beam", tried[x], x, quota).mean())
        return right_of(by["test"], "beam", tried[best], best, quota), best
    q, q_quota = (right_of(by["test"], "beam", "q_pi", 0.0, k) for k in ("none", "parent"))
    (adv, alpha), (adv_quota, alpha_quota) = (chosen("effective", ALPHAS, k) for k in ("none", "parent"))
    (odds, _), (odds_quota, _) = (chosen("log_odds", ODDS, k) for k in ("none", "parent"))
    return {"alpha": adv - q, "quota": q_quota - q, "alpha given quota": adv_quota - q_quota,
            "log-odds": odds - q, "log-odds given quota": odds_quota - q_quota,
            "sub-trees": right_of(by["test"], "dvts", "q_pi", quota="") - q,
            "A^mu alone": right_of(by["test"], "beam", "advantage") - q}, (alpha, alpha_quota)


class Mechanism:
    """Several runs' verifiers. each {verifier: {gain: (R + 1,)}}, in points."""

    def __init__(self, runs, recipes):
        self.facts, self.by = {}, {}
        for recipe in recipes:
            found = [gains(run.out / "mechanism" / f"{recipe.name}.csv") for run, _ in runs]
            facts = [f[recipe.name] for _, f in runs]
            boot = bootstrap([pd.DataFrame(g) for g, _ in found])
            self.by[recipe.name] = {k: 100 * boot[k].to_numpy() for k in boot}
            self.facts[recipe.name] = {
                "auc": float(np.mean([f["auc"] for f in facts])), "alphas": [x for _, x in found],
                "by_seed": [{k: round(100 * float(v.mean()), 2) for k, v in g.items()} for g, _ in found],
                "before": [f["before"] for f in facts]}

    def mean(self, gain, low=0.0, high=1.0):
        """Of one gain over the verifiers whose AUC lies in this range: (R + 1,), or None."""
        some = [g[gain] for n, g in self.by.items() if low <= self.facts[n]["auc"] <= high]
        return np.mean(some, 0) if some else None

    def correlations(self, gain="alpha"):
        """{feature: rank correlation with the gain, of each run}."""
        runs = len(next(iter(self.facts.values()))["before"])
        return {k: [spearman([f["before"][i][k] for f in self.facts.values()],
                             [f["by_seed"][i][gain] for f in self.facts.values()]) for i in range(runs)]
                for k in next(iter(self.facts.values()))["before"][0]}


LINES = {"A^mu": "alpha", "quota": "quota", "A^mu, both with quota": "alpha given quota"}


def report(runs, recipes, out):
    m = Mechanism(runs, recipes)
    names = sorted(m.by, key=lambda n: m.facts[n]["auc"])
    aucs = [m.facts[n]["auc"] for n in names]

    def line(gain):
        values = [interval(m.by[n][gain]) for n in names]
        return aucs, *([v[k] for v in values] for k in ("mean", "lo", "hi"))
    draw(out / "mechanism", "What is added to the beam by Q^pi, at verifiers from bad to good", [
        ("", "held-out AUC of the verifier", "points over Q^pi (over Q^pi with quota)",
         {k: line(g) for k, g in LINES.items()})])
    columns = ["verifier", "auc", *(f"{g} {k}" for g in m.by[names[0]] for k in ("mean", "lo", "hi")),
               *m.facts[names[0]]["before"][0]]
    rows = []
    for n in names:
        before = pd.DataFrame(m.facts[n]["before"]).mean().round(4).tolist()
        rows.append([n, round(m.facts[n]["auc"], 4),
                     *(v for g in m.by[n].values() for v in interval(g).values()), *before])
    write_csv(out / "mechanism_verifiers.csv", columns, rows)
    facts = provenance([run.out for run, _ in runs], [[f"mechanism-{r.name}" for r in recipes]] * len(runs))
    for low, high, name in ((0.70, 0.86, "weak"), (0.86, 1.0, "good")):
        facts[name] = {g: interval(x) for g in m.by[names[0]] if (x := m.mean(g, low, high)) is not None}
    facts |= {"verifiers": m.facts, "rank_correlation": m.correlations(),
              "rank_correlation_quota": m.correlations("quota")}
    write_json(out / "summary.json", facts)
    print(f"{'verifier':<22}{'AUC':>6}" + "".join(f"{g:>24}" for g in LINES))
    for n in names:
        cells_ = (interval(m.by[n][g]) for g in LINES.values())
        print(f"{n:<22}{m.facts[n]['auc']:>6.3f}" + "".join(
            f"{v['mean']:>+8.1f} [{v['lo']:+.1f}, {v['hi']:+.1f}]".rjust(24) for v in cells_))
    print(f"in {out}: mechanism.png, mechanism_verifiers.csv, summary.json")


@dataclass
class Flags:
    run: list = flag([Path("runs/calculator-seed0")], "folders of train.py, one a seed")
    out: Path = flag(None, "where figure, CSVs and summary.json go; default: RUN/mechanism", kind=Path)
    width: int = flag(8, "of the beams", low=1, high=4096)
    problems: int = flag(500, "test problems", low=2, high=10**6)
    validation: int = flag(250, "validation problems", low=2, high=10**6)
    verifiers: list = flag([r.name for r in VERIFIERS], "which", choices=[r.name for r in VERIFIERS])
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))


def main():
    a = parse(Flags, __doc__)
    tune_process()
    if len(a.run) > 1 and a.out is None:
        raise Fail(f"--run {' '.join(map(str, a.run))}: several folders need an --out for their mean")
    out = a.out or a.run[0] / "mechanism"
    make_folder(out)
    recipes, runs = [r for r in VERIFIERS if r.name in a.verifiers], []
    for run in open_runs(a.run, pick_device(a.device)):
        made, fixed = {}, {"width": a.width, "problems": a.problems, "validation": a.validation}
        for recipe in recipes:
            made[recipe.name] = run.stage(f"mechanism-{recipe.name}", partial(measure, run, recipe, a),
                                          asdict(recipe) | fixed)
        runs.append((run, made))
    report(runs, recipes, out)


if __name__ == "__main__":
    main_guard(main)

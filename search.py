"""Test-time search with what train.py left, on held-out problems (section 4.1 of the paper).

    python search.py                      # runs/calculator-seed0: re-ranking and beams, tuned on validation
    python search.py --all                # the paper's figures: other scores, bases, provers, data
    python search.py --show 3             # three problems, every candidate step with its values
    python search.py --search beam:effective --alpha 0.5 --prover bo16     # one method and score, other flags
    python search.py --run runs/calculator-seed? --all --out results/search    # several seeds, and their mean

Each search (a Cell of minipav/search/measure.py) is one table of rows in RUN/search; what is there is not
searched again. The methods and scores are in minipav/search/, the experiments of --all in
minipav/paper/experiments.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

from minipav import parallel
from minipav.flags import few, flag, parse
from minipav.paper.experiments import EXPERIMENTS
from minipav.paper.prediction import predict
from minipav.paper.report import report_search
from minipav.prover import Prover, check_head
from minipav.run import check_out, open_runs, task_of
from minipav.search import METHODS
from minipav.search.inspect import show
from minipav.search.measure import Bench, Cell, simplest_of_the_best
from minipav.search.score import QUOTAS, SCORES, check_quota
from minipav.utils import Fail, main_guard, pick_device, tune_process

ALPHAS = (0.2, 0.5, 1.0, 2.0, 5.0)      # tried beside 0; the paper's grid ends at 1


@dataclass
class Flags:
    run: list = flag([Path("runs/calculator-seed0")], "folders of train.py, one a seed")
    out: Path = flag(None, "where figures, CSVs and summary.json go; default: RUN/search", kind=Path)
    all: bool = flag(False, "every figure of the paper")
    show: int = flag(0, "print so many problems of a PAV beam of width 4, measure nothing", high=10**6)
    search: list = flag(["greedy", "pass", "majority", "best_of_n:orm", "best_of_n:q_pi",
                         "best_of_n:effective", "beam:q_pi", "beam:effective"], "METHOD or METHOD:SCORE")
    policy: str = flag("base", "that is searched with", choices=("weak", "base", "strong"))
    n: int = flag(128, "samples a problem for best-of-N", low=1, high=1 << 16)
    widths: list = flag([1, 2, 4, 8, 16, 32], "beam widths", low=1, high=4096)
    alpha: float = flag(None, "weight of A^mu; default: chosen on validation problems for every search with "
                        "widths (best-of-N takes its beam's); else train.py's", high=1000, kind=float)
    quota: str = flag(None, "of relatives in a beam; default: none, and beside it one chosen on validation "
                      "problems", choices=QUOTAS, kind=str)
    verifier: str = flag(None, "folder in the run, such as mechanism/base-60, in the place of q_pi", kind=str)
    spread: int = flag(12, "a beam spreads its samples over its prefixes, so many at the first level; 0: 3 "
                       "behind each prefix", high=1 << 16)
    prover: str = flag(None, "boK (bo1 is pi itself), weak, strong or a folder; default: the run's best-of-K",
                       kind=str)
    predict: bool = flag(False, "say from validation problems, before any test, whether A^mu will help")
    problems: int = flag(500, "test problems", low=1, high=10**6)
    validation: int = flag(500, "validation problems on which what has widths is tuned", low=2, high=10**6)
    tuned_at: int = flag(8, "... at this width", low=1, high=4096)
    seeds: list = flag([0], "of the sampling; curves are means over them", high=2**32 - 1)
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products; auto: bf16 where the device is made for it",
                      choices=("auto", "fp32", "bf16"))


def tune(bench, a, mu, cell):
    """Choose the alpha and the quota of a beam on validation problems, those that are not given: first alpha
    without a quota, then both. -> ((alpha, quota), (alpha, quota)), the tables"""
    alphas = [0.0, *ALPHAS] if a.alpha is None else [a.alpha]
    if "alpha" not in SCORES[cell.score].uses:
        alphas = [0.0]
    shaped, states = METHODS[cell.method].shaped, bench.run.task.state
    quotas = [q for q in QUOTAS if q == "none" or shaped and (q != "state" or states)]
    quotas, tables, chosen = [a.quota] if a.quota else quotas, {}, []
    for tried in (quotas[:1], quotas):                          # alpha without a quota, then both together
        if len(choices := [(x, q) for q in tried for x in alphas]) == 1:
            chosen += choices
            continue
        tables |= {(x, q): bench.measure(replace(
            cell, ns=(a.tuned_at,), prover=mu, alpha=x, quota=q, split="validation", problems=a.validation))
            for x, q in choices if (x, q) not in tables}
        simple = dict(sorted(tables.items(), key=lambda t: t[0][0] > 0))        # alpha 0 first
        chosen.append(simplest_of_the_best(simple))
    return chosen, list(tables.values())


def known_as(cell):
    return cell.score if cell.method == "beam" else f"{cell.method}:{cell.score}"


def measure(run, a, wanted):
    """Tune the beams among the wanted searches, measure all. -> [(group, table)], {experiment: facts}"""
    bench, mu, tables, chosen = Bench(run), a.prover or f"bo{run.config['K']}", [], {}
    print(f"{run.out}: {a.problems} test problems, prover {mu}")
    if a.verifier:
        bench.models["q_pi"] = bench.model(a.verifier)
    for cell in wanted:
        if METHODS[cell.method].budgets == "widths" and known_as(cell) not in chosen:
            chosen[known_as(cell)], found = tune(bench, a, mu, cell)
            tables += [("tune", t) for t in found]
    facts = {"chosen": chosen}
    if a.predict:
        beams = Cell("beam", "q_pi", (a.tuned_at,), a.policy, spread=a.spread, verifier=a.verifier or "",
                     split="validation", problems=a.validation, seed=a.seeds[0])
        facts["prediction"] = predict(bench, beams, [path for _, path in tables])
    for cell in wanted:
        alpha = bench.run.config["alpha"] if a.alpha is None else a.alpha
        how = chosen.get(known_as(cell), chosen.get(cell.score, [(alpha, "none")]))
        tuned = METHODS[cell.method].shaped and a.quota is None
        for group, (alpha, quota) in zip(("main", "tuned")[:1 + tuned], how):
            tables.append((group, bench.measure(replace(cell, prover=mu, alpha=alpha, quota=quota))))
    if a.all:
        alpha = chosen["effective"][0][0] if a.alpha is None and "effective" in chosen else a.alpha
        alpha = alpha or run.config["alpha"]                    # at 0 there is nothing to compare
        for name, experiment in EXPERIMENTS.items():
            if a.verifier and name in ("exact", "bases", "data"):
                continue                                        # it has no part in them
            more, facts[name] = experiment(bench, a, mu, alpha)
            tables += more
    return tables, facts


def main():
    a = parse(Flags, __doc__, defaults=lambda known: task_of(known.run[0]).search_defaults)
    tune_process()
    if a.prover:
        check_head(Prover.parse(a.prover).policy, "scalar")
    few(problems=a.problems, n=a.n)
    few(problems=a.problems, widths=max(a.widths))
    ns = tuple(sorted({a.n, *(2 ** k for k in range(a.n.bit_length()))}))
    budgets = {"n": ns, "widths": tuple(sorted(a.widths)), "one": (1,)}
    wanted = [Cell.parse(x, policy=a.policy, problems=a.problems, spread=a.spread,
                         verifier=a.verifier or "") for x in a.search]
    wanted = [replace(c, ns=budgets[METHODS[c.method].budgets], seed=s) for c in wanted for s in a.seeds]
    if a.verifier and a.policy != "base":
        raise Fail(f"--verifier {a.verifier}: stands in for the base policy's; leave --policy out")
    if not a.show:
        check_out(a.run, a.out)
    runs = open_runs(a.run, pick_device(a.device), a.dtype)
    for run in runs if a.verifier else ():
        check_head(str(run.out / a.verifier), "scalar", "verifier")
    check_quota(a.quota, runs[0].task)
    if a.all and not runs[0].task.phrases:
        raise Fail(f"--all: asks for more problems than {runs[0].task.name} has")
    if (a.show or a.predict) and parallel.world() > 1:
        raise Fail(f"--{'show' if a.show else 'predict'}: in one process; start it without torchrun")
    if a.predict and a.tuned_at < 2:
        raise Fail("--tuned_at 1: --predict looks at relatives in a beam; use 2 or more")
    if a.show:
        for run in runs:
            mu, alpha = a.prover or f"bo{run.config['K']}", a.alpha
            alpha = run.config["alpha"] if alpha is None else alpha
            cell = Cell("beam", "effective", (4,), policy=a.policy, prover=mu, alpha=alpha, spread=a.spread,
                        quota=a.quota or "none", verifier=a.verifier or "", problems=a.problems,
                        seed=a.seeds[0])
            show(Bench(run), cell, a.show)
        return
    runs[0].problems("test", a.problems)                        # are so many there?
    methods = [METHODS[c.method] for c in wanted]
    if any(m.budgets == "widths" and (a.alpha is None or m.shaped and not a.quota) for m in methods):
        runs[0].problems("validation", a.validation)            # on which they are tuned
    measured = [measure(run, a, wanted) for run in runs]
    report_search(runs, measured, a.out or runs[0].out / "search")
    for run in runs:
        run.close()


if __name__ == "__main__":
    main_guard(main)

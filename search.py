"""Test-time search with what train.py left, on held-out problems (section 4.1 of the paper).

    python search.py                      # runs/calculator-seed0: re-ranking and beams, alpha chosen first
    python search.py --all                # the paper's figures: other scores, bases, provers, data
    python search.py --show 3             # three problems, every candidate step with its values
    python search.py --search beam:effective --alpha 0.5 --prover bo16     # one method and score, other flags
    python search.py --run runs/calculator-seed? --all --out results/search    # several seeds, and their mean

Each search (method, score, policy, prover, alpha, budgets) is one table of rows in RUN/search; what is there
is not searched again. The methods and scores are in minipav/search/, the experiments of --all in
minipav/paper/experiments.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

from minipav import parallel
from minipav.files import make_folder
from minipav.flags import few, flag, parse
from minipav.paper.experiments import EXPERIMENTS
from minipav.paper.report import report_search
from minipav.prover import Prover, check_head
from minipav.run import open_runs
from minipav.search import METHODS
from minipav.search.inspect import show
from minipav.search.measure import Bench, Cell, accuracy
from minipav.utils import Fail, main_guard, pick_device, tune_process

ALPHAS = [round(0.1 * i, 1) for i in range(11)]                 # the paper's grid


@dataclass
class Flags:
    run: list = flag([Path("runs/calculator-seed0")], "folders of train.py, one a seed")
    out: Path = flag(None, "where figures, CSVs and summary.json go; default: RUN/search", kind=Path)
    all: bool = flag(False, "every figure of the paper")
    show: int = flag(0, "print so many problems of a PAV beam of width 4, measure nothing", high=10**6)
    search: list = flag(["greedy", "pass", "majority", "best_of_n:orm", "best_of_n:q_pi",
                         "best_of_n:effective",
                         "beam:q_pi", "beam:effective"], "METHOD or METHOD:SCORE")
    policy: str = flag("base", "that is searched with", choices=("weak", "base", "strong"))
    n: int = flag(128, "samples a problem for best-of-N", low=1, high=1 << 16)
    widths: list = flag([1, 2, 4, 8, 16, 32], "beam widths", low=1, high=4096)
    alpha: float = flag(None, "weight of A^mu; default: the best of 0, .1, ... 1 on validation problems",
                        high=1000, kind=float)
    prover: str = flag(None, "boK (bo1 is pi itself), weak, strong or a folder; default: the run's best-of-K",
                       kind=str)
    problems: int = flag(500, "test problems", low=1, high=10**6)
    validation: int = flag(60, "validation problems on which alpha is chosen", low=1, high=10**6)
    seeds: list = flag([0], "of the sampling; curves are means over them", high=2**32 - 1)
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products; auto: bf16 where the device is made for it",
                      choices=("auto", "fp32", "bf16"))


def choose_alpha(bench, a):
    """The paper's rule: the best alpha of the grid on validation problems, beam 16, mu = pi; ties: the
    smaller.
    -> (alpha, the tables)"""
    cells = [Cell("beam", "effective", (16,), prover="bo1", alpha=x, split="validation",
                  problems=a.validation, seed=a.seeds[0])
             for x in ALPHAS]
    tables = [bench.measure(cell) for cell in cells]
    return max(ALPHAS, key=lambda x: (accuracy(tables[ALPHAS.index(x)])[16], -x)), tables


def main():
    a = parse(Flags, __doc__)
    tune_process()
    if a.prover:
        check_head(Prover.parse(a.prover).policy, "scalar")
    if len(a.run) > 1 and a.out is None and not a.show:
        raise Fail(f"--run {' '.join(map(str, a.run))}: several folders need an --out for their mean")
    few(problems=a.problems, n=a.n)
    few(problems=a.problems, widths=max(a.widths))
    if a.out:
        make_folder(a.out)
    ns = tuple(2 ** k for k in range(a.n.bit_length()))
    budgets = {"n": ns, "widths": tuple(sorted(a.widths)), "one": (1,)}
    wanted = [Cell.parse(x, policy=a.policy, problems=a.problems) for x in a.search]
    wanted = [replace(c, ns=budgets[getattr(METHODS[c.method], "budgets", "n")],
                      seed=s) for c in wanted for s in a.seeds]
    runs, measured, alphas = open_runs(a.run, pick_device(a.device), a.dtype), [], []
    if a.show and parallel.world() > 1:
        raise Fail("--show: in one process; start it without torchrun")
    for run in runs:
        bench, mu, tables, facts = Bench(run), a.prover or f"bo{run.config['K']}", [], {}
        if a.show:
            alpha = 0.2 if a.alpha is None else a.alpha
            show(bench, Cell("beam", "effective", (4,), a.policy, mu, alpha, problems=a.problems,
                             seed=a.seeds[0]), a.show)
            continue
        print(f"{run.out}: {a.problems} test problems, prover {mu}")
        alpha = a.alpha
        if alpha is None:
            alpha, found = choose_alpha(bench, a)
            tables += [("alpha", t) for t in found]
        tables += [("main", bench.measure(replace(c, prover=mu, alpha=alpha))) for c in wanted]
        if a.all:
            for name, experiment in EXPERIMENTS.items():
                more, facts[name] = experiment(bench, a, mu, alpha)
                tables += more
        measured.append((tables, facts))
        alphas.append(alpha)
    if not a.show:
        report_search(runs, measured, alphas, a.out or runs[0].out / "search")


if __name__ == "__main__":
    main_guard(main)

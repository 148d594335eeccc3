"""What does A^mu do in a beam? Verifiers from bad to good, and for each the beam by Q^pi, by Q^pi + alpha
A^mu and by log-odds progress, with and without a quota of relatives, beside independent sub-trees.

    python -m minipav.paper.mechanism                                       # runs/calculator-seed0
    python -m minipav.paper.mechanism --run runs/calculator-seed? --out results/mechanism

Of each verifier, RUN/mechanism/NAME has the model, NAME-wWIDTH.csv a row for each search (`right`: a digit
a problem), and its stage what prediction.py measures on validation problems. alpha is chosen there too; gains
are on test problems.
"""
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from minipav import parallel
from minipav.files import write_csv
from minipav.flags import flag, parse
from minipav.model import GPT, SIZES
from minipav.paper.mechanism_report import COLUMNS, NOISE, best, report
from minipav.paper.noise import SCORES, SIGMAS, noise
from minipav.paper.prediction import describe_beam, same_states
from minipav.run import check_out, open_runs
from minipav.search.beam import search_width
from minipav.search.dvts import dvts
from minipav.search.measure import Bench, Cell
from minipav.utils import Fail, main_guard, pick_device, progress, tune_process
from minipav.verifier import evaluate, train_verifier

GRID = {"effective": (0.5, 1.0, 2.0, 5.0, 10.0), "log_odds": (1.0, 3.0)}   # alphas beside 0, which is Q^pi


@dataclass(frozen=True)
class Recipe:
    """How a verifier of Q^pi is trained."""
    init: str                       # a policy, "scratch", "nano" (small, too), or "q_pi": the run's own
    steps: int = 0
    traces: int = 0                 # of the run's data; 0: all
    seed: int = 0
    target: str = "bce"             # what it learns (targets.py)

    @property
    def name(self):
        parts = [self.init, str(self.steps or ""), f"{self.traces}traces" * bool(self.traces),
                 f"seed{self.seed}" * bool(self.seed), self.target * (self.target != "bce")]
        return "-".join(filter(None, parts))


VERIFIERS = [Recipe("q_pi"), *(Recipe("base", s) for s in (10, 30, 60, 120, 250)),
             Recipe("base", 120, seed=1), Recipe("base", 150, 1000), Recipe("base", 150, 3000),
             Recipe("strong", 60), Recipe("strong", 250), Recipe("scratch", 600), Recipe("nano", 500)]
RELATIVES = [Recipe("base", 250, target=target) for target in ("seer", "in_support", "dre")]


def tried(a, quotas):
    """The searches of validation problems."""
    fixed = dict(ns=(a.width,), split="validation", problems=a.validation, prover=f"bo{a.K}")
    for quota in quotas:
        yield Cell("beam", "q_pi", quota=quota, **fixed)
        for score, grid in GRID.items():
            yield from (Cell("beam", score, alpha=x, quota=quota, **fixed) for x in grid)


def wanted(a, rows, quotas):
    """The searches of test problems: alphas as chosen on validation."""
    fixed = dict(ns=(a.width,), problems=a.problems, prover=f"bo{a.K}")
    for quota in quotas:
        yield Cell("beam", "q_pi", quota=quota, **fixed)
        for score in GRID:
            if alpha := best(rows, score, quota):
                yield Cell("beam", score, alpha=alpha, quota=quota, **fixed)
    if "none" in quotas:
        yield Cell("beam", "advantage", **fixed)
        yield Cell("dvts", "q_pi", **fixed)


def data_of(run, recipe):
    """Labelled traces that a verifier is trained on."""
    traces = run.traces("base_train")
    few = torch.randperm(len(traces), generator=torch.Generator().manual_seed(recipe.seed))[:recipe.traces]
    return traces[few] if recipe.traces else traces


def train(run, recipe):
    """Make and save a verifier. -> facts"""
    c, seed, held_out = run.config, run.seed("mechanism", recipe.name), run.traces("base_validation")
    model = run.model(recipe.init if recipe.init in ("q_pi", "strong") else "base")
    if recipe.init in ("scratch", "nano"):
        torch.manual_seed(seed)
        small = SIZES["nano"] if recipe.init == "nano" else {}
        fresh = GPT(replace(model.config, **small)).to(model.device)
        fresh.bf16, model = model.bf16, fresh
    if recipe.init == "q_pi":
        found = evaluate(model, held_out)
    else:
        model, found = train_verifier(
            model, data_of(run, recipe), held_out, steps=recipe.steps, batch_size=c["batch_size"],
            lr_muon=c["lr_muon_verifier"], lr_adamw=c["lr_adamw_verifier"], seed=seed, target=recipe.target,
            micro_batch=c["micro_batch"], log=run.logger(recipe.name, recipe.steps))
    return {"auc": round(found.auc, 4), "files": model.save(run.out / "mechanism" / recipe.name)}


def measure(run, recipe, a, quotas, name):
    """A verifier's searches, and what a beam by Q^pi without a quota says of it on validation problems; with
    a quota of states, how often such a beam keeps a state twice. -> facts"""
    bench, path, rows = Bench(run), run.out / "mechanism" / f"{name}.csv", []
    bench.models["q_pi"] = run.model(f"mechanism/{recipe.name}")
    say = same_states if quotas == ["state"] else describe_beam
    before = say(bench, Cell("beam", "q_pi", (a.width,), split="validation", problems=a.validation))

    def search(cells):
        for cell in cells:
            how = bench.search(cell), run.problems(cell.split, cell.problems)
            r = search_width(*how, a.width, 0) if cell.method == "beam" else dvts(*how, cell.ns, 0)[0]
            rows.append((cell.split, cell.method, cell.score, cell.alpha, cell.quota, a.width,
                         round(float(r.right.mean()), 4), round(float(r.tokens.mean()), 1),
                         "".join(str(int(x)) for x in r.right)))
            bar.update()
    most = 11 * len(quotas) + 2 * ("none" in quotas)
    with progress(f"{name}, beams", most) as bar:
        search(tried(a, quotas))
        search(wanted(a, pd.DataFrame(rows, columns=COLUMNS), quotas))
    write_csv(path, COLUMNS, rows)
    return {"before": before, "files": [path]}


def put_noise(run, a, name):
    path, bench = run.out / "mechanism" / f"{name}.csv", Bench(run)
    with progress("errors put into exact values", len(SIGMAS) ** 2 * len(SCORES)) as bar:
        write_csv(path, NOISE, [row for row in noise(bench, a.width, a.problems) if bar.update() or True])
    return {"files": [path]}


@dataclass
class Flags:
    run: list = flag([Path("runs/calculator-seed0")], "folders of train.py, one a seed")
    out: Path = flag(None, "where figure, CSVs and summary.json go; default: RUN/mechanism", kind=Path)
    K: int = flag(4, "the prover is best-of-K of pi", low=1, high=999999)
    width: int = flag(4, "of the beams", low=2, high=4096)
    problems: int = flag(500, "test problems", low=2, high=10**6)
    validation: int = flag(250, "validation problems", low=2, high=10**6)
    quotas: list = flag(["none", "parent"], "beside one of states, of a task that has them",
                        choices=["none", "parent"])
    noise: bool = flag(False, "also search by exact values with errors put in (noise.py)")
    verifiers: list = flag([r.name for r in VERIFIERS], "which",
                           choices=[r.name for r in VERIFIERS + RELATIVES])
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))


def main():
    a = parse(Flags, __doc__)
    tune_process()
    device = pick_device(a.device)
    if parallel.world() > 1:
        raise Fail("mechanism: in one process; start it without torchrun")
    if "none" not in a.quotas:
        raise Fail(f"--quotas {' '.join(a.quotas)}: add none, which the others are held against")
    recipes, runs = [r for r in VERIFIERS + RELATIVES if r.name in a.verifiers], []
    check_out(a.run, a.out)
    for run in open_runs(a.run, device):
        made, fixed = {}, {"width": a.width, "problems": a.problems, "validation": a.validation, "K": a.K}
        for recipe in recipes:
            name, spec = recipe.name, asdict(recipe)
            made[name] = run.stage(f"mechanism-{name}", partial(train, run, recipe), spec)
            wide = {f"{name}-w{a.width}": a.quotas}
            if run.task.state:
                wide[f"{name}-w{a.width}-state"] = ["state"]
            for table, quotas in wide.items():
                made[table] = run.stage(f"mechanism-{table}", partial(measure, run, recipe, a, quotas, table),
                                        spec | fixed | {"quotas": quotas, "grid": GRID})
        if a.noise and run.task.exact:
            name = f"noise-w{a.width}"
            made[name] = run.stage(f"mechanism-{name}", partial(put_noise, run, a, name), fixed)
        runs.append((run, made))
        run.close()
    report(runs, [r.name for r in recipes], a.width, a.out or a.run[0] / "mechanism")


if __name__ == "__main__":
    main_guard(main)

"""Does progress under another policy help a beam, with as many updates for every verifier? Q^pi, Q^mu of the
weaker and of the stronger policy, and a second Q^pi (another network) are trained from pi. Beams by Q^pi, by
Q^pi + alpha A^mu, Q^pi + alpha Q^mu ("bonus"), A^mu and Q^mu alone, the finished trace by Q^pi; and, trace
and all, by a Q^pi of twice the updates. alpha is chosen on validation problems.
Give all runs: the files here are replaced. Delete RUN/provers/rows-* after a change of this file.

    python -m results.mechanism_provers.provers runs/calculator-seed?       # -> rows.csv.gz, auc.csv here
    python -m results.mechanism_provers.provers                             # the numbers, from the rows alone
"""
import sys
from itertools import combinations, product
from pathlib import Path

import pandas as pd

from minipav.files import read_json, write_csv, write_json
from minipav.paper.report import keep
from minipav.paper.statistics import bootstrap, interval
from minipav.run import Run
from minipav.search.beam import search_width
from minipav.search.measure import Bench, Cell
from minipav.utils import tune_process
from minipav.verifier import train_verifier

STEPS, WIDTH, QUOTAS, ALPHAS = (30, 60, 120), 8, ("none", "state"), (0.2, 0.5, 1.0, 2.0, 5.0)
PROBLEMS = {"validation": 200, "test": 500}
VERIFIERS = {"pi": ("base", 1), "second": ("base", 1), "weak": ("weak", 1), "strong": ("strong", 1),
             "twice": ("base", 2)}              # whose data, how often the updates
MUS = "second", "weak", "strong"
PROVERS = "bo1", "bo4", *MUS
TUNED = [*(("effective", mu) for mu in PROVERS), *(("bonus", mu) for mu in MUS)]
OTHERS = [*(("q_mu", mu) for mu in MUS), *(("advantage", mu) for mu in PROVERS), ("q_pi", "twice")]


def train(run, name, steps):
    """-> the folder of the verifier, its AUC"""
    data, times = VERIFIERS[name]
    folder, c = run.out.resolve() / "provers" / f"{name}-{steps}", run.config
    if not (folder / "auc.json").exists():
        traces = [run.traces(f"{data}_{split}") for split in ("train", "validation")]
        model, found = train_verifier(
            run.model("base"), *traces, steps=steps * times, batch_size=c["batch_size"],
            lr_muon=c["lr_muon_verifier"], lr_adamw=c["lr_adamw_verifier"],
            seed=run.seed("provers", name, steps), log=lambda *x: None)
        model.save(folder)
        write_json(folder / "auc.json", {"auc": found.auc})
    return str(folder), read_json(folder / "auc.json")["auc"]


def measure(run, steps, quota):
    """All rows of Q^pi after so many updates, with this quota."""
    made, bench, out = {name: train(run, name, steps) for name in VERIFIERS}, Bench(run), []
    bench.models["q_pi"] = run.model(made["pi"][0])

    def search(split, score, mu="", alpha=0.0):
        who = {"verifier" if score == "q_pi" else "prover": made[mu][0] if mu in made else mu}
        cell = Cell("beam", score, **who, alpha=alpha, quota=quota, split=split, problems=PROBLEMS[split])
        r = search_width(bench.search(cell), run.problems(split, cell.problems), WIDTH, 0)
        out.extend((run.config["seed"], steps, quota, score, mu, alpha, split, i, int(a), int(t))
                   for i, (a, t) in enumerate(zip(r.right, r.tokens)))
        return float(r.right.mean())
    valid, plain = search("validation", "q_pi"), search("test", "q_pi")
    as_plain, name = out[PROBLEMS["validation"]:], f"{run.out.name}, {steps} updates, quota {quota}"
    for score, mu in TUNED:
        tried = {0.0: valid} | {x: search("validation", score, mu, x) for x in ALPHAS}
        alpha = max(tried, key=tried.get)
        got = search("test", score, mu, alpha) if alpha else plain
        if not alpha:
            out.extend((*row[:3], score, mu, *row[5:]) for row in as_plain)
        print(f"{name}, {score} {mu}: alpha {alpha}, {plain:.3f} -> {got:.3f}", flush=True)
    for score, mu in OTHERS:
        print(f"{name}, {score} {mu}: {search('test', score, mu):.3f}", flush=True)
    return out


def main():
    tune_process()
    columns = ["run", "steps", "quota", "score", "prover", "alpha", "split", "problem", "right", "tokens"]
    frames, aucs, here = [], [], Path(__file__).parent
    for folder in sys.argv[1:]:
        run = Run.open(folder, "cpu")
        for quota, steps in product(QUOTAS, STEPS):
            path = run.out / "provers" / f"rows-{quota}-{steps}.csv"
            if not path.exists():
                write_csv(path, columns, measure(run, steps, quota))
            frames.append(pd.read_csv(path, keep_default_na=False))
        aucs += [(run.config["seed"], steps, name, round(train(run, name, steps)[1], 4))
                 for steps in STEPS for name in VERIFIERS]
    if frames:
        keep(here / "rows.csv.gz", frames)
        write_csv(here / "auc.csv", ["run", "steps", "verifier", "auc"], aucs)
    rows = pd.read_csv(here / "rows.csv.gz", keep_default_na=False)
    report(rows)
    print("without seed 0")
    report(rows[rows.run != 0])


def report(rows):
    """Accuracy of the beams by Q^pi, then points between beams, on test problems."""
    test, names = rows[rows.split == "test"], ["steps", "quota", "score", "prover"]
    wide = test.groupby(["run", "problem", *names]).right.mean().unstack(names)
    boot = bootstrap([x.droplevel("run") for _, x in wide.groupby("run")])
    for steps in [*((x,) for x in STEPS), STEPS]:
        right = sum(boot[x] for x in steps) / len(steps)
        told = {x: right[x] - right[x[0], "q_pi", ""] for x in right if x[1:] != ("q_pi", "")}  # gains
        for quota in QUOTAS:
            gain = {x[1:]: told[x] for x in told if x[0] == quota}
            a = {mu: gain["effective", mu] for mu in PROVERS}
            told |= {(quota, mu, "A over Q"): a[mu] - gain["bonus", mu] for mu in MUS}
            told |= {(quota, "A of", x, "over", y): a[x] - a[y] for y, x in combinations(PROVERS, 2)}
            told |= {(quota, "A of", mu, "over twice"): a[mu] - gain["q_pi", "twice"] for mu in PROVERS}
        told |= {(*x, "more than beside the quota"): told["none", *x] - told["state", *x] for x in TUNED}
        told["quota", "of states"] = right["state", "q_pi", ""] - right["none", "q_pi", ""]
        print("updates:", *steps, *((q, interval(right[q, "q_pi", ""].to_numpy())) for q in QUOTAS))
        for what, x in told.items():
            x = interval(100 * x.to_numpy())
            print(" ", *what, f"{x['mean']:.1f} [{x['lo']:.1f}, {x['hi']:.1f}]")


if __name__ == "__main__":
    main()

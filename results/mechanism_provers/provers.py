"""Does progress under another policy help a beam, if nobody's verifier is better trained? Q^pi, Q^mu of the
weaker and of the stronger policy, and a second Q^pi (another network: what two of them are worth) are trained
alike: from pi, the same few updates. Beams by Q^pi, Q^pi + alpha A^mu, Q^pi + alpha Q^mu ("bonus") and Q^mu
alone, the finished trace by Q^pi; alpha is chosen on validation problems.

    python -m results.mechanism_provers.provers runs/calculator-seed?       # -> rows.csv.gz, auc.csv here
    python -m results.mechanism_provers.provers                             # the numbers, from the rows alone
"""
import sys
from itertools import product
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
SEARCHES = [("effective", "bo4"), *(("effective", mu) for mu in MUS), *(("bonus", mu) for mu in MUS)]
ALONE = [("q_mu", mu) for mu in (*MUS, "twice")]


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
        cell = Cell("beam", score, prover=made[mu][0] if mu in made else mu, alpha=alpha, quota=quota,
                    split=split, problems=PROBLEMS[split])
        r = search_width(bench.search(cell), run.problems(split, cell.problems), WIDTH, 0)
        out.extend((run.config["seed"], steps, quota, score, mu, alpha, split, i, int(a), int(t))
                   for i, (a, t) in enumerate(zip(r.right, r.tokens)))
        return float(r.right.mean())
    valid, plain = search("validation", "q_pi"), search("test", "q_pi")
    as_plain, name = out[PROBLEMS["validation"]:], f"{run.out.name}, {steps} updates, quota {quota}"
    for score, mu in SEARCHES:
        tried = {0.0: valid} | {x: search("validation", score, mu, x) for x in ALPHAS}
        alpha = max(tried, key=tried.get)
        got = search("test", score, mu, alpha) if alpha else plain
        if not alpha:
            out.extend((*row[:3], score, mu, *row[5:]) for row in as_plain)
        print(f"{name}, {score} {mu}: alpha {alpha}, {plain:.3f} -> {got:.3f}", flush=True)
    for score, mu in ALONE if quota == "none" else []:
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
    report(pd.read_csv(here / "rows.csv.gz", keep_default_na=False))


def report(rows):
    """Accuracy of the beam by Q^pi, then points of one beam over another, on test problems."""
    test, names = rows[rows.split == "test"], ["quota", "score", "prover"]
    plain = {quota: (quota, "q_pi", "") for quota in QUOTAS}
    pairs = [((quota, *x), plain[quota]) for quota in QUOTAS for x in SEARCHES + ALONE * (quota == "none")]
    pairs += [(plain["state"], plain["none"])]
    pairs += [((quota, "effective", mu), (quota, "bonus", mu)) for quota in QUOTAS for mu in MUS]
    pairs += [(("none", "effective", "strong"), ("none", *x)) for x in SEARCHES[:3]]
    pairs += [(("none", "effective", mu), ("none", "q_mu", "twice")) for mu in ("bo4", *MUS)]
    for steps in [*((x,) for x in STEPS), STEPS[:2], STEPS]:
        wide = test[test.steps.isin(steps)].groupby(["run", "problem", *names]).right.mean().unstack(names)
        boot = bootstrap([x.droplevel("run") for _, x in wide.groupby("run")])
        print(f"mean of {steps} updates: Q^pi {interval(boot[plain['none']].to_numpy())}")
        for a, b in pairs:
            x = interval(100 * (boot[a] - boot[b]).to_numpy())
            print(f"  {' '.join(a)} over {' '.join(b)}: {x['mean']:+.1f} [{x['lo']:.1f}, {x['hi']:.1f}]")


if __name__ == "__main__":
    main()

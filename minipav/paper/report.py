"""From the rows of one run, or of several seeds, to tables, figures, claims and a summary.

    python -m minipav.paper.report runs/a runs/b runs/c --out results/train      # the same training with
    three seeds python -m minipav.paper.report --claims runs/didactic                        # of the didactic
    example and the theory

Intervals are 95% bootstrap intervals over problems, the same resampled problems for every method (paired);
with several runs the runs are resampled too, so that the spread over seeds is in them.
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from minipav.files import read_json, write_csv, write_json, write_text, write_whole
from minipav.flags import flag, parse
from minipav.paper.claims import DIDACTIC, SEARCH, THEORY, ahead, judge, sentence
from minipav.paper.figures import draw, lines, name_of, search_figures
from minipav.paper.statistics import Curves, interval, load, spread
from minipav.utils import Fail, main_guard

STAGE = dict(seconds=(int, float), command=str, commit=str, hardware=str, spec=dict)


def stage(folder, name):
    return read_json(Path(folder) / "stages" / f"{name}.json", **STAGE)


def provenance(runs, names):
    """What a result must be quoted with; names: of each run (a folder), the stages that it rests on."""
    records = [[stage(run, n) for n in ns] for run, ns in zip(runs, names)]
    return {"command": " ".join(["python", *sys.argv]),
            "commit": sorted({r["commit"] for x in records for r in x}),
            "hardware": sorted({r["hardware"] for x in records for r in x}),
            "minutes": spread(sum(r["seconds"] for r in x) / 60 for x in records)}


def judged(claims, measured):
    return [j for c in claims if (j := judge(c, measured))]


def finish(out, summary, claims, text, made, after):
    """Write table.txt and summary.json, print them, say where the files are and which command comes next."""
    write_text(out / "table.txt", text + "\n")
    write_json(out / "summary.json", summary | {"claims": claims})
    print("\n" + "\n".join([text, "", *map(sentence, claims)]))
    print(f"\nin {out}: table.txt, summary.json, {', '.join(made)}\nnext: {after}")


# ---- search and training
# --------------------------------------------------------------------------------------

class Searched:
    """Curves of several runs: tables {run's seed: [(group, path)]}, facts {experiment: facts} of each run."""

    def __init__(self, tables, facts, group="main"):
        self.rows, self.facts, self.group = load(tables), facts, group
        self.curves = Curves(self.rows[self.rows.split == "test"])

    def main(self, search):
        """The curve of the base policy with this search and the chosen prover and alpha."""
        return self.curves.get(self.group, search)

    def fact(self, experiment, get):
        """get(facts) of each run, or None if it was not measured everywhere."""
        return [get(f[experiment]) for f in self.facts] if all(f.get(experiment)
                                                               for f in self.facts) else None

    def table(self):
        """Rows (search, prover, policy, n, tokens, accuracy, lo, hi) of the main curves."""
        for (group, policy, method, score, prover, _), c in self.curves.by.items():
            if group == self.group:
                for k, n in enumerate(c.n):
                    x = interval(c.acc[:, k])
                    yield ":".join(y for y in (method,
                                               score) if y), prover, policy, int(n), round(c.tokens[0, k],
                                                                                           1), *x.values()

    def write(self, out):
        """rows.csv.gz, curves.csv. -> the table as text"""
        write_whole(out / "rows.csv.gz", lambda p: self.rows.to_csv(p, index=False, float_format="%.7g",
                                                                     compression={"method": "gzip",
                                                                                  "mtime": 0}))
        body = list(self.table())
        write_csv(out / "curves.csv", ["search", "prover", "policy", "n", "tokens_per_problem", "accuracy",
                                       "lo", "hi"], body)
        return "\n".join([f"{'method':<28}{'N or width':>10}{'tokens/problem':>16}{'accuracy':>10}   95% interval", *(
            f"{' '.join(x for x in (name_of(m), mu and f'({mu})') if x):<28}{n:>10}{tokens:>16.0f}{acc:>10.3f}   [{lo:.3f}, {hi:.3f}]"
            for m, mu, _, n, tokens, acc, lo, hi in body)])


def report_training(runs, out):
    """Of finished runs of train.py (folders), in `out`; the first one's base and q_pi are copied there if it
    is not the run itself."""
    configs = [read_json(run / "config.json", seed=int, task=str, alpha=(int, float), K=int) for run in runs]
    if len({c["seed"] for c in configs}) < len(runs):
        raise Fail("two of these runs have the same seed: each counts once")
    if any({**c, "seed": 0} != {**configs[0], "seed": 0} for c in configs):
        raise Fail("these runs differ in more than their seed: their numbers cannot be averaged")
    examples, mu = [stage(run,
                          "example") for run in runs], f"bo{configs[0]['K']}" if configs[0]["alpha"] else ""
    tables = {c["seed"]: [("train", run / t) for t in x["tables"]] for c, run,
              x in zip(configs, runs, examples)}
    s = Searched(tables, [{} for _ in runs], "train")
    for (*key, prover, alpha), c in list(s.curves.by.items()):
        if prover == mu:  # the prover of the PAV beam is not named in claims
            s.curves.by[(*key, "", alpha)] = c if mu else s.curves.by[(*key, prover, alpha)]
    text = s.write(out)
    draw(out / "accuracy", f"{configs[0]['task']}, seed {', '.join(str(c['seed']) for c in configs)}", [
        ("", "policy tokens generated a problem", "accuracy on held-out problems",
         lines({name_of(m): s.main(m) for m in (
            "greedy", "majority", "best_of_n:orm", "best_of_n:q_pi", "beam:q_pi", "beam:effective",
            "pass")}))])
    names = [[*x["stages"], "example", *(t.removesuffix(".csv") for t in x["tables"])] for x in examples]
    facts = provenance(runs, names) | {"seeds": [c["seed"] for c in configs],
                                       "config": {**configs[0], "seed": "each"}}
    facts |= {"base_sampled": spread(c["right"].mean() for _,
                                     c in s.rows[(s.rows.method == "pass") & (s.rows.n == 1)].groupby("run")),
              "base_greedy": spread(c["right"].mean() for _,
                                    c in s.rows[s.rows.method == "greedy"].groupby("run")),
              "planning_failure_share": spread(x["planning_failure_share"] for x in examples),
              "corrupted_step_auc": [x["corrupted_step_auc"] for x in examples],
              "pav_minus_best_q_points": ahead(s, "beam:effective", "best_of_n:q_pi")}
    if out not in runs:
        for name in ("base", "q_pi"):
            shutil.copytree(runs[0] / name, out / name, dirs_exist_ok=True)
    first = examples[0]
    print(f"\nbase policy: {facts['base_sampled']['mean']:.1%} sampled, {facts['base_greedy']['mean']:.1%} greedy; "
          f"{first['planning_failure_share']:.1%} of its failures are planning failures; AUC of right traces against the same with "
          f"a corrupted step: {first['corrupted_step_auc']}; {facts['minutes']['mean']:.1f} minutes")
    finish(out, facts, judged(SEARCH[:4], s), text, ["accuracy.png", "curves.csv", "rows.csv.gz"],
           f"python search.py --run {runs[0]}, python rl.py --run {runs[0]}; or other seeds, then python -m minipav.paper.report "
           f"{runs[0]} ... --out DIR for their mean")


def report_search(runs, measured, alphas, out):
    """Of the searches of search.py: measured has, for each run, its tables and the facts of its
    experiments."""
    tables = {run.config["seed"]: t for run, (t, _) in zip(runs, measured)}
    s, made = Searched(tables, [f for _, f in measured]), []

    def figure(name, title, panels):
        draw(out / name, title, panels)
        made.append(f"{name}.png")
    text = s.write(out)
    if "alpha" in tables[runs[0].config["seed"]][0]:
        rows = s.rows[s.rows.group == "alpha"].astype({"alpha": float}).groupby(["alpha",
                                                                                 "run"])["right"].mean().unstack()
        figure("alpha", "alpha on validation problems (beam 16, mu = pi)",
               [("mean, extreme runs", "alpha", "accuracy", {
            "beam, PAV": (list(rows.index), *(list(x) for x in (rows.mean(axis=1), rows.min(axis=1),
                                                                rows.max(axis=1))))})])
    search_figures(s, figure)
    names = [[str(p.relative_to(run.out)).removesuffix(".csv") for _, p in t] for run,
             (t, _) in zip(runs, measured)]
    facts = provenance([run.out for run in runs], names) | {"seeds": list(tables), "alpha": alphas}
    finish(out, facts, judged(SEARCH, s), text, [*made, "curves.csv", "rows.csv.gz"],
           f"python rl.py --run {runs[0].out}; or --all; or other seeds, then --run RUN RUN ... --out DIR for their mean")


# ---- command line
# ---------------------------------------------------------------------------------------------

@dataclass
class Flags:
    runs: list = flag([], "folders of train.py, one a seed", kind=Path)
    out: Path = flag(None, "folder for their table, figure and summary", kind=Path)
    claims: Path = flag(None, "folder of the didactic example and the theory: print what their numbers say",
                        kind=Path)


def main():
    a = parse(Flags, __doc__)
    if a.claims:
        for name, claims in (("summary.json", DIDACTIC), ("theory.json", THEORY)):
            if (a.claims / name).exists():
                print("\n".join(map(sentence, judged(claims, read_json(a.claims / name)))))
    elif a.runs and a.out:
        report_training(a.runs, a.out)
    else:
        raise Fail("give --runs RUN RUN ... --out DIR, or --claims DIR")


if __name__ == "__main__":
    main_guard(main)

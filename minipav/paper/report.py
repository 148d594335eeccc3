"""From the rows of one run, or of several seeds, to tables, figures, claims and a summary.

    python -m minipav.paper.report --runs runs/a runs/b runs/c --out results/train   # three seeds
    python -m minipav.paper.report --claims runs/didactic                   # the didactic example, the theory
    python -m minipav.paper.report --collect results                        # -> results/claims.json

Intervals are 95% bootstrap intervals over problems, the same resampled problems for every method (paired);
with several runs the runs are resampled too, so that the spread over seeds is in them.
"""
import gzip
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from minipav.files import make_folder, read_json, write_csv, write_json, write_text, write_whole
from minipav.flags import flag, parse
from minipav.paper.claims import DIDACTIC, SEARCH, THEORY, collect, judge, sentence
from minipav.paper.figures import draw, lines, name_of, search_figures, tune_figure
from minipav.paper.quantities import ahead
from minipav.paper.statistics import NONE, Curves, at_tokens, interval, load, read_table, spread
from minipav.run import differ, stage
from minipav.utils import Fail, command, main_guard

PAIRED = ["group", "search", "prover", "n", *(f"{what}{x}" for what in ("accuracy", "over_orm", "over_beam")
                                    for x in ("", "_lo", "_hi"))]


def provenance(runs, names):
    """What a result must be quoted with; names: of each run (a folder), the stages that it rests on."""
    records = [[stage(run, n) for n in each] for run, each in zip(runs, names)]
    every = [r for x in records for r in x]
    return {"command": command(), "commit": sorted({r["commit"] for r in every}),
            "hardware": sorted({r["hardware"] for r in every}),
            "minutes": spread(sum(r["seconds"] for r in x) / 60 for x in records)}


def judged(claims, measured):
    return [j for c in claims if (j := judge(c, measured))]


def finish(out, summary, claims, text, after):
    """Write table.txt and summary.json, print them, say where the files are and which command comes next."""
    write_text(out / "table.txt", text + "\n")
    write_json(out / "summary.json", summary | {"claims": claims})
    print("\n" + "\n".join([text, "", *map(sentence, claims)]))
    drawn = sorted(p.name for p in out.glob("*.png"))
    print(f"\nin {out}: table.txt, summary.json, CSVs, {', '.join(drawn)}\nnext: {after}")


def keep(path, tables):
    """All rows of these tables, compressed."""
    packed = gzip.compress(pd.concat(tables).to_csv(index=False).encode(), mtime=0)
    write_whole(path, lambda p: p.write_bytes(packed))


class Searched:
    """Searches of several runs: tables {run's seed: [(group, path)]}, and of each run {experiment: facts}."""

    def __init__(self, tables, facts, group="main"):
        self.rows, self.facts, self.group = load(tables), facts, group
        self.curves = Curves(self.rows[self.rows.split == "test"])

    def main(self, search):
        """The curve of the base policy with this search and the chosen prover and alpha."""
        return self.curves.get(self.group, search)

    def tuned(self, search):
        """... and with the alpha and the quota that were chosen together, if they were."""
        return self.curves.get("tuned", search) or self.main(search)

    def fact(self, experiment, get):
        """get(facts) of each run, or None if it was not measured everywhere."""
        found = [f[experiment] for f in self.facts if f.get(experiment)]
        return [get(f) for f in found] if found and len(found) == len(self.facts) else None

    def write(self, out):
        """rows.csv.gz, curves.csv, paired.csv. -> the table as text"""
        keep(out / "rows.csv.gz", [self.rows])
        header, body = ["group", "search", "prover", "n", "tokens_per_problem", "accuracy", "lo", "hi"], []
        text = [f"{'method':<32}{'N or width':>10}{'tokens/problem':>16}{'accuracy':>10}   95% interval"]
        for (group, _, method, score, prover, _), c in self.curves.by.items():
            search = f"{method}:{score}" if score else method
            for k, n in enumerate(c.n if group in (self.group, "tuned") else ()):
                acc, lo, hi = interval(c.acc[:, k]).values()
                body.append((group, search, prover, n, round(c.tokens[0, k], 1), acc, lo, hi))
                name = name_of(search) + (f" ({prover})" if prover else "") + ", tuned" * (group == "tuned")
                text.append(f"{name:<32}{n:>10}{c.tokens[0, k]:>16.0f}{acc:>10.3f}   [{lo:.3f}, {hi:.3f}]")
        write_csv(out / "curves.csv", header, body)
        if paired := list(self.paired()):
            write_csv(out / "paired.csv", PAIRED, paired)
        return "\n".join(text)

    def paired(self):
        """Rows of paired.csv: of every search of the base policy, at the tokens of N samples, if its budgets
        go so far: its accuracy, its points over best-of-N by the ORM and over the beam by Q^pi."""
        orm, beam = self.main("best_of_n:orm"), self.main("beam:q_pi")
        for (group, policy, method, score, prover, _), c in self.curves.by.items() if orm and beam else ():
            if group in (self.group, "tuned") and policy == "base" and method != "pass":
                for n, tokens in zip(orm.n, orm.tokens.T):
                    here, *others = (at_tokens(x, tokens) for x in (c, orm, beam))
                    found = [interval(x) or NONE for x in (here, *(100 * (here - x) for x in others))]
                    if found[0] != NONE:
                        yield (group, f"{method}:{score}".rstrip(":"), prover, n,
                               *(x for each in found for x in each.values()))


def report_training(runs, out):
    """Of finished runs of train.py (folders), in `out`; if that is none of them, the first one's base and
    q_pi are copied there."""
    configs = [read_json(run / "config.json", seed=int, task=str, alpha=(int, float), K=int) for run in runs]
    seeds, same = [c["seed"] for c in configs], {**configs[0], "seed": "each"}
    if len(set(seeds)) < len(runs):
        raise Fail("two of these runs have the same seed: each counts once")
    if any(differ(c, same) for c in configs):
        raise Fail("these runs differ in more than their seed: their numbers cannot be averaged")
    examples = [stage(run, "example") for run in runs]
    names = [[*x["stages"], "example", *(t.removesuffix(".csv") for t in x["tables"])] for x in examples]
    facts = provenance(runs, names)
    tables = {n: [("train", run / t) for t in x["tables"]] for n, run, x in zip(seeds, runs, examples)}
    s = Searched(tables, [{} for _ in runs], "train")
    # the PAV beam's prover goes without saying
    for key in [k for k in s.curves.by if k[4] == f"bo{same['K']}"]:
        s.curves.by[(*key[:4], "", key[5])] = s.curves.by.pop(key)
    text, searches = s.write(out), ("greedy", "majority", "best_of_n:orm", "best_of_n:q_pi", "beam:q_pi",
                                    "beam:effective", "pass")
    draw(out / "accuracy", f"{same['task']}, seed {', '.join(map(str, seeds))}", [
        ("", "policy tokens generated a problem", "accuracy",
         lines({name_of(m): s.main(m) for m in searches}))])
    one = s.rows[s.rows.n == 1].groupby(["method", "run"])["right"].mean()
    facts |= {
        "seeds": seeds, "config": same, "base_sampled": spread(one["pass"]),
        "base_greedy": spread(one["greedy"]),
        "planning_failure_share": spread(x["planning_failure_share"] for x in examples),
        "corrupted_step_auc": [x["corrupted_step_auc"] for x in examples],
        "pav_minus_best_q_points": ahead(s, "beam:effective", "best_of_n:q_pi")}
    for name in ("base", "q_pi") if out.resolve() not in [x.resolve() for x in runs] else ():
        shutil.copytree(runs[0] / name, out / name, dirs_exist_ok=True)
    print(f"\nbase policy: {one['pass'].mean():.1%} sampled, {one['greedy'].mean():.1%} greedy; "
          f"{facts['planning_failure_share']['mean']:.1%} of its failures are planning failures\n"
          f"AUC of right traces against the same with a corrupted step: {facts['corrupted_step_auc'][0]}\n"
          f"{facts['minutes']['mean']:.1f} minutes")
    finish(out, facts, judged(SEARCH[:4], s), text,
           f"python search.py --run {runs[0]}, python rl.py --run {runs[0]}; or other seeds, then "
           f"python -m minipav.paper.report --runs {runs[0]} ... --out DIR for their mean")


def headline(s):
    """The numbers that are quoted first, with intervals: one sample of the policy, the best of all searches
    (the oracle aside), pass@N, and the points by which the tuned beam is ahead of the ORM."""
    oracle, greedy, out = s.main("pass"), s.main("greedy"), {
        "problems": int(s.rows[s.rows.split == "test"].problem.max()) + 1}
    if greedy and oracle:
        out |= {"sft_greedy": interval(greedy.acc[:, 0]), "sft_sampled": interval(oracle.acc[:, 0]),
                f"pass_at_{oracle.n[-1]}": interval(oracle.acc[:, -1])}
    each = {(f"{name_of(f'{k[2]}:{k[3]}')}, {k[0]}", int(n)): c.acc[:, i] for k, c in s.curves.by.items()
            if k[0] in (s.group, "tuned") and k[1] == "base" and k[2] != "pass" for i, n in enumerate(c.n)}
    if each:
        name, n = max(each, key=lambda k: each[k][0])
        out["best_search"] = {"what": name, "n": n} | interval(each[name, n])
    return out | {"best_beam_minus_orm_points": ahead(s, "beam:effective", "best_of_n:orm", "tuned")}


def report_search(runs, measured, out):
    """Of the searches of search.py: measured has the tables and facts of each run."""
    tables = {run.config["seed"]: t for run, (t, _) in zip(runs, measured)}
    s = Searched(tables, [f for _, f in measured])
    tune_figure(s.rows[(s.rows.group == "tune") & (s.rows.method == "beam")], out)
    search_figures(s, out)
    names = [dict.fromkeys(str(p.relative_to(run.out)).removesuffix(".csv") for _, p in t) for run,
             (t, _) in zip(runs, measured)]
    facts = provenance([run.out for run in runs], names) | headline(s) | {
        "seeds": list(tables), "chosen": [f.get("chosen") for _, f in measured],
        "prediction": [f.pop("prediction", None) for _, f in measured],
        "experiments": [{k: x for k, x in f.items() if k != "chosen"} for _, f in measured]}
    finish(out, facts, judged(SEARCH, s), s.write(out),
           f"python rl.py --run {runs[0].out}; or --all; or other seeds, then --run RUN RUN ... --out DIR")


def overview(folder):
    """The three figures that say most, in one: search, the gain of A^mu, RL; what is there of them."""
    panels = []
    for name, start, title, *labels in (
            ("search/fig4", "base", "search", "policy tokens a problem", "accuracy"),
            ("mechanism/mechanism", "", "what is added to a narrow beam", "held-out AUC of the verifier",
             "points over the beam by Q^pi"),
            ("rl/fig7", "ours", "RL", "iteration", "accuracy")):
        if (folder / f"{name}.csv").exists():
            rows = read_table(folder / f"{name}.csv", ["panel", "line", "x", "y", "lo", "hi"],
                              ("panel", "line"))
            rows = rows[rows.panel.str.startswith(start)]
            panels.append((title, *labels, {k: g[["x", "y", "lo", "hi"]].to_numpy(float).T
                                            for k, g in rows.groupby("line", sort=False)}))
    if panels:
        draw(folder / "overview", "", panels)


@dataclass
class Flags:
    runs: list = flag([], "folders of train.py, one a seed", kind=Path)
    out: Path = flag(None, "folder for their table, figure and summary", kind=Path)
    claims: Path = flag(None, "folder of the didactic example and the theory: what their numbers say",
                        kind=Path)
    collect: Path = flag(None, "folder of folders with a summary.json: their claims -> claims.json there",
                         kind=Path)


def main():
    a = parse(Flags, __doc__)
    if a.collect:
        overview(a.collect)
        print(f"{len(collect(a.collect))} claims in {a.collect / 'claims.json'}, and overview.png")
        return
    if a.claims and not any((a.claims / x).is_file() for x in ("summary.json", "theory.json")):
        raise Fail(f"--claims {a.claims}: neither summary.json nor theory.json is there")
    if a.claims:
        for name, claims in (("summary.json", DIDACTIC), ("theory.json", THEORY)):
            if (a.claims / name).exists():
                print("\n".join(map(sentence, judged(claims, read_json(a.claims / name)))))
    elif a.runs and a.out:
        if missing := [run for run in a.runs if not (run / "config.json").is_file()]:
            raise Fail(f"--runs {missing[0]}: no run of train.py is there")
        make_folder(a.out)
        report_training(a.runs, a.out)
    else:
        raise Fail("give --runs RUN RUN ... --out DIR, or --claims DIR")


if __name__ == "__main__":
    main_guard(main)

"""The numbers of README.md that no table or summary here has, from the rows.

    python -m results.recount
"""
from pathlib import Path

import numpy as np
import pandas as pd

from minipav.files import read_json
from minipav.paper.statistics import DROPPED, Curves, at_tokens, bootstrap, interval

HERE = Path(__file__).parent
TWO = "base-30", "base-60"


def curves(folder, *groups):
    rows = pd.read_csv(HERE / folder / "rows.csv.gz", keep_default_na=False)
    rows = rows[rows.group.isin(groups) & (rows.split == "test")].astype({"alpha": str})
    for g in groups:
        rows.loc[rows.group == g, DROPPED.get(g, [])] = ""
    return Curves(rows)


def told(what, x):
    print(what)
    for k, v in x.items():
        print(f"    {k}: " + (f"{v['mean']:.1f} [{v['lo']:.1f}, {v['hi']:.1f}]" if v else "-"))


def over(what, a, b):
    """Points of curve a over curve b at the tokens of b."""
    told(what, {f"N = {n}": interval(100 * (at_tokens(a, b.tokens[:, k]) - b.acc[:, k]))
                for k, n in enumerate(b.n)})


def gain(folder, quota, score):
    """{run: points (problems,) that a beam by this score and quota adds to that by Q^pi, mean of TWO}; where
    alpha = 0 was chosen it is that beam."""
    rows = pd.read_csv(HERE / folder / "rows.csv.gz", dtype={"right": str}, keep_default_na=False)
    rows = rows[(rows.split == "test") & (rows.method == "beam")]
    right = {tuple(key): np.array([*map(int, x)]) for *key, x in zip(
        rows.run, rows.verifier, rows.quota, rows.score, rows.right)}
    return {run: 100 * np.mean([right.get((run, v, quota, score), right[run, v, quota, "q_pi"])
                                - right[run, v, "none", "q_pi"] for v in TWO], 0) for run in (0, 1, 2)}


def mean(each):
    return interval(bootstrap([pd.DataFrame({"x": x}) for x in each.values()]).x.to_numpy())


def explained(x, q, n=64):
    """How well the column q tells the true values of unfinished prefixes of one problem and level apart: R^2
    and mean squared error in percent. The sampling noise of the rollouts' means, of n each, is taken out."""
    x = x[x.left > 0]
    x = x[x.groupby(["problem", "step"]).step.transform("size") > 1]
    level = x.groupby(["problem", "step"])
    noise = x.rollouts * (1 - x.rollouts) / (n - 1) * (1 - 1 / level.step.transform("size"))
    true, guess = (x[k] - level[k].transform("mean") for k in ("rollouts", q))
    error = (guess - true) ** 2 - noise
    return f"{1 - error.sum() / (true ** 2 - noise).sum():.2f} {100 * error.mean():.1f}%"


def main():
    c = curves("search", "main", "tuned", "bases")
    q, orm = c.get("main", "best_of_n:q_pi"), c.get("main", "best_of_n:orm")
    over("default base: best-of-N by Q^pi over best-of-N by the ORM", q, orm)
    over("beam by Q^pi, no quota, over best-of-N by Q^pi", c.get("main", "beam:q_pi"), q)
    over("... quota of states", c.get("tuned", "beam:q_pi"), q)
    plain = c.get("main", "beam:q_pi")
    told("beam of width N over best-of-N by the ORM", {f"N = {n}": interval(100 * (
        plain.acc[:, list(plain.n).index(n)] - orm.acc[:, list(orm.n).index(n)])) for n in (4, 8, 16, 32)})
    fig4 = read_json(HERE.parent / "minipav" / "paper" / "paper.json", signed=False)["fig4"]
    print("the paper's: PAV beam of width N over the ORM at 3 N, in log N between points")
    for base in ("2B", "9B", "27B"):
        at_3n = np.interp(np.log(3 * np.array(fig4["N"])), np.log(fig4["N"]), fig4[base]["ORM"])
        gaps = zip(fig4["N"][1:5], 100 * (np.array(fig4[base]["PAV"]) - at_3n)[1:5])
        print(f"    {base}", *(f"N = {n}: {x:.1f}" for n, x in gaps), sep="   ")
    over("stronger base: beam over best-of-N by the ORM", c.get("bases", "beam:effective", "strong"),
         c.get("bases", "best_of_n:orm", "strong"))
    weak = curves("search_weak", "main", "tuned")
    q = weak.get("main", "best_of_n:q_pi")
    over("weak verifier: PAV beam, no quota, over best-of-N by the same Q^pi",
         weak.get("main", "beam:effective"), q)
    over("... by Q^pi, quota of states", weak.get("tuned", "beam:q_pi"), q)
    at4, at8 = (gain(f, "none", "effective") for f in ("mechanism", "mechanism_w8"))
    told("what A^mu adds by two verifiers", {
        "width 4": mean(at4), "width 8": mean(at8), "8 over 4": mean({r: at8[r] - at4[r] for r in at4}),
        "width 8, seeds 1 and 2": mean({r: at8[r] for r in (1, 2)})})
    told("... a quota of states", {"width 4": mean(gain("mechanism", "state", "q_pi"))})

    for folder in ("search_expert", "search_expert_more"):
        oracle = pd.read_csv(HERE / folder / "rollouts.csv.gz")
        rows = pd.read_csv(HERE / folder / "rows.csv.gz", keep_default_na=False)
        rows = rows[(rows.group == "main") & (rows.score == "orm") & (rows.n == 8) & (rows.problem < 100)]
        each = []
        for run, x in oracle.groupby("run"):
            x = x.pivot(index="problem", columns=["values", "width"], values="right").astype(float)
            x["best-of-8", 8] = rows[rows.run == run].set_index("problem").right
            each.append(x)
        b = 100 * bootstrap(each)
        told(f"{folder}: percent right on 100 problems, by values and width", {
            f"{v}, {w}": interval(b[v, w].to_numpy()) for v, w in b.columns})
        told("... width 2 over best-of-8 by the ORM", {
            v: interval((b[v, 2] - b["best-of-8", 8]).to_numpy()) for v in oracle["values"].unique()})
    early = b["rollouts to 3"] - b["rollouts from 4"]
    told("... rollouts to 3 over from 4", {f"width {w}": interval(early[w].to_numpy()) for w in early})
    values = [pd.read_csv(HERE / "search_expert" / f"values-seed{s}.csv.gz") for s in (0, 1, 2)]
    print("better base: Q^pi's values before the end within levels, R^2 and squared error of each seed")
    for q in ("expert", "expert_long", "expert_more"):
        for low, high in ((1, 99), (1, 3), (4, 99), (1, 1), (2, 2), (3, 3), (5, 6), (7, 99)):
            each = (explained(x[x.step.between(low, high)], q) for x in values)
            print(f"    {q}, steps {low} to {high}:", *each, sep="   ")


if __name__ == "__main__":
    main()

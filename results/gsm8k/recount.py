"""The numbers of README.md: of all of GSM8K and of RL, from the rows in full/, full/rl/ and rl/; of
"Sixty-four samples", and longer/search.png, from those in longer/.

    python -m results.gsm8k.recount
"""
from pathlib import Path

import numpy as np
import pandas as pd

from minipav.paper.figures import draw, line, name_of
from minipav.paper.statistics import Curves, at_tokens, bootstrap, interval

FULL, HERE = (Path(__file__).parent / name for name in ("full", "longer"))
SAMPLES = ("majority", "weighted_vote:q_pi", "weighted_vote:orm", "best_of_n:q_pi", "best_of_n:orm", "pass")


def pairs(samples, better, value):
    """How often, within a problem, a sample of `better` has a higher value than another one; 95% interval."""
    won = []
    for _, g in samples.assign(better=better).groupby("problem"):
        a, b = g[g.better][value].to_numpy()[:, None], g[~g.better][value].to_numpy()
        won.append(((a > b).sum() + (a == b).sum() / 2, a.size * b.size))
    won = np.array(won, float)
    drawn = won[np.random.default_rng(0).integers(0, len(won), (2000, len(won)))].sum(1)
    return won[:, 0].sum() / won[:, 1].sum(), *np.percentile(drawn[:, 0] / drawn[:, 1], [2.5, 97.5])


def samples(curves, group):
    """{search: its curve} of the searches over the same samples, whose numbers are printed."""
    of = {s: curves.get(group, s) for s in SAMPLES}
    one, vote, solved = of["pass"].acc[:, 0], of["majority"].acc, of["pass"].acc[:, 1]
    greedy = curves.get("main", "greedy").acc[:, 0]
    for s, c in of.items():
        print(s, [interval(a) for a in c.acc.T], "points over majority vote", [
            interval(x) for x in 100 * (c.acc - vote).T], "times a sample", interval(c.acc[:, -1] / one),
            "points over N = 4", interval(100 * (c.acc[:, -1] - c.acc[:, 2])), "over one", [
            interval(x) for x in 100 * (c.acc.T - one)], "over greedy decoding", interval(
                100 * (c.acc[:, -1] - greedy)))
        if s.startswith("best_of_n"):
            print("  right above wrong", interval((c.acc[:, 1] + solved - 2 * one) / (2 * solved - 2 * one)))
    return of


def trainings(folder):
    """Prints how far the samples of policies after RL are from each other."""
    rows = pd.read_csv(folder / "rows.csv.gz").query("iteration == 'end'")
    right = rows.assign(share=rows.right / rows.n).pivot(index="problem", columns="training", values="share")
    acc = bootstrap([right])
    print("points", folder.parent.name, {f"{a} over {b}": interval(100 * (acc[a] - acc[b]).to_numpy())
          for a, b in (("outcome", "sft"), ("pav", "sft"), ("pav", "outcome"))})


def surprise(folder):
    """The first evaluation of RL (2 samples a problem), in standard errors from the 32 of the same policy."""
    rows = pd.read_csv(folder / "rows.csv.gz").set_index("problem")
    start = rows[(rows.training == "outcome") & (rows.iteration == "0")]
    end = rows[(rows.training == "sft") & (rows.iteration == "end")]
    p = end.right / end.n
    return (start.right.sum() - 2 * p.sum()) / (2 * (p * (1 - p)).sum() * (1 + 2 / 32)) ** 0.5


def main():
    trainings(FULL / "rl")
    print(f"its start is {surprise(FULL / 'rl'):.1f} standard errors from its own 32 samples")
    trainings(FULL.parent / "rl")
    print("all of GSM8K")
    curves = Curves(pd.read_csv(FULL / "rows.csv.gz", keep_default_na=False).assign(prover="", alpha=""))
    of = samples(curves, "main")
    draw(FULL / "search", "SmolLM2-135M on 500 GSM8K problems", [
        ("", "policy tokens a problem", "accuracy", {name_of(s): line(c.tokens[0], c.acc)
         for s, c in of.items() if s != "pass"})])

    print("\nsixty-four samples of easy problems")
    more, first = (pd.read_csv(HERE / x, keep_default_na=False) for x in ("more.csv.gz", "rows.csv.gz"))
    curves = Curves(pd.concat([more, first[first.method == "greedy"]]).assign(prover="", alpha=""))
    of = samples(curves, "samples of 64")
    beams = {(g, s): curves.get(g, f"beam:{s}") for g, s in (
        ("main", "q_pi"), ("main", "effective"), ("quota grandparent", "q_pi"))}
    for name, b in beams.items():
        for j, w in enumerate(b.n):
            t, i = b.tokens[:, j], list(beams["main", "q_pi"].n).index(w)
            print(*name, "width", w, interval(b.acc[:, j]), "tokens", t[0], "points over", {
                s: interval(100 * (b.acc[:, j] - at_tokens(c, t))) for s, c in of.items() if s != "pass"},
                "holds, over pass@N", interval(100 * (b.solved[:, j] - at_tokens(of["pass"], t))),
                "over Q^pi", [interval(100 * (x[:, j] - y[:, i])) for x, y in (
                    (b.acc, beams["main", "q_pi"].acc), (b.solved, beams["main", "q_pi"].solved))])

    ends = pd.read_csv(HERE / "ends_test.csv.gz")
    clean, ended = ends.wrong == 0, ends[ends.ended == 1]
    print("a wrong calculation in", {k: x.mean() for k, x in (
        ("all", ~clean), ("right", ~clean[ends.right == 1]), ("wrong", ~clean[ends.right == 0]))})
    for value in ("q_pi", "orm"):
        best = ended.loc[ended.groupby("problem")[value].idxmax()]
        sure, wrong = ended[ended[value] > 0.4], best[best.right == 0]
        print(value, "claims", ended[value].mean(), "of the best", best[value].mean(),
              "over .4: right", sure.right.mean(), "picked", best[best[value] > 0.4].right.mean(), "problems",
              sure.problem.nunique(), "without a right one", (sure.groupby("problem").right.max() == 0).sum(),
              "picked, wrong, with a wrong calculation", (wrong.wrong > 0).mean())
        print("  above: without over with one", pairs(ended, ended.wrong == 0, value), "right, both without",
              pairs(ended[ended.wrong == 0], ended.right == 1, value))

    lines = {(g.removeprefix("main").replace("quota grandparent", ", quota of cousins"), s): b
             for (g, s), b in beams.items()}
    draw(HERE / "search", "SmolLM2-135M on 300 easy GSM8K problems", [
        ("the answer", "policy tokens a problem", "accuracy", {name_of(s): line(of[s].tokens[0], of[s].acc)
         for s in SAMPLES if s not in ("pass", "weighted_vote:orm")} | {
            name_of(f"beam:{s}") + g: line(b.tokens[0], b.acc) for (g, s), b in lines.items()}),
        ("a right answer among the candidates", "policy tokens a problem", "pass@N", {
            "samples": line(of["pass"].tokens[0], of["pass"].acc)} | {
            name_of(f"beam:{s}") + g: line(b.tokens[0], b.solved) for (g, s), b in lines.items()})])


if __name__ == "__main__":
    main()

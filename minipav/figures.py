"""The figures of search.py and of the didactic example.

Every figure is a PNG and a CSV of the same name with the numbers that are drawn: panel, line, x, y, lo, hi. Where the paper
has a curve, it stands in a panel of its own beside ours (minipav/paper.json, read off its figures).
"""
import json
from pathlib import Path

import numpy as np

from minipav.report import at_tokens, write_csv
from minipav.utils import write_whole

LABELS = {"greedy": "greedy decoding", "sample": "one sample", "majority": "majority vote", "orm": "best-of-N, ORM",
          "best_q": "best-of-N, Q^pi", "pav_as_orm": "best-of-N, PAV", "q_beam": "beam, Q^pi", "adv_beam": "beam, A^mu alone",
          "pav_beam": "beam, PAV", "bonus_beam": "beam, Q^pi + a Q^mu", "oracle_beam": "beam, exact Q", "pass": "pass@N (oracle)"}
PAPER = json.loads((Path(__file__).parent / "paper.json").read_text())
NAMES = {"weak": "weaker", "base": "base", "strong": "stronger"}


def draw(path, title, panels):
    """panels: [(title, xlabel, ylabel, {line: (x, y, lo, hi)})]; lo and hi may be None; string x make bars."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    body = []
    for ax, (name, xlabel, ylabel, lines) in zip(axes[0], panels):
        for i, (line, (x, y, lo, hi)) in enumerate(lines.items()):
            bars = isinstance(x[0], str)
            at = np.arange(len(x)) + (i - (len(lines) - 1) / 2) * 0.12 if bars else np.asarray(x, float)
            ax.plot(at, y, "o" if bars else "o-", ms=4, label=line, color=f"C{i}")
            if lo is not None and (bars or len(x) == 1):
                ax.vlines(at, lo, hi, color=f"C{i}", alpha=0.6)
            elif lo is not None:
                ax.fill_between(at, lo, hi, alpha=0.15, lw=0, color=f"C{i}")
            if bars:
                ax.set_xticks(range(len(x)), [name.replace(" ", "\n") for name in x])
            empty = [""] * len(x)
            body += [(name, line, *(v if isinstance(v, str) else round(float(v), 4) if v != "" else "" for v in row))
                     for row in zip(x, y, empty if lo is None else lo, empty if hi is None else hi)]
        if "tokens" in xlabel or xlabel == "N" or "rollouts" in xlabel or xlabel in ("K", "KL") or "gamma" in xlabel:
            ax.set_xscale("log", base=2)
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    fig.suptitle(title)
    fig.tight_layout()
    write_whole(path.with_suffix(".png"), lambda p: fig.savefig(p, dpi=130, format="png"))
    plt.close(fig)
    write_csv(path.with_suffix(".csv"), ["panel", "line", "x", "y", "lo", "hi"], body)


X = "policy tokens a problem"


def figures(s, out):
    """Draw every figure whose curves were measured: s is a verdicts.Search. -> their names"""
    made = []

    def figure(name, title, panels):
        draw(out / name, title, panels)
        made.append(name)
    p4, N = PAPER["fig4"], PAPER["fig4"]["N"]
    bases = [b for b in NAMES if s.has(f"{b}:orm", f"{b}:pav_beam", f"{b}:pass")]
    if bases:
        ours = [(f"{NAMES[b]} policy, {s.exact[f'{b}:pass'][1][0, 0]:.1%}", X, "accuracy", s.lines(
            {"beam, PAV": f"{b}:pav_beam", "best-of-N, ORM": f"{b}:orm", "pass@N": f"{b}:pass"})) for b in bases]
        paper = ("the paper, 2B", "N", "accuracy", {k: (N, p4["2B"][v], None, None) for k, v in (
            ("beam, PAV", "PAV"), ("best-of-N, ORM", "ORM"), ("pass@N", "passN"))})
        figure("fig4", "Fig. 4: search against PAVs and re-ranking by the ORM", [*ours, paper])
    if s.has("base:q_beam", "base:pav_beam"):
        p, p5 = PAPER["fig5a_9B"], ("orm", "best_q", "pav_as_orm")
        figure("fig5a", "Fig. 5a: the same search with only the score changed", [
            ("ours", X, "accuracy", s.lines({LABELS[m]: f"base:{m}" for m in LABELS if "beam" in m or m in p5})),
            ("the paper, 9B", "N", "accuracy", {k: (p["N_corrected"], p[v], None, None) for k, v in (
                ("best-of-N, ORM", "ORM"), ("best-of-N, PAV", "PAV_as_ORM"), ("beam, Q^pi", "PRM_Q"), ("beam, PAV", "PAV"))})])
        p = PAPER["fig6a_2B"]
        figure("fig6a", "Fig. 6a: is a right answer among the candidates?", [
            ("ours", X, "pass@N", s.lines({"samples": "base:pass", "beam, Q^pi": "base:q_beam:passed",
                                           "beam, PAV": "base:pav_beam:passed"})),
            ("the paper, 2B", "N", "pass@N", {k: (N, p[v], None, None) for k, v in (
                ("samples", "iid"), ("beam, Q^pi", "PRM_Q"), ("beam, PAV", "PAV"))})])
    if all("alpha" in f for f in s.facts):
        lines = {"beam, PAV": (s.facts[0]["alpha"]["alphas"], *s.over("alpha", lambda f: f["accuracy"]))}
        figure("alpha", "alpha on validation problems (beam 16, mu = pi)", [("mean, extreme runs", "alpha", "accuracy", lines)])
    if all("steps" in f for f in s.facts):
        steps, p = list(range(1, len(s.facts[0]["steps"]["q_pi"]) + 1)), PAPER["fig10"]
        figure("fig10", "Fig. 10: error in predicting the outcome after step h", [
            ("ours (right and wrong weigh the same)", "step", "error", {k: (steps, *s.over("steps", lambda f, v=v: f[v]))
                for k, v in (("Q^pi + alpha A^mu", "effective"), ("Q^pi", "q_pi"))}),
            ("the paper, 9B", "step", "error", {k: (p["step"], p[v], None, None) for k, v in (
                ("Q^pi + alpha A^mu", "PAV"), ("Q^pi", "PQV"))})])
    if all("provers" in f for f in s.facts):
        figure(*provers(s))
        rows_ = s.facts[0]["provers"]["theorem"]
        score, _, _ = s.over("provers", lambda f: [r["distinguishability"] + r["alignment"] for r in f["theorem"]])
        gain, lo, hi = s.over("provers", lambda f: [100 * r["gain"] for r in f["theorem"]])
        figure("theorem", "Theorem 3.1's two terms before the search, and the gain in it", [
            (f"{NAMES[b]} policy", "distinguishability + alignment", "points over the Q^pi beam", {
                r["prover"]: ([score[i]], [gain[i]], [lo[i]], [hi[i]]) for i, r in enumerate(rows_) if r["base"] == b})
            for b in ("base", "weak", "strong")])
    if all("data" in f for f in s.facts):
        figure(*data(s))
    return made


def provers(s):
    """Fig. 5b and 5c."""
    ks = sorted(int(m[7:]) for m in s.exact if m[:7] == "base:bo" and m[7:].isdigit())
    widths = s.exact[f"base:bo{ks[0]}"][0]

    def sweep(i):
        acc = [s.line(f"base:bo{k}") for k in ks]
        return ks, *([a[j][i] for a in acc] for j in (1, 2, 3))
    p, c = PAPER["fig5b_2B"], PAPER["fig5c_pct_over_ORM_beam16"]

    def over_orm(policy, mu):
        """Relative improvement in per cent over best-of-N by the ORM at the same tokens."""
        name = f"{policy}:{mu}" if mu != policy else f"{policy}:bo1"
        last = {which: (x[name][1][:, -1], at_tokens(x[f"{policy}:orm"], x[name][2][:, -1], beyond=False)) for which, x in
                (("exact", s.exact), ("drawn", s.drawn))}
        value = {k: 100 * (mine / orm - 1) for k, (mine, orm) in last.items()}
        return value["exact"][0], *np.nanpercentile(value["drawn"], [2.5, 97.5])
    have, y = [b for b in NAMES if s.has(f"{b}:orm")], "% over best-of-N, ORM"
    pairs = {f"mu = {NAMES[mu]}": ([NAMES[b] for b in have], *zip(*(over_orm(b, mu) for b in have))) for mu in NAMES}
    return "fig5bc", "Fig. 5b, 5c: provers", [
        ("best-of-K provers, base policy", "K", "accuracy", {f"beam {w}": sweep(i) for i, w in enumerate(widths)}),
        ("the paper, 2B", "N", "accuracy", {k: (p["N"], p[k], None, None) for k in ("Bo2", "Bo4", "Bo8", "Bo16", "Bo32")}),
        *([("base x prover", "base policy", y, pairs)] if have else []),
        ("the paper, beam 16", "base policy", y, {f"mu = {mu}": (list(c), [c[b][mu] for b in c], None, None) for mu in c})]


def data(s):
    """Fig. 6b and 11."""
    rows_ = s.facts[0]["data"]["rows"]
    ways, sizes = list(dict.fromkeys(r["way"] for r in rows_)), sorted({r["rollouts"] for r in rows_})
    aucs = {w: (sizes, *s.over("data", lambda f, w=w: [r["auc"] for r in f["rows"] if r["way"] == w])) for w in ways}
    p, q = PAPER["fig6b_9B"], PAPER["fig11"]
    return "fig6b", "Fig. 6b, 11: data for the verifier (Q^pi, beam 8)", [
        ("ours", "rollouts", "accuracy", {w: s.line(f"data:{w}") for w in ways}),
        ("ours (extreme runs)", "rollouts", "held-out AUC", aucs),
        ("the paper, 9B", "thousand rollouts", "accuracy",
         {f"n_mc/n_cov = {r}": (p["size_k"], y, None, None) for r, y in p["ratio"].items()}
         | {"first pits": (q["size_k"], q["first_pit"], None, None)})]

"""The figures. Each is a PNG and a CSV of the same name with the numbers that are drawn: panel, line, x, y,
lo, hi. Where the paper has a curve, it stands in a panel of its own beside ours (paper.json, read off its
figures)."""
from pathlib import Path

import numpy as np

from minipav.files import read_json, write_csv, write_whole
from minipav.paper.statistics import at_tokens, spread
from minipav.search.score import SCORES

PAPER = read_json(Path(__file__).parent / "paper.json")
NAMES = {"weak": "weaker", "base": "base", "strong": "stronger"}
METHODS = {"greedy": "greedy decoding", "pass": "pass@N (oracle)", "majority": "majority vote",
           "best_of_n": "best-of-N",
           "beam": "beam"}
TRAININGS = {"sft": "SFT", "rft": "RFT", "outcome": "ORM-RL", "pav": "PAV-RL"}
KEYS = {"SFT": "SFT", "RFT": "RFT", "ORM-RL": "ORM_RL", "PAV-RL": "PAV_RL"}     # their names in paper.json
X = "policy tokens a problem"


def name_of(search):
    """What a search is called in tables and figures: "METHOD:SCORE" -> text."""
    method, _, score = search.partition(":")
    return METHODS.get(method,
                       method) + (f", {SCORES[score].label if score in SCORES else score}" if score else "")


def draw(path, title, panels):
    """panels: [(title, xlabel, ylabel, {line: (x, y, lo, hi)})]; lo and hi may be None; string x make
    bars."""
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
            body += [(name, line, *(v if isinstance(v, str) else round(float(v), 4) for v in row))
                     for row in zip(x, y, empty if lo is None else lo, empty if hi is None else hi)]
        if any(w in xlabel for w in ("tokens", "rollouts", "gamma")) or xlabel in ("N", "K", "KL"):
            ax.set_xscale("log", base=2)
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    fig.suptitle(title)
    fig.tight_layout()
    write_whole(path.with_suffix(".png"), lambda p: fig.savefig(p, dpi=130, format="png"))
    plt.close(fig)
    write_csv(path.with_suffix(".csv"), ["panel", "line", "x", "y", "lo", "hi"], body)


def line(x, y):
    """(x, mean, lo, hi) of y (R + 1, k)."""
    return x, y[0], *np.nanpercentile(y[1:], [2.5, 97.5], axis=0)


def lines(curves, what="acc"):
    """{label: line against tokens} of the curves (a dict) that were measured."""
    return {label: line(c.tokens[0], getattr(c, what)) for label, c in curves.items() if c}


def theirs(x, of, names):
    """The paper's lines over x: names {label: key in `of`}."""
    return {label: (x, of[key], None, None) for label, key in names.items() if key in of}


# ---- search
# ---------------------------------------------------------------------------------------------------

def search_figures(s, draw):
    """Draw every figure whose curves were measured: s is a report.Searched, draw(name, title, panels)."""
    main, fig4 = {"beam, PAV": "beam:effective", "best-of-N, ORM": "best_of_n:orm",
                  "pass@N": "pass"}, PAPER["fig4"]
    each = [(b, {k: s.curves.get("main" if b == "base" else "bases", v, b) for k,
                 v in main.items()}) for b in NAMES]
    bases = [(f"{NAMES[b]} policy, {c['pass@N'].acc[0, 0]:.1%}", X, "accuracy", lines(c)) for b,
             c in each if all(c.values())]
    if bases:
        draw("fig4", "Fig. 4: search against PAVs and re-ranking by the ORM",
             [*bases, ("the paper, 2B", "N", "accuracy", theirs(
            fig4["N"], fig4["2B"], {"beam, PAV": "PAV", "best-of-N, ORM": "ORM", "pass@N": "passN"}))])
    if s.main("beam:q_pi") and s.main("beam:effective"):
        p, ours = PAPER["fig5a_9B"], {name_of(f"{m}:{x}"): s.main(f"{m}:{x}") for m in ("best_of_n", "beam")
                                      for x in SCORES}
        draw("fig5a", "Fig. 5a: the same search with only the score changed", [
            ("ours", X, "accuracy", lines(ours)), ("the paper, 9B", "N", "accuracy",
                                                   theirs(p["N_corrected"], p, {
                "best-of-N, ORM": "ORM", "best-of-N, PAV": "PAV_as_ORM", "beam, Q^pi": "PRM_Q",
                "beam, PAV": "PAV"}))])
        p = PAPER["fig6a_2B"]
        ours = {"samples": s.main("pass"), "beam, Q^pi": s.main("beam:q_pi"),
                "beam, PAV": s.main("beam:effective")}
        draw("fig6a", "Fig. 6a: is a right answer among the candidates?", [
            ("ours", X, "pass@N", lines(ours, "solved")),
            ("the paper, 2B", "N", "pass@N", theirs(p["N"], p,
                                                    {"samples": "iid", "beam, Q^pi": "PRM_Q",
                                                     "beam, PAV": "PAV"}))])
    if steps := s.fact("steps", lambda f: f):
        p, names = PAPER["fig10"], {"Q^pi + alpha A^mu": "effective", "Q^pi": "q_pi"}
        draw("fig10", "Fig. 10: error in predicting the outcome after step h", [
            ("ours (right and wrong weigh the same)", "step", "error", {k: over_runs(
                range(1, len(steps[0][v]) + 1), [f[v] for f in steps]) for k, v in names.items()}),
            ("the paper, 9B", "step", "error", theirs(p["step"], p,
                                                      {"Q^pi + alpha A^mu": "PAV", "Q^pi": "PQV"}))])
    if s.curves.get("provers", "beam:q_pi"):
        prover_figures(s, draw)
    if rows := s.fact("data", lambda f: f["rows"]):
        data_figure(rows, draw)


def over_runs(x, each):
    """(x, mean, lo, hi) over runs, with the extreme ones; each: a list of values for every run."""
    by = [spread(v) for v in zip(*each)]
    return list(x)[:len(by)], *([v[k] for v in by] for k in ("mean", "lo", "hi"))


def prover_figures(s, draw):
    """Fig. 5b, 5c, and Theorem 3.1's terms against the gain."""
    p, c, y = PAPER["fig5b_2B"], PAPER["fig5c_pct_over_ORM_beam16"], "% over best-of-N, ORM"

    def beam(b, mu):
        return s.curves.get("provers", "beam:effective", b, mu)
    ks = sorted(int(k[4][2:]) for k in s.curves.by if k[0] == "provers" and k[1] == "base"
                and k[4][:2] == "bo")
    by_k = {f"beam {w}": line(ks, np.stack([beam("base", f"bo{k}").acc[:, i] for k in ks], 1))
            for i, w in enumerate(beam("base", f"bo{ks[0]}").n)}

    def over_orm(b, mu):
        a, orm = beam(b, mu if mu != b
                      else "bo1"), s.curves.get("main" if b == "base" else "bases", "best_of_n:orm", b)
        return 100 * (a.acc[:, -1] / at_tokens(orm, a.tokens[:, -1], beyond=False) - 1)
    have = [b for b in NAMES if s.curves.get("main" if b == "base" else "bases", "best_of_n:orm", b)]
    pairs = {f"mu = {NAMES[mu]}": line([NAMES[b] for b in have],
                                       np.stack([over_orm(b, mu) for b in have], 1)) for mu in NAMES}
    draw("fig5bc", "Fig. 5b, 5c: provers", [
        ("best-of-K provers, base policy", "K", "accuracy", by_k),
        ("the paper, 2B", "N", "accuracy", theirs(p["N"], p,
                                                  {k: k for k in ("Bo2", "Bo4", "Bo8", "Bo16", "Bo32")})),
        ("base x prover", "base policy", y, pairs),
        ("the paper, beam 16", "base policy", y,
         {f"mu = {mu}": (list(c), [c[b][mu] for b in c], None, None) for mu in c})])
    terms = s.fact("provers",
                   lambda f: {(t["base"], t["prover"]): t["distinguishability"] + t["alignment"]
                              for t in f["theorem"]})
    if terms:
        draw("theorem", "Theorem 3.1's two terms before the search, and the gain in it", [
            (f"{NAMES[b]} policy", "distinguishability + alignment", "points over the Q^pi beam", {
                mu: line([np.mean([t[b, mu] for t in terms])], 100 * (beam(b, mu).acc - s.curves.get(
                    "provers", "beam:q_pi", b).acc).mean(1, keepdims=True)) for base,
                    mu in terms[0] if base == b})
            for b in NAMES])


def data_figure(rows, draw):
    """Fig. 6b and 11."""
    p, q, first = PAPER["fig6b_9B"], PAPER["fig11"], rows[0]
    sizes = sorted({r["rollouts"] for r in first})

    def panel(key):
        return {w: over_runs(sizes, [[r[key] for r in one if r["way"] == w] for one in rows])
                for w in dict.fromkeys(r["way"] for r in first)}
    draw("fig6b", "Fig. 6b, 11: data for the verifier (Q^pi, beam 8)", [
        ("ours (extreme runs)", "rollouts", "accuracy", panel("accuracy")),
        ("ours (extreme runs)", "rollouts", "held-out AUC", panel("auc")),
        ("the paper, 9B", "thousand rollouts", "accuracy",
         {f"n_mc/n_cov = {r}": (p["size_k"], y, None, None) for r, y in p["ratio"].items()}
         | {"first pits": (q["size_k"], q["first_pit"], None, None)})])


# ---- RL
# -------------------------------------------------------------------------------------------------------

def rl_figures(t, draw):
    """Draw every figure whose trainings are there: t is a rl_report.Trained."""
    main, p = [n for n in ("outcome", "pav") if t.curve(n)], PAPER["fig7b_2B"]
    if main:
        draw("fig7", "Fig. 7: RL with outcome reward and with process advantages", [
            *spent(t, main),
            ("the paper, 2B", "iteration", "accuracy",
             theirs([i * p["every"] for i in range(len(p["ORM_RL"]))], p, KEYS))])
    if all(t.end(n) is not None for n in TRAININGS):
        bars, c8 = list(TRAININGS.values()), {name: t.passes(n) for n, name in TRAININGS.items()}
        draw("fig8", "Fig. 7a, 8: the policies in the end", [
            ("7a: one sample", "policy", "accuracy", {
                "ours": line(bars, np.stack([t.end(n) for n in TRAININGS], 1)),
                "the paper, 2B": (bars, [PAPER["fig7a"]["2B"][KEYS[k]] for k in bars], None, None)}),
            ("8a: ours", "N", "pass@N", c8), ("8a: the paper, 2B", "N", "pass@N",
                                              theirs(PAPER["fig8a_2B"]["N"], PAPER["fig8a_2B"], KEYS)),
            (f"8b: {t.unsolved()} problems that SFT never solves", "N", "pass@N",
             {TRAININGS[n]: t.on_unsolved(n) for n in main}),
            ("8b: the paper, 9B", "N", "pass@N", theirs(PAPER["fig8b"]["N"], PAPER["fig8b"], KEYS))])
    if len(t.trained) > 2:
        draw("rewards", "Every training", spent(t, t.trained))
    if len(main) == 2:
        by = {}
        for n in t.trained:  # those that differ from pav in reward and KL alone
            if t.differs(n, "pav") <= {"kl"}:
                by.setdefault(TRAININGS.get(t.spec(n)["reward"], t.spec(n)["reward"]),
                              []).append((t.mean(n, "kl")[-1], n))
        draw("kl", "How far from the initial policy: every reward, with other KL coefficients too", [
            ("in the end", "KL", ylabel, {r: line([x for x, _ in sorted(ns)],
                                                  np.stack([t.end(n, N) for _, n in sorted(ns)], 1))
                                          for r, ns in by.items()}) for ylabel,
                                          N in (("accuracy", 1), (f"pass@{t.most}", t.most))])
        sweep_figure(t, draw)


def spent(t, names):
    """Panels of accuracy against iterations, and against all that was spent, the verifier's data and training
    included."""
    curves = {TRAININGS.get(n, n): (n, line(t.curve(n).n, t.curve(n).acc)) for n in names}

    def panel(title, xlabel, x):
        return title, xlabel, "accuracy", {label: (x(n), *y[1:]) for label, (n, y) in curves.items()}
    return [panel("ours", "iteration", lambda n: t.curve(n).n),
            panel("with the data for RFT and PAV", "token samples, millions",
                  lambda n: (t.before(n)[0] + t.mean(n, "tokens")) / 1e6),
            panel("with the data for RFT and PAV", "minutes",
                  lambda n: (t.before(n)[1] + t.mean(n, "seconds")) / 60)]


def sweep_figure(t, draw):
    """One panel a flag: what trainings that differ from `outcome` or `pav` in this flag alone come to in the
    end."""
    by = {}
    for n in t.trained:
        base = t.spec(n)["reward"]
        changed = list(t.differs(n, base)) if base in ("outcome", "pav") and base in t.trained else []
        if len(changed) == 1:
            by.setdefault(changed[0], {}).setdefault(str(t.spec(n)[changed[0]]), {})[base] = n
    panels = []
    for flag, values in by.items():
        values = {"default": {r: r for r in ("outcome", "pav")}} | values
        nan = np.full(len(t.end("pav")), np.nan)
        panels.append((flag, "value", "accuracy in the end", {TRAININGS[r]: line(list(values), np.stack(
            [t.end(v[r]) if r in v else nan for v in values.values()], 1)) for r in ("outcome", "pav")}))
    if panels:
        draw("sweeps", "What the result depends on", panels)

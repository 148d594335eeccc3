"""The figures. Each is a PNG and a CSV of the same name with the numbers that are drawn: panel, line, x, y,
lo, hi. Where the paper has a curve, it stands in a panel of its own (paper.json, read off its figures)."""
from pathlib import Path

import numpy as np
import pandas as pd

from minipav.files import read_json, write_csv, write_whole
from minipav.paper.statistics import at_tokens, spread
from minipav.search.score import SCORES

PAPER = read_json(Path(__file__).parent / "paper.json", signed=False)
NAMES = {"weak": "weaker", "base": "base", "strong": "stronger"}
METHODS = {"greedy": "greedy decoding", "pass": "pass@N (oracle)", "majority": "majority vote",
           "dvts": "sub-trees", "best_of_n": "best-of-N", "backtrack": "backtracking", "mcts": "MCTS",
           "puct": "MCTS, PUCT", "mcts_quality": "MCTS, quality value"}
TRAININGS = {"sft": "SFT", "rft": "RFT", "outcome": "ORM-RL", "pav": "PAV-RL"}
KEYS = {v: v.replace("-", "_") for v in TRAININGS.values()}                     # their names in paper.json
BEAMS = {"beam, Q^pi": "PRM_Q", "beam, PAV": "PAV"}
X = "policy tokens a problem"


def name_of(search):
    """What a search is called in tables and figures: "METHOD:SCORE" -> text."""
    method, _, score = search.partition(":")
    label = SCORES[score].label if score in SCORES else score
    return METHODS.get(method, method.replace("_", " ")) + (f", {label}" if label else "")


def draw(path, title, panels):
    """panels: (title, xlabel, ylabel, {line: (x, y, lo, hi or None)}); text x: bars; unsorted: dots."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False)
    body = []
    for ax, (name, xlabel, ylabel, lines) in zip(axes[0], panels):
        for i, (line, (x, y, lo, hi)) in enumerate(lines.items()):
            bars = isinstance(x[0], str)
            at = np.arange(len(x)) + (i - (len(lines) - 1) / 2) * 0.12 if bars else np.asarray(x, float)
            ax.plot(at, y, "o" if bars or (np.diff(at) < 0).any() else "o-", ms=4, label=line, color=f"C{i}")
            if lo is not None and (bars or len(x) == 1):
                ax.vlines(at, lo, hi, color=f"C{i}", alpha=0.6)
            elif lo is not None:
                ax.fill_between(at, lo, hi, alpha=0.15, lw=0, color=f"C{i}")
            if bars:
                ax.set_xticks(range(len(x)), [name.replace(" ", "\n") for name in x])
            bounds = ([""] * len(x),) * 2 if lo is None else (lo, hi)
            body += [(name, line, *(v if isinstance(v, str) else round(float(v), 4) for v in row))
                     for row in zip(x, y, *bounds)]
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
    return x, y[0], *pd.DataFrame(y[1:]).quantile([0.025, 0.975]).to_numpy()


def lines(curves, what="acc"):
    """{label: line against tokens} of the curves (a dict) that were measured."""
    return {label: line(c.tokens[0], getattr(c, what)) for label, c in curves.items() if c}


def over_runs(x, each):
    """(x, mean, lo, hi) over runs, with the extreme ones; each: a list of values for every run."""
    by = [spread(v) for v in zip(*each)]
    return list(x)[:len(by)], *([v[k] for v in by] for k in ("mean", "lo", "hi"))


def paper(of, names, x="N", title="the paper, 2B", xlabel="N", ylabel="accuracy"):
    """A panel of the paper's lines: names {label: key in `of`}."""
    x = of[x] if isinstance(x, str) else x
    return title, xlabel, ylabel, {label: (x, of[key], None, None) for label,
                                   key in names.items() if key in of}


# ---- search: s is a report.Searched; out: the folder

def of_base(s, search, base):
    return s.curves.get("main" if base == "base" else "bases", search, base)


def search_figures(s, out):
    """Draw every figure whose curves were measured."""
    three = {"beam, PAV": "beam:effective", "best-of-N, ORM": "best_of_n:orm", "pass@N": "pass"}
    each = {b: {k: of_base(s, v, b) for k, v in three.items()} for b in NAMES}
    if tuned := s.curves.get("tuned", "beam:effective"):
        each["base"]["our beam, tuned"] = tuned
    ours = [(f"{NAMES[b]} policy, {c['pass@N'].acc[0, 0]:.1%}", X, "accuracy", lines(c))
            for b, c in each.items() if all(c.values())]
    p = PAPER["fig4"]
    theirs = paper(p["2B"], {"beam, PAV": "PAV", "best-of-N, ORM": "ORM", "pass@N": "passN"}, p["N"])
    if ours:
        draw(out / "fig4", "Fig. 4: search against PAVs and re-ranking by the ORM", [*ours, theirs])
    beams = {k: s.main(v) for k, v in (("beam, Q^pi", "beam:q_pi"), ("beam, PAV", "beam:effective"))}
    tuned = {f"{k}, tuned": s.tuned(v) for k, v in (("beam, Q^pi", "beam:q_pi"),
                                                    ("beam, PAV", "beam:effective"))}
    if all(beams.values()):
        each = [f"{m}:{x}" for m in ("best_of_n", "beam") for x in SCORES]
        theirs = {"best-of-N, ORM": "ORM", "best-of-N, Q^pi": "PAV_as_ORM"} | BEAMS
        draw(out / "fig5a", "Fig. 5a: the same search with only the score changed", [
            ("ours", X, "accuracy", lines({name_of(m): s.main(m) for m in each})),
            ("ours, quota and alpha tuned", X, "accuracy", lines(beams | tuned)),
            paper(PAPER["fig5a_9B"], theirs, "N_corrected", "the paper, 9B")])
        draw(out / "fig6a", "Fig. 6a: is a right answer among the candidates?", [
            ("ours", X, "pass@N", lines({"samples": s.main("pass")} | beams, "solved")),
            paper(PAPER["fig6a_2B"], {"samples": "iid"} | BEAMS, ylabel="pass@N")])
    if steps := s.fact("steps", lambda f: f):
        ours = {k: over_runs(range(1, 99), [f[v] for f in steps])
                for k, v in (("Q^pi + alpha A^mu", "effective"), ("Q^pi", "q_pi"))}
        theirs = {"Q^pi + alpha A^mu": "PAV", "Q^pi": "PQV"}
        draw(out / "fig10", "Fig. 10: error in predicting the outcome after step h", [
            ("ours (right and wrong weigh the same)", "step", "error", ours),
            paper(PAPER["fig10"], theirs, "step", "the paper, 9B", "step", "error")])
    if s.curves.get("provers", "beam:q_pi"):
        prover_figures(s, out)
    if rows := s.fact("data", lambda f: f["rows"]):
        data_figure(rows, out)


def tune_figure(rows, out):
    """Accuracy of the beams that were tried on validation problems: a panel a score, a line a quota."""
    panels = []
    for score, tried in rows.groupby("score"):
        by = tried.groupby(["quota", tried.alpha.astype(float), "run"])["right"].mean().unstack()
        panels.append((name_of(f"beam:{score}"), "alpha", "accuracy", {
            f"quota {q}": (x.index.get_level_values(1), x.mean(axis=1), x.min(axis=1), x.max(axis=1))
            for q, x in by.groupby("quota", sort=False)}))
    if panels:
        draw(out / "tune", "Beams on validation problems (mean, extreme runs)", panels)


def prover_figures(s, out):
    """Fig. 5b, 5c, and Theorem 3.1's terms against the gain."""
    c, y, title = PAPER["fig5c_pct_over_ORM_beam16"], "% over best-of-N, ORM", "base policy"
    beam = {k[1::3]: x for k, x in s.curves.by.items() if k[0] == "provers" and k[4]}         # (base, prover)
    ks = sorted(int(mu[2:]) for b, mu in beam if b == "base" and mu[:2] == "bo")

    def over_orm(b, mu):
        a = beam[b, mu if mu != b else "bo1"]
        orm = at_tokens(of_base(s, "best_of_n:orm", b), a.tokens[:, -1])
        return 100 * (a.acc[:, -1] / orm - 1)
    by_k = {f"beam {w}": line(ks, np.stack([beam["base", f"bo{k}"].acc[:, i] for k in ks], 1))
            for i, w in enumerate(beam["base", "bo1"].n)}
    have = [b for b in NAMES if of_base(s, "best_of_n:orm", b)]
    pairs = {f"mu = {NAMES[mu]}": line([NAMES[b] for b in have], np.stack([over_orm(b, mu) for b in have], 1))
             for mu in NAMES if have and all((b, mu if mu != b else "bo1") in beam for b in have)}
    draw(out / "fig5bc", "Fig. 5b, 5c: provers", [
        ("best-of-K provers, base policy", "K", "accuracy", by_k),
        paper(PAPER["fig5b_2B"], {k: k for k in ("Bo2", "Bo4", "Bo8", "Bo16", "Bo32")}),
        ("base x prover", title, y, pairs),
        ("the paper, beam 16", title, y, {f"mu = {m}": (list(c), [c[b][m] for b in c], None,
                                                        None) for m in c})])
    terms = s.fact("provers", lambda f: {(t["base"], t["prover"]): t["distinguishability"] + t["alignment"]
                                         for t in f["theorem"]})

    def against(b, mu):
        gain = beam[b, mu].acc - s.curves.get("provers", "beam:q_pi", b).acc
        return line([np.mean([t[b, mu] for t in terms])], 100 * gain.mean(1, keepdims=True))
    draw(out / "theorem", "Theorem 3.1's two terms before the search, and the gain in it", [
        (f"{NAMES[b]} policy", "distinguishability + alignment", "points over the Q^pi beam",
         {mu: against(b, mu) for base, mu in terms[0] if base == b}) for b in NAMES])


def data_figure(rows, out):
    """Fig. 6b and 11."""
    p, first, panels = PAPER["fig6b_9B"], rows[0], []
    sizes, ways = sorted({r["rollouts"] for r in first}), dict.fromkeys(r["way"] for r in first)
    for key, name in (("accuracy", "accuracy"), ("auc", "held-out AUC")):
        panels.append(("ours (extreme runs)", "rollouts", name, {
            w: over_runs(sizes, [[r[key] for r in one if r["way"] == w] for one in rows]) for w in ways}))
    theirs = {f"n_mc/n_cov = {r}": y for r,
              y in p["ratio"].items()} | {"first pits": PAPER["fig11"]["first_pit"]}
    draw(out / "fig6b", "Fig. 6b, 11: data for the verifier (Q^pi, beam 8)", [*panels, paper(
        theirs, {k: k for k in theirs}, p["size_k"], "the paper, 9B", "thousand rollouts")])


# ---- RL: t is an rl_report.Trained

def rl_figures(t, out):
    """Draw every figure whose trainings are there."""
    main, p = [n for n in ("outcome", "pav") if t.curve(n)], PAPER["fig7b_2B"]
    if main:
        theirs = paper(p, KEYS, [i * p["every"] for i in range(len(p["ORM_RL"]))], xlabel="iteration")
        draw(out / "fig7", "Fig. 7: RL with outcome and with process reward", [*spent(t, main), theirs])
    if all(t.end(n) is not None for n in TRAININGS):
        names, hard = list(TRAININGS.values()), sum(int(h.sum()) for h in t.unsolved())
        bars = {"ours": line(names, np.stack([t.end(n) for n in TRAININGS], 1)),
                "the paper, 2B": (names, [PAPER["fig7a"]["2B"][KEYS[k]] for k in names], None, None)}
        draw(out / "fig8", "Fig. 7a, 8: the policies in the end", [
            ("7a: one sample", "policy", "accuracy", bars),
            ("8a: ours", "N", "pass@N", {name: t.passes(n) for n, name in TRAININGS.items()}),
            paper(PAPER["fig8a_2B"], KEYS, title="8a: the paper, 2B", ylabel="pass@N"),
            (f"8b: {hard} problems that SFT never solves", "N", "pass@N", {
                TRAININGS[n]: t.on_unsolved(n) for n in main}),
            paper(PAPER["fig8b"], KEYS, title="8b: the paper", ylabel="pass@N")])
    if len(t.trained) > 2:
        draw(out / "rewards", "Every training", spent(t, t.trained))
    if len(main) == 2:
        kl_figure(t, out)
        sweep_figure(t, out)


def spent(t, names):
    """Panels of accuracy against iterations, and against all that was spent, the verifier's data included."""
    curves = {n: line(t.curve(n).n, t.curve(n).acc) for n in names}

    def panel(title, xlabel, x):
        return title, xlabel, "accuracy", {TRAININGS.get(n, n): (x(n), *y[1:]) for n, y in curves.items()}
    data = "with the data for RFT and PAV"
    return [panel("ours", "iteration", lambda n: t.curve(n).n),
            panel(data, "token samples, millions", lambda n: (t.before(n)[0] + t.mean(n, "tokens")) / 1e6),
            panel(data, "minutes", lambda n: (t.before(n)[1] + t.mean(n, "seconds")) / 60)]


def kl_figure(t, out):
    """Of the trainings that differ from pav in reward and KL alone: the end against how far they went."""
    by, panels = {}, []
    for x, n in sorted((t.mean(n, "kl")[-1], n) for n in t.trained if t.differs(n, "pav") <= {"kl"}):
        reward = t.spec(n)["reward"]
        by.setdefault(TRAININGS.get(reward, reward), []).append((x, n))
    for ylabel, N in (("accuracy", 1), (f"pass@{t.most}", t.most)):
        panels.append(("in the end", "KL", ylabel, {
            r: line([x for x, _ in ns], np.stack([t.end(n, N) for _, n in ns], 1)) for r, ns in by.items()}))
    draw(out / "kl", "How far from the initial policy: every reward, with other KL coefficients too", panels)


def sweep_figure(t, out):
    """One panel a flag: what trainings that differ from `outcome` or `pav` in this flag alone come to."""
    by, rewards, nan = {}, ("outcome", "pav"), np.full(len(t.end("pav")), np.nan)
    for n in t.trained:
        reward = t.spec(n)["reward"]
        changed = list(t.differs(n, reward)) if reward in rewards else []
        if len(changed) == 1:
            default = {"default": {r: r for r in rewards}}
            by.setdefault(changed[0], default).setdefault(str(t.spec(n)[changed[0]]), {})[reward] = n
    panels = [(flag, "value", "accuracy in the end", {TRAININGS[r]: line(list(values), np.stack(
        [t.end(v[r]) if r in v else nan for v in values.values()], 1)) for r in rewards}) for flag,
        values in by.items()]
    if panels:
        draw(out / "sweeps", "What the result depends on", panels)

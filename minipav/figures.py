"""The figures, tables and verdicts of search.py, for one run or the mean of several seeds.

Every figure is a PNG and a CSV of the same name with the numbers that are drawn: panel, line, x, y, lo, hi. Where the paper
has a curve, it stands in a panel of its own beside ours (minipav/paper.json, read off its figures).
"""
import json
from pathlib import Path

import numpy as np

from minipav.report import Curves, at_tokens, bootstrap, claims, interval, mean_of, rows, table, tokens_to_reach, write_csv
from minipav.utils import Fail, write_whole

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
            if lo is not None and bars:
                ax.vlines(at, lo, hi, color=f"C{i}", alpha=0.6)
            elif lo is not None:
                ax.fill_between(at, lo, hi, alpha=0.15, lw=0, color=f"C{i}")
            if bars:
                ax.set_xticks(range(len(x)), x)
            empty = [""] * len(x)
            body += [(name, line, *(v if isinstance(v, str) else round(float(v), 4) if v != "" else "" for v in row))
                     for row in zip(x, y, empty if lo is None else lo, empty if hi is None else hi)]
        if "tokens" in xlabel or xlabel == "N" or "rollouts" in xlabel or xlabel == "K":
            ax.set_xscale("log", base=2)
        ax.set(title=name, xlabel=xlabel, ylabel=ylabel)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    fig.suptitle(title)
    fig.tight_layout()
    write_whole(path.with_suffix(".png"), lambda p: fig.savefig(p, dpi=130, format="png"))
    plt.close(fig)
    write_csv(path.with_suffix(".csv"), ["panel", "line", "x", "y", "lo", "hi"], body)


class Search:
    """What the experiments of one or more runs measured, with bootstrap intervals."""

    def __init__(self, folders, facts):
        self.facts, self.runs = facts, []
        for folder, here in zip(folders, facts):
            parts = [Curves(folder / "search" / f"{name}.safetensors") for name, f in here.items() if f["curves"]]
            whole = parts[0]
            for part in parts[1:]:
                whole.by, whole.also = whole.by | part.by, whole.also | part.also
            for m in [m for m in whole.by if "beam" in m]:      # the chance that some trace of the beam is right (Fig. 6a)
                n, _, tokens = whole.by[m]
                whole.by[f"{m}:passed"] = n, whole.also[m]["passed"], tokens
            self.runs.append(whole)
        self.exact, self.drawn = bootstrap(self.runs)

    def has(self, *curves):
        return all(c in self.exact for c in curves)

    def base(self, which):
        """{method: curve} of the base policy, as report.claims wants them."""
        return {m[5:]: c for m, c in which.items() if m.startswith("base:") and m.count(":") == 1}

    def line(self, curve):
        """(tokens, accuracy, lo, hi)"""
        _, acc, tokens = self.exact[curve]
        return tokens[0], acc[0], *np.percentile(self.drawn[curve][1], [2.5, 97.5], axis=0)

    def lines(self, curves):
        return {label: self.line(c) for label, c in curves.items() if c in self.exact}

    def gain(self, curve, baseline):
        """Interval of the difference in points, mean over the widths, of two curves with the same widths."""
        point, draws = (100 * (x[curve][1].mean(1) - x[baseline][1].mean(1)) for x in (self.exact, self.drawn))
        return interval(point[0], draws)

    def over(self, experiment, get):
        """get(facts) of each run: (mean, lowest, highest) arrays."""
        x = np.array([get(f[experiment]) for f in self.facts], float)
        return x.mean(0), x.min(0), x.max(0)


X = "policy tokens a problem"


def figures(s, out):
    """Draw every figure whose curves were measured. -> their names"""
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
        last = {which: (x[name][1][:, -1], at_tokens(x[f"{policy}:orm"], x[name][2][:, -1])) for which, x in
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

    def line(way, field):                                       # the rows stand in the order of their sizes
        return sizes, *s.over("data", lambda f: [r[field] for r in f["rows"] if r["way"] == way])
    p, q = PAPER["fig6b_9B"], PAPER["fig11"]
    return "fig6b", "Fig. 6b, 11: data for the verifier (Q^pi, beam 8)", [
        ("ours", "rollouts", "accuracy", {w: line(w, "accuracy") for w in ways}),
        ("ours", "rollouts", "held-out AUC", {w: line(w, "auc") for w in ways}),
        ("the paper, 9B", "thousand rollouts", "accuracy",
         {f"n_mc/n_cov = {r}": (p["size_k"], y, None, None) for r, y in p["ratio"].items()}
         | {"first pits": (q["size_k"], q["first_pit"], None, None)})]


# ---- claims ---------------------------------------------------------------------------------------------------------

def spearman(a, b):
    """Rank correlation; ties get their mean rank, and where all are tied it is 0."""
    def rank(x):
        x = np.asarray(x)
        return np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])
    a, b = rank(a) - rank(a).mean(), rank(b) - rank(b).mean()
    return float((a * b).sum() / max(1e-12, ((a ** 2).sum() * (b ** 2).sum()) ** 0.5))


def efficiency(orm, pav, C=3):
    """Compute efficiency in both readings of the paper (its text and the arrows in its Fig. 4): what best-of-N by the ORM spends,
    at the largest N and at the smallest N that is within half a point of its best, over what the beam spends for the same
    accuracy. -> {reading: {"tokens": ratio of policy tokens, "N": N / (C width)}}, None where the beam never gets there."""
    (n, acc, tokens), out = orm, {}
    for reading, k in (("largest N", len(n) - 1), ("where it saturates", int((acc[0] >= acc[0].max() - 0.005).argmax()))):
        level = acc[:1, k]
        spent, width = (float(tokens_to_reach((None, pav[1][:1], x), level)[0]) for x in (
            pav[2][:1], np.broadcast_to(np.asarray(pav[0], float), pav[1][:1].shape)))
        out[reading] = {"best_of": int(n[k]), "tokens": round(float(tokens[0, k]) / spent, 2) if spent == spent else None,
                        "N": round(int(n[k]) / (C * width), 2) if spent == spent else None}
    return out


def summarize(s):
    """The claims of section 4.1, each with its interval and a verdict."""
    out, v = {}, {}

    def judge(claim, yes, partly, why):
        v[claim] = f"{'reproduced' if yes else 'partly' if partly else 'not reproduced'}: {why}"

    def show(c):
        return f"{c['mean']:+.1f} [{c['lo']:+.1f}, {c['hi']:+.1f}]"
    if s.has(*(f"base:{m}" for m in ("orm", "best_q", "q_beam", "pav_beam"))):
        out |= claims(s.base(s.exact), s.base(s.drawn))
        out["compute_efficiency"] = efficiency(s.exact["base:orm"], s.exact["base:pav_beam"])
        points = {n: c for n, c in out["pav_minus_orm_points"].items() if c}
        judge("search against PAVs beats re-ranking by the ORM at equal tokens", all(c["lo"] > 0 for c in points.values()),
              any(c["lo"] > 0 for c in points.values()), "points ahead at the tokens of N rollouts: " + "; ".join(
                  f"{n}: {show(c)}" for n, c in points.items()) + " (paper: 8 to 10 at N = 128)")
        r = out["token_ratio_to_match_best_orm"]
        judge("1.5 to 5 times fewer tokens for what best-of-N by the ORM reaches", bool(r and r["lo"] and r["lo"] > 1.5),
              bool(r and r["mean"] > 1.5), "best-of-N at its best needs " + (
                  f"{r['mean']:.1f} [{r['lo']}, {r['hi']}] times the beam's tokens" if r else "fewer: the beam never gets there"))
        points = {n: c for n, c in out["pav_minus_qbeam_points"].items() if c}
        judge("the advantage adds to Q^pi: PAV beam above Q^pi beam", all(c["lo"] > 0 for c in points.values()),
              any(c["lo"] > 0 for c in points.values()), "; ".join(f"{n}: {show(c)}" for n, c in points.items()) + " points")
        gap = {}
        for which, x in (("exact", s.exact), ("drawn", s.drawn)):
            same = x["base:pav_beam:passed"][2]
            gap[which] = 100 * np.stack([x["base:pav_beam:passed"][1][:, k] - at_tokens(x["base:pass"], same[:, k])
                                         for k in range(same.shape[1])], 1)
        out["exploration_points_by_width"] = {str(w): interval(gap["exact"][0, k], gap["drawn"][:, k])
                                              for k, w in enumerate(s.exact["base:pav_beam"][0])}
        points = [c for c in out["exploration_points_by_width"].values() if c]
        judge("the beam holds a right answer more often than as many tokens of samples", all(c["lo"] > 0 for c in points),
              any(c["lo"] > 0 for c in points), "; ".join(show(c) for c in points) + " points by beam width")
    if s.has("base:oracle_beam", "base:best_q"):
        x, o = s.exact["base:oracle_beam"], s.exact["base:best_q"]
        out["oracle_beam_minus_best_of_n_points"] = {str(n): round(float(100 * (at_tokens(x, o[2][:, k])[0] - o[1][0, k])), 2)
                                                     for k, n in enumerate(o[0]) if o[2][0, k] >= x[2][0, 0]}
    if all("provers" in f for f in s.facts):
        ks = sorted(int(m[7:]) for m in s.exact if m[:7] == "base:bo" and m[7:].isdigit())
        out["best_k"] = mean_of([ks[int(np.argmax([r.by[f"base:bo{k}"][1].mean() for k in ks]))] for r in s.runs])
        mus = ("weak", "strong", "base", *(f"bo{k}" for k in ks))
        out["gain_by_prover_points"] = {m: s.gain(m, m.split(":")[0] + ":q_beam:provers") for m in s.exact
                                        if m.count(":") == 1 and m.split(":")[1] in mus}
        best = max(out["gain_by_prover_points"][f"base:bo{k}"]["lo"] for k in ks)
        inside = ks[0] < out["best_k"]["lo"] and out["best_k"]["hi"] < ks[-1]
        judge("an intermediate K is the best prover", best > 0 and inside, best > 0 or inside,
              f"best K of a run {out['best_k']}; points over the Q^pi beam " + "; ".join(
                  f"Bo{k}: {show(out['gain_by_prover_points'][f'base:bo{k}'])}" for k in ks))
        weak = out["gain_by_prover_points"]["strong:weak"]
        judge("a weaker prover improves a stronger base", weak["lo"] > 0, weak["mean"] > 0,
              f"{show(weak)} points over its Q^pi beam")
        each = [spearman([t["distinguishability"] + t["alignment"] for t in here], [t["gain"] for t in here])
                for f in s.facts if (here := [t for t in f["provers"]["theorem"] if t["base"] == "base"])]
        out["prover_rank_correlation"] = mean_of([round(x, 3) for x in each])
        judge("Theorem 3.1's terms, measured beforehand, rank the provers", min(each) > 0.5, np.mean(each) > 0.3,
              f"rank correlation with the gain, by run: {[round(x, 2) for x in each]}")
    if all("data" in f for f in s.facts):
        def by_way(f, way):
            return np.array([r["accuracy"] for r in f["rows"] if r["way"] == way])
        pit = s.over("data", lambda f: 100 * (by_way(f, "first pits") - by_way(f, "n_mc = 4")))
        out["first_pit_minus_random_points"] = {k: [round(float(x), 2) for x in xs] for k, xs in zip(("mean", "lo", "hi"), pit)}
        judge("first pits make better data than random seeds", pit[1].min() > 0, pit[0].mean() > 0,
              f"points by data size, mean {np.round(pit[0], 1).tolist()}, lowest run {np.round(pit[1], 1).tolist()}")
        few, many = (s.over("data", lambda f, n=n: by_way(f, f"n_mc = {n}"))[0] for n in (4, 16))
        judge("many completions a prefix pay at large budgets, few at small ones", many[0] < few[0] and many[-1] > few[-1],
              many[0] < few[0], f"accuracy by data size, n_mc = 4: {few.round(3).tolist()}, 16: {many.round(3).tolist()}")
    return out | {"verdicts": v}


def search_report(folders, facts, out):
    """Tables, figures with their CSVs and summary.json in `out`, from what search.py measured in these run folders."""
    out.mkdir(parents=True, exist_ok=True)
    configs = [json.loads((f / "config.json").read_text()) for f in folders]
    if len({c["seed"] for c in configs}) < len(configs):
        raise Fail("two of the --run folders have the same seed: each counts once")
    s = Search(folders, facts)
    body = [(m, *row) for m, *row in rows(s.exact, s.drawn, sorted(s.exact))]
    write_csv(out / "curves.csv", ["curve", "n", "tokens_per_problem", "accuracy", "lo", "hi"], body)
    spent = [(m, int(n), *(round(float(np.mean([r.also[m][x][k].mean() for r in s.runs])), 2) for x in ("scored", "seconds")))
             for m in s.runs[0].also for k, n in enumerate(s.runs[0].by[m][0])]
    write_csv(out / "budgets.csv", ["curve", "n", "verifier_tokens_per_problem", "seconds_all_problems"], spent)
    made = figures(s, out)
    text = table([(m, *row) for m in LABELS for curve, *row in body if curve == f"base:{m}"], LABELS)
    write_whole(out / "table.txt", lambda p: p.write_text(text + "\n"))
    first = next(iter(facts[0].values()))
    summary = {"seeds": [c["seed"] for c in configs], "test_problems": sum(r.P for r in s.runs), "hardware": first["hardware"],
               "commit": sorted({f["commit"] for here in facts for f in here.values()}),
               "minutes": mean_of([round(sum(f["seconds"] for f in here.values()) / 60, 2) for here in facts]),
               "alpha": [f.get("main", first)["chosen_alpha"] for f in facts], "prover": first["prover"], **summarize(s)}
    write_whole(out / "summary.json", lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"))
    print(f"\n{text}\n")
    for claim, verdict in summary["verdicts"].items():
        print(f"{claim}\n    {verdict}")
    if "compute_efficiency" in summary:
        print("compute efficiency of the PAV beam against best-of-N by the ORM (None: the beam never gets there)")
        for reading, e in summary["compute_efficiency"].items():
            print(f"    {reading} (N = {e['best_of']}): {e['tokens']} in policy tokens, {e['N']} as N / (3 width)")
    print(f"\nin {out}: table.txt, curves.csv, budgets.csv, summary.json, and as PNG with its CSV: {', '.join(made)}")

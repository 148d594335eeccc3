"""From what search.py measured to curves with intervals, the claims of section 4.1 and a verdict for each."""
import json
import sys

import numpy as np

from minipav.figures import LABELS, figures
from minipav.report import Curves, at_tokens, bootstrap, claims, interval, mean_of, rows, table, tokens_to_reach, write_csv
from minipav.utils import write_whole


class Search:
    """What the experiments of one or more runs measured, with bootstrap intervals."""

    def __init__(self, folders, facts):
        self.facts, self.runs = facts, []
        for folder, here in zip(folders, facts):
            parts = [Curves.load(folder / f"{name}.safetensors") for name, f in here.items() if f["curves"]]
            whole = parts[0]
            for part in parts[1:]:
                whole.by, whole.also = whole.by | part.by, whole.also | part.also
            for m in [m for m in whole.by if m.endswith(":wide")]:
                points, wide = whole.by[m[:-5]], whole.by.pop(m)
                whole.by[m[:-5]] = tuple(map(np.concatenate, zip(points, wide)))
                also, more = whole.also[m[:-5]], whole.also.pop(m)
                whole.also[m[:-5]] = {k: np.concatenate([also[k], more[k]]) for k in also}
            for m in [m for m in whole.by if "beam" in m]:      # the chance that some trace of the beam is right (Fig. 6a)
                n, _, tokens = whole.by[m]
                whole.by[f"{m}:passed"] = n, whole.also[m]["passed"], tokens
            for way in dict.fromkeys(r["way"] for r in here.get("data", {"rows": []})["rows"]):         # Fig. 6b, 11
                some = [r for r in here["data"]["rows"] if r["way"] == way]
                size, acc = np.array([r["rollouts"] for r in some]), np.array([[float(c) for c in r["solved"]] for r in some])
                whole.by[f"data:{way}"] = size, acc, np.broadcast_to(size[:, None], acc.shape).astype(float)
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

    def gains(self, curve, baseline):
        """The same at each point."""
        point, draws = (100 * (x[curve][1] - x[baseline][1]) for x in (self.exact, self.drawn))
        return [interval(point[0, k], draws[:, k]) for k in range(point.shape[1])]

    def over(self, experiment, get):
        """get(facts) of each run: (mean, lowest, highest) arrays."""
        x = np.array([get(f[experiment]) for f in self.facts], float)
        return x.mean(0), x.min(0), x.max(0)


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
    """The claims of section 4.1, each with its interval and a verdict: reproduced if every interval is above 0, partly if some
    are. An interval that is not defined is not above 0."""
    out, v = {}, {}

    def above(c):
        return bool(c) and c["lo"] is not None and c["lo"] > 0

    def show(c):
        return f"{c['mean']:+.1f} [{', '.join('-' if c[k] is None else f'{c[k]:+.1f}' for k in ('lo', 'hi'))}]"

    def judge(claim, intervals, why):
        yes = [above(c) for c in intervals]
        v[claim] = ("not measured" if not yes else "reproduced" if all(yes) else "partly" if any(yes) else "not reproduced"
                    ) + f": {why}"

    def by_budget(key):
        points = {n: c for n, c in out[key].items() if c}
        return points.values(), "; ".join(f"{n}: {show(c)}" for n, c in points.items())
    alphas = [f["main"]["chosen_alpha"] for f in s.facts]
    note = f"; alpha {alphas}" + (", and at 0 the PAV beam is the Q^pi beam" if 0 in alphas else "")
    if s.has(*(f"base:{m}" for m in ("orm", "best_q", "q_beam", "pav_beam"))):
        out |= claims(s.base(s.exact), s.base(s.drawn))
        out["compute_efficiency"] = efficiency(s.exact["base:orm"], s.exact["base:pav_beam"])
        points, text = by_budget("pav_minus_orm_points")
        judge("search against PAVs beats re-ranking by the ORM at equal tokens", points,
              f"points ahead at the tokens of N rollouts: {text} (paper: 8 to 10 at N = 128){note}")
        r = out["token_ratio_to_match_best_orm"]
        judge("1.5 to 5 times fewer tokens for what best-of-N by the ORM reaches", [
            {"lo": r["lo"] - 1.5}, {"lo": r["lo"] - 1}], "best-of-N at its best needs "
            f"{r['mean']:.2f} [{r['lo']:.2f}, {r['hi']:.2f}] times the beam's tokens for the same (0: the beam never gets there)")
        points, text = by_budget("pav_minus_qbeam_points")
        judge("the advantage adds to Q^pi: PAV beam above Q^pi beam", points, f"{text} points{note}")
    if s.has("base:pav_beam", "base:pass"):
        gap = {}
        for which, x in (("exact", s.exact), ("drawn", s.drawn)):
            _, acc, tokens = x["base:pav_beam:passed"]
            gap[which] = 100 * np.stack([acc[:, k] - at_tokens(x["base:pass"], tokens[:, k], beyond=False)
                                         for k in range(acc.shape[1])], 1)
        points = {str(w): interval(gap["exact"][0, k], gap["drawn"][:, k]) for k, w in enumerate(s.exact["base:pav_beam"][0])}
        out["exploration_points_by_width"] = points
        judge("the beam holds a right answer more often than as many tokens of samples", [c for c in points.values() if c],
              "; ".join(f"{w}: {show(c)}" for w, c in points.items() if c) + " points by beam width")
    if s.has("base:oracle_beam", "base:best_q"):
        x, o = s.exact["base:oracle_beam"], s.exact["base:best_q"]
        out["oracle_beam_minus_best_of_n_points"] = {str(n): round(float(100 * (at_tokens(x, o[2][:, k])[0] - o[1][0, k])), 2)
                                                     for k, n in enumerate(o[0]) if o[2][0, k] >= x[2][0, 0]}
    if s.has("base:exact:bo1:0.0"):
        gains = {m[11:]: s.gain(m, "base:exact:bo1:0.0") for m in s.exact if m.startswith("base:exact:") and m[-3:] != "0.0"}
        out["exact_gain_by_prover_and_alpha_points"] = gains
        judge("with exact values instead of a verifier's, the advantage adds to Q^pi", gains.values(),
              "points over the beam by exact Q^pi, by prover and alpha: " + "; ".join(
                  f"{m}: {show(c)}" for m, c in gains.items()))
    if all("provers" in f for f in s.facts):
        ks = sorted(int(m[7:]) for m in s.exact if m[:7] == "base:bo" and m[7:].isdigit())
        pairs = [f"{t['base']}:{t['prover']}" for t in s.facts[0]["provers"]["theorem"]]
        gains = {m: s.gain(m, m.partition(":")[0] + ":q_beam:provers") for m in pairs}
        out["gain_by_prover_points"] = gains
        out["best_k"] = mean_of([ks[int(np.argmax([r.by[f"base:bo{k}"][1].mean() for k in ks]))] for r in s.runs])
        used = f"; alpha {alphas}, where it is 0 that of train.py"
        best = max(ks[1:-1], key=lambda k: gains[f"base:bo{k}"]["mean"])
        judge("an intermediate K is the best prover", [s.gain(f"base:bo{best}", f"base:bo{k}") for k in (ks[0], ks[-1])],
              f"best K of a run: mean {out['best_k']['mean']}, from {out['best_k']['lo']} to {out['best_k']['hi']}; points over "
              "the Q^pi beam " + "; ".join(f"Bo{k}: {show(gains[f'base:bo{k}'])}" for k in ks) + used)
        judge("a weaker prover improves a stronger base", [gains["strong:weak"]],
              f"{show(gains['strong:weak'])} points over its Q^pi beam{used}")
        out["prover_rank_correlation"] = rank_correlation(s)
        c = out["prover_rank_correlation"]
        judge("Theorem 3.1's terms, measured beforehand, rank the provers", [c],
              f"rank correlation with the gain {c['mean']:.2f} [{c['lo']:.2f}, {c['hi']:.2f}]{used}")
    if all("data" in f for f in s.facts):
        pits = s.gains("data:first pits", "data:n_mc = 4")
        out["first_pit_minus_random_points"] = pits
        judge("first pits make better data than random seeds", pits, "; ".join(map(show, pits)) + " points by data size")
        many = s.gains("data:n_mc = 16", "data:n_mc = 4")
        judge("few completions a prefix are better at a small budget, many at a large one",
              [{"lo": None if many[0]["hi"] is None else -many[0]["hi"]}, many[-1]],
              "n_mc = 16 minus n_mc = 4: " + "; ".join(map(show, many)) + " points by data size")
        free = s.gains("data:n_mc = 0", "data:n_mc = 4")
        out["free_labels_minus_n_mc_4_points"] = free
    return out | {"verdicts": v}


def rank_correlation(s):
    """Spearman's correlation over the provers of the base policy: distinguishability + alignment (mean of the runs) against the
    gain over the Q^pi beam, with the gain's interval by the bootstrap."""
    mus = [t["prover"] for t in s.facts[0]["provers"]["theorem"] if t["base"] == "base"]
    terms = np.mean([[t["distinguishability"] + t["alignment"] for t in f["provers"]["theorem"] if t["base"] == "base"]
                     for f in s.facts], 0)
    rho = [np.array([spearman(terms, [x[f"base:{mu}"][1][r].mean() for mu in mus]) for r in range(len(x["base:bo1"][1]))])
           for x in (s.exact, s.drawn)]
    return interval(rho[0][0], rho[1])


def search_report(runs, folders, facts, out):
    """Tables, figures with their CSVs and summary.json in `out`, from what search.py measured of each run in its folder."""
    s, seeds = Search(folders, facts), [r.config["seed"] for r in runs]
    body = [(m, *row) for m, *row in rows(s.exact, s.drawn, sorted(s.exact))]
    write_csv(out / "curves.csv", ["curve", "n", "tokens_per_problem", "accuracy", "lo", "hi"], body)
    each = [(seed, m, int(n), *(round(float(np.mean(x[k])), 4) for x in (*r.by[m][1:], *r.also[m].values())))
            for seed, r in zip(seeds, s.runs) for m in r.also for k, n in enumerate(r.by[m][0])]
    write_csv(out / "by_seed.csv", ["seed", "curve", "n", "accuracy", "tokens_per_problem", "pass_at_n",
                                    "verifier_tokens_per_problem", "seconds_all_problems"], each)
    made = figures(s, out)
    text = table([(m, *row) for m in LABELS for curve, *row in body if curve == f"base:{m}"], LABELS)
    write_whole(out / "table.txt", lambda p: p.write_text(text + "\n"))
    first = next(iter(facts[0].values()))
    summary = {"command": " ".join(["python", *sys.argv]), "seeds": seeds,
               "test_problems": sum(r.P for r in s.runs), "hardware": first["hardware"],
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
    print(f"\nin {out}: table.txt, curves.csv, by_seed.csv, summary.json, and as PNG with its CSV: {', '.join(made)}\n"
          f"next: python rl.py --run {runs[0].out}; or --all; or other seeds, then --run RUN RUN ... --out DIR for their mean")

"""From the searches of mechanism.py to gains, a figure and what told them beforehand."""
import numpy as np
import pandas as pd

from minipav.files import write_csv
from minipav.paper.claims import MECHANISM, RANGES
from minipav.paper.figures import draw
from minipav.paper.report import finish, judged, keep, provenance
from minipav.paper.statistics import bootstrap, interval, read_table, spearman, spread

SCORE_NAMES = {"q_pi": "Q^pi", "effective": "A^mu", "log_odds": "log-odds"}
TEXTS = ("split", "method", "score", "quota", "right")
NOISE = ["inherited", "fresh", "score", "alpha", "quota", "right"]
COLUMNS = ["split", "method", "score", "alpha", "quota", "width", "accuracy", "tokens", "right"]


def best(rows, score, quota):
    """The alpha of a score that is right most often on validation problems; 0 is Q^pi."""
    rows = rows[(rows.split == "validation") & (rows.quota == quota) & rows.score.isin([score, "q_pi"])]
    return float(rows.sort_values("alpha").set_index("alpha").accuracy.idxmax())


def right_of(rows, method, score, alpha=0.0, quota="none"):
    """Right or not (P,) of one search."""
    rows = rows[(rows.method == method) & (rows.score == score)]
    return np.array(list(rows[(rows.alpha == alpha) & (rows.quota == quota)].right.iloc[0]), float)


def read(folder, name):
    """Every search of a verifier, those with a quota of states too, if the task has states."""
    paths = [folder / f"{name}.csv", folder / f"{name}-state.csv"]
    return pd.concat([read_table(p, COLUMNS, TEXTS) for p in paths if p == paths[0] or p.exists()])


def gains(rows):
    """{name: gain of each test problem}, the alphas that were chosen on validation problems, what that of
    A^mu without a quota gained there, and whether the beam by Q^pi is right (P,)."""
    tried = rows[(rows.split == "validation") & (rows.quota == "none") & (rows.score != "log_odds")]
    gained = tried.accuracy.max() - tried[tried.alpha == 0].accuracy.max()
    test = rows[rows.split == "test"]

    def chosen(score, quota):
        alpha = best(rows, score, quota)
        return right_of(test, "beam", score if alpha else "q_pi", alpha, quota), alpha
    q, out, alphas = right_of(test, "beam", "q_pi"), {}, {}
    for quota, of in (("none", ""), ("parent", "quota"), ("state", "state quota")):
        if (test.quota == quota).any():
            base, given = right_of(test, "beam", "q_pi", 0.0, quota), f" given {of}" * bool(of)
            if of:
                out[of] = base - q
            for score, name in (("effective", "alpha"), ("log_odds", "log-odds")):
                right, alphas[name + given] = chosen(score, quota)
                out[name + given] = right - base
    out |= {"sub-trees": right_of(test, "dvts", "q_pi", quota="") - q,
            "A^mu alone": right_of(test, "beam", "advantage") - q}
    return out, alphas, round(gained, 4), q


class Mechanism:
    """Several runs' verifiers. by {verifier: {gain: (R + 1,)}}, in points; plain {verifier: (R + 1,)}, the
    beam by Q^pi."""

    def __init__(self, runs, names, width):
        self.facts, self.by, self.plain = {}, {}, {}
        for name in names:
            table = f"{name}-w{width}"
            found = [gains(read(run.out / "mechanism", table)) for run, _ in runs]
            facts = [f[name] for _, f in runs]
            before = [f[table]["before"] | f.get(f"{table}-state", {"before": {}})["before"] for _, f in runs]
            boot = bootstrap([pd.DataFrame(g | {"": q}) for g, *_, q in found])
            self.plain[name] = boot.pop("").to_numpy()
            self.by[name] = {k: 100 * boot[k].to_numpy() for k in boot}
            self.facts[name] = {
                "auc": float(np.mean([f["auc"] for f in facts])), "alphas": [x for _, x, *_ in found],
                "by_seed": [{k: round(100 * float(v.mean()), 2) for k, v in g.items()} for g, *_ in found],
                "before": [x | {"auc": f["auc"], "validation_gain": gained}
                           for f, x, (_, _, gained, _) in zip(facts, before, found)]}

    def mean(self, gain, low=0.0, high=1.0):
        """Of one gain over the verifiers whose AUC lies in this range: {"mean", "lo", "hi"}, or None."""
        some = [g[gain] for n, g in self.by.items() if low <= self.facts[n]["auc"] <= high and gain in g]
        return interval(np.mean(some, 0)) if some else None

    def correlations(self, gain="alpha"):
        """{feature: rank correlation over the verifiers with this gain on test problems, of each run}."""
        runs = len(next(iter(self.facts.values()))["before"])
        return {k: [spearman([f["before"][i][k] for f in self.facts.values()],
                             [f["by_seed"][i][gain] for f in self.facts.values()]) for i in range(runs)]
                for k in next(iter(self.facts.values()))["before"][0]}

    def predicted(self):
        """Of each run, the correlation (with alpha's gain) of the feature that does best on the other runs,
        with its sign there: mean and extremes; None for one run."""
        found, out = self.correlations(), []
        for i in range(len(next(iter(found.values())))):
            others = {k: np.mean(v[:i] + v[i + 1:]) for k, v in found.items() if len(v) > 1}
            if others:
                k = max(others, key=lambda k: abs(others[k]))
                out.append(np.sign(others[k]) * found[k][i])
        return spread(out) if out else None


def noise_rows(run, name):
    return read_table(run.out / "mechanism" / f"{name}.csv", NOISE, ("score", "quota", "right"))


def noise_gains(runs, name):
    """{(inherited, fresh): {"score, alpha, quota": {"mean", "lo", "hi"}}} of points over the beam by Q^pi."""
    each = []
    for run, _ in runs:
        rows = noise_rows(run, name)
        right = {tuple(k): np.array(list(r), float) for *k, r in rows[NOISE].itertuples(index=False)}
        each.append(pd.DataFrame({k: 100 * (v - right[(*k[:2], "q_pi", 0.0, "none")])
                                  for k, v in right.items()}))
    boot, out = bootstrap(each), {}
    for inherited, fresh, score, alpha, quota in boot:
        name = f"{SCORE_NAMES[score]}" + f", alpha {alpha:g}" * bool(alpha) + f", quota {quota}" * (
            quota != "none")
        out.setdefault((inherited, fresh), {})[name] = interval(
            boot[inherited, fresh, score, alpha, quota].to_numpy())
    return out


def noise_panels(found):
    """A panel for each strength of fresh errors: points over the beam by Q^pi against that of inherited."""
    for fresh in sorted({f for _, f in found}):
        xs = sorted(i for i, f in found if f == fresh)
        yield f"fresh errors {fresh:g}", "inherited errors (in log-odds)", "points over Q^pi", {
            name: (xs, *([found[i, fresh][name][k] for i in xs] for k in ("mean", "lo", "hi")))
            for name in found[xs[0], fresh] if name != "Q^pi"}


SHOWN = {"A^mu": "alpha", "quota of siblings": "quota", "A^mu beside it": "alpha given quota",
         "quota of states": "state quota", "A^mu beside that": "alpha given state quota"}


def write_table(m, names, first, out):
    """mechanism_verifiers.csv, in points: the beam by Q^pi itself, and over `first`'s, every gain with its
    interval; and what validation problems said."""
    plain = {n: 100 * m.plain[n] for n in names}
    every = {n: {"Q^pi": plain[n], f"Q^pi over {first}'s": plain[n] - plain[first], **m.by[n]} for n in names}
    columns = ["verifier", "auc", *(f"{g} {k}" for g in every[first] for k in ("mean", "lo", "hi")),
               *m.facts[first]["before"][0]]
    rows = []
    for n in names:
        before = pd.DataFrame(m.facts[n]["before"]).mean().round(4).tolist()
        rows.append([n, round(m.facts[n]["auc"], 4),
                     *(v for g in every[n].values() for v in interval(g).values()), *before])
    write_csv(out / "mechanism_verifiers.csv", columns, rows)


def report(runs, names, width, out):
    """runs: [(run, {stage: its facts})]; names: of the verifiers."""
    m, first = Mechanism(runs, names, width), names[0]
    names = sorted(m.by, key=lambda n: m.facts[n]["auc"])
    aucs = [m.facts[n]["auc"] for n in names]

    shown = [(k, g) for k, g in SHOWN.items() if g in m.by[names[0]]]

    def line(gain):
        values = [interval(m.by[n][gain]) for n in names]
        return aucs, *([v[k] for v in values] for k in ("mean", "lo", "hi"))
    draw(out / "mechanism", f"What is added to a beam of width {width} by Q^pi", [
        ("", "held-out AUC of the verifier", "points over Q^pi (over Q^pi with quota)",
         {k: line(g) for k, g in (shown if len(shown) < 4 else shown[:1] + shown[3:])})])
    for name in [x for x in runs[0][1] if x.startswith("noise")]:
        panels = list(noise_panels(noise_gains(runs, name)))
        draw(out / "noise", "Exact values with errors put in, up to step 3", panels)
        keep(out / "noise_rows.csv.gz", [noise_rows(r, name).assign(run=r.config["seed"]) for r, _ in runs])
    write_table(m, names, first, out)
    facts = provenance([run.out for run, _ in runs], [[f"mechanism-{n}" for n in f] for _, f in runs])
    facts |= {"width": width, "seeds": [run.config["seed"] for run, _ in runs], "verifiers": m.facts,
              **{k: {g: m.mean(g, *r) for g in m.by[names[0]]}
                 for k, r in zip(("weak", "good"), RANGES.values())},
              "rank_correlation": {g: m.correlations(g) for _, g in shown}}
    tables = [read(run.out / "mechanism", f"{n}-w{width}").assign(run=run.config["seed"], verifier=n)
              for run, _ in runs for n in names]
    keep(out / "rows.csv.gz", tables)
    text = [f"{'verifier':<22}{'AUC':>6}" + "".join(f"{k:>26}" for k, _ in shown)]
    for n in names:
        found = (interval(m.by[n][g]) for _, g in shown)
        text.append(f"{n:<22}{m.facts[n]['auc']:>6.3f}" + "".join(
            f"{v['mean']:>+8.1f} [{v['lo']:+.1f}, {v['hi']:+.1f}]".rjust(26) for v in found))
    finish(out, facts, judged(MECHANISM, m), "\n".join(text),
           "python search.py --verifier mechanism/base-60; or other seeds, then --run RUN ... --out DIR")

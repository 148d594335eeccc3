"""From the trainings of rl.py to curves with intervals, the claims of section 5 and a verdict for each.

Intervals are 95% bootstrap intervals over runs and, within each, problems; every training is resampled in the same way (paired).
"""
import csv
import json
import sys

import numpy as np
import torch
from safetensors.numpy import load_file

from minipav.report import Curves, bootstrap, interval, mean_of, write_csv
from minipav.rewards import REWARDS
from minipav.rl import COLUMNS
from minipav.rl_figures import LABELS, figures
from minipav.search import pass_at_n
from minipav.sft import own_rollouts
from minipav.utils import Fail, write_whole

N = [2 ** k for k in range(9)]


class Trained:
    """All trainings of several runs: NAME:curve, accuracy by iteration, NAME:pass, pass@N in the end, and NAME:greedy, each
    (x (k,), accuracy (1, k), ...) in `exact` and (x, (R, k), ...) in `drawn`, as `report.bootstrap` makes them."""

    def __init__(self, runs, folders):
        self.names, self.flags, self.rows, self.final, self.hard, by_run = list(folders), {}, {}, {}, [], []
        for run in runs:
            by = {}
            for name, where in folders.items():
                folder = run.out / "rl" / where
                try:
                    f = load_file(folder / "final.safetensors")
                    self.final.setdefault(name, []).append(json.loads((folder / "final.json").read_text()))
                    self.flags[name] = json.loads((folder / "flags.json").read_text())
                    log = list(csv.DictReader((folder / "log.csv").open())) if "curve" in f else []
                except Exception as e:
                    raise Fail(f"{folder} is missing or damaged ({e}): delete it and run again") from None
                self.rows.setdefault(name, []).append([{k: float(row.get(k) or "nan") for k in COLUMNS} for row in log])
                reward = torch.from_numpy(f["reward"]).float()
                ns = np.array([x for x in N if x <= reward.shape[1]])
                passed = np.stack([pass_at_n(reward, int(x)).numpy() for x in ns])
                by[f"{name}:pass"] = ns, passed, np.ones_like(passed)
                by[f"{name}:greedy"] = np.array([1]), f["greedy"][None].astype(float), np.ones((1, len(reward)))
                if log:
                    by[f"{name}:curve"] = np.array([int(r["iteration"]) for r in log]), f["curve"], np.ones_like(f["curve"])
            if "sft:pass" in by:                                                # problems that no sample of SFT solves (Fig. 8b)
                self.hard.append(by["sft:pass"][1][-1] == 0)
            by_run.append(Curves(by))
        self.exact, self.drawn = bootstrap(by_run)
        self.each = by_run
        self.trained = [n for n in folders if f"{n}:curve" in self.exact]
        self.before = {n: np.mean([cost_before(run, self.flags[n]) for run in runs], 0) for n in self.trained}

    def line(self, key):
        """(x, mean, lo, hi) of a curve, for a figure."""
        return (self.exact[key][0], self.exact[key][1][0], *np.percentile(self.drawn[key][1], [2.5, 97.5], axis=0))

    def on_hard(self, name):
        """(N, mean, lo, hi) of pass@N on the problems that no sample of SFT solves; lo, hi: the extreme runs."""
        each = [(c.by[f"{name}:pass"][1][:, hard]) for c, hard in zip(self.each, self.hard)]
        by_run = [x.mean(1) for x in each if x.shape[1]] or [np.zeros(len(each[0]))]
        pooled = np.concatenate(each, 1)
        return self.exact[f"{name}:pass"][0], pooled.sum(1) / max(1, pooled.shape[1]), np.min(by_run, 0), np.max(by_run, 0)

    def at(self, key, which, n=None):
        """A curve's value (R,) at n, or at its end."""
        x, acc, _ = (self.exact if which == "exact" else self.drawn)[key]
        return acc[:, -1 if n is None else list(x).index(n)]

    def difference(self, a, b):
        """a - b in points with its interval, a and b functions of "exact" or "drawn"."""
        return interval(100 * (a("exact") - b("exact"))[0], 100 * (a("drawn") - b("drawn")))

    def mean(self, name, column):
        """Mean over the runs of a column of the log, at each evaluation."""
        return np.mean([[r[column] for r in rows] for rows in self.rows[name]], 0)


def first_reach(x, acc, level):
    """Where the curves acc (R, k) over x (k,) first reach level (R,), linear between points; NaN if they do not."""
    out = np.full(len(acc), np.nan)
    for r in range(len(acc)):
        k = int((acc[r] >= level[r]).argmax())
        if acc[r, k] >= level[r]:
            out[r] = x[0] if k == 0 else np.interp(level[r], acc[r, k - 1:k + 1], x[k - 1:k + 1])
    return out


def sample_efficiency(orm, pav):
    """Iterations that ORM-RL needs for its best accuracy over those in which PAV-RL first has it (R,); 0 if it never does, and
    NaN if ORM-RL is best at the start. orm, pav: (x (k,), acc (R, k), ...)."""
    best = orm[0][orm[1].argmax(1)]
    reached = first_reach(pav[0], pav[1], orm[1].max(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best == 0, np.nan, np.where(np.isnan(reached), 0.0, best / reached))


def control(name, flags):
    """The training with outcome reward to hold this one against: one that differs in nothing else, or else `outcome`. pav-sum and
    pav-pi have 1 + alpha times the gradient of outcome reward, so there the KL must count so much less."""
    f, other = flags[name], ("reward", "kl", "alpha", "prover", "n_mc", "refresh", "no_known")
    common = [k for k in f if k not in other]
    kl = f["kl"] / (1 + f["alpha"] * (f["reward"] in ("pav-sum", "pav-pi")))
    same = [n for n, g in flags.items() if g.get("reward") == "outcome" and all(g[k] == f[k] for k in common)
            and abs(g["kl"] - kl) < 1e-9]
    return same[0] if same else "outcome"


def summarize(t):
    """The claims of section 5, each a number with its interval; those whose trainings are there."""
    end, s = "{}:pass", {}

    def acc(name, n=1):
        return lambda which: t.at(end.format(name), which, n)
    pairs = {"pav_minus_orm_points": ("pav", "outcome", 1), "pass64_pav_minus_orm_points": ("pav", "outcome", 64),
             "pass64_pav_minus_sft_points": ("pav", "sft", 64), "pass64_orm_minus_sft_points": ("outcome", "sft", 64),
             "orm_minus_rft_points": ("outcome", "rft", 1), "pav_minus_rft_points": ("pav", "rft", 1)}
    pairs |= {f"{n.replace('-', '_')}_minus_outcome_points": (n, control(n, t.flags), 1) for n in t.trained
              if n not in LABELS and n != control(n, t.flags)}
    for claim, (a, b, n) in pairs.items():
        if {a, b} <= set(t.names) and all(n in t.exact[end.format(x)][0] for x in (a, b)):
            s[claim] = t.difference(acc(a, n), acc(b, n))
    if "pav" in t.trained:                                      # how good could ORM-RL be?
        others = [n for n in t.trained if t.flags[n]["reward"] == "outcome" and t.flags[n]["policy"] == t.flags["pav"]["policy"]]
        s["pav_minus_each_outcome_points"] = {n: t.difference(acc("pav"), acc(n)) for n in others}
    for name in t.trained:
        orm = control(name, t.flags)
        if name != orm and orm in t.trained:
            point, draws = (sample_efficiency(x[f"{orm}:curve"], x[f"{name}:curve"]) for x in (t.exact, t.drawn))
            s.setdefault("efficiency_by_training", {})[name] = interval(point[0], draws)
    if "pav" in s.get("efficiency_by_training", {}):
        s["sample_efficiency"] = s["efficiency_by_training"]["pav"]
    return s


def verdicts(s):
    """One sentence for each claim whose trainings are there."""
    def told(x, form="+.1f", unit="points"):
        mean, lo, hi = ("-" if x[k] is None else format(x[k], form) for k in ("mean", "lo", "hi"))
        return f"{mean} [{lo}, {hi}] {unit}"

    def above(x, aim=0.0):
        return x["lo"] > 0 and (x["mean"] >= aim or "partly")

    def word(ok):
        return {True: "reproduced", "partly": "partly", False: "not reproduced"}[ok]
    out = {}
    if "pav_minus_orm_points" in s:
        x = s["pav_minus_orm_points"]
        out["PAV-RL ends above ORM-RL (paper: 7 points)"] = f"{word(above(x, 7))}: {told(x)}"
        e = s["sample_efficiency"] or dict.fromkeys(("mean", "lo", "hi"))       # None: ORM-RL is best at the start
        ok = (e["lo"] or 0) > 1 and (e["mean"] >= 5 or "partly")
        out["PAV-RL needs 5 to 6 times fewer iterations for ORM-RL's best accuracy"] = f"{word(ok)}: {told(e, '.1f', 'times')}"
    if "pass64_pav_minus_orm_points" in s:
        x, y, z = (s.get(f"pass64_{k}_points") for k in ("pav_minus_orm", "pav_minus_sft", "orm_minus_sft"))
        ok = above(x) and above(y) and (z["hi"] < 0 or "partly")
        out["PAV-RL has the higher pass@64, above SFT's, and ORM-RL's is below SFT's"] = (
            f"{word(ok)}: PAV-RL over ORM-RL {told(x)}; over SFT {told(y)}; ORM-RL over SFT {told(z)}")
    for key, claim in (("pav_sum", "summed along the trace, A^mu gives no more than outcome reward (derived, not in the paper)"),
                       ("pav_pi", "with mu = pi, A^mu gives no more than outcome reward")):
        x = s.get(f"{key}_minus_outcome_points")
        if x:
            out[claim] = f"{word(not above(x))}: {told(x)}" + ("" if x["hi"] >= 0 else ", less")
    x = s.get("q_bonus_minus_outcome_points")
    if x:
        out["Q^mu as a bonus makes RL fail (App. G)"] = f"{word(x['hi'] < 0)}: {told(x)} against outcome reward"
    for r in ("pav-oracle", "pav-rollout", "vine", "pav-policyweak", "pav-policystrong"):
        x = s.get(f"{r.replace('-', '_')}_minus_outcome_points")
        if x:
            out[f"{r} against outcome reward (no claim of the paper)"] = told(x)
    each = s.get("pav_minus_each_outcome_points", {})
    if len(each) > 1:
        n = min(each, key=lambda n: each[n]["mean"])
        out["PAV-RL against the best of all ORM-RL here (no claim of the paper)"] = f"{told(each[n])} against {n}"
    return out


def sampled(t):
    """About how many tokens were sampled for these labelled traces: of every trace what follows its first labelled place, and
    for each place with several completions as many times the rest of the trace. The probes for first pits are not in it, while
    traces with a wrong step, which nobody sampled, are: a few per cent each."""
    last = t.lengths - 1
    known = t.ends.masked_fill((t.n == 0) | (t.ends < 0), 1 << 30).min(1).values
    once = (last - known).clamp(min=0)
    many = ((t.n > 1) & (t.ends >= 0) & (t.ends < last[:, None])) * t.n * (last[:, None] - t.ends)
    return float(torch.where(many.sum(1) > 0, many.sum(1), once).sum())


def cost_before(run, f):
    """(tokens, seconds) that a training with the flags f had cost before its first iteration: the rollouts that RFT is trained
    on, and for a verifier all of its data and its training. What every training starts from (SFT, the stronger policy) and RFT's
    own few steps are not in it; of the time of all rollouts the share is that of the tokens."""
    files = {(who, split): sampled(run.traces(f"{who}_{split}")) for who in ("base", "weak", "strong")
             for split in ("train", "validation")}
    tokens = 0.0 if f["no_rft"] else sampled(own_rollouts(run, f["policy"]))
    training = 0.0
    if REWARDS[f["reward"]][1] == "verifier":
        names = {"base", f["policy"] if f["prover"][:2] == "bo" else f["prover"]}               # every verifier starts from Q^pi
        tokens = sum(n for (who, _), n in files.items() if who in names) + tokens * (f["policy"] not in names)
        if "strong" not in {*names, f["policy"]}:               # whose right traces Q^pi's data branches off
            tokens += sampled(own_rollouts(run, "strong"))
        training = sum(run.stages["q_pi" if who == "base" else f"q_{who}"]["seconds"] for who in names)
    return tokens, training + run.stages["rollouts"]["seconds"] * tokens / sum(files.values())


def table(t):
    """Rows (training, seeds, iterations, minutes, KL to where RL started, accuracy, lo, hi, greedy, pass@16, pass@64) of the
    policies in the end."""
    for name in t.names:
        ns, mean, lo, hi = t.line(f"{name}:pass")
        log = t.rows[name][0]
        seconds = np.mean([f.get("seconds", 0) for f in t.final[name]])
        more = [round(float(mean[list(ns).index(k)]), 4) if k in ns else "" for k in (16, 64)]
        kl = round(float(t.mean(name, "kl")[-1]), 3) if log else ""
        yield (name, len(t.final[name]), int(log[-1]["iteration"]) if log else 0, round(float(seconds) / 60, 2), kl,
               *(round(float(x[0]), 4) for x in (mean, lo, hi)), round(float(t.at(f"{name}:greedy", "exact")[0]), 4), *more)


def rl_report(runs, folders, out):
    """Tables, figures and summary.json of these trainings ({label: folder}) over all runs."""
    t = Trained(runs, folders)
    names = t.names
    s = summarize(t)
    told = verdicts(s)
    body = list(table(t))
    header = ["training", "seeds", "iterations", "minutes", "kl", "accuracy", "lo", "hi", "greedy", "pass@16", "pass@64"]
    write_csv(out / "table.csv", header, body)
    text = "\n".join([
        f"{'training':<28}{'minutes':>8}{'KL':>6}{'accuracy':>10}   {'95% interval':<16}  greedy  pass@16  pass@64",
        *(f"{n:<28}{m:>8.1f}{kl and format(kl, '.2f'):>6}{a:>10.3f}   {f'[{lo:.3f}, {hi:.3f}]':<18}{g:>7.3f}{p:>9}{q:>9}"
          for n, _, _, m, kl, a, lo, hi, g, p, q in body)])
    write_whole(out / "table.txt", lambda p: p.write_text(text + "\n"))
    write_csv(out / "curves.csv", ["training", "seed", *COLUMNS], [
        (n, run.config["seed"], int(r["iteration"]), *("" if r[k] != r[k] else r[k] for k in COLUMNS[1:]))
        for n in names for run, rows in zip(runs, t.rows[n]) for r in rows])
    made = figures(t, out)
    facts = {"command": " ".join(["python", *sys.argv]), "seeds": [run.config["seed"] for run in runs],
             "test_problems": sum(c.P for c in t.each), "hardware": sorted({f["hardware"] for n in names for f in t.final[n]}),
             "commit": sorted({f["commit"] for n in names for f in t.final[n]}),
             "minutes": {n: mean_of([round(f["seconds"] / 60, 2) for f in t.final[n]]) for n in t.trained},
             "tokens": {n: round(float(t.mean(n, "tokens")[-1])) for n in t.trained},
             "before": {n: {"tokens": round(float(x)), "minutes": round(float(y) / 60, 2)} for n, (x, y) in t.before.items()},
             "controls": {n: control(n, t.flags) for n in t.trained},
             "accuracy_by_seed": {n: [round(float(c.by[f"{n}:pass"][1][0].mean()), 4) for c in t.each] for n in t.names}}
    write_whole(out / "summary.json", lambda p: p.write_text(json.dumps(facts | s | {"verdicts": told}, indent=1) + "\n"))
    print(f"\n{text}\n")
    for claim, verdict in told.items():
        print(f"{claim}\n    {verdict}")
    print(f"\nin {out}: table.txt, table.csv, curves.csv, summary.json" + "".join(f", {n}.png" for n in made))
    print("next: python rl.py --all; or other seeds of train.py, then python rl.py --run runs/... --out DIR for their mean")

"""From tidy rows to curves with paired bootstrap intervals.

Row 0 of every array of shape (R + 1, ...) is the data, the others are two-level resamples: runs first, then
problems within each, the same ones for every curve. A statistic is a function of such arrays; `interval`
reads it off.
"""
from math import comb
from typing import NamedTuple

import numpy as np
import pandas as pd

from minipav.files import damaged, reading

KEY = ["group", "policy", "method", "score", "prover", "alpha"]
DROPPED = {**dict.fromkeys(("main", "tuned", "bases"), ["prover", "alpha"]),
           **dict.fromkeys(("provers", "train"), ["alpha"])}
NONE = dict.fromkeys(("mean", "lo", "hi"))      # an interval that is not defined


class Curve(NamedTuple):
    n: np.ndarray                   # (k,) budgets: N of best-of-N, beam widths, iterations
    acc: np.ndarray                 # (R + 1, k)
    tokens: np.ndarray              # (R + 1, k) policy tokens a problem
    solved: np.ndarray              # (R + 1, k) pass@N


def read_table(path, columns, text=()):
    """These columns of a table; all but those in `text` hold numbers."""
    with reading(path, ValueError):                             # pandas' parser's are such
        table = pd.read_csv(path, usecols=columns, keep_default_na=False, dtype=str)
        return table.apply(lambda x: x if x.name in text else pd.to_numeric(x.where(x != "")))


def load(tables):
    """The rows of all runs: tables {run's seed: [(group, path)]}. Searches that differ only in an alpha or a
    prover that was chosen for each run by one rule are one curve."""
    texts, numbers = [*KEY[1:-1], "quota", "split"], ["right", "solved", "tokens", "verifier_tokens"]
    columns, frames = [*texts, "alpha", "n", "problem", *numbers], []
    for run, named in tables.items():
        for group, path in named:
            frame = read_table(path, columns, texts).assign(run=run, group=group)
            if frame.isna().any(axis=None) or frame.empty:
                raise damaged(path, "a number is missing")
            frames.append(frame.assign(**dict.fromkeys(DROPPED.get(group, []), "")))
    rows = pd.concat(frames)
    return rows.assign(alpha=rows.alpha.astype(str))


def bootstrap(each, R=1000, seed=0):
    """each: of every run a DataFrame (problems x columns). -> DataFrame (R + 1, columns)"""
    rng, runs = np.random.default_rng(seed), len(each)
    means = np.mean([x.to_numpy().mean(0) for x in each], 0)
    drawn = []
    for x in each:
        weights = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), R * runs) / len(x)
        drawn.append(weights @ x.to_numpy())                                    # (R * runs, columns)
    pick = rng.integers(runs, size=(R, runs))
    drawn = np.stack(drawn)[pick, np.arange(R * runs).reshape(R, runs)].mean(1)
    return pd.DataFrame(np.vstack([means, drawn]), columns=each[0].columns)


class Curves:
    """All curves of these rows, by (group, policy, method, score, prover, alpha)."""

    def __init__(self, rows):
        values = ["right", "tokens", "solved"]
        wide = rows.groupby(["run", "problem", *KEY, "n"])[values].mean().unstack([*KEY, "n"])
        self.each = [x.droplevel("run") for _, x in wide.groupby("run")]
        boot = bootstrap(self.each)
        self.by = {}
        for key in dict.fromkeys(c[1:-1] for c in boot.columns):
            n = sorted(c[-1] for c in boot.columns if c[0] == "right" and c[1:-1] == key)
            self.by[key] = Curve(np.array(n), *(boot[[(v, *key, x) for x in n]].to_numpy() for v in values))

    def get(self, group, search, policy="base", alpha=""):
        """The curve of "METHOD:SCORE" with no prover named, or None if it was not measured."""
        method, _, score = search.partition(":")
        return self.by.get((group, policy, method, score, "", str(alpha)))


def interval(x):
    """{"mean", "lo", "hi"} of x (R + 1,), rounded; None where it is not defined. A resample in which it is
    not defined counts as infinite, and an infinite bound is None."""
    if not np.isfinite(x[0]):
        return None
    lo, hi = np.percentile(np.where(np.isfinite(x[1:]), x[1:], np.inf), [2.5, 97.5], method="nearest")
    return {k: round(float(v), 4) if np.isfinite(v) else None for k,
            v in (("mean", x[0]), ("lo", lo), ("hi", hi))}


def spread(values):
    """Of one number a run: {"mean", "lo", "hi"}, where lo and hi are the lowest and the highest run's."""
    values = [float(v) for v in values]
    return {"mean": round(float(np.mean(values)), 4), "lo": round(min(values), 4),
            "hi": round(max(values), 4)}


def at_tokens(curve, tokens):
    """Accuracy (R + 1,) of a curve at a budget of `tokens` (R + 1,), linear in log tokens between measured
    points. A method never has to spend its whole budget, so its best affordable point counts; NaN below the
    cheapest point, and more than 5% beyond the last one."""
    out = np.full(len(tokens), np.nan)
    if tokens[0] > 1.05 * curve.tokens[0, -1]:                  # decided once, on the data
        return out
    for r, (acc, tok, t) in enumerate(zip(curve.acc, curve.tokens, tokens)):
        if t >= tok[0] * (1 - 1e-9):
            out[r] = max(acc[tok <= t * (1 + 1e-9)].max(initial=0), np.interp(np.log(t), np.log(tok), acc))
    return out


def first_reach(x, acc, level):
    """Where the curves acc (R + 1, k) over x (R + 1, k) first reach level (R + 1,), linear between points;
    NaN if they do not."""
    out = np.full(len(acc), np.nan)
    for r, (xs, ys) in enumerate(zip(np.broadcast_to(x, acc.shape), acc)):
        k = int((ys >= level[r]).argmax())
        if ys[k] >= level[r]:
            out[r] = xs[0] if k == 0 else np.interp(level[r], ys[k - 1:k + 1], xs[k - 1:k + 1])
    return out


def tokens_to_reach(curve, level):
    """The fewest tokens (R + 1,) at which the curve reaches `level` (R + 1,), linear in log tokens, or
    NaN."""
    return np.exp(first_reach(np.log(curve.tokens), curve.acc, level))


def pass_at_n(n, right, N):
    """1 - C(wrong, N) / C(n, N): the chance that one of N of n samples, `right` of them right, is right."""
    return np.array([1 - comb(n - int(r), N) / comb(n, N) for r in right])


def spearman(a, b):
    """Rank correlation; where all are tied it is 0."""
    return float(np.nan_to_num(pd.DataFrame({"a": a, "b": b}).corr("spearman").iloc[0, 1]))

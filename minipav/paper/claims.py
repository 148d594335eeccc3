"""Every claim of the paper that can be tested here: what it says, what is measured, and the rule for the
verdict.

A claim measures one or several quantities, each with an interval, and says in which range they must lie. One
meaning of the verdicts, everywhere:

    reproduced        every interval lies in the range
    partly            some do
    not reproduced    none does
    untested          not measured, or measured outside of the range that the claim is about

A claim that something is *not* different has a range around 0 (an equivalence margin), which the whole
interval must lie in: an interval that merely touches 0 shows nothing.
"""
from dataclasses import dataclass

import numpy as np

from minipav.paper.statistics import at_tokens, first_reach, interval, spearman, spread, tokens_to_reach

INF = float("inf")


@dataclass
class Claim:
    says: str
    where: str                      # figure, equation or section of the paper
    measure: object                 # measured -> {name: interval or None}, or None where something is missing
    lo: float = 0.0
    hi: float = INF
    unit: str = "points"
    untested: str = ""              # why what is measured here does not test it


def judge(claim, measured):
    """-> {"claim", "where", "verdict", "measured", "unit"}, or None if it was not measured."""
    found = claim.measure(measured)
    if found is None or not (known := {k: x for k, x in found.items() if x}):
        return None

    def inside(x):
        lo, hi = (-INF if x["lo"] is None else x["lo"]), (INF if x["hi"] is None else x["hi"])
        return claim.lo < lo and hi < claim.hi if claim.hi < INF else claim.lo < lo
    yes = [inside(x) for x in known.values()]
    verdict = "reproduced" if all(yes) else "partly" if any(yes) else "not reproduced"
    return {"claim": claim.says, "where": claim.where,
            "verdict": f"untested ({claim.untested})" if claim.untested else verdict,
            "measured": known, "unit": claim.unit}


def show(x):
    """"+1.2 [-0.3, +2.7]" of an interval."""
    mean, lo, hi = ("-" if x[k] is None else f"{x[k]:+.1f}" if abs(x[k]) >= 1 else f"{x[k]:+.2f}"
                    for k in ("mean", "lo", "hi"))
    return f"{mean} [{lo}, {hi}]"


def sentence(judged):
    values = "; ".join(f"{name}: {show(x)}" if name else show(x) for name, x in judged["measured"].items())
    return f"{judged['claim']} ({judged['where']})\n    {judged['verdict']}: {values} {judged['unit']}"


# ---- search: measured is a report.Searched
# ---------------------------------------------------------------------

def ahead(s, a, b):
    """{N: points of beam a ahead of b at the tokens of N samples}."""
    orm, a, b = s.main("best_of_n:orm"), s.main(a), s.main(b)
    if not (orm and a and b):
        return None
    return {f"N = {n}": interval(100 * (at_tokens(a, orm.tokens[:, k]) - at_tokens(b, orm.tokens[:, k])))
            for k, n in enumerate(orm.n) if n >= 4}


def token_ratio(s):
    """Tokens of best-of-N by the ORM at its best over those of the PAV beam at that accuracy; 0 if it never
    gets there."""
    orm, pav = s.main("best_of_n:orm"), s.main("beam:effective")
    if not (orm and pav):
        return None
    row, best = np.arange(len(orm.acc)), orm.acc.argmax(1)
    return {"": interval(np.nan_to_num(orm.tokens[row, best] / tokens_to_reach(pav, orm.acc[row, best])))}


def exploration(s):
    pav, samples = s.main("beam:effective"), s.main("pass")
    return pav and samples and {f"width {w}": interval(100 * (pav.solved[:, k] - at_tokens(samples,
                                                                                           pav.tokens[:, k], beyond=False)))
                                for k, w in enumerate(pav.n)}


def gains(s, group, search, base, **where):
    """{prover and alpha: points over the beam `base`, mean over the widths}."""
    out = {}
    for (g, policy, method, score, prover, alpha), c in s.curves.by.items():
        if (g, policy, f"{method}:{score}") == (group, where.get("policy", "base"),
                                                search) and c is not base and prover:
            out[" ".join(x for x in (prover,
                                     alpha and f"alpha {alpha}")
                                     if x)] = 100 * (c.acc.mean(1) - base.acc.mean(1))
    return out


def exact_gains(s):
    base = s.curves.get("exact", "beam:exact", alpha="0.0")
    return base and {k: interval(x) for k, x in gains(s, "exact", "beam:exact", base).items()}


def prover_gains(s, policy="base"):
    base = s.curves.get("provers", "beam:q_pi", policy)
    return base and gains(s, "provers", "beam:effective", base, policy=policy)


def intermediate_k(s):
    g = prover_gains(s)
    ks = sorted((k for k in g or () if k[:2] == "bo"), key=lambda k: int(k[2:]))
    if len(ks) < 3:
        return None
    best = max(ks[1:-1], key=lambda k: g[k][0])
    return {f"{best} over {k}": interval(g[best] - g[k]) for k in (ks[0], ks[-1])}


def weak_on_strong(s):
    g = prover_gains(s, "strong")
    return g and {"": interval(g["weak"])}


def rank_correlation(s):
    g, terms = prover_gains(s), s.fact("provers",
                                       lambda f: {t["prover"]: t["distinguishability"] + t["alignment"]
                                                             for t in f["theorem"] if t["base"] == "base"})
    if not g or not terms:
        return None
    mean = [np.mean([t[mu] for t in terms]) for mu in g]
    return {"": interval(np.array([spearman(mean, x) for x in np.stack(list(g.values()), 1)]))}


def data_gain(s, a, b):
    """{size: points of verifiers trained on data a over those on b}, with the extreme runs."""
    rows = s.fact("data", lambda f: {(r["rollouts"], r["way"]): 100 * r["accuracy"] for r in f["rows"]})
    return rows and {f"{n:,} rollouts": spread(r[n, a] - r[n,
                                                           b] for r in rows) for n in sorted({n for n,
                                                                                              _ in rows[0]})}


def error_drop(s):
    """Points by which the error of predicting the outcome falls with A^mu, after each step, with the extreme
    runs."""
    each = s.fact("steps", lambda f: [100 * (q - e) for q, e in zip(f["q_pi"], f["effective"])])
    return each and {f"step {h + 1}": spread(x) for h, x in enumerate(zip(*each))}


SMALL = "the paper's smallest size is 64,000 rollouts"
SEARCH = [
    Claim("search against PAVs beats re-ranking by the ORM at equal tokens (paper: by 8 to 10 points at N = 128)", "Fig. 4",
          lambda s: ahead(s, "beam:effective", "best_of_n:orm")),
    Claim("search against PAVs needs at least 1.5 times fewer tokens for what best-of-N by the ORM reaches",
          "Fig. 4",
          token_ratio, lo=1.5, unit="times (0: the beam never gets there)"),
    Claim("the advantage adds to Q^pi: PAV beam above Q^pi beam", "Fig. 5a",
          lambda s: ahead(s, "beam:effective", "beam:q_pi")),
    Claim("the beam holds a right answer more often than as many tokens of samples", "Fig. 6a", exploration),
    Claim("with exact values instead of a verifier's, the advantage adds to Q^pi", "not in the paper",
          exact_gains),
    Claim("an intermediate K is the best prover", "Fig. 5b", intermediate_k),
    Claim("a weaker prover improves a stronger base", "Fig. 5c", weak_on_strong),
    Claim("Theorem 3.1's terms, measured beforehand, rank the provers", "Theorem 3.1", rank_correlation,
          unit="rank correlation"),
    Claim("first pits make better data than random seeds", "Fig. 11",
          lambda s: data_gain(s, "first pits", "n_mc = 4"),
          untested=SMALL),
    Claim("many completions a prefix are better at a large budget", "Fig. 6b",
          lambda s: data_gain(s, "n_mc = 16", "n_mc = 4"),
          untested=SMALL),
    Claim("with the advantage a step's score mispredicts the outcome less often", "Fig. 10", error_drop)]


# ---- RL: measured is a rl_report.Trained
# --------------------------------------------------------------------------

def over(a, b, N=1):
    """Points of pass@N of training a over b in the end; b None: over the training with outcome reward and all
    else the same."""
    def measure(t):
        end, other = t.end(a, N), t.end(b or t.control(a), N)
        return None if end is None or other is None else {f"pass@{N}" if N > 1
                                                          else "": interval(100 * (end - other))}
    return measure


def sample_efficiency(orm, pav):
    """Iterations that ORM-RL needs for its best accuracy over those in which PAV-RL first has it (R + 1,); 0
    if it never does, NaN if ORM-RL is best at the start. Curves."""
    best, reached = orm.n[orm.acc.argmax(1)], first_reach(pav.n, pav.acc, orm.acc.max(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best == 0, np.nan, np.where(np.isnan(reached), 0.0, best / reached))


def efficiency(t):
    orm, pav = t.curve("outcome"), t.curve("pav")
    return orm and pav and {"": interval(sample_efficiency(orm, pav))}


def pass_64(t):
    pairs = {"PAV-RL over ORM-RL": ("pav", "outcome"), "PAV-RL over SFT": ("pav", "sft"),
             "SFT over ORM-RL": ("sft", "outcome")}
    found = {k: over(a, b, 64)(t) for k, (a, b) in pairs.items()}
    return None if None in found.values() else {k: x["pass@64"] for k, x in found.items()}


RL = [
    Claim("PAV-RL ends above ORM-RL (paper: by 7 points)", "Fig. 7a", over("pav", "outcome")),
    Claim("PAV-RL needs at least 5 times fewer iterations for ORM-RL's best accuracy", "Fig. 7b", efficiency,
          lo=5, unit="times"),
    Claim("PAV-RL has the higher pass@64, above SFT's, and ORM-RL's is below SFT's", "Fig. 8a", pass_64),
    Claim("summed along the trace, A^mu gives what outcome reward gives", "derived", over("pav_sum", None),
          -2, 2),
    Claim("with mu = pi, A^mu gives what outcome reward gives", "section 3", over("pav_pi", None), -2, 2),
    Claim("Q^mu as a bonus makes RL fail", "App. G", over("q_bonus", None), -INF, 0),
    *(Claim(f"{r} is above outcome reward", "not in the paper", over(r, None)) for r in (
        "pav_exact", "pav_rollout", "vine", "pav-policyweak", "pav-policystrong"))]


# ---- the didactic example and the theory: measured is their JSON
# ------------------------------------------------

def point(x):
    return x is not None and {"mean": x, "lo": x, "hi": x}


DIDACTIC = [
    Claim("the effective reward needs 10 times fewer iterations to 90% than only Q", "Fig. 3a",
          lambda d: {k: point(r["ratio"]) if r else None for k, r in d["ratio_of_medians"].items()}, lo=10,
          unit="times (medians over the seeds)"),
    Claim("provers of middling strength are the useful ones (gamma 8 to 15)", "Fig. 3b",
          lambda d: {k: g and {"mean": float(np.mean(g)), "lo": min(g), "hi": max(g)} for k,
                     g in d["useful_gamma"].items()},
          7.9, 15.1, unit="gammas above only Q"),
]
THEORY = [
    Claim("improvement is at least a constant times distinguishability + alignment, random provers",
          "Theorem 3.1",
          lambda d: {"smallest constant": point(d["c"])}, unit="over 1,000 random trees"),
    Claim("where Q = O(1/K), best-of-K's distinguishability grows as K^2", "Remark 3.1",
          lambda d: {"": point(d["remark_exponent_distinguishability"])}, 1.9, 2.1, unit="exponent"),
    Claim("... and so does the improvement", "Remark 3.1", lambda d: {"": point(d["remark_exponent_gain"])},
          1.9, 2.1,
          unit="exponent"),
    Claim("a weak prover improves a strong base in most trees", "Prop. F.1",
          lambda d: {"": point(d["weak_prover_helps_share"])}, lo=0.5, unit="share of the trees")]

"""Every claim of the paper that can be tested here: what it says, what is measured, the rule for the verdict.

A claim measures one or several quantities, each with an interval, and says in which range they must lie. One
meaning of the verdicts, everywhere:

    reproduced        every interval lies in the range
    partly            some do
    not reproduced    none does
    untested          measured outside of the range that the claim is about

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
    found = {k: x for k, x in (claim.measure(measured) or {}).items() if x}

    def inside(x):                                              # a bound that is not known is infinite
        low, high = x["lo"] is not None and x["lo"] > claim.lo, x["hi"] is not None and x["hi"] < claim.hi
        return (low or claim.lo == -INF) and (high or claim.hi == INF)
    yes = [inside(x) for x in found.values()]
    verdict = "reproduced" if all(yes) else "partly" if any(yes) else "not reproduced"
    verdict = f"untested ({claim.untested})" if claim.untested else verdict
    return found and dict(claim=claim.says, where=claim.where, verdict=verdict, measured=found,
                          unit=claim.unit) or None


def sentence(judged):
    """A judged claim as text: "claim (where)", its verdict, every quantity as "+1.2 [-0.3, +2.7]"."""
    def number(x):
        return "-" if x is None else f"{x:+.1f}" if abs(x) >= 1 else f"{x:+.2f}"
    def interval_of(x):                                         # a number may be exact, or a lower bound
        if x["lo"] == x["mean"] and x["hi"] in (None, x["mean"]):
            return ("over " if x["hi"] is None else "") + number(x["mean"])
        return f"{number(x['mean'])} [{number(x['lo'])}, {number(x['hi'])}]"
    values = [name + ": " * bool(name) + interval_of(x) for name, x in judged["measured"].items()]
    return (f"{judged['claim']} ({judged['where']})\n"
            f"    {judged['verdict']}: {'; '.join(values)} {judged['unit']}")


# ---- search: measured is a report.Searched
def ahead(s, a, b, of="tuned"):
    """{N: points of search a ahead of b at the tokens of N samples}; of: "main" or "tuned" beams."""
    orm, a, b = s.main("best_of_n:orm"), *(getattr(s, of)(x) for x in (a, b))
    if not (orm and a and b):
        return None
    gaps = {n: at_tokens(a, orm.tokens[:, k]) - at_tokens(b, orm.tokens[:, k]) for k, n in enumerate(orm.n)}
    return {f"N = {n}": interval(100 * x) for n, x in gaps.items() if n >= 4}


def token_ratio(s):
    """Tokens of best-of-N by the ORM at its best over the PAV beam's at that accuracy; 0 if it never is."""
    orm, pav = s.main("best_of_n:orm"), s.tuned("beam:effective")
    if not (orm and pav):
        return None
    row, best = np.arange(len(orm.acc)), orm.acc.argmax(1)
    return {"": interval(np.nan_to_num(orm.tokens[row, best] / tokens_to_reach(pav, orm.acc[row, best])))}


def exploration(s):
    pav, samples = s.tuned("beam:effective"), s.main("pass")
    if not (pav and samples):
        return None
    gaps = [pav.solved[:, k] - at_tokens(samples, pav.tokens[:, k], beyond=False) for k in range(len(pav.n))]
    return {f"width {w}": interval(100 * x) for w, x in zip(pav.n, gaps)}


def gains(s, group, search, base, policy="base"):
    """{prover, and alpha where it varies: points (R + 1,) over the beam `base`, mean over the widths}."""
    out = {}
    for (g, p, method, score, prover, alpha), c in s.curves.by.items():
        if (g, p, f"{method}:{score}") == (group, policy, search) and prover:
            out[f"{prover} alpha {alpha}" if alpha else prover] = 100 * (c.acc.mean(1) - base.acc.mean(1))
    return out


def exact_gains(s):
    base = s.curves.get("exact", "beam:exact", alpha="0.0")
    return base and {k: interval(x) for k, x in gains(s, "exact", "beam:exact", base).items()}


def prover_gains(s, policy="base"):
    base = s.curves.get("provers", "beam:q_pi", policy)
    return gains(s, "provers", "beam:effective", base, policy) if base else {}


def intermediate_k(s):
    g = prover_gains(s)
    ks = sorted((k for k in g if k[:2] == "bo"), key=lambda k: int(k[2:]))
    if len(ks) < 3:
        return None
    best = max(ks[1:-1], key=lambda k: g[k][0])
    return {f"{best} over {k}": interval(g[best] - g[k]) for k in (ks[0], ks[-1])}


def rank_correlation(s):
    """Of the terms of Theorem 3.1 (mean of the runs) with the gain, over the provers of the base policy."""
    terms, g = s.fact("provers", lambda f: {t["prover"]: t["distinguishability"] + t["alignment"]
                                            for t in f["theorem"] if t["base"] == "base"}), prover_gains(s)
    if not (g and terms):
        return None
    mean = [np.mean([t[mu] for t in terms]) for mu in g]
    return {"": interval(np.array([spearman(mean, x) for x in zip(*g.values())]))}


def data_gain(a, b):
    """{size: points of verifiers trained on data a over those on b}, with the extreme runs."""
    def measure(s):
        each = s.fact("data", lambda f: {(r["rollouts"], r["way"]): 100 * r["accuracy"] for r in f["rows"]})
        sizes = sorted({n for n, _ in each[0]} if each else ())
        return {f"{n:,} rollouts": spread(x[n, a] - x[n, b] for x in each) for n in sizes}
    return measure


def few_then_many(s):
    pairs = ("n_mc = 4", "n_mc = 16"), ("n_mc = 16", "n_mc = 4")
    few, many = (list(data_gain(*p)(s).values()) for p in pairs)
    return {"few at the smallest size": few[0], "many at the largest": many[-1]} if few else {}


def error_drop(s):
    """Points by which the error of predicting the outcome falls with A^mu, after each step (extreme runs)."""
    each = s.fact("steps", lambda f: [100 * (q - e) for q, e in zip(f["q_pi"], f["effective"])])
    return each and {f"step {h + 1}": spread(x) for h, x in enumerate(zip(*each))}


SMALL = "the paper's smallest size is 64,000 rollouts"
SEARCH = [
    Claim("search against PAVs beats re-ranking by the ORM at equal tokens (8 to 10 points at N = 128)",
          "Fig. 4", lambda s: ahead(s, "beam:effective", "best_of_n:orm")),
    Claim("at least 1.5 times fewer tokens than best-of-N by the ORM for its best accuracy", "Fig. 4",
          token_ratio, lo=1.5, unit="times (0: the beam never gets there)"),
    Claim("the advantage adds to Q^pi: PAV beam above Q^pi beam", "Fig. 5a",
          lambda s: ahead(s, "beam:effective", "beam:q_pi", "main")),
    Claim("... and does so where both keep a quota of relatives, chosen on validation problems",
          "not in the paper", lambda s: ahead(s, "beam:effective", "beam:q_pi")),
    Claim("the beam holds a right answer more often than as many tokens of samples", "Fig. 6a", exploration),
    Claim("with exact values instead of a verifier's, the advantage adds to Q^pi", "not in the paper",
          exact_gains),
    Claim("an intermediate K is the best prover", "Fig. 5b", intermediate_k),
    Claim("a weaker prover improves a stronger base", "Fig. 5c", lambda s: dict(
        [("", interval(x)) for k, x in prover_gains(s, "strong").items() if k == "weak"])),
    Claim("Theorem 3.1's terms, measured beforehand, rank the provers", "Theorem 3.1", rank_correlation,
          unit="rank correlation"),
    Claim("first pits make better data than random seeds", "Fig. 11", data_gain("first pits", "n_mc = 4"),
          untested=SMALL),
    Claim("few completions a prefix are better at a small budget, many at a large one", "Fig. 6b",
          few_then_many, untested=SMALL),
    Claim("with the advantage a step's score mispredicts the outcome less often", "Fig. 10", error_drop)]


# ---- RL: measured is an rl_report.Trained

def over(a, b=None, N=1):
    """Points of pass@N of training a over b in the end; b None: over its control with outcome reward."""
    def measure(t):
        end, other = t.end(a, N), t.end(b or t.control(a), N)
        return {} if end is None or other is None else {"": interval(100 * (end - other))}
    return measure


def sample_efficiency(orm, pav):
    """Iterations that ORM-RL needs for its best accuracy over those in which PAV-RL first has it (R + 1,); 0
    if it never does, NaN if ORM-RL is best at the start. orm, pav: Curves."""
    best, reached = orm.n[orm.acc.argmax(1)], first_reach(pav.n, pav.acc, orm.acc.max(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best == 0, np.nan, np.where(np.isnan(reached), 0.0, best / reached))


def efficiency(t):
    orm, pav = t.curve("outcome"), t.curve("pav")
    return orm and pav and {"": interval(sample_efficiency(orm, pav))}


def pass_64(t):
    pairs = {"PAV-RL over ORM-RL": ("pav", "outcome"), "PAV-RL over SFT": ("pav", "sft"),
             "SFT over ORM-RL": ("sft", "outcome")}
    found = {k: over(a, b, 64)(t).get("") for k, (a, b) in pairs.items()}
    return found if all(found.values()) else {}


def over_best(t):
    """Points of PAV-RL over the best of all trainings with outcome reward that start from the same policy."""
    others = [n for n in t.trained if t.spec(n)["reward"] == "outcome"]
    if "pav" not in t.trained or len(others) < 2:
        return {}
    others = [n for n in others if t.spec(n)["policy"] == t.spec("pav")["policy"]]
    return over("pav", max(others, key=lambda n: t.end(n)[0]))(t)


RL = [
    Claim("PAV-RL ends above ORM-RL (paper: by 7 points)", "Fig. 7a", over("pav", "outcome")),
    Claim("at least 5 times fewer iterations than ORM-RL for its best accuracy", "Fig. 7b", efficiency, lo=5,
          unit="times"),
    Claim("PAV-RL has the higher pass@64, above SFT's, and ORM-RL's is below SFT's", "Fig. 8a", pass_64),
    Claim("summed along the trace, A^mu gives what outcome reward gives", "derived", over("pav_sum"), -2, 2),
    Claim("with mu = pi, A^mu gives what outcome reward gives", "section 3", over("pav_pi"), -2, 2),
    Claim("Q^mu as a bonus makes RL fail", "App. G", over("q_bonus"), -INF, 0),
    Claim("PAV-RL is above the best of all ORM-RL here", "not in the paper", over_best),
    *(Claim(f"{says} is above outcome reward", "not in the paper", over(r)) for r, says in (
        ("pav_exact", "PAV-RL with exact values"), ("pav_rollout", "PAV-RL with fresh rollouts"),
        ("vine", "VinePPO's A^pi"), ("pav-policyweak", "PAV-RL from the weaker policy"),
        ("pav-policystrong", "PAV-RL from the stronger policy")))]


# ---- the didactic example and the theory: measured is their JSON

def point(x, at_least=False):
    """A number without an interval; at_least: a lower bound."""
    return {"mean": x, "lo": x, "hi": None if at_least else x}


def exponent(of):
    return lambda d: {"": point(d[f"remark_exponent_{of}"])}


DIDACTIC = [
    Claim("the effective reward needs 10 times fewer iterations to 90% than only Q", "Fig. 3a",
          lambda d: {k: r and point(r["ratio"], r["at_least"]) for k, r in d["ratio_of_medians"].items()},
          lo=10, unit="times (medians over the seeds)"),
    Claim("provers of middling strength are the useful ones (gamma 8 to 15)", "Fig. 3b",
          lambda d: {k: g and {"mean": sum(g) / len(g), "lo": min(g), "hi": max(g)}
                     for k, g in d["useful_gamma"].items()}, 7.9, 15.1, unit="gammas above only Q")]
THEORY = [
    Claim("improvement is at least a constant times distinguishability + alignment, random provers",
          "Theorem 3.1",
          lambda d: {"smallest constant": point(d["c"])}, unit="over 1,000 random trees"),
    Claim("where Q = O(1/K), best-of-K's distinguishability grows as K^2", "Remark 3.1",
          exponent("distinguishability"), 1.9, 2.1, unit="exponent"),
    Claim("... and so does the improvement", "Remark 3.1", exponent("gain"), 1.9, 2.1, unit="exponent"),
    Claim("a weak prover improves a strong base in most trees", "Prop. F.1",
          lambda d: {"": point(d["weak_prover_helps_share"])}, lo=0.5, unit="share of the trees")]

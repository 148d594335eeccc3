"""What the claims measure: functions of searches, trainings or files -> {name: interval}, empty or None
where something is missing."""
import numpy as np

from minipav.paper.statistics import at_tokens, first_reach, interval, spearman, spread, tokens_to_reach


# ---- search: measured is a report.Searched
def ahead(s, a, b, of="main"):
    """{N: points of search a ahead of b at the tokens of N >= 4 samples}; of: "main" or "tuned" beams."""
    orm, a, b = s.main("best_of_n:orm"), *(getattr(s, of)(x) for x in (a, b))
    if not (orm and a and b):
        return None
    gaps = {n: at_tokens(a, orm.tokens[:, k]) - at_tokens(b, orm.tokens[:, k]) for k, n in enumerate(orm.n)}
    return {f"N = {n}": interval(100 * x) for n, x in gaps.items() if n >= 4}


def token_ratio(of="main"):
    """Tokens of best-of-N by the ORM at its best over the PAV beam's at that accuracy: 0 if it never is; none
    if best-of-N is never right."""
    def measure(s):
        orm, pav = s.main("best_of_n:orm"), getattr(s, of)("beam:effective")
        if not (orm and pav):
            return None
        row, best = np.arange(len(orm.acc)), orm.acc.argmax(1)
        ratio = np.nan_to_num(orm.tokens[row, best] / tokens_to_reach(pav, orm.acc[row, best]))
        return {"": interval(np.where(orm.acc[row, best] == 0, np.nan, ratio))}
    return measure


def exploration(s):
    pav, samples = s.main("beam:effective"), s.main("pass")
    if not (pav and samples):
        return None
    gaps = [pav.solved[:, k] - at_tokens(samples, pav.tokens[:, k]) for k in range(len(pav.n))]
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
    """Points of the paper's best K, 4 (fixed before, not chosen here), over the smallest and the largest."""
    g = prover_gains(s)
    ks = sorted((k for k in g if k[:2] == "bo"), key=lambda k: int(k[2:]))
    ends = (ks[0], ks[-1]) if "bo4" in ks[1:-1] else ()
    return {f"bo4 over {k}": interval(g["bo4"] - g[k]) for k in ends}


def rank_correlation(s):
    """Of the terms of Theorem 3.1 (mean of the runs) with the gain, over the provers of the base policy."""
    terms, g = s.fact("provers", lambda f: {t["prover"]: t["distinguishability"] + t["alignment"]
                                            for t in f["theorem"] if t["base"] == "base"}), prover_gains(s)
    if not (g and terms):
        return None
    mean = [np.mean([t[mu] for t in terms]) for mu in g]
    return {"": interval(np.array([spearman(mean, x) for x in zip(*g.values())]))}


def data_gain(a, b):
    """{size: points of verifiers trained on data a over those on b}, with the extreme runs of several."""
    def measure(s):
        each = s.fact("data", lambda f: {(r["rollouts"], r["way"]): 100 * r["accuracy"] for r in f["rows"]})
        sizes = sorted({n for n, _ in each[0]} if each and len(each) > 1 else ())
        return {f"{n:,} rollouts": spread(x[n, a] - x[n, b] for x in each) for n in sizes
                if all({(n, a), (n, b)} <= x.keys() for x in each)}
    return measure


def few_then_many(s):
    pairs = ("n_mc = 4", "n_mc = 16"), ("n_mc = 16", "n_mc = 4")
    few, many = (list(data_gain(*p)(s).values()) for p in pairs)
    return {"few at the smallest size": few[0], "many at the largest": many[-1]} if few else {}


def error_drop(s):
    """Points by which the error of predicting the outcome falls with A^mu, after each step (extreme runs)."""
    each = s.fact("steps", lambda f: [100 * (q - e) for q, e in zip(f["q_pi"], f["effective"])])
    return each and len(each) > 1 and {f"step {h + 1}": spread(x) for h, x in enumerate(zip(*each))}


# ---- RL: measured is an rl_report.Trained

def over(a, b=None, N=1):
    """Points of pass@N of training a over b in the end; b None: over its control with outcome reward; "fair":
    over that whose KL weighs as little."""
    def measure(t):
        against = t.fair(a) if b == "fair" and a in t.trained else b or t.control(a)
        end, other = t.end(a, N), t.end(against, N)
        return {} if end is None or other is None else {"": interval(100 * (end - other))}
    return measure


def sample_efficiency(orm, pav):
    """Iterations that ORM-RL needs for its best accuracy over those in which PAV-RL first has it (R + 1,); 0
    if it never does, NaN if ORM-RL is best at the start. orm, pav: Curves."""
    best, reached = orm.acc.argmax(1), first_reach(pav.n, pav.acc, orm.acc.max(1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(best == 0, np.nan, np.where(np.isnan(reached), 0.0, orm.n[best] / reached))


def efficiency(fair=False):
    """By iterations, and by tokens with the verifier's data."""
    def measure(t):
        orm = t.fair("pav") if fair and "pav" in t.trained else "outcome"
        if not (orm in t.trained and "pav" in t.trained):
            return {}
        pairs = {"": t.curve, "tokens": t.by_tokens}
        return {k: interval(sample_efficiency(f(orm), f("pav"))) for k, f in pairs.items()}
    return measure


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


# ---- the didactic example and the theory: measured is their JSON

def point(x, at_least=False):
    """A number without an interval; at_least: a lower bound."""
    return {"mean": x, "lo": x, "hi": None if at_least else x}


def exponent(of):
    return lambda d: {"": point(d[f"remark_exponent_{of}"])}

"""Every claim of the paper that can be tested here: what it says, what is measured, the rule for the verdict.

A claim measures one or several quantities, each with an interval, and says in which range they must lie. One
meaning of the verdicts, everywhere:

    reproduced        every interval lies in the range
    partly            some do
    not reproduced    none does

A claim that something is *not* different has a range around 0 (an equivalence margin), which the whole
interval must lie in: an interval that merely touches 0 shows nothing.
"""
import re
from dataclasses import dataclass

from minipav.files import read_json, write_json
from minipav.paper import quantities as q
from minipav.paper.statistics import interval
from minipav.utils import Fail

INF = float("inf")


@dataclass
class Claim:
    says: str
    where: str                      # figure, equation or section of the paper
    measure: object                 # of quantities.py: measured -> {name: interval or None}, or None
    lo: float = 0.0
    hi: float = INF
    unit: str = "points"
    key: str = ""                   # its name in claims.json; several quantities: KEY_n8, KEY_n16, ...


def judge(claim, measured):
    """-> {"claim", "where", "verdict", "measured", "unit"}, or None if it was not measured."""
    found = {k: x for k, x in (claim.measure(measured) or {}).items() if x}

    def inside(x):                                              # a bound that is not known is infinite
        low, high = x["lo"] is not None and x["lo"] > claim.lo, x["hi"] is not None and x["hi"] < claim.hi
        return (low or claim.lo == -INF) and (high or claim.hi == INF)
    def verdict(yes):
        return "reproduced" if all(yes) else "partly" if any(yes) else "not reproduced"
    return found and dict(key=claim.key or slug(claim.where), claim=claim.says, where=claim.where,
                          verdict=verdict([*map(inside, found.values())]), unit=claim.unit, measured=found,
                          each={k: verdict([inside(x)]) for k, x in found.items()}) or None


def slug(text):
    return re.sub("[^a-z0-9]+", "_", text.lower()).strip("_")


def collect(folder):
    """Every quantity that a summary.json in a folder of `folder` judges, and those of didactic/ ->
    claims.json there: {key: verdict, mean, lo, hi}; folders search_NAME and NAME give KEY_NAME, train
    train_KEY. Raises Fail if two have the same."""
    out, plain = {}, {"didactic/summary.json": DIDACTIC, "didactic/theory.json": THEORY}
    for path in sorted([*folder.glob("*/summary.json"), *folder.glob("*/theory.json")]):
        name, found = "_" + path.parent.name, read_json(path)
        name = re.sub("^_(search|rl|train|mechanism|didactic)(?=_|$)", "", name)
        own = plain.get(str(path.relative_to(folder)), ())
        for c in found.get("claims") or [j for c in own if (j := judge(c, found))]:
            for what, x in c["measured"].items():
                key = "_".join(filter(None, [c["key"], slug(what.replace(" = ", ""))]))
                key = "train_" * path.parent.name.startswith("train") + key + name
                if key in out:
                    raise Fail(f"{path}: another folder's claim has the key {key}, too; rename the folder")
                out[key] = {"verdict": c["each"][what], **x, "unit": c["unit"], "claim": c["claim"]}
    write_json(folder / "claims.json", out)
    return out


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


TUNED = "our beam, alpha and quota chosen on validation problems,"
SEARCH = [
    Claim("search against PAVs beats re-ranking by the ORM at equal tokens (paper: by 8 to 10 points)",
          "Fig. 4", lambda s: q.ahead(s, "beam:effective", "best_of_n:orm"), key="search_plain_minus_orm"),
    Claim("at least 1.5 times fewer tokens than best-of-N by the ORM for its best accuracy", "Fig. 4",
          q.token_ratio(), lo=1.5, unit="times (0: the beam never gets there)",
          key="search_plain_token_ratio"),
    Claim("the advantage adds to Q^pi: PAV beam above Q^pi beam", "Fig. 5a",
          lambda s: q.ahead(s, "beam:effective", "beam:q_pi"), key="search_pav_minus_q"),
    Claim("the beam holds a right answer more often than as many tokens of samples", "Fig. 6a", q.exploration,
          key="search_exploration"),
    Claim(f"{TUNED} beats re-ranking by the ORM at equal tokens", "Fig. 4, ours",
          lambda s: q.ahead(s, "beam:effective", "best_of_n:orm", "tuned"), key="search_pav_minus_orm"),
    Claim(f"{TUNED} needs at most half the tokens of best-of-N at its best", "Fig. 4, ours",
          q.token_ratio("tuned"), lo=2, unit="times (0: the beam never gets there)",
          key="search_token_ratio"),
    Claim(f"{TUNED} is better by PAV than by Q^pi (chosen alike)", "Fig. 5a, ours",
          lambda s: q.ahead(s, "beam:effective", "beam:q_pi", "tuned"), key="search_pav_minus_q_tuned"),
    Claim("with exact values instead of a verifier's, the advantage adds to Q^pi", "not in the paper",
          q.exact_gains, key="exact_values_gain"),
    Claim("an intermediate K, 4, is the best prover", "Fig. 5b", q.intermediate_k),
    Claim("a weaker prover improves a stronger base", "Fig. 5c", lambda s: dict(
        [("", interval(x)) for k, x in q.prover_gains(s, "strong").items() if k == "weak"])),
    Claim("Theorem 3.1's terms, measured beforehand, rank the provers", "Theorem 3.1", q.rank_correlation,
          unit="rank correlation"),
    Claim("first pits make better data than random seeds", "Fig. 11", q.data_gain("first pits", "n_mc = 16"),
          key="first_pits"),
    Claim("few completions a prefix are better at a small budget, many at a large one", "Fig. 6b",
          q.few_then_many, key="n_mc"),
    Claim("the reference policy's exact values are better labels than 16 completions of pi", "Fig. 6b, ours",
          q.data_gain("exact, equal traces", "n_mc = 16"), key="exact_labels"),
    Claim("with the advantage a step's score mispredicts the outcome less often", "Fig. 10", q.error_drop)]

RANGES = {"": (0.70, 0.86), "above .86": (0.86, 1.0)}
MECHANISM = [*(Claim(f"{what} (verifiers of AUC .70 to .86; above)", where,
                     lambda m, g=gain: {k: m.mean(g, *r) for k, r in RANGES.items()}, key=key)
               for what, where, gain, key in (
    ("the advantage adds to Q^pi", "Fig. 5a", "alpha", "weak_verifier_alpha_gain"),
    ("a quota of siblings adds to Q^pi", "ours", "quota", "weak_verifier_quota_gain"),
    ("the advantage adds to Q^pi where both have it", "ours", "alpha given quota", "alpha_gain_given_quota"),
    ("a quota of states adds to Q^pi", "ours", "state quota", "state_quota_gain"),
    ("the advantage adds to Q^pi where both have that", "ours", "alpha given state quota",
     "alpha_gain_given_state_quota"),
    ("log-odds progress adds to Q^pi", "ours", "log-odds", "log_odds_gain"),
    ("A^mu alone is better than Q^pi", "Fig. 5a", "A^mu alone", "advantage_alone_gain"))),
    Claim("what validation problems say beforehand ranks the gains of alpha", "ours",
          lambda m: {"": m.predicted()}, lo=0.7, unit="rank correlation over the verifiers (extreme runs)",
          key="prediction_rank_correlation")]
RL = [
    Claim("PAV-RL ends above ORM-RL (paper: by 7 points)", "Fig. 7a", q.over("pav", "outcome"),
          key="rl_pav_minus_orm"),
    Claim("at least 5 times fewer iterations (and tokens, with the verifier's data) than ORM-RL for its best "
          "accuracy", "Fig. 7b", q.efficiency(), lo=5, unit="times", key="rl_sample_efficiency"),
    Claim("... and than ORM-RL whose KL weighs as little", "Fig. 7b, fair", q.efficiency(True), lo=5,
          unit="times", key="rl_sample_efficiency_fair"),
    Claim("PAV-RL ends above ORM-RL whose KL weighs as little", "Fig. 7a, fair", q.over("pav", "fair"),
          key="rl_pav_minus_orm_fair"),
    Claim("PAV-RL has a higher pass@64 than ORM-RL", "Fig. 8a", q.over("pav", "outcome", 64),
          key="rl_pass64_pav_minus_orm"),
    Claim("... and than ORM-RL whose KL weighs as little", "Fig. 8a, fair", q.over("pav", "fair", 64),
          key="rl_pass64_pav_minus_orm_fair"),
    Claim("PAV-RL has the higher pass@64, above SFT's, and ORM-RL's is below SFT's", "Fig. 8a", q.pass_64,
          key="rl_pass64"),
    Claim("summed along the trace, A^mu gives what outcome reward gives", "derived", q.over("pav_sum"), -2, 2,
          key="rl_pav_sum"),
    Claim("with mu = pi, A^mu gives what outcome reward gives", "section 3", q.over("pav_pi"), -2, 2,
          key="rl_pav_pi"),
    Claim("Q^mu as a bonus makes RL fail", "App. G", q.over("q_bonus"), -INF, 0, key="rl_q_bonus"),
    Claim("PAV-RL is above the best of all ORM-RL here", "not in the paper", q.over_best,
          key="rl_pav_over_best_orm"),
    *(Claim(f"{says} is above outcome reward", "not in the paper", q.over(r), key=f"rl_{slug(r)}")
      for r, says in (
        ("pav_exact", "PAV-RL with exact values"), ("pav_rollout", "PAV-RL with fresh rollouts"),
        ("vine", "VinePPO's A^pi"), ("pav-policyweak", "PAV-RL from the weaker policy"),
        ("pav-policystrong", "PAV-RL from the stronger policy")))]

DIDACTIC = [
    Claim("the effective reward needs 10 times fewer iterations to 90% than only Q", "Fig. 3a",
          lambda d: {k: q.point(r["ratio"], r["at_least"]) for k, r in d["ratio_of_medians"].items()},
          lo=10, unit="times (medians over the seeds)"),
    Claim("provers of middling strength are the useful ones (gamma 8 to 15)", "Fig. 3b",
          lambda d: {k: g and {"mean": sum(g) / len(g), "lo": min(g), "hi": max(g)}
                     for k, g in d["useful_gamma"].items()}, 7.9, 15.1, unit="gammas above only Q")]
THEORY = [
    Claim("improvement is at least a constant times distinguishability + alignment, random provers",
          "Theorem 3.1",
          lambda d: {"smallest constant": q.point(d["c"])}, unit="over 1,000 random trees"),
    Claim("where Q = O(1/K), best-of-K's distinguishability grows as K^2", "Remark 3.1",
          q.exponent("distinguishability"), 1.9, 2.1, unit="exponent", key="distinguishability_exponent"),
    Claim("... and so does the improvement", "Remark 3.1", q.exponent("gain"), 1.9, 2.1, unit="exponent",
          key="improvement_exponent"),
    Claim("a weak prover improves a strong base by at least a constant times eta^2, where its A^mu varies "
          "more than A^pi", "Prop. F.1",
          lambda d: {k: q.point(x["c"]) for k, x in d["weak_prover"].items()},
          unit="smallest constant over those of 1,000 trees")]

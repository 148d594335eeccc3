"""The experiments of search.py: each takes a Bench and returns {curve: [Point]} and {fact: number or list}.

A curve is called POLICY:METHOD, for example base:orm, or base:bo4 in the experiment on provers. To add an experiment, write
one more function and name it in EXPERIMENTS; its figure goes into figures.py.
"""
import numpy as np
import torch

from minipav.advantage import (
    Traces,
    advantage,
    effective_reward,
    first_pit,
    monte_carlo,
    newline,
    q_best_of_k,
    seed_rollouts,
    theorem_terms,
    wrong_steps,
)
from minipav.evaluate import Point, beam_curve, final_score, last_place, sampled_curves
from minipav.sampler import sample
from minipav.search import beam_search
from minipav.tokenizer import join, pad_token
from minipav.utils import Fail
from minipav.verifier import Oracle, score, train_verifier

SAMPLED = ("greedy", "sample", "majority", "orm", "best_q", "pav_as_orm", "pass")
BEAMS = {"q_beam": dict(rule="effective", alpha=0.0), "adv_beam": dict(rule="advantage"), "pav_beam": dict(rule="effective"),
         "bonus_beam": dict(rule="bonus"), "oracle_beam": dict(rule="effective", alpha=0.0)}
ALPHAS = [round(0.1 * i, 1) for i in range(11)]                 # the paper's grid, at beam 16 with mu = pi
KS = (1, 2, 4, 8, 16, 32)


class Bench:
    """One run's models and test problems, and the flags that all experiments share."""

    def __init__(self, run, args):
        self.run, self.args, self.P = run, args, args.problems
        self.problems = run.problems("test", args.problems)
        self.mu, self.alpha, self.models = args.prover or f"bo{run.config['K']}", args.alpha, {}

    def model(self, name):
        if name == "oracle":
            return Oracle(self.run.task, self.run.enc)
        if name not in self.models:
            self.models[name] = self.run.model(name)
        return self.models[name]

    def q_of(self, policy):
        """The verifier of Q of a policy."""
        return self.model({"base": "q_pi", "weak": "q_weak", "strong": "q_strong"}[policy])

    def prover(self, name):
        """Keyword arguments of beam_search for the prover bo4, weak, ..."""
        return dict(K=int(name[2:])) if name[:2] == "bo" else dict(q_mu_model=self.q_of(name))

    def q_mu(self, name, tokens, ends, q):
        """Q^mu at the places `ends` of these rows, where Q^pi is q."""
        return q_best_of_k(q, int(name[2:])) if name[:2] == "bo" else score(self.q_of(name), tokens, ends)

    def beam(self, policy, widths, method="pav_beam", mu=None, problems=None, **how):
        """The curve of one beam, averaged over --seeds."""
        q = self.model("oracle") if method == "oracle_beam" else self.q_of(policy)
        how = {"alpha": self.alpha} | BEAMS[method] | self.prover(mu or self.mu) | how
        if how["alpha"] == 0 and how["rule"] == "effective":    # Q^pi decides alone: no other verifier has to be asked
            how["q_mu_model"] = None
        name = f"{policy} {method}" + (f" {mu}" if mu else "")
        return mean([beam_curve(self.run, name, self.model(policy), q, problems or self.problems, widths, seed=s, **how)[0]
                     for s in self.args.seeds])

    def samples(self, policy, methods, n):
        """Curves of all that needs whole samples of a policy, averaged over --seeds."""
        q_pi = self.q_of(policy)
        cache = {}                                              # best_q and pav_as_orm share these scores

        def values(s):
            if cache.get("of") is not s:
                cache.update(of=s, q=score(q_pi, s.tokens, s.ends))
            return cache["q"]

        def effective(s):
            q = values(s)
            adv = torch.nn.functional.pad(advantage(self.q_mu(self.mu, s.tokens, s.ends, q)), (1, 0))
            return last_place(effective_reward(q, adv, self.alpha), s), s.lengths.float() * (1 + (self.mu[:2] != "bo"))
        scorers = {"orm": lambda s: (final_score(self.model("orm"), s), s.lengths.float()),
                   "best_q": lambda s: (last_place(values(s), s), s.lengths.float()), "pav_as_orm": effective}
        scorers = {m: f for m, f in scorers.items() if m in methods}
        each = [sampled_curves(self.run, self.model(policy), self.problems, n, s, scorers)[0] for s in self.args.seeds]
        return {f"{policy}:{m}": mean([curves[m] for curves in each]) for m in each[0] if m in methods}


def mean(curves):
    """One curve from those of several sampling seeds, point by point."""
    return [Point(points[0].n, *(torch.stack([getattr(p, f) for p in points]).mean(0) for f in Point._fields[1:]))
            for points in zip(*curves)]


# ---- experiments ----------------------------------------------------------------------------------------------------

def choose_alpha(b):
    """The paper's rule: the best alpha of the grid on validation problems, at beam 16 with mu = pi. Ties: the smaller."""
    problems, acc = b.run.problems("validation", b.args.validation), []
    for alpha in ALPHAS:
        acc.append(float(b.beam("base", [16], "pav_beam", "bo1", problems, alpha=alpha)[0].acc.mean()))
    return {}, {"alpha": ALPHAS[int(np.argmax(acc))], "alphas": ALPHAS, "accuracy": acc}


def main_comparison(b):
    """Fig. 4 and 5a for the base policy, and 6a: every method."""
    curves = b.samples("base", b.args.method, b.args.n)
    for method in BEAMS:
        if method in b.args.method and (method != "oracle_beam" or hasattr(b.run.task, "exact")):
            most = {"adv_beam": 4, "bonus_beam": 4, "oracle_beam": 8}.get(method, max(b.args.widths))
            curves[f"base:{method}"] = b.beam("base", [w for w in b.args.widths if w <= most] or b.args.widths[:1], method)
    if not curves:
        raise Fail(f"--method {' '.join(b.args.method)}: task {b.run.task.name} has no exact values; add another method")
    return curves, {}


def errors_by_step(b, n=8):
    """Fig. 10: how often a threshold on the score after step h mispredicts the outcome of a rollout. The threshold is chosen
    on validation problems; right and wrong rollouts weigh the same, so guessing is .5 (the paper does not say)."""
    def scores(split):
        t = seed_rollouts(b.model("base"), b.run.task, b.run.enc, b.run.problems(split, b.P), n, b.args.seeds[0], **b.run.how)
        q = score(b.q_of("base"), t.tokens, t.ends)
        adv = advantage(b.q_mu(b.mu, t.tokens, t.ends, q))
        return {"effective": effective_reward(q[:, 1:], adv, b.alpha), "q_pi": q[:, 1:]}, t.reward

    def error(value, reward, cut):
        return 1 - (float((value[reward == 1] >= cut).float().mean()) + float((value[reward == 0] < cut).float().mean())) / 2
    validation, reward_v = scores("validation")
    test, reward_t = scores("test")
    out = {name: [] for name in test}
    for name in test:
        for h in range(min(b.run.task.max_steps, validation[name].shape[1], test[name].shape[1])):
            ok, ok_t = ~validation[name][:, h].isnan(), ~test[name][:, h].isnan()
            if not ok.any() or not ok_t.any():
                break
            v, r = validation[name][ok, h], reward_v[ok]
            cuts = torch.quantile(v, torch.linspace(0, 1, 201))
            best = min(cuts, key=lambda c: error(v, r, c))
            out[name].append(error(test[name][ok_t, h], reward_t[ok_t], best))
    return {}, out


def wide_beams(b, widths=(64,)):
    """The two beams at the budget of best-of-128; these points are joined to the curves of the main comparison."""
    return {f"base:{m}:wide": b.beam("base", list(widths), m) for m in ("q_beam", "pav_beam")}, {}


def other_bases(b):
    """Fig. 4 for a weaker and a stronger base policy, at the base's alpha. Each has its own Q; the ORM is the base's, since at
    the end of a trace the outcome does not depend on who wrote it. (Its own Q re-ranks them too.)"""
    curves = {}
    for policy in ("weak", "strong"):
        curves |= b.samples(policy, ("greedy", "sample", "orm", "best_q", "pass"), max(1, b.args.n // 2))
        curves[f"{policy}:pav_beam"] = b.beam(policy, [w for w in b.args.widths if w <= 16] or b.args.widths[:1])
    return curves, {}


def provers(b):
    """Fig. 5b: best-of-K for every K; 5c: each base with each prover; and before any search, from logged values alone, the
    two terms of Theorem 3.1 for each (base, prover)."""
    curves, facts = {}, {"theorem": []}
    alpha = b.alpha or b.run.config["alpha"]                    # at alpha 0 all provers are the same
    for policy in ("base", "weak", "strong"):
        others = [mu for mu in ("weak", "strong") if mu != policy]
        mus = [f"bo{k}" for k in KS] + others if policy == "base" else ["bo1", f"bo{b.run.config['K']}", *others, "base"]
        widths = [4, 8] if policy == "base" else [8]
        q_mus, q, pi = logged_values(b, policy, mus)
        curves[f"{policy}:q_beam:provers"] = b.beam(policy, widths, "q_beam")
        for mu in mus:
            curves[f"{policy}:{mu}"] = b.beam(policy, widths, mu=mu, alpha=alpha)
            d, al, se = (float(x) for x in theorem_terms(q_mus[mu], q, pi))
            gain = float(torch.stack([p.acc for p in curves[f"{policy}:{mu}"]]).mean()
                         - torch.stack([p.acc for p in curves[f"{policy}:q_beam:provers"]]).mean())
            facts["theorem"].append({"base": policy, "prover": mu, "distinguishability": d, "alignment": al, "se": se,
                                     "gain": gain})
    return curves, facts


def logged_values(b, policy, mus, states=400, actions=16):
    """Q^mu, Q^pi (states, actions) after `actions` next steps that the policy samples at states of its own rollouts on
    validation problems, and their weights. A step counts as often as it was drawn."""
    run, enc = b.run, b.run.enc
    problems = run.problems("validation", states)
    t = seed_rollouts(b.model(policy), run.task, enc, problems, 1, b.args.seeds[0], **run.how)
    u = torch.rand(len(t), generator=torch.Generator().manual_seed(b.args.seeds[0]))
    place = (u * ((t.ends >= 0).sum(1) - 1)).long()                             # any state but the finished one
    lengths = t.ends.gather(1, place[:, None])[:, 0] + 1
    s = sample(b.model(policy), t.tokens, lengths, actions, max_new_tokens=run.task.max_step_tokens,
               stop=[newline(enc), enc.eot_token], seed=b.args.seeds[0] + 1, pad=pad_token(enc), **run.how)
    again = torch.arange(len(t)).repeat_interleave(actions)
    tokens, lengths = join(t.tokens[again], lengths[again], s.tokens, s.lengths, pad_token(enc))
    ends = (lengths - 1)[:, None]
    q = score(b.q_of(policy), tokens, ends)
    q_mus = {mu: b.q_mu(mu, tokens, ends, q).view(-1, actions) for mu in mus}
    return q_mus, q.view(-1, actions), torch.full((len(t), actions), 1 / actions)


def exact_values(b):
    """Is it the verifier's error? The PAV beam with exact Q^pi, and A^mu of best-of-K from it, by alpha and K."""
    if not hasattr(b.run.task, "exact"):
        return {}, {}
    curves = {}
    for alpha, mu in [(0.0, "bo1"), *((a, f"bo{k}") for k in (1, 4, 16) for a in (0.2, 0.5, 1.0))]:
        curves[f"base:exact:{mu}:{alpha}"] = b.beam("base", [2, 4], "oracle_beam", mu, alpha=alpha)
    return curves, {}


def data_sizes(b, shares=(0.05, 0.4), width=8):
    """Fig. 6b and 11: Q^pi trained anew, from the stronger policy, on fresh rollouts of pi (as many as a share of the seeds of
    train.py): seeds with n_mc completions of each of their prefixes (n_mc = 0: a seed's own outcome is its prefixes' label),
    or spent on first pits. Each sees its data at least once, and 100 batches of 128. Judged by a beam by Q^pi."""
    run, task, base, out = b.run, b.run.task, b.model("base"), []
    sizes = [round(x * run.config["problems"] * run.config["n_cov"]) for x in shares]
    problems, rng = run.problems("train", max(sizes)), np.random.default_rng(run.seed("data"))
    seeds = seed_rollouts(base, task, run.enc, problems, 1, run.seed("data"), **run.how)
    prefixes = (seeds.ends >= 0).sum(1) - 1                                     # of each seed: all but the finished trace

    def labelled(rollouts, n_mc):
        """As many seeds as the rollouts pay for, with n_mc completions of each of their prefixes."""
        some = seeds[:max(1, int(((1 + n_mc * prefixes).cumsum(0) <= rollouts).sum()))]
        if n_mc == 0:
            return some
        return monte_carlo(base, task, run.enc, problems, some, some.ends >= 0, n_mc, run.seed("data", n_mc), **run.how)

    def first_pits(rollouts, n_probe=4, most=32):
        """Two thirds of the rollouts for probing, the rest for the prefixes up to the pits that were found (App. D)."""
        t = labelled(2 * rollouts // 3, n_probe)
        pit = first_pit(t.q.masked_fill(t.n == 0, float("nan")), t.reward, run.config["pit_threshold"])
        upto = torch.arange(t.ends.shape[1]) <= pit[:, None]
        n = min(most, rollouts // 3 // max(1, int(upto.sum())))
        if n == 0 or not upto.any():
            return t
        again = monte_carlo(base, task, run.enc, problems, t, upto, n, run.seed("data", "pits"), **run.how)
        t.q, t.n = torch.where(upto, again.q, t.q), torch.where(upto, again.n, t.n)     # the probe chose the pit: not its q
        return t
    ways = {f"n_mc = {n}": lambda r, n=n: labelled(r, n) for n in (0, 4, 16)} | {"first pits": first_pits}
    for size in sizes:
        for way, collect in ways.items():
            data = collect(size)
            few = seeds[torch.from_numpy(rng.permutation(len(data))[:max(1, len(data) // 6)])]
            data = Traces.cat([data, wrong_steps(task, run.enc, problems, few, rng)], pad_token(run.enc))
            q, r = train_verifier(run.model("strong"), data, run.traces("base_validation"), batch_size=128,
                                  steps=max(100, len(data) // 128),
                                  lr_muon=run.config["lr_muon_verifier"], lr_adamw=run.config["lr_adamw_verifier"],
                                  seed=run.seed("data", size), log=lambda *x: None)
            beam = beam_search(base, q, task, run.enc, b.problems, width=width, alpha=0.0, seed=b.args.seeds[0], **run.how)
            out.append({"rollouts": size, "way": way, "traces": len(data), "auc": r.auc, "accuracy": float(beam.reward.mean()),
                        "solved": "".join(str(int(x)) for x in beam.reward)})
            print(f"  {size:>6} rollouts, {way:<10}: {len(data):>6} traces, AUC {r.auc:.3f}, accuracy {beam.reward.mean():.3f}",
                  flush=True)
    return {}, {"rows": out}


EXPERIMENTS = {"alpha": choose_alpha, "main": main_comparison, "steps": errors_by_step, "exact": exact_values, "wide": wide_beams,
               "bases": other_bases, "provers": provers, "data": data_sizes}
DEFAULT = ("alpha", "main", "steps")

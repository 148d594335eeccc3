"""The paper's experiments beyond one search and one training: lists of searches for search.py --all, lists of
trials for rl.py --sweep and --tune. An experiment is a function (bench, flags, prover, alpha) -> ([(group,
table)], facts)."""
from dataclasses import replace

import numpy as np
import torch

from minipav.advantage import advantage, effective_reward, first_pit, monte_carlo, q_best_of_k, seed_rollouts
from minipav.data import corrupted_steps
from minipav.prover import Prover, verifier_of
from minipav.run import keyed
from minipav.sampler import sample
from minipav.search.beam import search_width
from minipav.search.measure import Bench, Cell
from minipav.tokenizer import delimiter_tokens, join, pad_token
from minipav.traces import Traces
from minipav.verifier import exact_q, score, train_verifier

GRID = {"lr": (0.1, 0.3, 1, 2), "kl": (0.01, 0.03, 0.1)}      # of --tune, for every reward; lr: times --lr
# of --sweep; ORM-RL in 480 iterations costs about what PAV-RL does in 150, its verifier's data included
SWEEPS = [("pav", {flag: x}) for flag, x in (
    ("alpha", 0.5), ("alpha", 3.0), ("alpha", 6.0), ("prover", "bo16"), ("prover", "weak"),
    ("prover", "strong"),
    ("refresh", 2), ("trust_verifier", True))]
SWEEPS += [(reward, {flag: x}) for flag, x in (
    ("policy", "weak"), ("policy", "strong"), ("kl", 1e-3), ("kl", 0.1), ("kl", 0.2), ("baseline", "none"),
    ("baseline", "group"), ("no_rft", True), ("iterations", 480)) for reward in ("outcome", "pav")]
SWEEPS += [("pav_exact", {"kl": 1e-3})]
KS = (1, 2, 4, 8, 16, 32)


def trained(bench):
    """The policies that have a verifier (with --prover_rollouts 0 only pi has)."""
    return [p for p in ("base", "weak", "strong") if (bench.run.out / verifier_of(p)).exists()]


def searches(bench, a, group, *names, ns=(8,), **fields):
    """These searches, each for every one of --seeds."""
    own = fields.get("policy", "base") == "base"
    fields = dict(spread=a.spread, quota=a.quota or "none", verifier=own and a.verifier or "") | fields
    cells = [Cell.parse(name, ns=ns, problems=a.problems, seed=seed, **fields)
             for name in names for seed in a.seeds]
    return [(group, bench.measure(cell)) for cell in cells]


def controls(bench, a, mu, alpha):
    """Fig. 5a: other scores of the same beam, but for those that --search names."""
    out = []
    for name, ns in (("beam:advantage", (1, 2, 4)), ("beam:bonus", (1, 2, 4)), ("beam:exact", (1, 2, 4, 8))):
        if name not in a.search and (name != "beam:exact" or bench.run.task.exact):
            out += searches(bench, a, "main", name, ns=ns, prover=mu, alpha=alpha * (name == "beam:bonus"))
    return out, {}


def errors_by_step(bench, a, mu, alpha, n=8):
    """Fig. 10: how often a threshold on the score after step h mispredicts the outcome of a rollout. The
    threshold is chosen on validation problems; right and wrong rollouts weigh the same, so guessing is .5
    (the paper: unsaid)."""
    def scores(split):
        t = seed_rollouts(bench.model("base"), bench.run, bench.run.problems(split, a.problems), n,
                          a.seeds[0])
        q, q_mu = values(bench, "base", [mu], t.tokens, t.ends)
        return {"effective": effective_reward(q[:, 1:], advantage(q_mu[mu]), alpha),
                "q_pi": q[:, 1:]}, t.reward

    def error(value, reward, cut):
        hits = (value[reward == 1] >= cut).float().mean(), (value[reward == 0] < cut).float().mean()
        return 1 - (float(hits[0]) + float(hits[1])) / 2
    (validation, reward_v), (test, reward_t), out = scores("validation"), scores("test"), {}
    for name in test:
        out[name] = []
        for v, x in list(zip(validation[name].T, test[name].T))[:bench.run.task.max_steps]:
            ok, ok_t = ~v.isnan(), ~x.isnan()
            if not ok.any() or not ok_t.any():
                break
            cuts = torch.quantile(v[ok], torch.linspace(0, 1, 201))
            best = min(cuts, key=lambda c: error(v[ok], reward_v[ok], c))
            out[name].append(error(x[ok_t], reward_t[ok_t], best))
    return [], out


def exact_values(bench, a, mu, alpha):
    """Is it the verifier's error? The PAV beam with exact Q^pi, and A^mu of boK from it."""
    pairs = [(0.0, "bo1"), *((x, f"bo{k}") for k in (1, 4, 16) for x in (0.2, 0.5, 1.0))]
    return [t for x, m in pairs * bool(bench.run.task.exact)
            for t in searches(bench, a, "exact", "beam:exact", ns=(2, 4), prover=m, alpha=x)], {}


def other_bases(bench, a, mu, alpha):
    """Fig. 4 for a weaker and a stronger base policy, at the base's alpha. Each has its own Q; the ORM is the
    base's, since at the end of a trace the outcome does not depend on who wrote it."""
    ns = tuple(2 ** k for k in range(max(1, a.n // 2).bit_length()))
    widths, out = tuple(w for w in sorted(a.widths) if w <= 16) or (1,), []
    for policy in trained(bench)[1:]:
        out += searches(bench, a, "bases", "greedy", ns=(1,), policy=policy)
        out += searches(bench, a, "bases", "pass", "best_of_n:orm", "best_of_n:q_pi", ns=ns, policy=policy)
        out += searches(bench, a, "bases", "beam:effective", ns=widths, policy=policy, prover=mu, alpha=alpha)
    return out, {}


def provers(bench, a, mu, alpha):
    """Fig. 5b: best-of-K for every K; 5c: each base with each prover; and before any search, from logged
    values alone, the two terms of Theorem 3.1 for each (base, prover)."""
    out, facts, config = [], [], bench.run.config
    for policy in trained(bench)[:1 if a.verifier else 3]:
        mus = [f"bo{k}" for k in KS] if policy == "base" else ["bo1", f"bo{config['K']}"]
        mus += [p for p in trained(bench)[1:] if p != policy] + ["base"] * (policy != "base")
        fixed = dict(policy=policy, ns=(4, 8) if policy == "base" else (8,))
        q_mus, q = logged_values(bench, a, policy, mus)
        out += searches(bench, a, "provers", "beam:q_pi", **fixed)
        for m in mus:                                           # at alpha 0 all provers are the same
            out += searches(bench, a, "provers", "beam:effective", prover=m, alpha=alpha, **fixed)
            d, al = theorem_terms(q_mus[m], q)
            facts.append({"base": policy, "prover": m, "distinguishability": d, "alignment": al})
    return out, {"theorem": facts}


def theorem_terms(q_mu, q_pi):
    """The two terms of Theorem 3.1 from values (states, actions) after actions drawn from pi:
    distinguishability E_s Var_{a~pi} A^mu and alignment E_s E_{a~pi}[A^mu A^pi].

    A^mu is taken against V^mu, which the prover's own actions define; subtracting pi's mean instead changes
    neither the variance nor the product, since E_pi[A^pi] = 0.
    """
    adv_mu, adv_pi = (q - q.mean(-1, keepdim=True) for q in (q_mu, q_pi))
    return float((adv_mu ** 2).mean()), float((adv_mu * adv_pi).mean())


def values(bench, policy, mus, tokens, ends):
    """Q^pi at these step ends, and {prover: Q^mu}."""
    q, out = score(bench.model(verifier_of(policy)), tokens, ends), {}
    for m in mus:
        mu = Prover.parse(m, policy)
        own = mu.policy == policy
        out[m] = q_best_of_k(q, mu.K) if own else score(bench.model(verifier_of(mu.policy)), tokens, ends)
    return q, out


def logged_values(bench, a, policy, mus, states=400, actions=16):
    """Q^mu, Q^pi (states, actions) after `actions` next steps that the policy samples at states of its own
    rollouts on validation problems. A step counts as often as it was drawn."""
    run, enc, pi = bench.run, bench.run.enc, bench.model(policy)
    t = seed_rollouts(pi, run, run.problems("validation", states), 1, a.seeds[0])
    u = torch.rand(len(t), generator=torch.Generator().manual_seed(a.seeds[0]))
    end = (u * t.last).long()  # any state but the finished one
    lengths = t.ends.gather(1, end[:, None])[:, 0] + 1
    s = sample(pi, t.tokens, lengths, actions, max_new_tokens=run.task.max_step_tokens, seed=a.seeds[0] + 1,
               stop=delimiter_tokens(enc, run.task.delimiter), pad=pad_token(enc), **run.sampling)
    again = torch.arange(len(t)).repeat_interleave(actions)
    tokens, lengths = join(t.tokens[again], lengths[again], s.tokens, s.lengths, pad_token(enc))
    q, q_mus = values(bench, policy, mus, tokens, (lengths - 1)[:, None])
    return {m: x.view(-1, actions) for m, x in q_mus.items()}, q.view(-1, actions)


def data_sizes(bench, a, mu, alpha, sizes=(16000, 64000), width=8):
    """Fig. 6b and 11: Q^pi trained anew, from pi, on fresh rollouts of pi, with the same updates. Judged by a
    beam by Q^pi."""
    spec = {"sizes": sizes, "width": width, "problems": a.problems, "seed": a.seeds[0]}
    return [], bench.run.stage(keyed("search/data", spec), lambda: {
        "rows": list(train_on_sizes(bench, a, sizes, width))}, spec)


def data_by_way(run, base, problems, seeds, n_probe=16):
    """{way: rollouts -> Traces}. At equal rollouts: seeds with n_mc completions of each of their prefixes
    (n_mc = 0: a seed's own outcome is its prefixes' label); or three quarters of the rollouts for probing,
    and the rest for the prefixes up to the first pits that were found (App. D; if none was, for probing). At
    equal traces, those of n_mc = 16: fewer completions, and exact values."""
    def traces(rollouts, n_mc):
        return seeds[:max(1, int(((1 + n_mc * seeds.last).cumsum(0) <= rollouts).sum()))]

    def labelled(t, n_mc):
        return monte_carlo(base, run, problems, t, t.ends >= 0, n_mc, run.seed("data", n_mc)) if n_mc else t

    def with_pits(rollouts):
        t = labelled(traces(3 * rollouts // 4, n_probe), n_probe)
        pit = first_pit(t.q.masked_fill(~t.labelled, float("nan")), t.reward, run.config["pit_threshold"])
        index = torch.arange(t.ends.shape[1])
        upto = (index <= pit[:, None]) & (index < t.last[:, None])              # an end is known
        if not upto.any():
            return labelled(traces(rollouts, n_probe), n_probe)                 # no pit: all for probing
        n = max(1, rollouts // 4 // int(upto.sum()))
        # the probe chose the pit
        again = monte_carlo(base, run, problems, t, upto, n, run.seed("data", "pits"))
        return replace(t, q=torch.where(upto, again.q, t.q), n=torch.where(upto, again.n, t.n))

    def exact(t):
        return replace(t, q=exact_q(run, problems, t).nan_to_num(0.0), exact=t.ends >= 0)
    ways = {f"n_mc = {n}": lambda r, n=n: labelled(traces(r, n), n) for n in (0, 4, 16)}
    ways["first pits"] = with_pits
    ways |= {f"n_mc = {n}, equal traces": lambda r, n=n: labelled(traces(r, 16), n) for n in (0, 4)}
    return ways | ({"exact, equal traces": lambda r: exact(traces(r, 16))} if run.task.exact else {})


def train_on_sizes(bench, a, sizes, width, steps=150):
    run, base, c, seed = bench.run, bench.model("base"), bench.run.config, bench.run.seed("data")
    problems, test = run.problems("train", max(sizes)), run.problems("test", a.problems)
    seeds, held_out = seed_rollouts(base, run, problems, 1, seed), run.traces("base_validation")
    ways, rng = data_by_way(run, base, problems, seeds), np.random.default_rng(seed)
    for size, (way, collect) in ((size, w) for size in sizes for w in ways.items()):
        data = collect(size)
        few = seeds[torch.from_numpy(rng.permutation(len(data))[:max(1, len(data) // 6)])]
        data = Traces.cat([data, corrupted_steps(run, problems, few, rng)], pad_token(run.enc))
        q, r = train_verifier(base, data, held_out, batch_size=128, steps=steps, micro_batch=c["micro_batch"],
                              lr_muon=c["lr_muon_verifier"], lr_adamw=c["lr_adamw_verifier"],
                              seed=run.seed("data", size), log=lambda *x: None)
        judge = Bench(run)
        judge.models = bench.models | {"q_pi": q}
        found = search_width(judge.search(Cell("beam", "q_pi")), test, width, a.seeds[0])
        print(f"  {size} rollouts, {way}: {len(data):,} traces, AUC {r.auc:.3f}, "
              f"beam {found.right.mean():.3f}")
        yield {"rollouts": size, "way": way, "traces": len(data), "auc": r.auc,
               "accuracy": float(found.right.mean())}


EXPERIMENTS = {"controls": controls, "steps": errors_by_step, "exact": exact_values, "bases": other_bases,
               "provers": provers, "data": data_sizes}

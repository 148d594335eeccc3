"""The verifiers' data (section 4.2, App. D): from seed rollouts to labelled traces of every policy.

A recipe is a function (c, policies, seeds) -> {policy: Traces}: c says how much of what, `policies` are the
models by name ("base" is pi, the others provers), `seeds` their own seed rollouts.

    paper   n_mc completions at every prefix of every seed, first pits                     (the paper's)
    dense   a seed's outcome labels all of its prefixes; completions where the values are  (ours, the default)
"""
from dataclasses import dataclass, replace

import torch

from minipav.advantage import first_pit, monte_carlo, rollout_from
from minipav.tokenizer import encode_rows, join, pad_token
from minipav.traces import Traces, label_with_outcome, responses


@dataclass
class Collect:
    """What a recipe is given. A count of 0 means none."""
    env: object                     # task, encoding, sampling parameters
    problems: list                  # that the seeds are of
    n_mc: int                       # completions a prefix; up to a first pit four times as many
    branches: int                   # dense: completions in all, of prefixes of right seeds
    prover_branches: int            # dense: completions of pi's prefixes by each prover, beside as many seeds
    corrupted_fraction: float       # dense: of the seeds, copied with a corrupted step
    pit_traces: int                 # wrong traces that are searched for a first pit
    pit_threshold: float            # Q above which a state is a high-value one
    q_from: str                     # dense: branches are of right seeds of pi and of this policy
    seed: int
    rng: object                     # of numpy

    def pick(self, n, most):
        """Random row indices, `most` at the most."""
        return torch.from_numpy(self.rng.permutation(n)[:most])


def random_h(ends, rng):
    """The index h (N,) of a random step end of each trace, any but the last one. ends (N, S + 1)"""
    return (torch.from_numpy(rng.random(len(ends))) * ((ends >= 0).sum(1) - 1)).long()


def corrupted_steps(env, problems, traces, rng):
    """Each trace with a corrupted step put in, labelled 0 from there on (a verifier that has seen none is
    fooled by one). Nothing if the task does not say how."""
    if env.task.corrupt is None or len(traces) == 0:
        return traces[:0]
    chosen, prompt_lengths = [problems[i] for i in traces.problem.tolist()], traces.ends[:, 0] + 1
    texts = responses(env.enc, traces.tokens, traces.lengths, prompt_lengths)
    texts, first = env.task.corrupt(chosen, texts, rng)
    prompts = encode_rows(env.enc, [env.task.prompt(p) for p in chosen])
    tokens, lengths = join(*prompts, *encode_rows(env.enc, texts), pad_token(env.enc))
    return label_with_outcome(env, problems, traces.problem, tokens, lengths, prompt_lengths,
                              torch.as_tensor(first) + 1, sampled=False)


def first_pits(mu, env, problems, probed, n_mc, threshold, seed):
    """App. D: the first pits of wrong traces whose prefixes have been probed, and the prefixes up to them
    estimated again with n_mc completions. -> Traces of the rows that have a pit, labelled up to it."""
    pit = first_pit(probed.q.masked_fill(~probed.labelled, float("nan")), probed.reward, threshold)
    rows = (pit >= 0).nonzero()[:, 0]
    upto = torch.arange(probed.ends.shape[1]) <= pit[rows, None]
    estimated = monte_carlo(mu, env, problems, probed[rows], upto, n_mc, seed)
    return replace(estimated, labelled=estimated.labelled & upto)


def high_value_branches(pi, c, seeds):
    """Where the values are: n_mc completions by pi of prefixes of the seeds that came out right (if none did,
    of any), `branches` in all.

    At a low success rate almost every seed says "wrong" at every step end, and a verifier learns little from
    it. App. D spends an initial budget on finding high-value states; the prefixes of right seeds are such
    states, whichever policy found them, and fresh completions by pi are unbiased labels of Q^pi.
    -> Traces (prefix-major), estimates (prefixes,)
    """
    right = (seeds.reward == 1).nonzero()[:, 0] if seeds.reward.any() else torch.arange(len(seeds))
    rows, h = (seeds.ends[right, 1:] >= 0).nonzero(as_tuple=True)  # every h that a step end h + 1 comes after
    picked = c.pick(len(rows), max(1, c.branches // c.n_mc))
    t = rollout_from(pi, c.env, c.problems, seeds, right[rows[picked]], h[picked], c.n_mc, c.seed + 1)
    return t, t.reward.view(-1, c.n_mc).mean(1)


def dense(c, policies, seeds):
    """Ours. pi: its seeds, branches off right seeds (its own, and those of q_from), copies with a
    corrupted step, and first pits on wrong branches off a high-value state. A prover: its seeds, its
    completions of pi's prefixes, which the search will ask about, and some of the corrupted copies."""
    pad, pi, pi_seeds = pad_token(c.env.enc), policies["base"], seeds["base"]
    branches, q, corrupted = pi_seeds[:0], torch.zeros(0), pi_seeds[:0]
    if c.branches:
        found = [seeds[k] for k in dict.fromkeys(("base", c.q_from))]
        branches, q = high_value_branches(pi, c, Traces.cat(found, pad))
    if c.corrupted_fraction:
        copied = pi_seeds[c.pick(len(pi_seeds), max(1, round(c.corrupted_fraction * len(pi_seeds))))]
        copied = Traces.cat([copied, branches[branches.reward == 1]], pad)
        corrupted = corrupted_steps(c.env, c.problems, copied, c.rng)
    data = {"base": [pi_seeds, branches, corrupted]}
    if c.pit_traces and len(branches):
        fell = ((q.repeat_interleave(c.n_mc) > c.pit_threshold) & (branches.reward == 0)).nonzero()[:, 0]
        fell = branches[fell[c.pick(len(fell), c.pit_traces)]]
        probed = monte_carlo(pi, c.env, c.problems, fell, fell.ends >= 0, c.n_mc, c.seed + 2)
        pits = first_pits(pi, c.env, c.problems, probed, 4 * c.n_mc, c.pit_threshold, c.seed + 3)
        (pits if len(pits) else branches).cost[0] += probed.cost.sum()          # what all probes cost
        data["base"].append(pits)
    visited = Traces.cat([pi_seeds, branches], pad)
    for name in [k for k in seeds if k != "base"]:
        rows = c.pick(len(visited), c.prover_branches)
        h = random_h(visited.ends[rows], c.rng)
        done = rollout_from(policies[name], c.env, c.problems, visited, rows, h, 1, c.seed + 4)
        share = c.corrupted_fraction * 2 * c.prover_branches                    # its seeds and branches
        data[name] = [seeds[name], done, corrupted[c.pick(len(corrupted), max(1, round(share)))]]
    return {name: Traces.cat(parts, pad) for name, parts in data.items()}


def paper(c, policies, seeds):
    """The paper's: of every policy, n_mc completions by itself at every prefix of its seeds, and first pits
    on its wrong seeds."""
    data = {}
    for k, (name, t) in enumerate(seeds.items()):
        mu, seed = policies[name], c.seed + 10 * k
        t = monte_carlo(mu, c.env, c.problems, t, t.ends >= 0, c.n_mc, seed + 1)
        t.cost += seeds[name].cost
        wrong = (t.reward == 0).nonzero()[:, 0]
        probed = t[wrong[c.pick(len(wrong), c.pit_traces)]]
        pits = first_pits(mu, c.env, c.problems, probed, 4 * c.n_mc, c.pit_threshold, seed + 2)
        data[name] = Traces.cat([t, pits], pad_token(c.env.enc))
    return data


RECIPES = {"dense": dense, "paper": paper}

"""The estimator: Monte-Carlo rollouts -> Q and V -> process advantages -> the effective reward.

The top half is pure functions over tensors, one an equation. The lower half collects the data of section 4.2 and App. D:
seed rollouts, branches off the right ones, first pits, wrong steps. Symbols are the paper's. Every trace keeps its values
at S + 1 places, h = 0..S: place 0 is the bare prompt, where Q is V(x), and place h the end of step h, where Q is Q(s_h, a_h).
"""
from dataclasses import dataclass, fields

import torch

from minipav.sampler import sample
from minipav.tokenizer import decode_rows, encode_rows, join, pad_token

# ---- equations ------------------------------------------------------------------------------------------------------

def advantage(q):
    """Eq. 2: A(s_h, a_h) = Q(s_h, a_h) - Q(s_{h-1}, a_{h-1}) from values q (..., S + 1); place 0 is V(x). -> (..., S)"""
    return q[..., 1:] - q[..., :-1]


def q_best_of_k(q, K):
    """Eq. 30: the value of the prover that samples K continuations of pi and keeps a right one if there is one."""
    return 1 - (1 - q) ** K


def effective_reward(q_pi, adv_mu, alpha):
    """Eq. 5: Q^pi(s_h, a_h) + alpha A^mu(s_h, a_h), for each step by itself: never summed along a trace."""
    return q_pi + alpha * adv_mu


def standard_error(q, n):
    """Of a Monte-Carlo mean q of n outcomes in {0, 1}; with half a success and half a failure added, so that 0 of n and
    n of n do not claim to be exact."""
    p = (q * n + 0.5) / (n + 1)
    return (p * (1 - p) / n).sqrt()


def advantage_error(q, n):
    """Standard error of `advantage(q)` when the values rest on n (..., S + 1) independent outcomes. -> (..., S)"""
    se = standard_error(q, n)
    return (se[..., 1:] ** 2 + se[..., :-1] ** 2).sqrt()


def q_best_of_k_error(q, n, K):
    """Standard error of `q_best_of_k(q, K)`, to first order: K (1 - q)^(K-1) times that of q."""
    return K * (1 - q) ** (K - 1) * standard_error(q, n)


def theorem_terms(q_mu, q_pi, pi):
    """The two terms of Theorem 3.1 from values after each action: q_mu, q_pi, pi (states, actions), pi sums to 1.

    Returns (distinguishability E_s Var_{a~pi} A^mu, alignment E_s E_{a~pi}[A^mu A^pi], their sum's standard error over
    the states). With mu = pi the two are equal; a constant prover has 0 and 0.
    """
    adv_mu = q_mu - (pi * q_mu).sum(-1, keepdim=True)
    adv_pi = q_pi - (pi * q_pi).sum(-1, keepdim=True)
    # A^mu by Eq. 2 is taken against V^mu, which the prover's own actions define; subtracting pi's mean instead changes
    # neither the variance nor the product, since E_pi[A^pi] = 0.
    var, prod = (pi * adv_mu ** 2).sum(-1), (pi * adv_mu * adv_pi).sum(-1)
    return var.mean(), prod.mean(), (var + prod).std() / len(var) ** 0.5


def first_pit(q, reward, threshold):
    """The first pit of each trace (App. D): the first step with Q = 0 after a place with Q > threshold, in a trace
    that ends wrong. q (N, S + 1) with NaN where there is no estimate, reward (N,). -> place (N,), or -1 for none."""
    high = torch.cummax((q > threshold).int(), 1).values.bool()
    pit = high & (q == 0) & (reward[:, None] == 0)
    return torch.where(pit.any(1), pit.int().argmax(1), -1)


# ---- data -----------------------------------------------------------------------------------------------------------

KNOWN = 16                          # the label at the end of a finished trace is exact: it counts as this many outcomes

@dataclass
class Traces:
    """Labelled traces, tokens of prompt and response together. N rows, T positions, S steps at the most."""
    problem: torch.Tensor           # (N,) index into the list of problems
    tokens: torch.Tensor            # (N, T) right-padded
    lengths: torch.Tensor           # (N,)
    ends: torch.Tensor              # (N, S + 1) position of each place's last token (prompt, step 1, ...); -1: no such
    q: torch.Tensor                 # (N, S + 1) label: Monte-Carlo estimate of Q at each place
    n: torch.Tensor                 # (N, S + 1) number of outcomes it is the mean of; 0: unlabelled, KNOWN: exact
    reward: torch.Tensor            # (N,) Rex of the whole trace

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return Traces(*(getattr(self, f.name)[rows] for f in fields(self)))

    @staticmethod
    def cat(parts, pad=0):
        """All parts one after the other, padded to a common width."""
        fill = dict(tokens=pad, ends=-1, q=0.0, n=0)

        def wide(name):
            ts = [getattr(p, name) for p in parts]
            if name in fill:
                width = max(t.shape[1] for t in ts)
                ts = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill[name]) for t in ts]
            return torch.cat(ts)
        return Traces(*(wide(f.name) for f in fields(Traces)))


def step_ends(tokens, prompt_lengths, lengths, delimiters):
    """Positions (N, S + 1) of the last token of the prompt and of every finished step; -1 beyond the last one.

    A step ends with its delimiter: a newline, or end-of-text for the last one. tokens (N, T).
    """
    N, T = tokens.shape
    t = torch.arange(T)
    end = torch.isin(tokens, torch.tensor(delimiters)) & (t >= prompt_lengths[:, None]) & (t < lengths[:, None])
    end[torch.arange(N), prompt_lengths - 1] = True
    place = end.cumsum(1) - 1                                                   # (N, T): which place a position belongs to
    out = torch.full((N, int(place.max()) + 1), -1)
    row, pos = end.nonzero(as_tuple=True)
    out[row, place[row, pos]] = pos
    return out


def newline(enc):
    """The step delimiter as a token."""
    return enc.encode_ordinary("\n")[0]


def label_with_outcome(task, enc, problems, which, tokens, lengths, prompt_lengths, since=None):
    """Traces of finished rollouts: a rollout's own outcome is an unbiased one-sample label for each of its prefixes.

    which (N,) indexes `problems`; `since` (N,) is the first place whose continuation was sampled from the policy that
    is being valued (default 0: the whole trace was).
    """
    texts = responses(enc, tokens, lengths, prompt_lengths)
    reward = torch.tensor([task.outcome(problems[i], text) for i, text in zip(which.tolist(), texts)]).float()
    ends = step_ends(tokens, prompt_lengths, lengths, [newline(enc), enc.eot_token])
    place = torch.arange(ends.shape[1])
    labelled = (ends >= 0) & (place >= (0 if since is None else since[:, None]))
    n = labelled.long()
    ended = (tokens.gather(1, lengths[:, None] - 1)[:, 0] == enc.eot_token).nonzero()[:, 0]
    n[ended, (ends[ended] >= 0).sum(1) - 1] = KNOWN
    return Traces(which, tokens, lengths, ends, reward[:, None] * labelled, n, reward)


def responses(enc, tokens, lengths, prompt_lengths):
    """The texts of the responses alone, end-of-text included."""
    new = lengths - prompt_lengths
    at = (prompt_lengths[:, None] + torch.arange(int(new.max()))).clamp(max=tokens.shape[1] - 1)
    return decode_rows(enc, tokens.gather(1, at), new)


def random_places(ends, rng):
    """A random place (N,) of each trace, any but the last one. ends (N, S + 1)"""
    return (torch.from_numpy(rng.random(len(ends))) * ((ends >= 0).sum(1) - 1)).long()


def seed_rollouts(policy, task, enc, problems, n_cov, seed, **how):
    """n_cov seed rollouts a problem, each labelled with its own outcome at every place. -> Traces (problem-major)"""
    prompts, prompt_lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    s = sample(policy, prompts, prompt_lengths, n_cov, max_new_tokens=task.max_new_tokens, stop=[enc.eot_token],
               seed=seed, pad=pad_token(enc), **how)
    which = torch.arange(len(problems)).repeat_interleave(n_cov)
    prompt_lengths = prompt_lengths[which]
    tokens, lengths = join(prompts[which], prompt_lengths, s.tokens, s.lengths, pad_token(enc))
    return label_with_outcome(task, enc, problems, which, tokens, lengths, prompt_lengths)


def complete(mu, task, enc, problems, traces, rows, places, n_mc, seed, **how):
    """n_mc completions by mu of each prefix traces[rows[i]] up to places[i]. -> Traces (prefix-major), labelled with
    their outcomes from that place on; their mean is the prefix's estimate of Q^mu."""
    t, places = traces[rows], places.repeat_interleave(n_mc)
    prefix_lengths = t.ends.gather(1, places[::n_mc, None])[:, 0] + 1
    prefix = t.tokens[:, :int(prefix_lengths.max())]
    s = sample(mu, prefix, prefix_lengths, n_mc, max_new_tokens=task.max_new_tokens, stop=[enc.eot_token], seed=seed,
               pad=pad_token(enc), **how)
    again = torch.arange(len(rows)).repeat_interleave(n_mc)
    tokens, lengths = join(prefix[again], prefix_lengths[again], s.tokens, s.lengths, pad_token(enc))
    return label_with_outcome(task, enc, problems, t.problem[again], tokens, lengths, t.ends[again, 0] + 1, places)


def monte_carlo(mu, task, enc, problems, traces, wanted, n_mc, seed, **how):
    """Traces with label and count replaced, at the places marked in `wanted` (N, S + 1), by n_mc completions of mu.
    A trace's last place is known exactly: its outcome, and no completion is spent on it."""
    final = (traces.ends >= 0).sum(1) - 1
    q, n = torch.zeros_like(traces.q), torch.zeros_like(traces.n)
    q[torch.arange(len(q)), final], n[torch.arange(len(n)), final] = traces.reward, n_mc
    ask = wanted & (traces.ends >= 0)
    ask[torch.arange(len(ask)), final] = False
    rows, places = ask.nonzero(as_tuple=True)
    if len(rows):
        done = complete(mu, task, enc, problems, traces, rows, places, n_mc, seed, **how)
        q[rows, places], n[rows, places] = done.reward.view(-1, n_mc).mean(1), n_mc
    return Traces(traces.problem, traces.tokens, traces.lengths, traces.ends, q, n, traces.reward)


def high_value_branches(pi, task, enc, problems, seeds, *, count, n_mc, seed, rng, **how):
    """Where the values are: n_mc completions by pi of prefixes of the seeds that came out right, about `count` in all.

    At a low success rate almost every seed says "wrong" at every place, and a verifier learns little from it. App. D
    spends an initial budget on finding high-value states; the prefixes of right seeds are such states, whichever policy
    found them, and fresh completions by pi are unbiased labels of Q^pi. -> Traces (prefix-major), estimates (prefixes,)
    """
    right = (seeds.reward == 1).nonzero()[:, 0] if seeds.reward.any() else torch.arange(len(seeds))
    rows, places = (seeds.ends[right, 1:] >= 0).nonzero(as_tuple=True)          # every place but the last one
    some = torch.from_numpy(rng.permutation(len(rows))[:max(1, count // n_mc)])
    branches = complete(pi, task, enc, problems, seeds, right[rows[some]], places[some], n_mc, seed, **how)
    return branches, branches.reward.view(-1, n_mc).mean(1)


def first_pit_data(mu, task, enc, problems, traces, *, n_probe, n_mc, threshold, seed, **how):
    """App. D: probe every prefix of these wrong traces with n_probe completions, find the first pits, estimate the
    prefixes up to the pit again with n_mc. -> Traces of the rows that have a pit, labelled up to it."""
    probed = monte_carlo(mu, task, enc, problems, traces, traces.ends >= 0, n_probe, seed, **how)
    pit = first_pit(probed.q.masked_fill(probed.n == 0, float("nan")), probed.reward, threshold)
    rows = (pit >= 0).nonzero()[:, 0]
    upto = torch.arange(traces.ends.shape[1]) <= pit[rows, None]
    again = monte_carlo(mu, task, enc, problems, traces[rows], upto, n_mc, seed + 1, **how)
    again.n[~upto] = 0
    return again


def wrong_steps(task, enc, problems, traces, rng):
    """Each trace with a wrong step put in, labelled 0 from there on (a verifier that has seen none is fooled by one)."""
    prompt_lengths = traces.ends[:, 0] + 1
    chosen = [problems[i] for i in traces.problem.tolist()]
    texts, first = task.corrupt(chosen, responses(enc, traces.tokens, traces.lengths, prompt_lengths), rng)
    ok = [task.judge(p, t) == "illegal" for p, t in zip(chosen, texts)]         # two wrongs may have made a right
    if not any(ok):
        return traces[:0]
    chosen, texts, first = ([x for x, keep in zip(xs, ok) if keep] for xs in (chosen, texts, list(first)))
    traces, prompt_lengths = traces[torch.tensor(ok)], prompt_lengths[torch.tensor(ok)]
    tokens, lengths = encode_rows(enc, [task.prompt(p) + t for p, t in zip(chosen, texts)])
    since = torch.as_tensor(first) + 1
    return label_with_outcome(task, enc, problems, traces.problem, tokens, lengths, prompt_lengths, since)

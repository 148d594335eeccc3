"""What a step is worth in RL: from outcomes and values to the weight of each token (section 5 of the paper).

The tokens of step h all get that step's own return, by default Rex + alpha A^mu(s_h, a_h) (Eq. 5; Rex is an
unbiased sample of Q^pi). A^mu is never summed along the trace: such a sum telescopes to the outcome minus a
function of the state (pav_sum).
"""
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad as pad_right

from minipav import parallel
from minipav.advantage import advantage, effective_reward, q_best_of_k, rollout_from
from minipav.attention import BETA, attention_share, uniform_share
from minipav.prover import check_head
from minipav.sampler import WHOLE
from minipav.search.best_of_n import pass_at_n
from minipav.utils import Fail
from minipav.verifier import exact_q, score


@dataclass
class Reward:
    returns: object  # (Rex, Q^mu after the step, A^mu, alpha), each (N, S) -> return of each step (N, S)
    values: str = None              # where Q^mu comes from: one of VALUES, or nowhere
    # the flags of rl.py that it depends on, beside those of the loop: one not named stays at its default
    uses: tuple = ()
    baseline: bool = True           # False: the return is an advantage of pi itself and needs none
    known: bool = True              # known values (Rex at the end) take the place of Q^mu's there
    lr: float = 1e-3                # of the policy: chosen for `outcome` and `pav`, others' where said
    loop: bool = False              # trained by a loop of its own (LOOPS in rl.py)
    scaled: bool = False  # 1 + alpha times outcome reward's gradient; control: outcome, the KL over 1 + alpha


def pav(rex, q, adv, alpha):
    return effective_reward(rex, adv, alpha)                                    # Eq. 5


def summed(rex, q, adv, alpha):
    return rex + alpha * adv.nan_to_num(0.0).flip(1).cumsum(1).flip(1)          # of A^mu from this step on


def spread_out(rex, share, gain, alpha):
    return rex * (1 - BETA * (share - gain))    # of r_t (attention.py), from the step's first token on


VERIFIER = ("alpha", "prover", "refresh", "trust_verifier")
REWARDS = {
    "outcome": Reward(lambda rex, q, adv, alpha: rex),                                              # ORM-RL
    "pav": Reward(pav, "verifier", VERIFIER),                                                       # PAV-RL
    "pav_rollout": Reward(pav, "rollouts", ("alpha", "prover", "n_mc")),  # no verifier: fresh rollouts of mu
    "pav_exact": Reward(pav, "exact", ("alpha", "prover")),                     # no error at all
    "vine": Reward(lambda rex, q, adv, alpha: adv, "current", ("n_mc",), baseline=False),  # VinePPO's A^pi
    "q_bonus": Reward(lambda rex, q, adv, alpha: rex + alpha * q, "verifier", VERIFIER),  # App. G's control
    "pav_sum": Reward(summed, "verifier", VERIFIER, scaled=True),               # outcome reward again
    # mu = pi: outcome reward in expectation
    "pav_pi": Reward(pav, "current", ("alpha", "n_mc"), scaled=True),
    # relatives: what the group says of a trace's outcome; the outcome over the tokens, by attention, evenly
    "grpo": Reward(lambda rex, z, adv, alpha: z, "group", baseline=False, known=False),
    "abc": Reward(spread_out, "attention", known=False),
    "uniform": Reward(spread_out, "evenly", known=False),
    # and what is no reward at all: training on what a tree search finds
    "selftrain": Reward(None, "verifier", baseline=False, loop=True),
    "dpo": Reward(None, "verifier", baseline=False, loop=True, lr=3e-4)}


def gradient_ratio(alpha, K):
    """How many times outcome reward's gradient that of `pav` under best-of-K of pi is, at most: where values
    are small A^BoK is K times A^pi, and Rex has the gradient of A^pi."""
    return 1 + alpha * K


# ---- from values to token weights

def step_returns(reward, rex, q_mu, alpha):
    """The return (N, S) of each step from Rex (N,) and Q^mu (N, S + 1); 0 where Q^mu is NaN (no step)."""
    rex = rex[:, None].expand(-1, q_mu.shape[1] - 1)
    return reward.returns(rex, q_mu[:, 1:], advantage(q_mu), alpha).masked_fill(q_mu[:, 1:].isnan(), 0.0)


def close(traces):
    """Traces in which a row that was truncated within a step has a step end there too; without labels."""
    row, last = torch.arange(len(traces)), traces.last
    cut = traces.ends[row, last] < traces.lengths - 1
    ends = pad_right(traces.ends, (0, 1), value=-1)
    ends[row[cut], last[cut] + 1] = traces.lengths[cut] - 1
    ends = ends[:, :int((ends >= 0).sum(1).max())]
    none = torch.zeros(ends.shape)
    return replace(traces, ends=ends, q=none, n=none.long(), labelled=none.bool(), exact=none.bool())


def to_estimate(traces, H):
    """The step ends (N, S + 1) whose value has to be estimated: not the last (Rex), none after H (0)."""
    index = torch.arange(traces.ends.shape[1])
    return (index < traces.last[:, None]) & (index < H)


def with_terminal_values(q, traces, H):
    """q (N, S + 1) with the values that need not be estimated put in, and NaN behind the last step end."""
    end = torch.arange(traces.ends.shape[1]) == traces.last[:, None]
    q = torch.where(end, traces.reward[:, None], torch.where(to_estimate(traces, H), q, 0.0))
    return q.masked_fill(traces.ends < 0, float("nan"))


def step_of_token(tokens, ends):
    """The step (N, T) that each token of a response belongs to, delimiter included; -1 elsewhere."""
    t, last = torch.arange(tokens.shape[1]), ends.max(1, keepdim=True).values
    ascending = ends.masked_fill(ends < 0, tokens.shape[1])
    before = torch.searchsorted(ascending, t.expand(len(ends), -1).contiguous())  # step ends before a token
    return torch.where((t > ends[:, :1]) & (t <= last), before - 1, -1)


def to_tokens(x, step):
    """x (N, S) of each step, at the tokens (N, T) of that step; 0 elsewhere."""
    return torch.where(step >= 0, x.gather(1, step.clamp(min=0)), 0.0)


def step_baseline(kind, returns, ends, group, running):
    """What is subtracted from the returns (N, S) of --baseline group, mean and none. None of it depends on
    the step that it is subtracted from: the group's mean, at each step, is that of the problem's *other*
    traces."""
    if kind == "group":
        there = (ends[:, 1:] >= 0).float()
        total, n = (x.view(-1, group, x.shape[1]) for x in (returns * there, there))
        others, count = (x.sum(1, keepdim=True) - x for x in (total, n))
        return (others / count.clamp(min=1)).flatten(0, 1)
    return torch.full_like(returns, running if kind == "mean" else 0.0)


# ---- where Q^mu comes from: (loop, problems, traces, seed) -> Q^mu (N, S + 1), tokens sampled

def by_rollouts(mu, K, env, problems, traces, n_mc, seed, **sampling):
    """Unbiased Q^mu of best-of-K of mu from n_mc >= K completions of each prefix whose value is not known."""
    rows, h = to_estimate(traces, env.task.max_steps).nonzero(as_tuple=True)
    q = torch.zeros(traces.ends.shape)
    done = rollout_from(mu, env, problems, traces, rows, h, n_mc, seed, **sampling)
    q[rows, h] = pass_at_n(done.reward.view(-1, n_mc), K).float()
    return q, int(done.cost.sum())


def by_group(loop, problems, traces, seed):
    """GRPO's advantage (arXiv 2402.03300), for every step of a trace: its outcome minus its group's mean,
    over the standard deviation. Ours: no clipping (each batch is used once), no division by length."""
    group = traces.reward.view(-1, loop.a.group)
    z = (group - group.mean(1, keepdim=True)) / (group.std(1, keepdim=True) + 1e-4)
    return z.flatten()[:, None].expand(traces.ends.shape), 0


VALUES = {"verifier": lambda l, problems, traces, seed: (
              q_best_of_k(score(l.verifier, traces.tokens, traces.ends), l.mu.K), 0),
          "exact": lambda l, problems, traces, seed: (
              q_best_of_k(exact_q(l.run, problems, traces).nan_to_num(0.0), l.mu.K), 0),
          "group": by_group,
          "attention": lambda l, problems, traces, seed: (attention_share(l.orm, traces), 0),
          "evenly": lambda l, problems, traces, seed: (uniform_share(traces), 0),
          "rollouts": lambda l, problems, traces, seed: by_rollouts(
              l.mu_policy, l.mu.K, l.run, problems, traces, l.a.n_mc, seed),
          "current": lambda l, problems, traces, seed: by_rollouts(
              l.policy, 1, l.run, problems, traces, l.a.n_mc, seed, **WHOLE)}


def check_trial(reward, mu, a):
    """Raises Fail if this reward cannot be had with this prover, or with these flags."""
    values, other = REWARDS[reward].values, mu.policy != a.policy
    if other and (values == "exact" or values == "verifier" and a.refresh):
        raise Fail(f"--prover {a.prover}: only boK has exact values, or a verifier to --refresh; use boK")
    if values in ("verifier", "rollouts"):
        check_head(mu.policy, "scalar" if values == "verifier" else "lm")
    if REWARDS[reward].loop and parallel.world() > 1:
        raise Fail(f"--reward {reward}: in one process; start it without torchrun")
    if values == "group" and a.group < 2:
        raise Fail(f"--group {a.group}: {reward} compares traces of a problem; take 2 or more")
    if a.group == 1 and a.baseline == "group":
        raise Fail("--group 1: --baseline group needs the problem's other traces; use --group 2 or more")
    if values == "rollouts" and a.n_mc < mu.K:
        raise Fail(f"--n_mc {a.n_mc}: best-of-{mu.K} needs at least {mu.K} completions a prefix")

"""What a step is worth in RL: from outcomes and values to the weight of each token (section 5 of the paper).

The tokens of step h all get that step's own return, by default Rex + alpha A^mu(s_h, a_h) (Eq. 5; Rex is an unbiased sample of
Q^pi). A^mu is never summed along the trace: such a sum telescopes to the outcome minus a function of the state (pav-sum).
"""
import torch
import torch.nn.functional as F

from minipav.advantage import Traces, advantage, complete, effective_reward, q_best_of_k
from minipav.search import pass_at_n
from minipav.tokenizer import decode_rows
from minipav.utils import Fail

# reward: (the return of a step, where Q^mu comes from)
REWARDS = {"outcome": ("outcome", None),                        # ORM-RL: Rex alone
           "pav": ("effective", "verifier"),                    # Eq. 5
           "pav-rollout": ("effective", "rollouts"),            # Q^mu from fresh rollouts of the prover: no verifier
           "pav-oracle": ("effective", "exact"),                # exact Q^mu of the task's tabular policy: no error at all
           "vine": ("alone", "current"),                        # VinePPO: A^pi of the current policy, from fresh rollouts
           "q-bonus": ("bonus", "verifier"),                    # Q^mu itself: App. G's control
           "pav-sum": ("sum", "verifier"),                      # summed: outcome reward again
           "pav-pi": ("effective", "current")}                  # mu = pi: in expectation equals outcome reward


def prover_of(a):
    """(K, name of the policy) of the prover that the flags `a` ask for: best-of-K of --policy, or another policy by itself.
    Raises Fail if --reward cannot be had with it."""
    source = REWARDS[a.reward][1]
    if source in (None, "current"):
        return 1, a.policy
    if a.prover[:2] != "bo":
        if source == "exact" or a.refresh:
            raise Fail(f"--prover {a.prover}: only best-of-K has exact values, or a verifier to --refresh; use boK")
        return 1, a.prover
    K = int(a.prover[2:])
    if source == "rollouts" and a.n_mc < K:
        raise Fail(f"--n_mc {a.n_mc}: best-of-{K} needs at least {K} completions a prefix")
    return K, a.policy


# ---- from values to token weights -----------------------------------------------------------------------------------

def step_returns(rule, reward, q_mu, alpha):
    """The return (N, S) of each step, from Rex (N,) and Q^mu (N, S + 1), NaN behind the last place: 0 there."""
    adv, rex = advantage(q_mu), reward[:, None].expand(-1, q_mu.shape[1] - 1)
    if rule == "outcome":
        out = rex
    elif rule == "effective":
        out = effective_reward(rex, adv, alpha)
    elif rule == "bonus":
        out = rex + alpha * q_mu[:, 1:]
    elif rule == "sum":                                                         # of A^mu from this step on
        out = rex + alpha * adv.nan_to_num(0.0).flip(1).cumsum(1).flip(1)
    else:                                                                       # alone
        out = adv
    return out.masked_fill(q_mu[:, 1:].isnan(), 0.0)


def close(traces):
    """Traces in which a row that was cut off within a step has a place at its last token too."""
    ends, row = F.pad(traces.ends, (0, 1), value=-1), torch.arange(len(traces))
    final = (traces.ends >= 0).sum(1)
    cut = ends[row, final - 1] < traces.lengths - 1
    ends[row[cut], final[cut]] = traces.lengths[cut] - 1
    ends = ends[:, :int((ends >= 0).sum(1).max())]
    return Traces(traces.problem, traces.tokens, traces.lengths, ends, torch.zeros(ends.shape), torch.zeros_like(ends),
                  traces.reward)


def step_of_token(tokens, ends):
    """The step (N, T) that each token of a response belongs to, its delimiter included; -1 in prompt and padding."""
    t, last = torch.arange(tokens.shape[1]), ends.max(1, keepdim=True).values
    places = ends.masked_fill(ends < 0, tokens.shape[1])
    before = torch.searchsorted(places, t.expand(len(ends), -1).contiguous())               # how many places lie before it
    return torch.where((t > ends[:, :1]) & (t <= last), before - 1, -1)


def to_tokens(x, step):
    """x (N, S) of each step, at the tokens (N, T) of that step; 0 elsewhere."""
    return torch.where(step >= 0, x.gather(1, step.clamp(min=0)), 0.0)


def step_baseline(kind, returns, ends, group, running):
    """What is subtracted from the returns (N, S) of --baseline group, mean and none. None of it depends on the step that it is
    subtracted from: the group's mean, at each step, is that of the problem's *other* traces."""
    if kind == "group":
        there = (ends[:, 1:] >= 0).float()
        total, n = (x.view(-1, group, x.shape[1]) for x in (returns * there, there))
        return ((total.sum(1, keepdim=True) - total) / (n.sum(1, keepdim=True) - n).clamp(min=1)).flatten(0, 1)
    return torch.full_like(returns, running if kind == "mean" else 0.0)


# ---- where Q^mu comes from ------------------------------------------------------------------------------------------

def unknown(traces, H):
    """The places (N, S + 1) whose value has to be estimated: at the last one it is Rex, and after H steps 0 if it goes on."""
    place = torch.arange(traces.ends.shape[1])
    return (place < (traces.ends >= 0).sum(1, keepdim=True) - 1) & (place < H)


def known_values(q, traces, H):
    """q (N, S + 1) with what need not be estimated put in, and NaN behind the last place."""
    last = torch.arange(traces.ends.shape[1]) == (traces.ends >= 0).sum(1, keepdim=True) - 1
    q = torch.where(last, traces.reward[:, None], torch.where(unknown(traces, H), q, 0.0))
    return q.masked_fill(traces.ends < 0, float("nan"))


def q_by_rollouts(mu, K, run, problems, traces, n_mc, seed, **how):
    """Unbiased Q^mu (N, S + 1) of best-of-K of a policy from n_mc >= K completions of each prefix that is not `known_values`'s,
    and the number of tokens sampled. how: options of the sampler."""
    rows, places = unknown(traces, run.task.max_steps).nonzero(as_tuple=True)
    done = complete(mu, run.task, run.enc, problems, traces, rows, places, n_mc, seed, **how)
    q = torch.zeros(traces.ends.shape)
    q[rows, places] = pass_at_n(done.reward.view(-1, n_mc), K).float()
    return q, int(done.lengths.sum() - (traces.ends[rows, places] + 1).sum() * n_mc)


def q_exact(K, run, problems, traces):
    """Q^mu (N, S + 1) of best-of-K of the task's tabular policy, by dynamic programming."""
    value = run.task.exact(problems)
    rows, places = (traces.ends >= 0).nonzero(as_tuple=True)
    texts = decode_rows(run.enc, traces.tokens[rows], traces.ends[rows, places] + 1)
    which = traces.problem[rows].tolist()
    prompts = [run.task.prompt(p) for p in problems]
    q = torch.zeros(traces.ends.shape)
    q[rows, places] = torch.tensor([value(i, text.removeprefix(prompts[i])) for i, text in zip(which, texts)])
    return q_best_of_k(q, K)

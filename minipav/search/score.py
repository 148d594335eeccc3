"""What a search ranks by, what it is given and what it returns."""
from dataclasses import dataclass, field

import torch

from minipav import parallel
from minipav.advantage import effective_reward
from minipav.utils import Fail
from minipav.verifier import ExactValues


@dataclass
class Step:
    """N candidate steps: the values after and before them, what led there, and the search's alpha. All
    candidates of one level of a beam have the same depth: a term in it weighs them against finished traces
    only."""
    q_pi: torch.Tensor              # (N,) Q^pi after the step
    q_mu: torch.Tensor              # (N,) Q^mu after it
    q_pi_before: torch.Tensor       # (N,) and before it
    q_mu_before: torch.Tensor
    path: torch.Tensor              # (N, S + 1) Q^pi at the ancestors, prompt first, the parent's repeated
    depth: int                      # h, from 1; (N,) in trees and best-of-N
    logprob: torch.Tensor           # (N,) log pi of the step's tokens
    alpha: float

    @property
    def adv_mu(self):
        return self.q_mu - self.q_mu_before                     # Eq. 2, of one step


@dataclass
class Score:
    label: str
    of: object                      # Step -> (N,); the search keeps the highest
    verifier: str = "q_pi"          # whose values q_pi are: Q of the policy, "orm", or "exact"
    uses: tuple = ("prover", "alpha")   # what `of` reads of these; one that is not named is blank (alpha 0)


def log_odds(s):
    """Eq. 5 with log-odds in the place of values, mu = pi."""
    now, before = (q.clamp(1e-6, 1 - 1e-6).logit() for q in (s.q_pi, s.q_pi_before))
    return effective_reward(now, now - before, s.alpha)


SCORES = {
    "q_pi": Score("Q^pi", lambda s: s.q_pi, uses=()),
    "orm": Score("ORM", lambda s: s.q_pi, verifier="orm", uses=()),
    "effective": Score("PAV", lambda s: effective_reward(s.q_pi, s.adv_mu, s.alpha)),               # Eq. 5
    "advantage": Score("A^mu alone", lambda s: s.adv_mu, uses=("prover",)),
    "q_mu": Score("Q^mu", lambda s: s.q_mu, uses=("prover",)),
    "log_odds": Score("log-odds progress", log_odds, uses=("alpha",)),
    "bonus": Score("Q^pi + a Q^mu", lambda s: s.q_pi + s.alpha * s.q_mu),  # App. G's control
    "exact": Score("exact values", lambda s: effective_reward(s.q_pi, s.adv_mu, s.alpha), verifier="exact")}


QUOTAS = ("none", "parent", "grandparent", "state")     # who share it are relatives


def check_quota(quota, task):
    """Raises Fail if this task has no such relatives."""
    if quota == "state" and task.state is None:
        raise Fail(f"--quota state: task {task.name} does not say what a state is")


@dataclass
class Result:
    """Of one search, for each of P problems."""
    right: torch.Tensor             # (P,) Rex of the answer, or its expectation
    solved: torch.Tensor  # (P,) whether (or the chance that) a right answer is among the candidates: pass@N
    tokens: torch.Tensor            # (P,) policy tokens generated, duplicates and losers included
    verifier_tokens: torch.Tensor   # (P,) tokens read by verifiers, prompt included
    text: list = None               # P answers, where there is one answer
    q: torch.Tensor = None          # (P,) the verifier's value of it, -1 where there is none; beams, trees
    seconds: float = 0.0            # all problems together

    @classmethod
    def empty(cls, P):
        return cls(*torch.zeros(4, P), [""] * P, torch.full((P,), -1.0))

    def enter(self, task, problems, owner, q, texts):
        """Finished traces of the problems owner (K,), with values q (K,); the answer to a problem is the one
        with the highest value."""
        best = set(top(q, owner, 1).tolist())
        for k, (p, text) in enumerate(zip(owner.tolist(), texts)):
            right = float(task.outcome(problems[p], text))
            self.solved[p] = max(self.solved[p], right)
            if k in best:
                self.text[p], self.right[p], self.q[p] = text, right, q[k]

    def exchange(self, mine):
        """This process has the problems of the slice `mine`: get the others."""
        parallel.exchange(mine, self.right, self.solved, self.tokens, self.verifier_tokens, self.q)
        parallel.exchange_list(mine, self.text)


@dataclass
class Search:
    """What a method is given beside problems, budgets and a seed."""
    env: object                     # task, encoding, sampling parameters
    policy: object
    score: Score = None
    verifier: object = None         # of Q^pi (or the ORM); None: exact values
    exact: object = ExactValues     # beam: (env, problems, device) -> those values
    mu_verifier: object = None      # of Q^mu; None: mu is best-of-K of pi
    K: int = 1
    alpha: float = 0.0
    C: int = 3                      # beams, trees: next steps sampled for each prefix, on average
    spread: int = 12                # beam: most samples at the first level; 0: C a prefix (beam.py)
    quota: str = "none"             # beam: every group of such relatives has its best before any second one
    log: list = None                # beam: gets the candidates of every level
    # samples and their values, shared by searches of the same problems
    memo: dict = field(default_factory=dict)

    @property
    def readers(self):
        """How many models read each step, beside the policy."""
        return (self.verifier is not None) + (self.mu_verifier is not None)

    def remember(self, key, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


# ---- ranking

def sort(value, owner, tier=None):
    """Row indices by owner, then by tier (none: all the same), then by value, the highest first."""
    order = value.argsort(descending=True, stable=True)
    for key in (tier, owner) if tier is not None else (owner,):
        order = order[key[order].argsort(stable=True)]
    return order


def ranks(value, owner):
    """The place (N,) of each row among its owner's by value; 0 is the highest."""
    order = sort(value, owner)
    return torch.empty_like(order).index_copy_(0, order, places(owner[order]))


def places(o):
    """0, 1, 2, ... within each run of equal numbers of o, ascending."""
    return torch.arange(len(o), device=o.device) - torch.searchsorted(o, o)


def top(value, owner, k, tier=None):
    """Row indices of the k highest values of each owner, ordered by owner, tier and value; a lower tier goes
    first."""
    order = sort(value, owner, tier)
    return order[places(owner[order]) < k]

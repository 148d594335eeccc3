"""What a search ranks by, what it is given and what it returns."""
import re
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

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
    path: torch.Tensor  # (N, h) Q^pi at the ancestors, from the prompt on (best-of-N: all values)
    depth: int                      # h, from 1; (N,) in best-of-N
    logprob: torch.Tensor           # (N,) log pi of the step's tokens
    alpha: float

    @property
    def adv_mu(self):
        return self.q_mu - self.q_mu_before                                     # Eq. 2


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


class Quota(NamedTuple):
    """How a beam is kept from filling with relatives."""
    kin: str = "parent"             # relatives share a parent, a "grandparent", or the "state" they reach
    penalty: float = 0.0            # of a score for every better relative

    @classmethod
    def parse(cls, text):
        """"none"; "parent": every prefix's best child before any second child; "grandparent": so for its
        grandchildren; "state": every state's best; a number: the penalty for siblings. Else raises Fail."""
        if text in ("parent", "grandparent", "state"):
            return cls(text, float("inf"))
        if text != "none" and not re.fullmatch(r"[0-9]*[.]?[0-9]+", text, re.ASCII):
            raise Fail(f"--quota {text}: choose none, parent, grandparent, state, or a penalty such as 0.1")
        return cls("parent", 0.0 if text == "none" else float(text))


@dataclass
class Result:
    """Of one search, for each of P problems."""
    right: torch.Tensor             # (P,) Rex of the answer, or its expectation
    solved: torch.Tensor  # (P,) whether (or the chance that) a right answer is among the candidates: pass@N
    tokens: torch.Tensor            # (P,) policy tokens generated, duplicates and losers included
    verifier_tokens: torch.Tensor   # (P,) tokens read by verifiers, prompt included
    text: list = None               # P answers, where there is one answer
    q: torch.Tensor = None          # (P,) the verifier's value of it, -1 where there is none; beams
    seconds: float = 0.0            # all problems together


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
    C: int = 3                      # beam: next steps sampled for each prefix, on average
    spread: int = 12                # beam: most samples at the first level; 0: C behind every prefix
    quota: Quota = Quota()          # beam: of relatives
    log: list = None                # beam: gets the candidates of every level
    # samples and their values, shared by searches of the same problems
    memo: dict = field(default_factory=dict)

    def remember(self, key, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

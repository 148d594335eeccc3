"""What a search ranks by, what it is given and what it returns."""
from dataclasses import dataclass, field

import torch

from minipav.advantage import effective_reward


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


SCORES = {
    "q_pi": Score("Q^pi", lambda s: s.q_pi, uses=()),
    "orm": Score("ORM", lambda s: s.q_pi, verifier="orm", uses=()),
    "effective": Score("PAV", lambda s: effective_reward(s.q_pi, s.adv_mu, s.alpha)),               # Eq. 5
    "advantage": Score("A^mu alone", lambda s: s.adv_mu, uses=("prover",)),
    "bonus": Score("Q^pi + a Q^mu", lambda s: s.q_pi + s.alpha * s.q_mu),  # App. G's control
    "exact": Score("exact values", lambda s: effective_reward(s.q_pi, s.adv_mu, s.alpha), verifier="exact")}


@dataclass
class Result:
    """Of one search, for each of P problems."""
    right: torch.Tensor             # (P,) Rex of the answer, or its expectation
    solved: torch.Tensor  # (P,) whether (or the chance that) a right answer is among the candidates: pass@N
    tokens: torch.Tensor            # (P,) policy tokens generated, duplicates and losers included
    verifier_tokens: torch.Tensor   # (P,) tokens read by verifiers, prompt included
    text: list = None               # P answers, where there is one answer
    seconds: float = 0.0            # all problems together


@dataclass
class Search:
    """What a method is given beside problems, budgets and a seed."""
    env: object                     # task, encoding, sampling parameters
    policy: object
    score: Score = None
    verifier: object = None         # of Q^pi (or the ORM); None: the task's exact values
    mu_verifier: object = None      # of Q^mu; None: mu is best-of-K of pi
    K: int = 1
    alpha: float = 0.0
    C: int = 3                      # beam: next steps sampled for each prefix
    log: list = None                # beam: gets the candidates of every level
    # samples and their values, shared by searches of the same problems
    memo: dict = field(default_factory=dict)

    def remember(self, key, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

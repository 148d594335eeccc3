"""Which errors does A^mu mend? The beam by exact values with errors put in: such as relatives share, and such
as they do not."""
import copy
from functools import partial

import torch

from minipav.search.beam import search_width
from minipav.search.measure import Cell
from minipav.utils import derive_seed
from minipav.verifier import ExactValues

SIGMAS = (0.0, 1.5, 3.0)            # of errors in log-odds, inherited; half of them fresh
LAST = 3                            # inherited errors are drawn up to this step
SCORES = [("q_pi", 0.0, "none"), ("q_pi", 0.0, "parent"), ("q_pi", 0.0, "grandparent"),
          ("effective", 0.5, "none"), ("effective", 2.0, "none"), ("effective", 2.0, "parent"),
          ("log_odds", 1.0, "none"), ("log_odds", 5.0, "none"), ("log_odds", 1.0, "parent")]


class Noisy(ExactValues):
    """Exact values with errors in their log-odds: of each of the first LAST steps one that all descendants
    inherit, and of every step a fresh one; what is known, at a trace's end, is changed as little as its
    log-odds, clamped to 11.5, let it. Drawn for a batch at once: they depend on --max_tokens_in_flight."""

    def __init__(self, env, problems, device, inherited, fresh, seed):
        self.sigma, self.fresh, self.depth = inherited, fresh, 0
        self.generator = torch.Generator().manual_seed(derive_seed(seed, problems[0]))
        self.kept = torch.zeros(len(problems))
        super().__init__(env, problems, device)

    def _read(self):
        super()._read()
        error = self.kept + self.fresh * torch.randn(len(self.kept), generator=self.generator)
        self.q = (self.q.clamp(1e-5, 1 - 1e-5).logit() + error.to(self.device)).sigmoid()

    def children(self, parent, new, new_lengths):
        grown = copy.copy(self)
        grown.kept, grown.depth = self.kept[parent.cpu()], self.depth + 1
        if grown.depth <= LAST:
            grown.kept = grown.kept + self.sigma * torch.randn(len(parent), generator=self.generator)
        return ExactValues.children(grown, parent, new, new_lengths)

    def __getitem__(self, rows):
        some = super().__getitem__(rows)
        some.kept = self.kept[rows.cpu()]
        return some


def noise(bench, width, count):
    """Accuracy of each score on test problems, in rows (inherited, fresh, score, alpha, quota, right)."""
    problems, seed = bench.run.problems("test", count), bench.run.seed("noise")
    for inherited in SIGMAS:
        for fresh in (x / 2 for x in SIGMAS):
            for score, alpha, quota in SCORES:
                s = bench.search(Cell("beam", score, alpha=alpha, quota=quota))
                s.verifier, s.exact = None, partial(Noisy, inherited=inherited, fresh=fresh, seed=seed)
                right = search_width(s, problems, width, 0).right
                yield inherited, fresh, score, alpha, quota, "".join(str(int(x)) for x in right)

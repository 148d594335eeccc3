"""Greedy search with backtracking, as in HGS-PRM (arXiv 2310.10080): sample a step; take it if its score is
positive, else sample again; if C were sampled and none was, take the best neutral one; if there is none, go
back to the parent.

There a model says positive, neutral or negative. Ours, for any score: positive is a step that does not lose
(its score is not below that of a step that changes no value), neutral one that loses no more than half of it;
a last step is positive if it brings the trace to Q^pi = .9, and then the search ends.
"""
import torch

from minipav.search.tree import STOP, search_trees


def backtrack(s, problems, widths, seed):
    """-> a Result for each width: w * C * H steps sampled a problem at most."""
    return search_trees(s, problems, widths, seed, f"backtracking, {s.score.label}", walk, 1)


def walk(tree, budgets):
    P, N, C, device = len(tree.problems), len(tree.owner), tree.s.C, tree.device
    here, active = torch.arange(P, device=device), torch.ones(P, dtype=torch.bool, device=device)
    tries = torch.zeros(N, dtype=torch.long, device=device)     # steps behind a node that were not taken
    neutral, spent = torch.full((N,), -1, device=device), 0     # the best neutral child of a node
    for budget in budgets:
        while spent < budget and active.any():
            child = torch.full((P,), -1, device=device)
            new = tree.grow(here[active], 1)
            child[tree.owner[new]] = new
            here, active = move(tree, here, active, child, tries, neutral, C)
            spent += 1
        yield


def move(tree, here, active, child, tries, neutral, C):
    """Where each problem goes from the node `here` (P,) after the step `child` (P,), -1: none was sampled."""
    there = active & (child >= 0)
    score, still, ended = tree.score[child], tree.still[child], tree.ended[child]
    positive = there & torch.where(ended, tree.path[child, -1] >= STOP, score >= still)
    fair = there & ~positive & ~ended & (score >= still - still.abs() / 2)
    better = fair & ((neutral[here] < 0) | (score > tree.score[neutral[here]]))
    neutral[here[better]] = child[better]
    on, failed = positive & ~ended, active & ~positive
    tries[here[failed]] += 1
    stuck = failed & (tries[here] >= C)
    fallback = stuck & (neutral[here] >= 0)
    back = stuck & ~fallback
    to = here.clone()
    to[on], to[fallback] = child[on], neutral[here[fallback]]
    neutral[here[fallback]] = -1                        # when it comes back, this way is closed
    to[back] = tree.parent[here[back]]
    tries[here[back]] = 0
    tries[to[back & (to != here)]] += 1
    return to, active & ~(positive & ended)

"""Monte-Carlo tree search with a verifier's values, as in ReST-MCTS* (arXiv 2406.03816): select by UCT,
expand three steps, roll forward greedily from the best, back up.

    select     V + .7 sqrt(2 ln N_parent / N); PUCT (MCTS-DPO, arXiv 2405.00451): V + c p sqrt(N_parent) /
               (1 + N), log p the step's log-probability over its tokens to the power 1.25
    roll       three single steps behind the best new child; half of its value is the best value on the way
    back up    a node's value is the mean of its children's, weighted by visits
    stop       at a finished trace with a value of .9

Ours: values come from any score (there: a value network, trained for the quality value; `quality` builds that
value from the parent's and the step's Q^pi, with the steps that are left in the place of those to a right
answer); a new node counts as visited once; a finished trace is not selected; a node is expanded again when
fewer samples were taken behind it than the root of its visits (samples repeat themselves), and closed when
nothing goes on behind it; finished traces of a roll are answers too.
"""
from functools import partial

import torch

from minipav.search.score import places, top
from minipav.search.tree import STOP, search_trees

BRANCH, ROLL, MIX, C_UCT, C_PUCT, EXPONENT = 3, 3, 0.5, 0.7, 1.0, 1.25
WIDEST = 24                         # most children of a node before its last expansion
PATIENCE = 12                       # samples behind a node that leads nowhere


def mcts(s, problems, widths, seed, puct=False, quality=False):
    """-> a Result for each width: up to w * C * H + 5 steps a problem, fewer where rolls end early."""
    work = partial(iterate, puct=puct, quality=quality)
    return search_trees(s, problems, widths, seed, f"MCTS, {s.score.label}", work, BRANCH + ROLL)


def iterate(tree, budgets, puct, quality):
    N, device = len(tree.owner), tree.device
    if quality:
        tree.score.zero_()
    V, visits, samples = tree.score.clone(), torch.ones(N, device=device), torch.zeros(N, device=device)
    children, closed = torch.full((N, WIDEST + BRANCH), -1, device=device), tree.ended.clone()
    active, spent = torch.ones(len(tree.problems), dtype=torch.bool, device=device), 0
    for budget in budgets:
        while spent < budget and active.any():
            leaf = select(tree, active.nonzero()[:, 0], V, visits, children, samples, closed, puct)
            new = tree.grow(leaf, BRANCH)
            samples[leaf] += BRANCH
            V[new] = value(tree, new, quality)
            new = new[~known(tree, new, children)]
            column = (children[tree.parent[new]] >= 0).sum(1) + places(tree.owner[new])
            new, column = new[column < children.shape[1]], column[column < children.shape[1]]
            children[tree.parent[new], column] = new
            closed[new] = tree.ended[new]
            roll(tree, new, V, quality)
            back_up(tree, leaf, V, visits, children)
            done = tree.ended[:tree.size] & (tree.path[:tree.size, -1] >= STOP)
            active[tree.owner[:tree.size][done]] = False
            spent += BRANCH + ROLL
        yield V, visits, children


def value(tree, nodes, quality):
    """Of new nodes: their score, in the place of which comes, if asked, the quality value max(v + (1 - v) /
    (m + 1) (1 - 2 r), 0): v is the parent's, r = 1 - Q^pi, m steps are left."""
    if quality:
        v, left = tree.score[tree.parent[nodes]], tree.H - tree.depth[nodes]
        tree.score[nodes] = (v + (1 - v) / (left + 1) * (2 * tree.path[nodes, -1] - 1)).clamp(min=0)
    return tree.score[nodes]


def known(tree, new, children):
    """Which of these nodes a sibling is equal to."""
    kids = children[tree.parent[new]]
    return ((tree.tokens[kids] == tree.tokens[new][:, None]).all(-1) & (kids >= 0)).any(1)


def select(tree, roots, V, visits, children, samples, closed, puct):
    """From these roots down to nodes to expand: with fewer samples behind them than the root of their visits.
    A node that PATIENCE samples have left no child to go on with is closed, and the way begins anew."""
    node, P = roots.clone(), len(tree.problems)
    while True:
        kids = children[node]                                                   # -1: none
        live = (kids >= 0) & ~closed[kids]
        enough = torch.where(live.any(1), samples[node] ** 2 >= visits[node], samples[node] >= PATIENCE)
        lost = node[(node < P) & enough & ~live.any(1)]         # nothing goes on: be patient once more
        if len(lost):
            again = torch.isin(tree.owner, tree.owner[lost])
            closed[again], samples[again] = tree.ended[again], 0.0
        expand = ~enough & (kids[:, WIDEST] < 0) | (node < P) & ~live.any(1)
        if expand.all():
            return node
        n, parent = visits[kids], visits[node, None]
        if puct:
            tokens = (tree.lengths[kids] - tree.lengths[node, None]).clamp(min=1)
            p = (tree.logprob[kids] / tokens ** EXPONENT).exp()
            bonus = C_PUCT * p * parent.sqrt() / (1 + n)
        else:
            bonus = C_UCT * (2 * parent.log() / n).sqrt()
        best = (V[kids] + bonus).masked_fill(~live, -torch.inf).argmax(1)
        down = torch.where(live.any(1), kids.gather(1, best[:, None])[:, 0], roots)
        closed[node[~expand & ~live.any(1)]] = True
        node = torch.where(expand, node, down)


def roll(tree, new, V, quality):
    """Mix into the best new child of each problem what a greedy roll from it comes to."""
    best = new[top(V[new], tree.owner[new], 1)]
    highest, at = torch.zeros(len(tree.problems), device=tree.device), best
    highest[tree.owner[best]] = V[best]
    for _ in range(ROLL):
        at = at[~tree.ended[at]]
        if len(at) == 0:
            break
        at = tree.grow(at, 1)
        V[at] = value(tree, at, quality)
        highest[tree.owner[at]] = torch.maximum(highest[tree.owner[at]], V[at])
    best = best[~tree.ended[best]]
    V[best] = (1 - MIX) * V[best] + MIX * highest[tree.owner[best]]


def back_up(tree, leaf, V, visits, children):
    """From these nodes (one a problem) to their roots: visits, and means of the children's values."""
    while len(leaf):
        visits[leaf] += 1
        kids = children[leaf]
        n = torch.where(kids >= 0, visits[kids], 0.0)
        worst = V[:tree.size].min().clamp(max=0)                                # of a dead end
        V[leaf] = torch.where(n.any(1), (n * V[kids]).sum(1) / n.sum(1).clamp(min=1), worst)
        leaf = tree.parent[leaf[leaf != tree.parent[leaf]]]


puct, quality = partial(mcts, puct=True), partial(mcts, quality=True)

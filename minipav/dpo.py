"""Step-level preferences from a tree search, as in MCTS-DPO (arXiv 2405.00451): of each node's children the
one with the highest value and the one with the lowest are a pair for conservative DPO,

    -(1 - e) log sigma(beta h) - e log sigma(-beta h),    h = log pi/ref(best) - log pi/ref(worst),
    e = min(1 - conf, .5),  conf = 1 / (1 + N_worst / max(1, N_best)),  N visits after the expansion.

Among children of one parent the order by Q is that by A^mu under any best-of-K of pi. There a model judges
its own steps, here the verifier does; there the search is 64 iterations by PUCT, here that of selftrain.py.
"""
import torch
import torch.nn.functional as F

from minipav.precision import in_chunks, mixed
from minipav.selftrain import TreeLoop
from minipav.utils import apply_step, micro_batches

BETA = 0.1


@mixed
def step_logp(model, tokens, start, lengths):
    """(N,): log-probability of the tokens from `start` (N,) on of each row."""
    t = torch.arange(1, tokens.shape[1], device=tokens.device)
    row, col = at = ((t >= start[:, None]) & (t < lengths[:, None])).nonzero(as_tuple=True)

    def sums(hidden, token, row):
        chosen = model.head(hidden).float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        return [torch.zeros(len(tokens), device=tokens.device).index_add(0, row, chosen)]
    hidden = model.trunk(tokens[:, :-1], at=at)
    return in_chunks(sums, model.config.vocab_size, hidden, tokens[row, col + 1], row)[0]


def cdpo(h, n_best, n_worst):
    """The loss (M,) of pairs with log-ratio differences h (M,)."""
    confidence = 1 / (1 + n_worst / n_best.clamp(min=1))
    e = (1 - confidence).clamp(max=0.5)
    return -(1 - e) * F.logsigmoid(BETA * h) - e * F.logsigmoid(-BETA * h)


def pairs(V, children):
    """The best and the worst child (M,) of each node with children of different values."""
    kids = children[(children >= 0).sum(1) > 1]
    value, there = V[kids], kids >= 0
    best = kids.gather(1, value.masked_fill(~there, -torch.inf).argmax(1)[:, None])[:, 0]
    worst = kids.gather(1, value.masked_fill(~there, torch.inf).argmin(1)[:, None])[:, 0]
    different = V[best] > V[worst]
    return best[different], worst[different]


class Loop(TreeLoop):
    def iterate(self, i):
        tree, _, V, visits, children, facts = self.search(i, self.policy)
        best, worst = pairs(V, children)
        longer = torch.maximum(tree.lengths[best], tree.lengths[worst])
        for rows in micro_batches(longer, (self.micro_batch + 1) // 2):         # two rows a pair
            both = torch.cat([best[rows], worst[rows]])
            T = int(tree.lengths[both].max())
            args = tree.tokens[both, :T], tree.lengths[tree.parent[both]], tree.lengths[both]
            with torch.no_grad():
                ref = step_logp(self.ref, *args)
            ratio = step_logp(self.policy, *args) - ref
            h = ratio[:len(both) // 2] - ratio[len(both) // 2:]
            loss = cdpo(h, visits[best[rows]] - 1, visits[worst[rows]] - 1)
            (loss.sum() / len(best)).backward()
        if len(best):
            apply_step(self.policy, self.optimizers["policy"], self.rate(i))
        return facts

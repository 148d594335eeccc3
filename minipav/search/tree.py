"""Trees of steps, one a problem, that grow from any of their nodes: what backtrack.py and mcts.py search."""
import time

import torch

from minipav import parallel
from minipav.advantage import q_best_of_k
from minipav.sampler import prefill
from minipav.search.beam import distinct, expand
from minipav.search.score import Result, Step
from minipav.tokenizer import encode_rows, pad_token
from minipav.traces import responses
from minipav.utils import progress
from minipav.verifier import Values

STOP = 0.9                          # Q^pi of a finished trace at which a search ends


class Tree:
    """Nodes of P problems in one table; node i < P is the prompt of problem i. By node: parent, owner, depth,
    tokens (N, T), lengths, path (N, H + 1): Q^pi at the step ends up to it, the last one repeated, q_mu,
    logprob: of its step, score, still: the score of a step that changes no value, ended: by END."""

    def __init__(self, s, problems, room, seed, offset):
        """room: nodes a problem; offset: number of the first of these problems, for the randomness."""
        task, enc, P, N = s.env.task, s.env.enc, len(problems), len(problems) * (room + 1)
        self.s, self.problems, self.seed, self.offset, self.size = s, problems, seed, offset, P
        self.H, self.device = task.max_steps, s.policy.device
        prompts, lengths = (x.to(self.device) for x in encode_rows(enc, [task.prompt(p) for p in problems]))
        self.parent, self.owner, self.depth, self.lengths = torch.zeros(4, N, dtype=torch.long,
                                                                        device=self.device)
        self.ended = torch.zeros(N, dtype=torch.bool, device=self.device)
        self.q_mu, self.logprob, self.score, self.still = torch.zeros(4, N, device=self.device)
        self.path = torch.zeros(N, self.H + 1, device=self.device)
        self.tokens = torch.full((N, prompts.shape[1] + task.longest), pad_token(enc), device=self.device)
        root = torch.arange(P, device=self.device)
        self.owner[:P], self.parent[:P], self.lengths[:P], self.prompt_lengths = root, root, lengths, lengths
        self.tokens[:P, :prompts.shape[1]] = prompts
        self.drawn, self.spent = torch.zeros(2, P, dtype=torch.long, device=self.device)
        self.read = s.readers * lengths     # as if a cache were kept
        self.exact = task.exact_values(problems) if s.verifier is None else None
        self.evaluate(root)

    def evaluate(self, nodes):
        s, p, rows = self.s, self.parent[nodes], (self.tokens[nodes], self.lengths[nodes])
        if self.exact:
            texts = responses(s.env.enc, *rows, self.prompt_lengths[self.owner[nodes]])
            q = [self.exact(i, text) for i, text in zip(self.owner[nodes].tolist(), texts)]
            q = torch.tensor(q, device=self.device).float()
        else:
            q = Values(s.verifier, *rows).q
        self.q_mu[nodes] = Values(s.mu_verifier, *rows).q if s.mu_verifier else q_best_of_k(q, s.K)
        after = torch.arange(self.H + 1, device=self.device) >= self.depth[nodes, None]
        self.path[nodes] = torch.where(after, q[:, None], self.path[p])
        before = self.path[p, -1], self.q_mu[p]
        rest = self.path[p], self.depth[nodes], self.logprob[nodes], s.alpha
        self.score[nodes] = s.score.of(Step(self.path[nodes, -1], self.q_mu[nodes], *before, *rest))
        self.still[nodes] = s.score.of(Step(*before, *before, *rest))

    def grow(self, nodes, n):
        """Sample n next steps behind each of these nodes (owners ascending). -> the new nodes; duplicates and
        steps that never ended are none, nor is a last step without END, nor what gets too long."""
        s, owner, enc = self.s, self.owner[nodes], self.s.env.enc
        rows = self.tokens[nodes], torch.arange(len(nodes)), self.lengths[nodes]
        cache, hidden = prefill(s.policy, *rows)
        first = (owner + self.offset << 24) + self.drawn[owner]
        steps, _ = expand(s, owner, cache, hidden, first, n, self.seed, whole=False)
        row, new, count, stop, logprob = steps
        self.drawn.index_add_(0, owner, torch.full_like(owner, n))
        self.spent.index_add_(0, owner[row], count)
        kept = distinct(row, new, stop)
        kept = kept[(stop[kept] == enc.eot_token) | (self.depth[nodes[row[kept]]] + 1 < self.H)]
        long = self.lengths[nodes[row]] + count > (self.prompt_lengths + s.env.task.longest)[owner[row]]
        kept = kept[~long[kept]]
        p, count, at = nodes[row[kept]], count[kept], self.size + torch.arange(len(kept), device=self.device)
        self.size += len(kept)
        self.parent[at], self.owner[at], self.depth[at] = p, self.owner[p], self.depth[p] + 1
        self.lengths[at], self.ended[at] = self.lengths[p] + count, stop[kept] == enc.eot_token
        self.tokens[at], self.logprob[at] = self.tokens[p], logprob[kept].sum(1)
        r, t = (torch.arange(new.shape[1], device=self.device) < count[:, None]).nonzero(as_tuple=True)
        self.tokens[at[r], self.lengths[p][r] + t] = new[kept][r, t]
        self.read.index_add_(0, self.owner[p], s.readers * count)
        if len(at):
            self.evaluate(at)
        return at

    def finished(self):
        """The finished nodes (K,) and their responses."""
        done = self.ended[:self.size].nonzero()[:, 0]
        prompts = self.prompt_lengths[self.owner[done]]
        return done, responses(self.s.env.enc, self.tokens[done], self.lengths[done], prompts)


def search_trees(s, problems, widths, seed, name, work, steps):
    """A Result for each width (ascending), w * C * H steps a problem, about what a beam of it samples:
    work(tree, budgets) yields when each of the budgets is spent, of which it takes `steps` at once."""
    P, H, mine = len(problems), s.env.task.max_steps, parallel.share(len(problems))
    budgets = [w * s.C * H for w in widths]
    out = [Result.empty(P) for _ in widths]
    slots = 3 * H + max(len(s.env.task.prompt(p)) for p in problems) + s.env.task.longest
    in_flight = s.env.sampling.get("max_tokens_in_flight", 1 << 18)
    batch = max(1, min((1 << 27) // ((max(budgets) + steps) * slots), in_flight // (s.C * slots)))
    with progress(name, (mine.stop - mine.start) * len(widths)) as bar, torch.no_grad():
        for i in range(mine.start, mine.stop, batch):
            here = slice(i, min(i + batch, mine.stop))
            start = time.time()
            tree = Tree(s, problems[here], max(budgets) + steps, seed, i)
            for r, _ in zip(out, work(tree, budgets)):
                done, texts = tree.finished()
                r.enter(s.env.task, problems, tree.owner[done] + i, tree.path[done, -1], texts)
                r.tokens[here], r.verifier_tokens[here] = tree.spent.float().cpu(), tree.read.float().cpu()
                r.seconds += time.time() - start
                bar.update(here.stop - i)
    for r in out:
        r.exchange(mine)
    return out

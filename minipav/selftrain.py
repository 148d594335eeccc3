"""Self-training from a tree search, as in ReST-MCTS* (arXiv 2406.03816): search -> fine-tune the policy on
the right traces, fit the value model to the values of all nodes; twice.

There each round gathers a large set and trains anew; here an iteration searches a batch of problems with the
policy of the round's start and makes one step of both models on what it found, in two rounds.
"""
import copy

import torch

from minipav.advantage import seed_rollouts
from minipav.reinforce import Reinforce, policy_loss
from minipav.rewards import close, step_of_token
from minipav.sampler import WHOLE
from minipav.search.mcts import BRANCH, ROLL, iterate
from minipav.search.score import SCORES, Search
from minipav.search.tree import Tree
from minipav.sft import sft_loss
from minipav.utils import apply_step, backward, make_optimizers
from minipav.verifier import verifier_loss

ROUNDS = 2


class TreeLoop(Reinforce):
    """A training whose iterations begin with a tree search (mcts.py, by Q^pi) in the place of samples: of
    batch / group problems, as many steps of each as a beam of width `group` samples. There is no value
    network."""

    @torch.no_grad()
    def search(self, i, policy):
        """-> the tree, Rex of its finished nodes (N,), all nodes' values and visits (N,) and children (N, K;
        -1: none), facts for the log"""
        a, run = self.a, self.run
        problems = run.task.problems("train", a.batch // a.group, run.seed("rl problems", a.seed, i))
        s = Search(run, policy, SCORES["q_pi"], verifier=self.verifier)
        budget = a.group * s.C * run.task.max_steps
        tree = Tree(s, problems, budget + BRANCH + ROLL, run.seed("rl traces", a.seed, i), 0)
        found = next(iterate(tree, [budget], puct=False, quality=False))
        self.state["tokens"] += int(tree.spent.sum())
        (done, texts), outcome = tree.finished(), torch.zeros(len(tree.owner), device=tree.device)
        rex = [run.task.outcome(problems[i], x) for i, x in zip(tree.owner[done].tolist(), texts)]
        outcome[done] = torch.tensor(rex, device=tree.device).float()
        solved = len(tree.owner[outcome > 0].unique()) / len(problems)
        return tree, outcome, *found, {"train_reward": solved}

    def log(self, problems):
        """As in REINFORCE; the KL, which no loss has computed, from one trace of each problem."""
        traces = close(seed_rollouts(self.policy, self.run, problems, 1, self.run.seed("rl kl"), **WHOLE))
        step = step_of_token(traces.tokens, traces.ends)
        with torch.no_grad():
            batch = (x.to(self.policy.device) for x in (traces.tokens, step, torch.zeros(step.shape)))
            kl = float(policy_loss(self.policy, self.ref, *batch, 0.0)[1]) / len(traces)
        self.facts = [f | {"kl": kl} for f in self.facts]
        return super().log(problems)


class Loop(TreeLoop):
    def __init__(self, run, init, *args):
        super().__init__(run, init, *args)
        c, self.actor = run.config, copy.deepcopy(init)
        lrs = c["lr_muon_verifier"] / 4, c["lr_adamw_verifier"] / 4
        self.optimizers |= {"verifier": make_optimizers(self.verifier, *lrs), "actor": []}

    def iterate(self, i):
        if i % max(1, -(-self.a.iterations // ROUNDS)) == 0:
            self.actor.load_state_dict(self.policy.state_dict())
        tree, outcome, V, _, children, facts = self.search(i, self.actor)
        right = outcome.nonzero()[:, 0]
        if len(right):
            lengths, prompts = tree.lengths[right].cpu(), tree.prompt_lengths[tree.owner[right]].cpu()
            batch = tree.tokens[right].cpu(), lengths, prompts
            backward(sft_loss, self.policy, batch, lengths, (lengths - prompts).sum(), self.micro_batch)
            apply_step(self.policy, self.optimizers["policy"], self.rate(i))
        known = (tree.ended | (children >= 0).any(1)).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(self.run.seed("rl nodes", self.a.seed, i))
        known = known[torch.randperm(len(known), generator=generator)[:self.a.batch]]
        q = torch.where(tree.ended[known], outcome[known], V[known]).cpu()[:, None]
        lengths, ones = tree.lengths[known].cpu(), torch.ones(q.shape)
        batch = tree.tokens[known].cpu(), lengths[:, None] - 1, q, ones.long(), ones
        if len(known):
            backward(verifier_loss, self.verifier, batch, lengths, len(known), self.micro_batch)
            apply_step(self.verifier, self.optimizers["verifier"], 1.0)
        return facts

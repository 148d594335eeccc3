"""Is it the verifier? A beam whose values of unfinished prefixes are means of fresh rollouts of pi, judged by
the problem's answer, not a verifier's: an oracle, no method. Finished traces keep the verifier's value, and
unfinished ones of all other levels where it is an oracle of the first three, or of the later ones, alone.
Beside it the beam by the verifier, on the same problems, the first of search.py's.

    python -m results.search_expert.rollouts runs/expert-seed?         # -> rollouts.csv.gz in search_expert/
"""
import copy
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from minipav.advantage import rollout_from
from minipav.paper.report import keep
from minipav.run import Run
from minipav.search.beam import beam
from minipav.search.measure import Bench, Cell
from minipav.tokenizer import encode_rows, join, pad_token
from minipav.traces import label_with_outcome
from minipav.utils import tune_process
from minipav.verifier import Values

N_MC, PROBLEMS, WIDTHS = 64, 100, (1, 2, 4)
LEVELS = {"verifier": (), "rollouts": range(99), "rollouts to 3": range(4), "rollouts from 4": range(4, 99)}


class Rollouts:
    """Behind the interface of Values."""

    def __init__(self, levels, policy, verifier, env, problems, device):
        self.levels, self.policy, self.env, self.problems, self.level = levels, policy, env, problems, 0
        self.owner = torch.arange(len(problems))
        self.tokens, self.lengths = encode_rows(env.enc, [env.task.prompt(p) for p in problems])
        self.prompt_lengths, self.values = self.lengths, Values(verifier, self.tokens, self.lengths)
        self.q = self.values.q

    def children(self, parent, new, new_lengths):
        c, env = copy.copy(self), self.env
        c.values, c.level = self.values.children(parent, new, new_lengths), self.level + 1
        c.owner, c.q = self.owner[parent], c.values.q.clone()
        c.tokens, c.lengths = join(self.tokens[parent], self.lengths[parent], new, new_lengths,
                                   pad_token(env.enc))
        if c.level not in self.levels:
            return c
        t = label_with_outcome(env, self.problems, c.owner, c.tokens, c.lengths,
                               self.prompt_lengths[c.owner])
        on = (c.tokens[torch.arange(len(t)), t.lengths - 1] != env.enc.eot_token).nonzero()[:, 0]
        done = rollout_from(self.policy, env, self.problems, t, on, t.last[on], N_MC, c.level)
        c.q[on] = done.reward.view(-1, N_MC).mean(1)
        return c

    def __getitem__(self, rows):
        c = copy.copy(self)
        c.values, c.q = self.values[rows], self.q[rows]
        c.owner, c.tokens, c.lengths = self.owner[rows], self.tokens[rows], self.lengths[rows]
        return c


def main():
    tune_process()
    out = []
    for folder in sys.argv[1:]:
        run = Run.open(folder, "cpu")
        problems, bench = run.problems("test", 500)[:PROBLEMS], Bench(run)
        for values, levels in LEVELS.items():
            s = bench.search(Cell("beam", "q_pi", problems=PROBLEMS))
            if levels:
                s.exact, s.verifier = partial(Rollouts, levels, s.policy, s.verifier), None
            for width, r in zip(WIDTHS, beam(s, problems, WIDTHS, 0)):
                print(f"{folder}, {values}, width {width}: {r.right.mean():.3f} at {r.tokens.mean():.0f}")
                out += [(run.config["seed"], values, width, i, int(a), int(b), int(t))
                        for i, (a, b, t) in enumerate(zip(r.right, r.solved, r.tokens))]
    columns = ["run", "values", "width", "problem", "right", "solved", "tokens"]
    path = Path(__file__).parents[1] / f"search_{Path(folder).name.partition('-')[0]}" / "rollouts.csv.gz"
    keep(path, [pd.DataFrame(out, columns=columns)])
    print(f"rows in {path}")


if __name__ == "__main__":
    main()

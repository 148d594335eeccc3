"""Tasks: where problems come from and what counts as right. A new task is one file with one class, named in get_task
(and for a dial of its own a flag in train.py and a name in Run).

A problem is a small tuple. A response is text: steps separated by newlines (one step a line), ended by END. The trainer
and the search know a task only through the methods below.
"""
import inspect
import zlib

import numpy as np

from minipav.tokenizer import END
from minipav.utils import Fail


class Task:
    """The interface. `phrases` are the multi-character pieces of its texts that deserve a token of their own."""

    name: str
    phrases: list
    max_steps: int                 # H: a response with more lines is wrong
    max_step_tokens: int           # room for the longest step, newline included
    max_new_tokens: int            # room for the longest response, END included

    def draw(self, n, rng):
        """About n random solvable problems, of any split."""
        raise NotImplementedError

    def prompt(self, problem):
        """The question as text, ended by a newline."""
        raise NotImplementedError

    def demos(self, problems, directed, rng):
        """One demonstration (text with END) a problem: with probability `directed` a successful one, else legal steps
        in no particular direction, so that a policy trained on them computes faithfully and fails at *planning*."""
        raise NotImplementedError

    def judge(self, problem, response):
        """'right', 'planning' (every step legal and computed right, the target missed) or 'illegal' (all else)."""
        raise NotImplementedError

    def corrupt(self, problems, responses, rng):
        """(texts, first_wrong): each response with a wrong step put in (wrong arithmetic, often landing on the target,
        or an operation that is not offered) and the index of that step, from which on the value is 0."""
        raise NotImplementedError

    def outcome(self, problem, response):
        """Rex(problem, response) in {0, 1}. No eval: each line must match the grammar, or the answer is wrong."""
        return int(self.judge(problem, response) == "right")

    def answer(self, response):
        """What majority vote counts: what the last step ends on; None for an unfinished response."""
        return self.steps(response)[-1].rpartition(" = ")[2] if response.endswith(END) else None

    @staticmethod
    def steps(response):
        """The lines of a response, END stripped."""
        return response.removesuffix(END).split("\n")

    def split_of(self, problem):
        """Every problem belongs to one split for ever, by a hash of its prompt: 5% test, 5% validation, 90% train."""
        h = zlib.crc32(self.prompt(problem).encode()) % 20
        return ("test", "validation")[h] if h < 2 else "train"

    def problems(self, split, n, seed):
        """n distinct problems of a split ('train', 'validation', 'test'), the same ones for the same seed."""
        rng = np.random.default_rng([("train", "validation", "test").index(split), seed])
        found, share = {}, 0.9 if split == "train" else 0.05
        for _ in range(100):
            for p in self.draw(int(1.1 * n / share) + 20, rng):
                if self.split_of(p) == split:
                    found.setdefault(self.prompt(p), p)
            if len(found) >= n:
                return list(found.values())[:n]
        raise Fail(f"task {self.name} has fewer than {n} distinct {split} problems at this difficulty")


def get_task(name, **dials):
    """The task called `name`, with its difficulty dials (H, min_steps, ...) set where they are not None."""
    from minipav.tasks.calculator import Calculator
    from minipav.tasks.countdown import Countdown
    tasks = {t.name: t for t in (Calculator, Countdown)}
    if name not in tasks:
        raise Fail(f"--task {name}: unknown; choose one of {', '.join(tasks)}")
    dials = {k: v for k, v in dials.items() if v is not None}
    for dial in dials:
        if dial not in inspect.signature(tasks[name]).parameters:
            raise Fail(f"--{dial} is no dial of task {name}: leave it out")
    return tasks[name](**dials)

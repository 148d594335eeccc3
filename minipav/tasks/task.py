"""What a task is: where problems come from, and what counts as right.

A problem is a small tuple. A response is text: steps that end with the delimiter, the last one with END. A
task is a dataclass whose fields are its dials (`H: int = flag(8, "most steps")`), which become flags of
train.py by themselves (each with a name that is none of those). The trainer and the search know a task only
through what stands here.
"""
import zlib

import numpy as np

from minipav.tokenizer import END, encode_rows
from minipav.utils import Fail, derive_seed

# where a split has too few problems
LOWER = {"train": "--problems or --batch_size", "test": "--test_problems (search.py, rl.py: --problems)",
         "validation": "--problems (search.py: --validation; 20 at least, a tenth of a text's train.jsonl)"}


class Task:
    name: str
    # the pieces of its texts that deserve a token of their own; 10 to 99 and *2 have one, other text is bytes
    phrases: list
    delimiter = "\n"               # what a step ends with: one character
    max_steps: int                 # a response with more steps is wrong
    max_step_tokens: int           # room for the longest step, delimiter included
    max_new_tokens: int            # room for the longest response, END included, of a sample or of a search

    # draw(n, rng) -> about n random solvable problems, of any split
    # prompt(problem) -> the question as text, ended by the delimiter
    # judge(problem, response) -> 'right', 'planning' (each step legal, the target missed) or 'illegal'

    defaults = {}                  # of flags of train.py
    search_defaults = {}           # of search.py
    rl_defaults = {}               # of rl.py
    data_crc = 0                   # of the files that the problems are from

    # Optional; where they are None, what needs them is left out.
    # (problems, expert_fraction, rng) -> a text with END each: with that chance a right one, else legal steps
    demonstrations = None
    # (problems, responses, rng) -> texts, each with an illegal step put in, and the index of that step
    corrupt = None
    # (step) -> the state that it reaches, as a text: with the number of steps so far all that later steps
    # depend on, if none was illegal
    state = None
    # (problems) -> f(i, prefix of a response): exact Q of a tabular reference policy
    exact = None

    def fits(self, enc):
        """Raises Fail if its prompts do not fit this encoding."""

    @property
    def longest(self):
        """Tokens of the longest response that a step-level search may write."""
        return min(self.max_new_tokens, self.max_steps * self.max_step_tokens)

    def room(self, enc):
        """Tokens of the longest row: a prompt (twice the longest of some), a response, and a whole completion
        behind a part of it."""
        if self.demonstrations:
            self.try_out(enc)
        prompts = [self.prompt(p) for p in self.problems("train", 20, 0)]
        return max(128, 2 * int(encode_rows(enc, prompts)[1].max()) + 2 * self.max_new_tokens)

    def try_out(self, enc):
        """Raises Fail if a right demonstration is none, or longer than what a search may write (a text's may
        be)."""
        problems = self.problems("train", 20, 0)
        texts = self.demonstrations(problems, 1.0, np.random.default_rng(0))
        for p, text in zip(problems, texts):
            verdict, steps = self.judge(p, text), [x + self.delimiter for x in self.steps(text)]
            for wrong, why in (
                    (not self.prompt(p).endswith(self.delimiter), "is behind a prompt without the delimiter"),
                    (not text.endswith(END), "does not end with END"),
                    (verdict != "right", f"is judged {verdict!r}, not 'right'"),
                    (len(steps) > self.max_steps, f"has more than max_steps {self.max_steps} steps"),
                    (int(encode_rows(enc, steps)[1].max()) > self.max_step_tokens,
                     f"has a step of more than max_step_tokens {self.max_step_tokens} tokens"),
                    (int(encode_rows(enc, [text])[1]) > self.max_new_tokens,
                     f"has more than max_new_tokens {self.max_new_tokens} tokens")):
                if wrong:
                    raise Fail(f"task {self.name}: its right demonstration {text!r} {why}")

    def exact_values(self, problems):
        """`exact`; raises Fail if the task has none."""
        if self.exact is None:
            raise Fail(f"task {self.name} has no exact values")
        return self.exact(problems)

    def check(self, problems, test_problems, seed):
        """Raises Fail if there are fewer problems than train.py is asked for."""
        for split, n in dict(train=problems, validation=max(20, problems // 20), test=test_problems).items():
            self.problems(split, n, seed)

    def batches(self, size, n, seed, step):
        """The problems of SFT's n batches from optimizer step `step` on, all together."""
        return self.problems("train", size * n, derive_seed(seed, "sft problems", step))

    def outcome(self, problem, response):
        """Rex(problem, response) in {0, 1}. No eval: a line off the grammar is wrong."""
        return int(self.judge(problem, response) == "right")

    def answer(self, response):
        """What majority vote counts: what the last step ends on; None for an unfinished response."""
        return self.steps(response)[-1].rpartition(" = ")[2] if response.endswith(END) else None

    def steps(self, response):
        """The steps of a response, END stripped."""
        return response.removesuffix(END).split(self.delimiter)

    def split_of(self, problem):
        """Every problem belongs to one split for ever, by a hash of its prompt: 5% test, 5% validation."""
        h = zlib.crc32(self.prompt(problem).encode()) % 20
        return ("test", "validation")[h] if h < 2 else "train"

    def problems(self, split, n, seed):
        """n distinct problems of a split ('train', 'validation', 'test'), the same ones for the same seed."""
        rng = np.random.default_rng([("train", "validation", "test").index(split), seed])
        found, share = {}, 0.9 if split == "train" else 0.05
        idle = 0                                                # rounds in a row without a new one
        while idle < 20:
            before = len(found)
            for p in self.draw(int(1.1 * n / share) + 20, rng):
                if self.split_of(p) == split:
                    found.setdefault(self.prompt(p), p)
            if len(found) >= n:
                return list(found.values())[:n]
            idle = 0 if len(found) > before else idle + 1
        raise Fail(f"task {self.name} has fewer than {n} {split} problems at this difficulty: lower "
                   f"{LOWER[split]}")

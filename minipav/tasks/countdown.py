r"""Countdown: combine all of 3-6 numbers into a target, one operation a line, with the numbers that are left.

    using 3 5 12 19 make 24                                     <- prompt
    19 - 12 = 7 (left: 3 5 7)                                   <- a step
    7 * 3 = 21 (left: 5 21)
    21 + 5 = 26 (left: 26)<|endoftext|>                         <- legal and computed right, but not 24

Every result is an integer 1..99 and division is exact. All numbers are used: n - 1 steps.
"""
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from minipav.flags import flag
from minipav.tasks.task import Task
from minipav.tokenizer import END

TOP = 100


class Problem(NamedTuple):
    numbers: tuple                  # ascending
    target: int
    hint: tuple                     # the steps (a, sign, b) of one solution, for the demonstrations


@lru_cache(1 << 16)
def parse(line):
    """(a, sign, b, result, left) of '19 - 12 = 7 (left: 3 5 7)', or None if it is malformed."""
    n = "[1-9][0-9]?"
    m = re.fullmatch(rf"({n}) ([+\-*/]) ({n}) = ({n}) \(left: ({n}(?: {n}){{0,5}})\)", line, re.ASCII)
    return m and (int(m[1]), m[2], int(m[3]), int(m[4]), tuple(map(int, m[5].split(" "))))


def apply(a, sign, b):
    """The result of a step, or 0 where it is illegal."""
    r = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else 0 if a % b else a // b
    return r if 1 <= r < TOP else 0


def moves(numbers):
    """Every distinct legal step (a, sign, b) with a >= b from the ascending tuple `numbers`."""
    pairs = {(numbers[j], numbers[i]) for j in range(len(numbers)) for i in range(j)}
    return [(a, s, b) for a, b in sorted(pairs) for s in "+-*/" if apply(a, s, b)]


def after(numbers, step):
    """The numbers left after a step, ascending."""
    left = list(numbers)
    left.remove(step[0])
    left.remove(step[2])
    return tuple(sorted([*left, apply(*step)]))


@lru_cache(1 << 20)
def value(numbers, target):
    """Exact chance that uniformly random legal steps from the ascending `numbers` end on the target: the
    brute-force oracle."""
    if len(numbers) == 1:
        return float(numbers[0] == target)
    ways = moves(numbers)
    return sum(value(after(numbers, m), target) for m in ways) / len(ways) if ways else 0.0


def play(numbers, rng):
    """Uniformly random legal steps until one number, or no step, is left. -> (steps, numbers left)"""
    steps = []
    while len(numbers) > 1 and (ways := moves(numbers)):
        steps.append(ways[rng.integers(len(ways))])
        numbers = after(numbers, steps[-1])
    return steps, numbers


def as_lines(numbers, steps):
    for a, s, b in steps:
        numbers = after(numbers, (a, s, b))
        yield f"{a} {s} {b} = {apply(a, s, b)} (left: {' '.join(map(str, numbers))})"


@dataclass
class Countdown(Task):
    numbers: int = flag(4, "how many numbers", low=3, high=6)

    name = "countdown"
    defaults = {"lr_muon_verifier": 0.005}                      # at .01 Q^pi comes out poorly on some seeds
    phrases = ["using ", " make ", " = ", " (left: ", " + ", " - ", " * ", " / "]

    def __post_init__(self):
        self.max_steps = self.numbers - 1
        self.max_step_tokens = 2 * self.numbers + 8             # a + b = c (left: x y z) and the newline
        self.max_new_tokens = self.max_steps * self.max_step_tokens

    def draw(self, n, rng):
        problems = []
        while len(problems) < n:
            numbers = tuple(sorted(map(int, rng.integers(1, 26, self.numbers))))
            steps, left = play(numbers, rng)
            if len(left) == 1 and left[0] >= 10:
                problems.append(Problem(numbers, left[0], tuple(steps)))
        return problems

    def prompt(self, problem):
        return f"using {' '.join(map(str, problem.numbers))} make {problem.target}\n"

    def demonstrations(self, problems, expert_fraction, rng):
        steps = [p.hint if rng.random() < expert_fraction else play(p.numbers, rng)[0] for p in problems]
        return ["\n".join(as_lines(p.numbers, x)) + END for p, x in zip(problems, steps)]

    def left(self, problem, lines):
        """The numbers that are left from the start on, up to the first line that is malformed or wrong."""
        out = [problem.numbers]
        for line in lines:
            a, sign, b, result, left = parse(line) or (0, "+", 0, 0, ())
            enough = a in out[-1] and b in out[-1] and (a != b or out[-1].count(a) > 1)
            now = after(out[-1], (a, sign, b)) if enough else None
            if apply(a, sign, b) != result or tuple(sorted(left)) != now:
                break
            out.append(now)
        return out

    def state(self, step):
        return " ".join(sorted(step.rpartition("(left: ")[2].replace(")", " )").split()))

    def judge(self, problem, response):
        lines = self.steps(response)
        left = self.left(problem, lines[:self.max_steps])
        if not response.endswith(END) or len(left) <= len(lines):
            return "illegal"
        return "right" if left[-1] == (problem.target,) else "planning"

    def exact(self, problems):
        """Exact Q of uniformly random legal steps: -> f(i, prefix), the chance of a right answer of
        problems[i] behind the finished lines of `prefix`; at an end the outcome."""
        def q(i, prefix):
            p, lines = problems[i], self.steps(prefix)[:-1]
            if prefix.endswith(END):
                return float(self.outcome(p, prefix))
            left = self.left(p, lines)
            return value(left[-1], p.target) if len(left) > len(lines) and len(left[-1]) > 1 else 0.0
        return q

    def corrupt(self, problems, responses, rng):
        """Wrong arithmetic, on the last step often the target, or a number that is not there; then on at
        random. What comes before the corrupted step is legal."""
        texts, where = [], []
        for p, response in zip(problems, responses):
            lines = self.steps(response)[:self.max_steps]
            kept = self.left(p, lines)
            where.append(int(rng.integers(max(1, len(kept) - 1))))
            numbers = kept[where[-1]]
            a, sign, b = parse(lines[where[-1]])[:3] if len(kept) > 1 else (numbers[-1], "+", numbers[0])
            truth, left = apply(a, sign, b), list(numbers)
            left.remove(a)
            left.remove(b)
            absent = [k for k in range(1, TOP) if k not in numbers and apply(k, sign, b)]
            if absent and rng.random() < 0.5:
                a = int(rng.choice(absent))
                result = apply(a, sign, b)
            else:
                result = p.target if not left and truth != p.target else truth - 1 if truth > 1 else 2
            left = tuple(sorted([*left, result]))
            line = f"{a} {sign} {b} = {result} (left: {' '.join(map(str, left))})"
            texts.append("\n".join([*lines[:where[-1]], line, *as_lines(left, play(left, rng)[0])]) + END)
        return texts, where

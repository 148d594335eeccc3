r"""Countdown: combine all of 3-6 numbers into a target, one operation a line, with the numbers that are left.

    using 3 5 12 19 make 24                                     <- prompt
    19 - 12 = 7 (left: 3 5 7)                                   <- a step
    7 * 3 = 21 (left: 5 21)
    21 + 5 = 26 (left: 26)<|endoftext|>                         <- legal and computed right, but not 24

Every result is an integer 1..99 and division is exact. All numbers are used once, so n numbers take n - 1 steps.
"""
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

from minipav.flags import flag
from minipav.tasks.task import Task
from minipav.tokenizer import END

TOP = 100


class Problem(NamedTuple):
    numbers: tuple                                              # ascending
    target: int
    hint: tuple                                                 # the steps (a, sign, b) of one solution, for the demos


@lru_cache(1 << 16)
def parse(line):
    """(a, sign, b, result, left) of '19 - 12 = 7 (left: 3 5 7)', or None if it is malformed."""
    number = "[1-9][0-9]?"
    m = re.fullmatch(rf"({number}) ([+\-*/]) ({number}) = ({number}) \(left: ({number}(?: {number})*)\)", line, re.ASCII)
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


def value(numbers, target):
    """Exact chance that uniformly random legal steps end on the target: the brute-force oracle."""
    @cache
    def v(ns):
        if len(ns) == 1:
            return float(ns[0] == target)
        ways = moves(ns)
        return sum(v(after(ns, m)) for m in ways) / len(ways) if ways else 0.0
    return v(tuple(sorted(numbers)))


@dataclass
class Countdown(Task):
    numbers: int = flag(4, "how many numbers", low=3, high=6)

    name = "countdown"
    phrases = ["using ", " make ", " = ", " (left: ", " + ", " - ", " * ", " / "]

    def __post_init__(self):
        self.max_steps = self.numbers - 1
        self.max_step_tokens = 2 * self.numbers + 8             # a + b = c (left: x y z) and the newline
        self.max_new_tokens = self.max_steps * self.max_step_tokens

    @staticmethod
    def _play(numbers, rng):
        """Uniformly random legal steps until one number, or no step, is left."""
        steps = []
        while len(numbers) > 1 and (ways := moves(numbers)):
            steps.append(ways[rng.integers(len(ways))])
            numbers = after(numbers, steps[-1])
        return steps, numbers

    def draw(self, n, rng):
        problems = []
        while len(problems) < n:
            numbers = tuple(sorted(map(int, rng.integers(1, 26, self.numbers))))
            steps, left = self._play(numbers, rng)
            if len(left) == 1 and left[0] >= 10:
                problems.append(Problem(numbers, left[0], tuple(steps)))
        return problems

    def prompt(self, problem):
        return f"using {' '.join(map(str, problem.numbers))} make {problem.target}\n"

    @staticmethod
    def _text(numbers, steps):
        lines = []
        for a, s, b in steps:
            numbers = after(numbers, (a, s, b))
            lines.append(f"{a} {s} {b} = {apply(a, s, b)} (left: {' '.join(map(str, numbers))})")
        return "\n".join(lines) + END

    def demonstrations(self, problems, expert_fraction, rng):
        return [self._text(p.numbers, p.hint if rng.random() < expert_fraction else self._play(p.numbers, rng)[0])
                for p in problems]

    def judge(self, problem, response):
        numbers, lines = problem.numbers, self.steps(response)
        if not response.endswith(END) or len(lines) > self.max_steps:
            return "illegal"
        for line in lines:
            step = parse(line)
            if step is None:
                return "illegal"
            a, sign, b, result, left = step
            enough = numbers.count(a) and numbers.count(b) and (a != b or numbers.count(a) > 1)
            if not enough or apply(a, sign, b) != result or tuple(sorted(left)) != after(numbers, step[:3]):
                return "illegal"
            numbers = after(numbers, step[:3])
        return "right" if numbers == (problem.target,) else "planning"

    def corrupt(self, problems, responses, rng):
        texts, wrong = [], []
        for p, r in zip(problems, responses):
            lines = [ln for ln in self.steps(r) if parse(ln)][:self.max_steps] or ["1 + 1 = 1 (left: 1)"]
            w = int(rng.integers(len(lines)))
            numbers = parse(lines[w - 1])[4] if w else p.numbers
            a, sign, b, result, left = parse(lines[w])
            if rng.random() < 0.5:                              # wrong arithmetic; on the last step it hits the target
                new = p.target if len(left) == 1 and result != p.target else result - 1 if result > 1 else 2
            else:                                               # a number that is not there, used all the same
                a = next((k for k in range(a + 1, TOP) if k not in numbers and apply(k, sign, b)), a)
                new = apply(a, sign, b)
                new = new if new and a not in numbers else result % 98 + 1
            left = list(left)
            if result in left:
                left.remove(result)
            left = tuple(sorted([*left, new]))
            head = [*lines[:w], f"{a} {sign} {b} = {new} (left: {' '.join(map(str, left))})"]
            rest = self._text(left, self._play(left, rng)[0])
            texts.append("\n".join(head) + ("\n" + rest if rest != END else END))
            wrong.append(w)
        return texts, wrong

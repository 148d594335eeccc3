r"""Calculator: reach a target from a start in at most H steps with the four operations that the prompt offers.

    from 23 reach 8 in at most 8 steps with +7 -4 *2 /3         <- prompt
    *2 = 46                                                     <- a step: one operation and its result
    -4 = 42
    /3 = 14
    *2 = 28
    -4 = 24
    /3 = 8<|endoftext|>                                         <- right: the last result is the target

Values are integers 1..63, division must be exact. A problem has 63 values and 4 actions, so V and Q of a tabular policy
are exact by dynamic programming: `dp` is the oracle of the tests.
"""
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from minipav.flags import flag
from minipav.tasks.task import Task
from minipav.tokenizer import END
from minipav.utils import Fail

TOP = 64                                                        # values are 1..TOP-1; row 0 of a table means "illegal"


class Problem(NamedTuple):
    start: int
    target: int
    ops: tuple                                                  # operands (a, b, c, d) of +a -b *c /d


@lru_cache(1 << 16)
def parse(line):
    """(sign, operand, result) of a line such as '*2 = 46', or None if it is malformed."""
    m = re.fullmatch(r"([+\-*/])([1-9]) = ([1-9][0-9]?)", line, flags=re.ASCII)
    return m and (m[1], int(m[2]), int(m[3]))


def transitions(problems):
    """next (N, TOP, 4): the value after each operation, 0 where it is illegal (not in 1..63, or not exact)."""
    v = np.arange(TOP)[None, :, None]
    a, b, c, d = (np.array([p.ops for p in problems])[:, None, [k]] for k in range(4))
    nxt = np.concatenate([v + a, v - b, v * c, np.where(v % d == 0, v // d, 0)], axis=2)
    nxt[(nxt < 1) | (nxt >= TOP)] = 0
    nxt[:, 0] = 0
    return nxt


def dp(nxt, target, H, policy=None):
    """Exact values by dynamic programming. nxt (N, TOP, 4), target (N,).

    policy (H, TOP, 4) or (N, H, TOP, 4): the chance of each operation at each step and value; None is uniform over the
    legal ones. Returns Q (N, H, TOP, 4), the chance of a right answer after taking an operation at step h (Eq. 1; 0 for
    an illegal one), and V (N, H + 1, TOP). A walk stops right when it reaches the target.
    """
    N = len(nxt)
    if policy is None:
        policy = ((nxt > 0) / np.maximum((nxt > 0).sum(-1, keepdims=True), 1)).astype(np.float32)[:, None]
    policy = np.broadcast_to(policy, (N, H, TOP, 4))
    Q, V = np.zeros((N, H, TOP, 4), np.float32), np.zeros((N, H + 1, TOP), np.float32)
    V[np.arange(N), :, target] = 1                              # and V at the value 0, "illegal", stays 0
    for h in reversed(range(H)):
        Q[:, h] = np.take_along_axis(V[:, h + 1], nxt.reshape(N, -1), 1).reshape(nxt.shape)
        V[:, h] = np.einsum("nvk,nvk->nv", policy[:, h], Q[:, h])
        V[np.arange(N), h, target] = 1
    return Q, V


def distance(nxt, start, H):
    """Breadth-first distance (N, TOP) from the start to every value; H + 1 means further than H."""
    N = len(nxt)
    dist = np.full((N, TOP), H + 1)
    dist[np.arange(N), start] = 0
    for h in range(H):
        n, v = np.nonzero(dist == h)
        reached = nxt[n, v]                                     # (number of frontier values, 4)
        n = np.repeat(n, 4)
        new = dist[n, reached.ravel()] > H
        dist[n[new], reached.ravel()[new]] = h + 1
        dist[:, 0] = H + 1
    return dist


def walk(nxt, Q, directed, value, step, target, H, rng):
    """Walks from value (N,) at step (N,) until the target or H: actions (N, H), -1 where idle. Uniform over the legal
    operations; where `directed` (N,), conditioned on success: pi(k | v, h) = uniform(k | v) Q(v, h, k) / V(v, h)."""
    actions, value = np.full((len(nxt), H), -1), value.copy()
    for h in range(H):
        n = np.nonzero((value != target) & (step <= h))[0]
        p = (nxt[n, value[n]] > 0).astype(np.float32)
        q = Q[n, h, value[n]]
        p = np.where((directed[n] & (q.sum(1) > 0))[:, None], q, p)
        k = (rng.random((len(n), 1)) * p.sum(-1, keepdims=True) >= p.cumsum(-1)).sum(-1).clip(max=3)
        actions[n, h], value[n] = k, nxt[n, value[n], k]
    return actions


@dataclass
class Calculator(Task):
    H: int = flag(8, "most steps", low=1, high=20)
    min_steps: int = flag(5, "steps that every problem needs", low=1, high=20)

    name = "calculator"
    phrases = ["from ", " reach ", " in at most ", " steps with ",
               *(f"{op}{d} = " for op in "+-*/" for d in range(1, 10)), *(f" {op}{d}" for op in "-*/" for d in range(1, 10))]
    max_step_tokens = 5                                         # 3 are enough: "*2 = ", "46", newline

    def __post_init__(self):
        if self.min_steps > self.H:
            raise Fail(f"--min_steps {self.min_steps}: must be at most --H {self.H}")
        self.max_steps, self.max_new_tokens = self.H, 3 * self.H + 2

    def draw(self, n, rng):
        """The target is uniform over the values that some walk of at most H steps reaches and none of fewer than
        min_steps: solvable by construction, and no easier targets more often, as the end of a random walk would give."""
        ops = np.stack([rng.integers(1, 10, n), rng.integers(1, 10, n), rng.integers(2, 4, n), rng.integers(2, 4, n)], 1)
        problems = [Problem(int(s), 0, tuple(map(int, o))) for s, o in zip(rng.integers(1, TOP, n), ops)]
        far = distance(transitions(problems), np.array([p.start for p in problems]), self.H)
        fits = (far >= self.min_steps) & (far <= self.H)
        target = (rng.random(fits.shape) * fits).argmax(1)
        return [Problem(p.start, int(t), p.ops) for p, t, f in zip(problems, target, fits) if f[t]]

    def prompt(self, problem):
        a, b, c, d = problem.ops
        return f"from {problem.start} reach {problem.target} in at most {self.H} steps with +{a} -{b} *{c} /{d}\n"

    def _walks(self, problems, directed, value, step, rng, chunk=512):
        """`walk` for any number of problems; chunks keep the tables in the processor's cache."""
        out = []
        for i in range(0, len(problems), chunk):
            s = slice(i, i + chunk)
            nxt, target = transitions(problems[s]), np.array([p.target for p in problems[s]])
            out.append(walk(nxt, dp(nxt, target, self.H)[0], directed[s], value[s], step[s], target, self.H, rng))
        return np.concatenate(out)

    @staticmethod
    def _lines(problem, actions, value):
        lines = []
        for k in actions[actions >= 0]:
            x = problem.ops[k]
            value = (value + x, value - x, value * x, value // x)[k]
            lines.append(f"{'+-*/'[k]}{x} = {value}")
        return lines

    def demonstrations(self, problems, expert_fraction, rng):
        value, step = np.array([p.start for p in problems]), np.zeros(len(problems), int)
        actions = self._walks(problems, rng.random(len(problems)) < expert_fraction, value, step, rng)
        return ["\n".join(self._lines(p, a, p.start)) + END for p, a in zip(problems, actions)]

    def judge(self, problem, response):
        lines = self.steps(response)
        if not response.endswith(END) or len(lines) > self.H:
            return "illegal"
        value = self._replay(problem, lines)
        return "illegal" if value == 0 else "right" if value == problem.target else "planning"

    def _replay(self, problem, lines):
        """The value after these lines, 0 if one of them is illegal or computed wrong."""
        value = problem.start
        for line in lines:
            step = parse(line)
            if step is None or (step[0], step[1]) not in zip("+-*/", problem.ops):
                return 0
            sign, x, result = step
            value = self._apply(sign, value, x)
            if value != result or not 1 <= value < TOP:
                return 0
        return value

    def exact(self, problems):
        """Exact Q of the uniform legal walk that stops at the target: -> f(i, prefix), the chance of a right answer of
        problems[i] behind the finished lines of `prefix`; a prefix that has ended is worth its outcome."""
        nxt = transitions(problems)
        _, V = dp(nxt, np.array([p.target for p in problems]), self.H)

        def value(i, prefix):
            if prefix.endswith(END):
                return float(self.outcome(problems[i], prefix))
            lines = prefix.split("\n")[:-1]
            v = self._replay(problems[i], lines)
            if v == 0 or len(lines) >= self.H:
                return 0.0
            if v == problems[i].target:                         # it went past the target, and has to come back
                legal = nxt[i, v] > 0
                return float(V[i, len(lines) + 1, nxt[i, v]][legal].mean()) if legal.any() else 0.0
            return float(V[i, len(lines), v])
        return value

    def corrupt(self, problems, responses, rng):
        lines = [[ln for ln in self.steps(r) if parse(ln)][:self.H] or ["+1 = 1"] for r in responses]
        wrong = np.array([rng.integers(len(ln)) for ln in lines])
        value = np.zeros(len(problems), int)
        for i, (p, ln, w) in enumerate(zip(problems, lines, wrong)):
            before = parse(ln[w - 1])[2] if w else p.start
            sign, x, result = parse(ln[w])
            if rng.random() < 0.5:                              # wrong arithmetic; half of it lands on the target
                near = int(np.clip(result + rng.choice([-10, -2, -1, 1, 2, 10]), 1, TOP - 1))
                near = near if near != result else 2 if result == 1 else result - 1
                result = p.target if result != p.target and rng.random() < 0.5 else near
            else:                                               # right arithmetic with an operation that is not offered
                away = [k for k in range(1, 10) if k != x and 1 <= self._apply(sign, before, k) < TOP]
                if away:
                    x = int(rng.choice(away))
                    result = self._apply(sign, before, x)
                else:
                    result = min(result, TOP) - 1 if result > 1 else 2
            lines[i] = ln[:w] + [f"{sign}{x} = {result}"]
            value[i] = result
        directed = rng.random(len(problems)) < 0.5              # go on, often to the target: still worth nothing
        rest = self._walks(problems, directed, value, wrong + 1, rng)
        return ["\n".join(ln + self._lines(p, a, v)) + END for p, ln, a, v in zip(problems, lines, rest, value)], wrong

    @staticmethod
    def _apply(sign, v, x):
        """The result of an operation, 0 for an inexact division."""
        return v + x if sign == "+" else v - x if sign == "-" else v * x if sign == "*" else 0 if v % x else v // x

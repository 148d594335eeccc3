r"""Calculator: reach a target from a start in at most H steps with four operations.

    from 23 reach 8 in at most 8 steps with +7 -4 *2 /3         <- prompt
    *2 = 46                                                     <- a step: one operation and its result
    -4 = 42
    /3 = 14
    *2 = 28
    -4 = 24
    /3 = 8<|endoftext|>                                         <- right: the last result is the target

Values are integers 1..63, division must be exact. A problem has 63 values and 4 actions, so V and Q of a
tabular policy are exact by dynamic programming: `dp` is the oracle of the tests.
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

TOP = 64                            # values are 1..TOP-1; row 0 of a table means "illegal"


class Problem(NamedTuple):
    start: int
    target: int
    ops: tuple                      # operands (a, b, c, d) of +a -b *c /d


def apply(sign, v, x):
    """The result of an operation, 0 where it is illegal."""
    r = v + x if sign == "+" else v - x if sign == "-" else v * x if sign == "*" else 0 if v % x else v // x
    return r if 1 <= r < TOP else 0


@lru_cache(1 << 16)
def parse(line):
    """(sign, operand, result) of a line such as '*2 = 46', or None if it is malformed."""
    m = re.fullmatch(r"([+\-*/])([1-9]) = ([1-9][0-9]?)", line, flags=re.ASCII)
    return m and (m[1], int(m[2]), int(m[3]))


def transitions(problems):
    """next (N, TOP, 4): the value after each operation, 0 where it is illegal."""
    v = np.arange(TOP)[None, :, None]
    a, b, c, d = (np.array([p.ops for p in problems])[:, None, [k]] for k in range(4))
    nxt = np.concatenate([v + a, v - b, v * c, np.where(v % d == 0, v // d, 0)], axis=2)
    nxt[(nxt < 1) | (nxt >= TOP)] = 0
    nxt[:, 0] = 0
    return nxt


def weights(nxt, skew):
    """Of each operation after which `nxt` (..., 4) comes: 0 if it is illegal, else 1, and `skew` for +."""
    return (nxt > 0) * np.array([skew, 1, 1, 1], np.float32)


def dp(nxt, target, H, skew=1.0):
    """Exact values, by dynamic programming, of the walk of demonstrations that do not know the way. nxt (N,
    TOP, 4), target (N,). -> Q (N, H, TOP, 4), the chance of a right answer after an operation at step h (Eq.
    1; 0 for an illegal one), and V (N, H + 1, TOP). A walk stops right when it reaches the target."""
    N, policy = len(nxt), normal(weights(nxt, skew))                            # the same at every step
    Q, V = np.zeros((N, H, TOP, 4), np.float32), np.zeros((N, H + 1, TOP), np.float32)
    V[np.arange(N), :, target] = 1                              # and V at the value 0, "illegal", stays 0
    for h in reversed(range(H)):
        Q[:, h] = np.take_along_axis(V[:, h + 1], nxt.reshape(N, -1), 1).reshape(nxt.shape)
        V[:, h] = np.einsum("nvk,nvk->nv", policy, Q[:, h])
        V[np.arange(N), h, target] = 1
    return Q, V


def normal(w):
    """Weights (..., 4) as chances; 0 where there are none."""
    return (w / np.maximum(w.sum(-1, keepdims=True), 1)).astype(np.float32)


def distance(nxt, start, H):
    """Breadth-first distance (N, TOP) from the start to every value; H + 1 means further than H."""
    N = len(nxt)
    dist = np.full((N, TOP), H + 1)
    dist[np.arange(N), start] = 0
    for h in range(H):
        n, v = np.nonzero(dist == h)
        n, reached = np.repeat(n, 4), nxt[n, v].ravel()         # 4 for each value of the frontier
        new = dist[n, reached] > H
        dist[n[new], reached[new]] = h + 1
        dist[:, 0] = H + 1
    return dist


def walk(nxt, Q, expert, value, step, target, H, rng, skew):
    """Walks from value (N,) at step (N,) until the target or H: actions (N, H), -1 where idle. Operations are
    drawn by their weights; in the rows `expert` (N,) as if success were given: pi(k | v, h) ~ weight(k | v)
    Q(v, h, k)."""
    actions, value = np.full((len(nxt), H), -1), value.copy()
    for h in range(H):
        n = np.nonzero((value != target) & (step <= h))[0]
        p = weights(nxt[n, value[n]], skew)
        q = Q[n, h, value[n]] * p
        p = np.where((expert[n] & (q.sum(1) > 0))[:, None], q, p)
        k = (rng.random((len(n), 1)) * p.sum(-1, keepdims=True) >= p.cumsum(-1)).sum(-1).clip(max=3)
        actions[n, h], value[n] = k, nxt[n, value[n], k]
    return actions


@dataclass
class Calculator(Task):
    H: int = flag(8, "most steps", low=1, high=20)
    min_steps: int = flag(5, "steps that every problem needs", low=1, high=20)
    skew: float = flag(1.0, "how much likelier + is than another operation in demonstrations", low=1, high=99)

    name = "calculator"
    phrases = ["from ", " reach ", " in at most ", " steps with ",
               *(f"{op}{d} = " for op in "+-*/" for d in range(1, 10)),
               *(f" {op}{d}" for op in "-*/" for d in range(1, 10))]
    max_step_tokens = 5                                         # 3 are enough: "*2 = ", "46", newline

    def __post_init__(self):
        if self.min_steps > self.H:
            raise Fail(f"--min_steps {self.min_steps}: must be at most --H {self.H}")
        self.max_steps, self.max_new_tokens = self.H, 3 * self.H + 2

    def draw(self, n, rng):
        """The target is uniform over the values that some walk of at most H steps reaches and none of fewer
        than min_steps: solvable by construction, and easier targets no more often."""
        ops = np.stack([rng.integers(low, high, n) for low, high in ((1, 10), (1, 10), (2, 4), (2, 4))], 1)
        problems = [Problem(int(s), 0, tuple(map(int, o))) for s, o in zip(rng.integers(1, TOP, n), ops)]
        chunks = (problems[i:i + 4096] for i in range(0, n, 4096))              # their tables are large
        far = np.concatenate([distance(transitions(x), np.array([p.start for p in x]), self.H)
                              for x in chunks])
        fits = (far >= self.min_steps) & (far <= self.H)
        target = (rng.random(fits.shape) * fits).argmax(1)
        return [p._replace(target=int(t)) for p, t, f in zip(problems, target, fits) if f[t]]

    def prompt(self, problem):
        offered = " ".join(f"{sign}{x}" for sign, x in zip("+-*/", problem.ops))
        return f"from {problem.start} reach {problem.target} in at most {self.H} steps with {offered}\n"

    def _walks(self, problems, expert, value, step, rng, chunk=512):
        """The lines of a `walk` of every problem; chunks keep the tables in the processor's cache."""
        out = []
        for i in range(0, len(problems), chunk):
            s = slice(i, i + chunk)
            nxt, target = transitions(problems[s]), np.array([p.target for p in problems[s]])
            Q, _ = dp(nxt, target, self.H, self.skew)
            actions = walk(nxt, Q, expert[s], value[s], step[s], target, self.H, rng, self.skew)
            for p, ks, v in zip(problems[s], actions, value[s].tolist()):
                out.append([])
                for k in ks[ks >= 0]:
                    v = apply("+-*/"[k], v, p.ops[k])
                    out[-1].append(f"{'+-*/'[k]}{p.ops[k]} = {v}")
        return out

    def demonstrations(self, problems, expert_fraction, rng):
        value, step = np.array([p.start for p in problems]), np.zeros(len(problems), int)
        walks = self._walks(problems, rng.random(len(problems)) < expert_fraction, value, step, rng)
        return ["\n".join(lines) + END for lines in walks]

    def values(self, problem, lines):
        """The values from the start on, up to the first line that is not right."""
        out = [problem.start]
        for line in lines:
            sign, x, result = parse(line) or ("", 0, 0)
            if (sign, x) not in zip("+-*/", problem.ops) or apply(sign, out[-1], x) != result:
                break
            out.append(result)
        return out

    def state(self, step):
        return step.rpartition(" = ")[2]                        # the value

    def judge(self, problem, response):
        lines = self.steps(response)
        values = self.values(problem, lines[:self.H])
        if not response.endswith(END) or len(values) <= len(lines):
            return "illegal"
        return "right" if values[-1] == problem.target else "planning"

    def exact(self, problems):
        """Exact Q of the weighted walk that stops at the target: -> f(i, prefix), the chance of a right
        answer of problems[i] behind the finished lines of `prefix`; at an end the outcome."""
        nxt = transitions(problems)
        _, V = dp(nxt, np.array([p.target for p in problems]), self.H, self.skew)

        def value(i, prefix):
            if prefix.endswith(END):
                return float(self.outcome(problems[i], prefix))
            lines = self.steps(prefix)[:-1]
            values, h = self.values(problems[i], lines), len(lines)
            if len(values) <= h or h >= self.H:
                return 0.0
            if values[-1] != problems[i].target:
                return float(V[i, h, values[-1]])
            # it went past the target, and has to come back
            legal = nxt[i, values[-1]]
            return float((normal(weights(legal, self.skew)) * V[i, h + 1, legal]).sum())
        return value

    def corrupt(self, problems, responses, rng):
        """Wrong arithmetic, half of it landing on the target, or an operation that is not offered; then on,
        often to the target: still worth nothing. What comes before the corrupted step is legal."""
        heads, where, value = [], [], []
        for p, response in zip(problems, responses):
            lines = self.steps(response)
            values = self.values(p, lines)
            where.append(int(rng.integers(min(max(1, len(values) - 1), self.H))))
            before, line = values[where[-1]], parse(lines[where[-1]])
            sign, x = line[:2] if line and len(values) > 1 else ("+", p.ops[0])
            truth, offered = apply(sign, before, x), p.ops["+-*/".index(sign)]
            others = [k for k in range(1, 10) if k != offered and apply(sign, before, k)]
            near = [v for v in (truth + d for d in (-10, -2, -1, 1, 2, 10)) if 1 <= v < TOP]
            if others and rng.random() < 0.5:
                x = int(rng.choice(others))
                value.append(apply(sign, before, x))
            else:
                on_target = truth != p.target and rng.random() < 0.5
                value.append(p.target if on_target else int(rng.choice(near)))
            heads.append([*lines[:where[-1]], f"{sign}{x} = {value[-1]}"])
        rest = self._walks(problems, rng.random(len(problems)) < 0.5, np.array(value), np.array(where) + 1,
                           rng)
        return ["\n".join(a + b) + END for a, b in zip(heads, rest)], where

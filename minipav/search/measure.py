"""Search a run's problems and write one row for each search (a Cell), budget and problem."""
from dataclasses import asdict, dataclass, replace

import numpy as np

from minipav.files import read_csv, write_csv
from minipav.prover import Prover, verifier_of, weights_of
from minipav.run import keyed
from minipav.search import METHODS
from minipav.search.score import SCORES, Search
from minipav.utils import Fail

COLUMNS = ("method", "score", "policy", "prover", "alpha", "spread", "quota", "split", "sample_seed", "n",
           "problem", "right", "solved", "tokens", "verifier_tokens", "text")


@dataclass
class Cell:
    """One search at several budgets."""
    method: str
    score: str = ""                 # one of SCORES, or none
    ns: tuple = (1,)                # N of best-of-N, widths of a beam
    policy: str = "base"
    prover: str = "bo4"
    alpha: float = 0.0
    spread: int = 12                # how a beam spends its samples, and what it keeps: see Search
    quota: str = "none"
    verifier: str = ""              # another one in the place of Q^pi: its folder in the run
    split: str = "test"
    problems: int = 500
    seed: int = 0                   # of the sampling

    def __post_init__(self):
        """What has no part in the result is always the same: equal searches are one cell."""
        uses = SCORES[self.score].uses if self.score else ()
        self.alpha = float(self.alpha) if "alpha" in uses else 0.0
        if "prover" not in uses or "alpha" in uses and self.alpha == 0:
            self.prover = ""
        if not METHODS[self.method].shaped:
            self.spread, self.quota = 0, ""
        if not self.score or SCORES[self.score].verifier != "q_pi":
            self.verifier = ""

    @classmethod
    def parse(cls, text, **fields):
        """"beam:effective" -> that method and score; "beam" is that too, "best_of_n" is "best_of_n:orm".
        Raises Fail if there is no such method or score."""
        method, colon, score = text.partition(":")
        if method not in METHODS or colon and (score not in SCORES or not METHODS[method].score):
            raise Fail(f"--search {text}: choose METHOD or METHOD:SCORE of {', '.join(METHODS)} and the "
                       f"scores {', '.join(SCORES)}")
        if method == "mcts_quality" and score and score not in ("q_pi", "exact"):
            raise Fail(f"--search {text}: the quality value is made of q_pi, or of exact values")
        return cls(method, score or METHODS[method].score, **fields)


class Bench:
    """One run's models and problems, each loaded once."""

    def __init__(self, run):
        self.run, self.models, self.memos, self.found = run, {}, {}, {}

    def model(self, name):
        if name not in self.models:
            self.models[name] = self.run.model(name)
        return self.models[name]

    def search(self, cell):
        """The Search of a cell: its models, its prover."""
        score = SCORES.get(cell.score)
        memo = self.memos.setdefault((cell.policy, cell.split, cell.problems), {})
        s = Search(self.run, self.model(cell.policy), score, alpha=cell.alpha, spread=cell.spread,
                   quota=cell.quota or "none", memo=memo)
        if score and score.verifier != "exact":
            own = cell.verifier or verifier_of(cell.policy)
            s.verifier = self.model(own if score.verifier == "q_pi" else score.verifier)
        if cell.prover:
            mu = Prover.parse(cell.prover, cell.policy)
            s.K = mu.K
            s.mu_verifier = self.model(verifier_of(mu.policy)) if mu.policy != cell.policy else None
        return s

    def measure(self, cell):
        """Search, unless it was done before. -> path of the rows, a table with COLUMNS"""
        spec = asdict(cell) | weights_of(cell.prover)
        name = keyed("search/" + "-".join(x for x in (cell.method, cell.score, cell.policy) if x), spec)
        path = self.run.out / f"{name}.csv"

        def work():
            problems = self.run.problems(cell.split, cell.problems)
            same = replace(cell, score="q_pi") if orders_as_q(cell) else cell
            if str(same) not in self.found:
                self.found[str(same)] = METHODS[cell.method].run(self.search(same), problems, list(cell.ns),
                                                                 cell.seed)
            results = self.found[str(same)]
            write_csv(path, COLUMNS, rows(cell, results))
            seconds = {n: round(r.seconds, 2) for n, r in zip(cell.ns, results)}
            return {"seconds_by_n": seconds, "files": [path]}
        self.run.stage(name, work, spec)
        return path


def orders_as_q(cell):
    """Whether its score, at alpha 0, is Q^pi, or orders candidates as that does: it is searched once."""
    logits = cell.score == "log_odds" and cell.method in ("beam", "dvts")       # trees ask for more
    return cell.alpha == 0 and (cell.score in ("effective", "bonus") or logits)


def rows(cell, results):
    fixed = [getattr(cell, k) for k in COLUMNS[:8]] + [cell.seed]
    for n, r in zip(cell.ns, results):
        for i in range(len(r.right)):
            numbers = (f"{float(x[i]):.9g}" for x in (r.right, r.solved, r.tokens, r.verifier_tokens))
            text = r.text[i].replace("\0", "\ufffd") if r.text else ""        # csv of Python 3.10 has no NUL
            yield *fixed, n, i, *numbers, text


def rights(path):
    """Right or not (P,) in a table of rows of one budget."""
    return np.array([float(row["right"]) for row in read_csv(path, COLUMNS)])


def simplest_of_the_best(tables):
    """Of tables {choice: path}, on the same problems and samples, the simpler ones first: the first that is
    behind the best by no more than the standard error of their paired difference."""
    right = {choice: rights(path) for choice, path in tables.items()}
    best = max(right.values(), key=np.mean)
    gaps = {choice: best - x for choice, x in right.items()}
    return next(c for c, gap in gaps.items() if gap.mean() <= gap.std(ddof=1) / len(gap) ** 0.5)

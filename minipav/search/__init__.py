"""Test-time search: a method is a function (Search, problems, budgets, seed) -> a Result for each budget.

To add one: a file with such a function, and its line in METHODS. To add a score: its line in SCORES
(score.py).
"""
from typing import NamedTuple

from minipav.search.backtrack import backtrack
from minipav.search.beam import beam
from minipav.search.best_of_n import at_n, best_of_n, greedy, majority, weighted_vote
from minipav.search.dvts import dvts
from minipav.search.mcts import mcts, puct, quality


class Method(NamedTuple):
    run: object                     # the function
    budgets: str = "n"              # of search.py's: numbers of samples, "widths", or "one"
    shaped: bool = False            # whether it depends on Search's spread and quota
    score: str = "q_pi"             # what it goes by if nothing is said; "": it knows no score


METHODS = {"greedy": Method(greedy, "one", score=""), "pass": Method(at_n, score=""),
           "majority": Method(majority, score=""), "best_of_n": Method(best_of_n, score="orm"),
           "weighted_vote": Method(weighted_vote),
           "beam": Method(beam, "widths", shaped=True, score="effective"),
           "dvts": Method(dvts, "widths"), "backtrack": Method(backtrack, "widths"),
           "mcts": Method(mcts, "widths"), "puct": Method(puct, "widths"),
           "mcts_quality": Method(quality, "widths")}

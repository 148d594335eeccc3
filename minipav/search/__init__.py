"""Test-time search: a method is a function (Search, problems, budgets, seed) -> a Result for each budget.

To add one: a file with such a function, and its line in METHODS. To add a score: its line in SCORES
(score.py).
"""
from minipav.search.backtrack import backtrack
from minipav.search.beam import beam
from minipav.search.best_of_n import at_n, best_of_n, greedy, majority
from minipav.search.dvts import dvts
from minipav.search.mcts import mcts, puct, quality

METHODS = {"greedy": greedy, "pass": at_n, "majority": majority, "best_of_n": best_of_n, "beam": beam,
           "dvts": dvts, "backtrack": backtrack, "mcts": mcts, "puct": puct, "mcts_quality": quality}

"""How good are a verifier's values before the end of a trace? Q^pi of several runs of one seed, which share
their policy, beside means of fresh rollouts, at every step of the seed rollouts of the first validation
problems of the last run (at its end: the outcome).

    python -m results.search_expert.values runs/expert{,_long,_more}-seed0      # -> values-seed0.csv.gz here
"""
import sys
from pathlib import Path

import pandas as pd

from minipav.advantage import monte_carlo
from minipav.paper.report import keep
from minipav.run import Run
from minipav.utils import tune_process
from minipav.verifier import score

N_MC, PROBLEMS = 64, 100


def main():
    tune_process()
    runs = {folder.rpartition("/")[2].partition("-")[0]: Run.open(folder, "cpu") for folder in sys.argv[1:]}
    *_, last = runs.values()
    traces, seed = last.traces("seeds_base_validation"), last.config["seed"]
    problems = last.problems("validation", int(traces.problem.max()) + 1)       # the number counts
    traces = traces[traces.problem < PROBLEMS]
    rollouts = monte_carlo(last.model("base"), last, problems, traces, traces.ends >= 0, N_MC, seed)
    trace, step = rollouts.labelled.nonzero(as_tuple=True)
    columns = {"run": seed, "problem": traces.problem[trace], "trace": trace, "step": step,
               "left": traces.last[trace] - step, "rollouts": rollouts.q[trace, step]}
    for name, run in runs.items():
        q = score(run.model("q_pi"), traces.tokens, traces.ends)
        columns[name] = [f"{x:.4f}" for x in q[trace, step].tolist()]
    path = Path(__file__).parent / f"values-seed{seed}.csv.gz"
    keep(path, [pd.DataFrame(columns)])
    print(f"rows in {path}")


if __name__ == "__main__":
    main()

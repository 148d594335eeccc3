"""Test-time search with what train.py left: every method and figure of the paper's section 4.1, on held-out problems.

    python search.py                      # runs/calculator-seed0: the main comparison (Fig. 4, 5a, 6a, alpha, Fig. 10)
    python search.py --all                # the other bases and provers, data sizes and first pits too (Fig. 4, 5b, 5c, 6b, 11)
    python search.py --show 3             # three problems, every candidate step with its values, and what the beam kept
    python search.py --run runs/calculator-seed? --all --out results/search     # several seeds, and their mean

What is measured lands in RUN/search (with other flags: a folder beside it), one file an experiment; what is there is not
measured again.
The methods are in minipav/search.py, the experiments in minipav/experiments.py, the figures in minipav/figures.py, the claims
in minipav/verdicts.py.
"""
import argparse
import json
import time
from pathlib import Path

from minipav.evaluate import save_curves
from minipav.experiments import BEAMS, DEFAULT, EXPERIMENTS, SAMPLED, Bench
from minipav.run import commit, hardware, open_runs
from minipav.search import beam_search
from minipav.tokenizer import decode_rows
from minipav.utils import Fail, derive_seed, main_guard, make_folder, pick_device, tune_process, write_whole
from minipav.verdicts import search_report


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, nargs="+", default=[Path("runs/calculator-seed0")], help="folders that train.py wrote")
    p.add_argument("--out", type=Path, help="where figures, CSVs and summary.json go (default: where it was measured)")
    p.add_argument("--all", action="store_true", help="every figure")
    p.add_argument("--show", type=int, metavar="K", help="print K problems step by step, measure nothing")
    p.add_argument("--method", nargs="+", choices=[*SAMPLED, *BEAMS], default=[*SAMPLED, *BEAMS], help="only these")
    p.add_argument("--n", type=int, default=128, help="samples a problem for best-of-N")
    p.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="beam widths")
    p.add_argument("--alpha", type=float, help="weight of A^mu; default: the best of 0, .1, ... 1 on validation problems")
    p.add_argument("--prover", help="boK (bo1 is pi itself), weak or strong; default: the run's best-of-K")
    p.add_argument("--problems", type=int, default=500, help="test problems")
    p.add_argument("--validation", type=int, default=60, help="validation problems on which alpha is chosen")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the sampling; curves are averages over them")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = p.parse_args(argv)
    for name in ("n", "problems", "validation", "show"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise Fail(f"--{name} {getattr(args, name)}: must be at least 1")
    if min(args.widths) < 1 or min(args.seeds) < 0 or args.alpha is not None and not args.alpha >= 0:
        raise Fail(f"--widths {args.widths} must be at least 1, --seeds {args.seeds} and --alpha {args.alpha} 0 or more")
    if args.prover not in (None, "weak", "strong") and not (args.prover[:2] == "bo" and args.prover[2:].isdigit()
                                                            and int(args.prover[2:]) > 0):
        raise Fail(f"--prover {args.prover}: unknown; choose boK with K >= 1 (bo4), weak or strong")
    if len(args.run) > 1 and args.out is None and args.show is None:
        raise Fail("several --run folders need an --out for their mean")
    args.widths, args.device = sorted(set(args.widths)), pick_device(args.device)
    return args


def measured_in(run, args):
    """(folder, flags): RUN/search for the default flags, for others a folder of their own, so that no result is lost."""
    flags, default = ({k: getattr(a, k) for k in ("method", "n", "widths", "alpha", "prover", "problems", "validation", "seeds")}
                      for a in (args, get_args([])))
    return run.out / ("search" if flags == default else f"search-{derive_seed(*flags.items()):08x}"), flags


def measure(b, name):
    """Run an experiment, unless its folder holds it already. -> its facts"""
    folder, flags = measured_in(b.run, b.args)
    path = folder / f"{name}.json"
    make_folder(folder)
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise Fail(f"{path} is damaged ({e}): delete it") from None
        if old.get("flags") == flags:
            print(f"{name}: measured before, at commit {old['commit']}")
            return old
    print(name, flush=True)
    start = time.time()
    curves, facts = EXPERIMENTS[name](b)
    if curves:
        save_curves(folder / f"{name}.safetensors", curves)
    facts |= {"flags": flags, "chosen_alpha": b.alpha, "prover": b.mu, "seconds": round(time.time() - start, 1),
              "commit": commit(), "hardware": hardware(b.args.device), "curves": sorted(curves)}
    write_whole(path, lambda p: p.write_text(json.dumps(facts, indent=1) + "\n"))
    return facts


def show(b, K):
    """K problems: the candidates of each level of a PAV beam, with their values."""
    log, b.alpha = [], 0.2 if b.alpha is None else b.alpha
    some = b.problems[:K]
    r = beam_search(b.model("base"), b.q_of("base"), b.run.task, b.run.enc, some, width=4, alpha=b.alpha, seed=b.args.seeds[0],
                    log=log, **b.prover(b.mu), **b.run.how)
    for i, problem in enumerate(some):
        prompt = b.run.task.prompt(problem)
        print(f"{prompt.strip()}        (mu = {b.mu}, alpha = {b.alpha}, width 4)\n"
              f"{'kept':<6}{'Q^pi':>7}{'Q^mu':>7}{'A^mu':>8}{'score':>8}   steps so far")
        for level in log:
            mine = (level["owner"] == i).nonzero()[:, 0]
            mine = mine[level["score"][mine].argsort(descending=True)]
            for x, text in zip(mine.tolist(), decode_rows(b.run.enc, level["tokens"][mine], level["lengths"][mine])):
                q, q_mu, adv, value = (float(level[k][x]) for k in ("q_pi", "q_mu", "adv_mu", "score"))
                steps = ", ".join(b.run.task.steps(text.removeprefix(prompt).strip()))
                print(f"{'  *' if level['kept'][x] else '':<6}{q:>7.3f}{q_mu:>7.3f}{adv:>8.3f}{value:>8.3f}   {steps}")
            print()
        print(f"answer: {', '.join(b.run.task.steps(r.responses[i])) or 'none'} -> {'right' if r.reward[i] else 'wrong'}\n")


def main():
    args = get_args()
    tune_process()
    start, facts = time.time(), []
    runs = open_runs(args.run, args.device)
    folders = [measured_in(run, args)[0] for run in runs]
    out = args.out or folders[0]
    make_folder(out)
    for run in runs:
        b = Bench(run, args)
        if args.show:
            show(b, args.show)
            continue
        print(f"{run.out}: {args.problems} test problems, prover {b.mu}")
        names = [n for n in EXPERIMENTS if args.all or n in DEFAULT]
        here = {}
        for name in names:
            if not (name == "alpha" and args.alpha is not None):
                here[name] = measure(b, name)
                b.alpha = here[name].get("alpha", b.alpha)
        facts.append(here)
    if not args.show:
        search_report(runs, folders, facts, out)
        print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main_guard(main)

"""Online RL with process advantages, and every control: section 5 of the paper, from what train.py left.

    python rl.py                          # runs/calculator-seed0: outcome reward (ORM-RL) beside Q^pi + alpha A^mu (PAV-RL)
    python rl.py --all                    # every reward
    python rl.py --sweep                  # other alphas, provers, difficulties, iterations; what keeps it stable
    python rl.py --reward pav --alpha 1 --prover bo16 --policy weak             # one training with other flags
    python rl.py --tune lr --all          # the learning rate (or the KL) of each reward over one grid, on validation problems
    python rl.py --run runs/calculator-seed? --all --out results/rl             # several seeds, and their mean

Each training has a folder RUN/rl/NAME with log.csv and a checkpoint; it goes on where it was stopped, and what is finished
is not done again. The loop is in minipav/rl.py, the rewards in minipav/rewards.py, claims and figures in minipav/rl_report.py.
"""
import argparse
import copy
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from minipav.model import GPT
from minipav.report import write_csv
from minipav.rewards import REWARDS, prover_of
from minipav.rl import RL, outcomes
from minipav.rl_report import rl_report
from minipav.run import commit, hardware, open_runs
from minipav.sft import rft
from minipav.utils import Fail, main_guard, make_folder, pick_device, progress, tune_process, write_whole

GRID = {"lr": (3e-4, 1e-3, 2e-3), "kl": (0.01, 0.03, 0.1)}      # of --tune, the same for every reward
# of --sweep; ORM-RL in 480 iterations costs about what PAV-RL does in 150, its verifier's data included
SWEEPS = [*({"reward": "pav", **x} for x in (
    {"alpha": 0.5}, {"alpha": 3.0}, {"alpha": 6.0}, {"prover": "bo16"}, {"prover": "weak"}, {"prover": "strong"}, {"refresh": 2},
    {"no_known": True})), *({"reward": r, **x} for x in (
        {"policy": "weak"}, {"policy": "strong"}, {"kl": 1e-3}, {"kl": 0.1}, {"kl": 0.2}, {"baseline": "none"},
        {"baseline": "group"}, {"no_rft": True}, {"iterations": 480}) for r in ("outcome", "pav")),
    {"reward": "pav-oracle", "kl": 1e-3}]


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, nargs="+", default=[Path("runs/calculator-seed0")], help="folders that train.py wrote")
    p.add_argument("--out", type=Path, help="where figures, CSVs and summary.json go (default: RUN/rl)")
    p.add_argument("--all", action="store_true", help="every reward")
    p.add_argument("--sweep", action="store_true", help="also other alphas, provers, policies; without what keeps it stable")
    p.add_argument("--tune", choices=list(GRID), help="try this flag over a grid, on validation problems")
    # what is rewarded
    p.add_argument("--reward", nargs="+", choices=list(REWARDS), default=["outcome", "pav"])
    p.add_argument("--alpha", type=float, default=1.0, help="weight of A^mu in the effective reward (Eq. 5)")
    p.add_argument("--prover", default="bo4", help="boK (best-of-K of --policy, by its Q^pi), weak or strong")
    p.add_argument("--n_mc", type=int, default=4, help="completions a prefix, for the rewards that sample them (VinePPO: 9)")
    p.add_argument("--refresh", type=int, default=0, metavar="R", help="a step of the verifier every R iterations; 0: frozen")
    # the loop
    p.add_argument("--policy", choices=("weak", "base", "strong"), default="base", help="of train.py: where RFT starts")
    p.add_argument("--no_rft", action="store_true", help="start from that policy itself")
    p.add_argument("--no_known", action="store_true", help="believe the verifier at a trace's end and after H steps too")
    p.add_argument("--iterations", type=int, default=150)
    p.add_argument("--batch", type=int, default=128, help="traces an iteration")
    p.add_argument("--group", type=int, default=4, help="traces a problem")
    p.add_argument("--baseline", choices=("value", "group", "mean", "none"), default="value")
    p.add_argument("--lr", type=float, default=1e-3, help="of the policy (AdamW)")
    p.add_argument("--warmup", type=float, default=0.1, help="share of the iterations; the learning rate then falls as a cosine")
    p.add_argument("--value_lr", type=float, default=1e-3, help="of the value network's embedding and head (AdamW)")
    p.add_argument("--value_lr_muon", type=float, default=0.01, help="and of its matrices (Muon)")
    p.add_argument("--kl", type=float, default=0.03, help="coefficient of the KL to the initial policy")
    p.add_argument("--micro_batch", type=int, default=0, help="traces in one backward pass; 0: all. Changes no result")
    p.add_argument("--seed", type=int, default=0, help="of the sampling in RL, beside the run's own")
    # evaluation
    p.add_argument("--eval_every", type=int, default=20)
    p.add_argument("--problems", type=int, default=500, help="test problems")
    p.add_argument("--eval_n", type=int, default=4, help="samples a problem while training")
    p.add_argument("--n", type=int, default=64, help="samples a problem at the end")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = p.parse_args(argv)
    for name in ("n_mc", "iterations", "batch", "group", "eval_every", "problems", "eval_n", "n"):
        if getattr(args, name) < 1:
            raise Fail(f"--{name} {getattr(args, name)}: must be at least 1")
    for name in ("alpha", "refresh", "warmup", "value_lr_muon", "kl", "micro_batch", "seed"):
        if not getattr(args, name) >= 0:
            raise Fail(f"--{name} {getattr(args, name)}: must be 0 or more")
    for name in ("lr", "value_lr"):
        if not getattr(args, name) > 0:
            raise Fail(f"--{name} {getattr(args, name)}: must be above 0")
    if args.group == 1 and args.baseline == "group":
        raise Fail("--group 1: --baseline group needs the problem's other traces; use --group 2 or more")
    if args.batch % args.group:
        raise Fail(f"--batch {args.batch}: must be a multiple of --group {args.group}")
    if args.prover not in ("weak", "strong") and not (args.prover[:2] == "bo" and args.prover[2:].isdigit()
                                                      and int(args.prover[2:])):
        raise Fail(f"--prover {args.prover}: unknown; choose boK with K >= 1 (bo4), weak or strong")
    if args.warmup > 1:
        raise Fail(f"--warmup {args.warmup}: is a share, at most 1")
    if len(args.run) > 1 and args.out is None:
        raise Fail("several --run folders need an --out for their mean")
    args.device = pick_device(args.device)
    return args


# flags that a reward does not use
UNUSED = {"outcome": ("alpha", "prover", "n_mc", "refresh", "no_known"),
          "vine": ("alpha", "prover", "refresh", "baseline", "no_known"), "pav-pi": ("prover", "refresh", "no_known"),
          "pav-oracle": ("n_mc", "refresh", "no_known"), "pav-rollout": ("refresh", "no_known")}
# what a training depends on
ARM = ("reward", "policy", "no_rft", "no_known", "alpha", "prover", "n_mc", "refresh", "iterations", "batch", "group", "baseline",
       "lr", "warmup", "value_lr", "value_lr_muon", "kl", "seed", "eval_every", "problems", "eval_n", "n")
STARTS = ("policy", "seed", "problems", "n")                    # and the evaluation of SFT and RFT


def named(kind, a, keys, default):
    """The name of a training or of a start: its kind and those of its flags that differ from `default`."""
    changed = [f"{k}{getattr(a, k)}".removesuffix("True") for k in keys if getattr(a, k) != getattr(default, k)]
    return "-".join([kind, *changed])


def arm_flags(args, **changes):
    """(label, folder name, flags) of one training. The folder tells all flags that are not the default ones, the label only those
    in which it differs from the others of this call; flags that its reward does not use count in neither."""
    a, default = copy.copy(args), get_args([])
    vars(a).update(changes)
    unused = UNUSED.get(a.reward, ("n_mc",))
    vars(a).update({k: getattr(args, k) for k in unused})
    label = named(a.reward, a, ARM[1:], args)
    vars(a).update({k: getattr(default, k) for k in unused})
    return label, named(a.reward, a, ARM[1:], default), a


def finished(folder, flags):
    """True if what these flags make is there and done. Raises Fail if the folder holds what others made."""
    path = folder / "flags.json"
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError as e:
            raise Fail(f"{path} is damaged ({e}): delete its folder") from None
        if old != flags:
            raise Fail(f"{folder} was made with other defaults: delete it")
    make_folder(folder)
    write_whole(path, lambda p: p.write_text(json.dumps(flags, indent=1) + "\n"))
    return (folder / "final.json").exists()


def final(run, folder, policy, a, n, curve=None, **facts):
    """Evaluate a policy as it is in the end: Rex of n samples of every problem -> final.safetensors, final.json."""
    problems = run.problems(a.split, a.problems)
    with progress(f"{folder.name}, {n} samples", a.problems * n) as bar:
        reward = outcomes(policy, run, problems, n, run.seed("rl final", a.seed), progress=bar.to)
    greedy = outcomes(policy, run, problems, 1, 0, temperature=0.0)
    state = {"reward": reward.to(torch.uint8), "greedy": greedy[:, 0].to(torch.uint8)}
    if curve is not None:
        state["curve"] = curve
    write_whole(folder / "final.safetensors", lambda p: save_file(state, p))
    facts |= {"accuracy": round(float(reward.mean()), 4), "greedy": round(float(greedy.mean()), 4), "commit": commit(),
              "hardware": hardware(a.device)}
    write_whole(folder / "final.json", lambda p: p.write_text(json.dumps(facts, indent=1) + "\n"))


def initial(run, a):
    """The policy that RL starts from: RFT of --policy, or with --no_rft that policy. On the way SFT and RFT are evaluated."""
    kinds = {"sft": lambda sft: sft} | ({} if a.no_rft else {"rft": lambda sft: rft(run, a.policy, sft)})
    for kind, make in kinds.items():
        folder = run.out / "rl" / named(kind, a, STARTS, get_args([]))
        if not finished(folder, {k: getattr(a, k) for k in STARTS}):
            model = make(run.model(a.policy))
            model.save(folder)
            if a.split == "test":                               # which problems does SFT never solve? (Fig. 8b)
                final(run, folder, model, a, a.n * (4 if kind == "sft" else 1))
    return GPT.load(folder, a.device)


def train_arm(run, args, **changes):
    """One training, unless it is done already; where it was stopped it goes on. -> its final accuracy"""
    _, name, a = arm_flags(args, **changes)
    folder = run.out / "rl" / (f"tune/{name}" if a.split == "validation" else name)
    if not finished(folder, {k: getattr(a, k) for k in ARM}):
        rl = RL(run, initial(run, a), folder, a)
        policy = rl.train()
        policy.save(folder)
        final(run, folder, policy, a, a.n, rl.curve, tokens=rl.state["tokens"], seconds=round(rl.state["seconds"], 1))
        (folder / "checkpoint.safetensors").unlink()
    facts = json.loads((folder / "final.json").read_text())
    print(f"{name:<40} accuracy {facts['accuracy']:.3f}   greedy {facts['greedy']:.3f}", flush=True)
    return facts["accuracy"]


def main():
    args = get_args()
    tune_process()
    start = time.time()
    runs = open_runs(args.run, args.device)
    out = args.out or runs[0].out / "rl"
    make_folder(out)
    args.split = "validation" if args.tune else "test"
    rewards = list(REWARDS) if args.all else args.reward
    arms = [{"reward": r} for r in rewards] + SWEEPS * args.sweep
    if {"pav-sum", "pav-pi"} & set(rewards) and args.alpha:     # 1 + alpha times the gradient, one KL: their control
        arms.append({"reward": "outcome", "kl": args.kl / (1 + args.alpha)})
    if args.tune:
        arms = [{"reward": r, args.tune: x} for r in rewards for x in GRID[args.tune]]
    arms = [arm for arm in arms if arm["reward"] != "pav-oracle" or hasattr(runs[0].task, "exact")]
    if len(arms) == 0:
        raise Fail(f"--reward pav-oracle: task {runs[0].task.name} has no exact values")
    for arm in arms:
        prover_of(arm_flags(args, **arm)[2])                    # fail now, not after the first trainings
    found = [[] for _ in arms]
    for run in runs:
        print(f"{run.out}: {args.problems} {args.split} problems")
        for arm, accuracies in zip(arms, found):
            accuracies.append(train_arm(run, args, **arm))
    if args.tune:
        rows = [(*arm.values(), round(sum(acc) / len(acc), 4)) for arm, acc in zip(arms, found)]
        path = out / f"tune_{args.tune}.csv"
        write_csv(path, ["reward", args.tune, "validation accuracy"], rows)
        for r in dict.fromkeys(row[0] for row in rows):
            best = max((row for row in rows if row[0] == r), key=lambda row: row[2])
            print(f"the best of {r}: --{args.tune} {best[1]} ({best[2]})")
        print(f"all in {path}")
    else:
        starts = {kind: named(kind, args, STARTS, get_args([])) for kind in ("sft", "rft")[:1 if args.no_rft else 2]}
        rl_report(runs, starts | {label: name for label, name, _ in (arm_flags(args, **arm) for arm in arms)}, out)
    print(f"{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main_guard(main)

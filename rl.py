"""Online RL with process advantages, and every control: section 5 of the paper, from what train.py left.

    python rl.py                          # runs/calculator-seed0: outcome reward (ORM-RL) beside PAV-RL
    python rl.py --all                    # every reward
    python rl.py --sweep                  # other alphas, provers, base policies, KLs, baselines
    python rl.py --reward pav --alpha 3 --prover bo16 --policy weak         # one training with other flags
    python rl.py --tune lr --all          # the learning rate (or KL) of each reward, on validation problems
    python rl.py --run runs/calculator-seed? --all --out results/rl         # several seeds, and their mean

Each training has a folder RUN/rl/REWARD-HASH with log.csv, rows.csv, the policy, and while it runs a
checkpoint; it goes on where it was stopped, and what is finished is not done again. The loop is in
minipav/reinforce.py, the rewards in minipav/rewards.py, the sweep in minipav/paper/experiments.py.
"""
from dataclasses import dataclass, replace
from pathlib import Path

from minipav import dpo, parallel, selftrain
from minipav.files import write_csv
from minipav.flags import few, flag, parse
from minipav.paper.experiments import GRID, SWEEPS
from minipav.paper.rl_report import ROWS, report_rl
from minipav.prover import Prover, verifier_of, weights_of
from minipav.reinforce import Reinforce, outcomes
from minipav.rewards import REWARDS, check_trial, gradient_ratio
from minipav.run import check_out, keyed, open_runs, task_of
from minipav.sft import rft
from minipav.utils import Fail, main_guard, pick_device, progress, tune_process

LOOPS = {"selftrain": selftrain.Loop, "dpo": dpo.Loop}          # in the place of REINFORCE


@dataclass
class Flags:
    run: list = flag([Path("runs/calculator-seed0")], "folders of train.py, one a seed")
    out: Path = flag(None, "where figures, CSVs and summary.json go; default: RUN/rl", kind=Path)
    reward: list = flag(["outcome", "pav"], "what a step is worth", choices=list(REWARDS))
    all: bool = flag(False, "every reward")
    sweep: bool = flag(False, "also other alphas, provers, base policies, KLs, baselines")
    no_control: bool = flag(False, "leave out ORM-RL whose KL weighs as little as that of a dense reward")
    tune: str = flag(None, "try this flag over a grid, on validation problems", choices=list(GRID), kind=str)
    micro_batch: int = flag(0, "as train.py's; changes no result", high=1 << 16)
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products; auto: bf16 where the device is made for it",
                      choices=("auto", "fp32", "bf16"))


@dataclass
class Trial:
    """What a training depends on, beside its reward and the run."""
    # what is rewarded
    alpha: float = flag(1.0, "weight of A^mu in the effective reward (Eq. 5)", high=1000)
    prover: str = flag("bo4", "boK (best-of-K of --policy, by its Q^pi), weak, strong, or a folder")
    n_mc: int = flag(4, "completions a prefix, for the rewards that sample them (VinePPO: 9)", low=1,
                     high=4096)
    refresh: int = flag(0, "a step of the verifier every so many iterations; 0: frozen")
    trust_verifier: bool = flag(False, "believe the verifier also where the value is known: at a trace's end")
    # the loop
    policy: str = flag("base", "of train.py: where RFT starts", choices=("weak", "base", "strong"))
    no_rft: bool = flag(False, "start from that policy itself")
    rft_lr: float = flag(3e-4, "of RFT (AdamW)", low=1e-12, high=10)
    iterations: int = flag(150, "of the loop", low=1, high=10**6)
    batch: int = flag(128, "traces an iteration", low=1, high=1 << 16)
    group: int = flag(4, "traces a problem", low=1, high=1 << 16)
    baseline: str = flag("value", "what is subtracted from a return: the value network, ...",
                         choices=("value", "group", "mean", "none"))
    lr: float = flag(None, "of the policy (AdamW); default: the task's, else the reward's own, mostly .001",
                     low=1e-12, high=10, kind=float)
    warmup: float = flag(0.1, "share of the iterations with a linear warm-up; a cosine to 0, where lower",
                         high=1)
    value_lr: float = flag(1e-3, "of the value network's embedding and head (AdamW)", low=1e-12, high=10)
    value_lr_muon: float = flag(0.01, "and of its matrices (Muon); 0: AdamW alone", high=10)
    kl: float = flag(0.03, "coefficient of the KL to the initial policy", high=1000)
    seed: int = flag(0, "of the sampling in RL, beside the run's own", high=2**32 - 1)
    # evaluation
    eval_every: int = flag(20, "iterations between evaluations", low=1)
    problems: int = flag(500, "held-out problems", low=1, high=10**6)
    eval_n: int = flag(4, "samples a problem while training", low=1, high=4096)
    n: int = flag(64, "samples a problem at the end", low=1, high=1 << 16)


def unused(reward):
    """The flags that a training with this reward does not depend on."""
    special = {"alpha", "prover", "n_mc", "refresh", "trust_verifier"} - set(REWARDS[reward].uses)
    special |= {"kl", "value_lr", "value_lr_muon"} if REWARDS[reward].loop else set()
    return special | (set() if REWARDS[reward].baseline else {"baseline"})


def plain(reward, a):
    """The trial with the reward's own learning rate, if none was given, and the flags that do not matter at
    their defaults."""
    return replace(a, lr=a.lr or REWARDS[reward].lr, **{k: getattr(Trial(), k) for k in unused(reward)})


def used(reward, a, split):
    """All that a training's result depends on, as a dict."""
    without = unused(reward) | ({"rft_lr"} if a.no_rft else set())
    return {"reward": reward, "split": split} | {k: v for k, v in vars(a).items() if k not in without}


def label(reward, a, default):
    """The name of a training in tables: its reward and the flags in which it differs from this call's."""
    one, other = (used(reward, plain(reward, x), "") for x in (a, default))
    return "-".join([reward, *(f"{k}{v}".removesuffix("True") for k, v in one.items() if v != other[k])])


def evaluate(run, folder, policy, a, n, split, curve=()):
    """rows.csv of a finished policy: n samples of every problem and greedy decoding; before that, what it was
    while it was trained. -> facts"""
    problems = run.problems(split, a.problems)
    with progress(f"{folder.name}, {n} samples", a.problems * n) as bar:
        reward = outcomes(policy, run, problems, n, run.seed("rl final", a.seed), progress=bar.to)
    greedy = outcomes(policy, run, problems, 1, 0, temperature=0.0)
    rows = [(iteration, i, a.eval_n, round(float(x) * a.eval_n), "")
            for iteration, row in curve for i, x in enumerate(row)]
    rows += [("end", i, n, int(r.sum()), int(g)) for i, (r, g) in enumerate(zip(reward, greedy[:, 0]))]
    write_csv(folder / "rows.csv", ROWS, rows)
    files = [folder / "rows.csv", *folder.glob("log.csv")]
    return {"accuracy": round(float(reward.mean()), 4), "greedy": round(float(greedy.mean()), 4),
            "files": files}


def start(run, a, split, micro_batch):
    """The policy that RL starts from: RFT of --policy, or with --no_rft that policy. On the way SFT and RFT
    are evaluated. -> (policy, their stages by name)"""
    stages = {}
    for kind in ("sft", "rft")[:1 if a.no_rft else 2]:
        spec = {"policy": a.policy, "seed": a.seed, "problems": a.problems,
                "n": a.n * (4 if kind == "sft" else 1), "split": split} | (
                    {"lr": a.rft_lr} if kind == "rft" else {})
        stages[kind] = name = keyed(f"rl/{kind}", spec)

        def work(kind=kind, spec=spec, folder=run.out / name):
            model = run.model(a.policy)
            if kind == "rft":
                seeds = run.traces(f"seeds_{a.policy}_train")
                model = rft(model, seeds, run.seed("rft"), a.policy, lr=a.rft_lr, micro_batch=micro_batch)
            model.save(folder)
            # which problems does SFT never solve? (Fig. 8b)
            return evaluate(run, folder, model, a, spec["n"], split) if split == "test" else {}
        run.stage(name, work, spec)
    return run.model(name), stages


def train(run, reward, a, split, micro_batch):
    """One training, unless it is done already; where it was stopped it goes on. -> (start's stages, its
    stage, accuracy)"""
    spec = used(reward, a, split) | weights_of(a.prover)
    name = keyed(f"rl/{reward}", spec)
    folder, (init, stages) = run.out / name, start(run, a, split, micro_batch)

    def work():
        Loop = LOOPS[reward] if REWARDS[reward].loop else Reinforce
        loop = Loop(run, init, folder, reward, a, split, micro_batch)
        policy = loop.train()
        policy.save(folder)
        facts = evaluate(run, folder, policy, a, a.n, split,
                         [(row["iteration"], x) for row, x in zip(loop.rows, loop.curve)])
        return facts | {"tokens": loop.state["tokens"], "training_seconds": round(loop.state["seconds"], 1)}
    record = run.stage(name, work, spec)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    print(f"{name:<40} accuracy {record['accuracy']:.3f}   greedy {record['greedy']:.3f}", flush=True)
    return stages, name, record["accuracy"]


def sweeps(runs, trial):
    """Those of SWEEPS for whose policies and provers all runs have the verifiers, and right seeds for RFT."""
    def has(run, changes):
        t = replace(trial, **changes)
        found = (run.out / verifier_of(Prover.parse(t.prover, t.policy).policy)).exists()
        rft = found and "policy" in changes and not t.no_rft
        return found and (not rft or bool(run.traces(f"seeds_{t.policy}_train").reward.any()))
    out = [(r, changes) for r, changes in SWEEPS if all(has(run, changes) for run in runs)]
    if len(out) < len(SWEEPS):
        print(f"--sweep: {len(SWEEPS) - len(out)} need verifiers or right seeds that are not there: left out")
    return out


def grid(name, trial):
    """The values of a flag that --tune tries: a learning rate's are multiples of --lr."""
    return [float(f"{x * (trial.lr or 1e-3):.3g}") if name == "lr" else x for x in GRID[name]]


def trials(a, trial, swept=()):
    """(reward, Trial) of everything that this call trains."""
    alone = [r for r in REWARDS if REWARDS[r].loop] if parallel.world() > 1 else []     # in one process only
    rewards = [r for r in REWARDS if r not in alone] if a.all else a.reward
    if a.tune:
        return [(r, replace(trial, **{a.tune: x})) for r in rewards for x in grid(a.tune, trial)]
    out = [(r, trial) for r in rewards] + [(r, replace(trial, **changes)) for r, changes in swept]
    if a.no_control:
        return out
    if any(REWARDS[r].scaled for r in rewards) and trial.alpha:
        out.append(("outcome", replace(trial, kl=trial.kl / (1 + trial.alpha))))        # their control
    mu = Prover.parse(trial.prover, trial.policy)
    if {"pav", "outcome"} <= set(rewards) and trial.alpha and mu.policy == trial.policy:
        times = gradient_ratio(trial.alpha, mu.K)
        out.append(("outcome", replace(trial, kl=trial.kl / times)))    # the KL weighs as little as in PAV-RL
    return out


def main():
    a, trial = parse(Flags, __doc__, more=lambda _: Trial,
                     defaults=lambda known: task_of(known.run[0]).rl_defaults)
    tune_process()
    if trial.batch % trial.group:
        raise Fail(f"--batch {trial.batch}: must be a multiple of --group {trial.group}")
    if a.tune and a.sweep:
        raise Fail("--tune and --sweep: one at a time")
    few(problems=trial.problems, n=4 * trial.n)
    few(batch=trial.batch, n_mc=trial.n_mc)
    check_out(a.run, a.out)
    runs, split = open_runs(a.run, pick_device(a.device), a.dtype), "validation" if a.tune else "test"
    swept = sweeps(runs, trial) if a.sweep else ()
    asked = trials(a, trial, swept)
    wanted = [(r, plain(r, t)) for r, t in asked if REWARDS[r].values != "exact" or runs[0].task.exact]
    why = f"--reward pav_exact: task {runs[0].task.name} has no exact values"
    if not wanted:
        raise Fail(why)
    if len(wanted) < len(asked):
        print(f"{why}: left out")
    for reward, t in wanted:
        check_trial(reward, Prover.parse(t.prover, t.policy), t)  # now, not after the first trainings
    done = [{} for _ in runs]                                                   # of each run: label -> stage
    scores = {}
    for run, stages in zip(runs, done):
        print(f"{run.out}: {trial.problems} {split} problems")
        for reward, t in wanted:
            before, name, acc = train(run, reward, t, split, a.micro_batch)
            if t.policy == trial.policy:
                stages.update(before)
            stages[label(reward, t, trial)] = name
            scores.setdefault((reward, getattr(t, a.tune or "lr")), []).append(acc)
    out = a.out or runs[0].out / "rl"
    if a.tune:
        means = [(*key, round(sum(x) / len(x), 4)) for key, x in scores.items()]
        write_csv(out / f"tune_{a.tune}.csv", ["reward", a.tune, "validation accuracy"], means)
        for r in dict.fromkeys(reward for reward, _ in wanted):
            best = max((row for row in means if row[0] == r), key=lambda row: row[2])
            print(f"the best of {r}: --{a.tune} {best[1]} ({best[2]})")
        print(f"all in {out / f'tune_{a.tune}.csv'}")
    else:
        report_rl(runs, done, out)
    for run in runs:
        run.close()


if __name__ == "__main__":
    main_guard(main)

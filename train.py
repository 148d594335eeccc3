"""The whole of minipav, from nothing to a figure, in the order of the paper.

    python train.py                       # calculator, 2 CPU cores: 9 minutes; or a GPU
    python train.py --smoke --out /tmp/x  # every stage at toy size, seconds
    python train.py --resume              # go on where an interrupted run stopped: to the same result

1 policies    SFT of the base policy pi, and of a weaker and a stronger prover
2 rollouts    seed rollouts, and from them the labelled traces of each policy (section 4.2, App. D)
3 verifiers   Q^pi, the ORM, and Q^mu of both provers
4 evaluation  re-ranking and beam search on held-out problems (section 4.1)
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from minipav.advantage import seed_rollouts
from minipav.budget import fit
from minipav.cache import tokens_in_flight
from minipav.data import RECIPES, Collect
from minipav.files import write_csv
from minipav.flags import few, flag, parse
from minipav.model import GPT, SIZES, GPTConfig
from minipav.paper.report import report_training
from minipav.precision import pick_dtype
from minipav.pretrained import PACKAGES, open_pretrained
from minipav.run import TRAINED, Run
from minipav.search.inspect import describe
from minipav.search.measure import Bench, Cell
from minipav.search.score import QUOTAS, check_quota
from minipav.sft import train_policy
from minipav.targets import TARGETS
from minipav.tasks import TASKS
from minipav.utils import Fail, derive_seed, main_guard, pick_device, progress, tune_process
from minipav.verifier import outcome_only, train_verifier

SMOKE = dict(size="nano", sft_steps=60, strong_steps=10, batch_size=64, problems=150, branches=400, n_mc=2,
             pit_traces=20, prover_rollouts=200, orm_steps=20, q_steps=25, mu_steps=8, test_problems=40,
             max_n=8, widths=[1, 2])


@dataclass
class Flags:
    # run
    task: str = flag("calculator", "what is solved", choices=list(TASKS))
    size: str = flag("mini", "size of policies and verifiers, without --init", choices=list(SIZES))
    init: str = flag(None, f"pretrained weights: {', '.join(PACKAGES)}, a folder of the Hugging Face hub, or "
                     "a .gguf file", kind=str)
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of matrix products; auto: bf16 where the device is made for it",
                      choices=("auto", "fp32", "bf16"))
    seed: int = flag(0, "of everything; the same seed gives the same run on a machine", high=2**32 - 1)
    out: Path = flag(None, "run folder; default: runs/TASK-seedSEED", kind=Path)
    resume: bool = flag(False, "go on with the run in --out")
    minutes: float = flag(0.0, "cut all counts so that the run takes about so long; 0: do not", high=10**6)
    smoke: bool = flag(False, "toy size, to see every stage work")
    # SFT
    expert_fraction: float = flag(0.15, "of the demonstrations: those that reach the target", high=1)
    sft_steps: int = flag(400, "optimizer steps of the base policy")
    weak_at: float = flag(0.45, "the weaker prover is the base after this share of its SFT", high=1)
    strong_steps: int = flag(320, "the stronger prover is the base, trained on for so many steps ...")
    strong_expert_fraction: float = flag(1.0, "... with this fraction of expert demonstrations", high=1)
    batch_size: int = flag(256, "rows of an optimizer step", low=1, high=1 << 16)
    lr_muon: float = flag(0.02, "learning rate of the blocks' matrices; 0: AdamW alone", high=10)
    lr_adamw: float = flag(3e-3, "learning rate of the rest", low=1e-12, high=10)
    # rollouts; a count of 0 means none
    temperature: float = flag(1.0, "of every policy's samples, but RL's own", low=0.01, high=100)
    top_p: float = flag(0.98, "nucleus of the same; 1: all of it", low=1e-6, high=1)
    recipe: str = flag("dense", "of the verifiers' data: dense is ours, paper the paper's",
                       choices=list(RECIPES))
    problems: int = flag(10000, "training problems with seed rollouts of pi", low=20, high=10**7)
    n_cov: int = flag(4, "seed rollouts a problem", low=1, high=4096)
    n_mc: int = flag(3, "completions a prefix (four times as many up to a first pit)", low=1, high=4096)
    pit_traces: int = flag(250, "wrong traces that are searched for a first pit", high=10**6)
    pit_threshold: float = flag(0.2, "Q above which a state is a high-value one", high=1)
    q_from: str = flag("base", "Q^pi starts from this policy; dense data branches off its right seeds too",
                       choices=("base", "strong"))
    branches: int = flag(40000, "dense: completions of prefixes of right seeds", high=10**8)
    corrupted_fraction: float = flag(0.15, "dense: seeds copied with a corrupted step, as are all right "
                                     "branches", high=1)
    prover_rollouts: int = flag(20000, "of each prover, half its own seeds; dense: half from pi's prefixes",
                                high=10**8)
    # verifiers
    target: str = flag("bce", "what a verifier learns", choices=list(TARGETS))
    q_steps: int = flag(800, "optimizer steps of Q^pi", low=1)
    orm_steps: int = flag(60, "optimizer steps of the ORM, which starts from Q^pi", low=1)
    mu_steps: int = flag(50, "optimizer steps of each Q^mu, which starts from Q^pi", low=1)
    lr_muon_verifier: float = flag(0.01, "as --lr_muon, for verifiers", high=10)
    lr_adamw_verifier: float = flag(1e-3, "as --lr_adamw, for verifiers", low=1e-12, high=10)
    balance: bool = flag(False, "weigh labels Q < .5 and Q >= .5 the same, as in the paper")
    # memory
    micro_batch: int = flag(0, "rows of mean length in one backward pass; 0: all", high=1 << 16)
    checkpointing: bool = flag(False, "compute each block again for its backward pass")
    # evaluation
    test_problems: int = flag(500, "held-out problems", low=1, high=10**6)
    max_n: int = flag(64, "samples a problem for best-of-N", low=1, high=1 << 16)
    widths: list = flag([1, 2, 4, 8, 16, 24], "of the beams", low=1, high=4096)
    alpha: float = flag(0.2, "weight of A^mu in the effective reward (Eq. 5)", high=1000)
    quota: str = flag(None, "of relatives in a beam; default: state, of a task that has states, else "
                      "grandparent", choices=QUOTAS, kind=str)
    K: int = flag(4, "the prover of the PAV beam is best-of-K of pi (Eq. 30)", low=1, high=999999)
    max_tokens_in_flight: int = flag(None, "most slots of the KV buffers", low=1, high=1 << 40, kind=int)


def provers(a):
    """The policies that have a verifier, beside pi."""
    return ("weak", "strong") if a.prover_rollouts else ()


# ---- 1 policies

def policies(run, a):
    """pi; the weaker prover: pi early in training; the stronger: pi trained on with expert demonstrations."""
    torch.manual_seed(run.seed("policies"))
    room = run.task.room(run.enc)
    model = open_pretrained(a.init).load(a.device, room) if a.init else GPT(
        GPTConfig(run.enc.n_vocab, room, **SIZES[a.size])).to(a.device)
    model.bf16, model.checkpointing = a.dtype == "bf16", a.checkpointing
    print(f"  {sum(p.numel() for p in model.parameters()):,} {'new ' * (not a.init)}parameters, {a.device}")

    def train(name, fraction, steps, seed, weak_at=None):
        if run.task.demonstrations is None or steps == 0:
            print(f"  {name}: no SFT ({'0 steps' if steps == 0 else 'the task has no demonstrations'})")
            return model.save(run.out / name)
        show = run.logger(name, steps)

        def log(step, steps, loss):
            show(step, steps, loss)
            if step == weak_at:
                model.save(run.out / "weak")
        train_policy(model, run, fraction, steps=steps, batch_size=a.batch_size, lr_muon=a.lr_muon,
                     lr_adamw=a.lr_adamw, seed=seed, log=log, micro_batch=a.micro_batch,
                     keeper=run.keeper(name))
        return model.save(run.out / name)
    files = [run.out / "weak" / name for name in ("config.json", "model.safetensors")]
    if not run.keeper("base").path.exists():    # without SFT weak is untrained; a resumed one has been saved
        model.save(run.out / "weak")
    seed, weak_at = run.seed("policies"), max(1, int(a.weak_at * a.sft_steps))
    files += train("base", a.expert_fraction, a.sft_steps, seed, weak_at)
    return {"files": files + train("strong", a.strong_expert_fraction, a.strong_steps, seed + 1)}


# ---- 2 rollouts

def rollouts(run, a):
    """Of every policy: its seed rollouts, and by --recipe the labelled traces of its verifier."""
    seed, rng = run.seed("rollouts"), np.random.default_rng(run.seed("rollouts"))
    models = {name: run.model(name) for name in ("base", *provers(a))}
    tokens = {}
    for split, share in (("train", 1.0), ("validation", 0.05)):
        problems, s = run.problems(split, int(max(20, share * a.problems))), derive_seed(seed, split)
        n_mu, seeds = int(max(20, share * a.prover_rollouts // 2)), {}
        for name, model in models.items():
            if name == "base":
                with progress(f"seeds, {split}", len(problems) * a.n_cov) as bar:
                    seeds[name] = seed_rollouts(model, run, problems, a.n_cov, s, progress=bar.to)
            else:
                cycled = [problems[i % len(problems)] for i in range(n_mu)]    # a seed each, round and round
                seeds[name] = seed_rollouts(model, run, cycled, 1, s + 3)
                seeds[name].problem %= len(problems)
            right = float(seeds[name].reward.mean())
            print(f"  {name}, {split}: {len(seeds[name]):,} seeds, {right:.1%} right")
            run.save_traces(f"seeds_{name}_{split}", seeds[name])
        c = Collect(run, problems, n_mc=a.n_mc, branches=int(share * a.branches), prover_branches=n_mu,
                    q_from=a.q_from, corrupted_fraction=a.corrupted_fraction, pit_threshold=a.pit_threshold,
                    pit_traces=a.pit_traces if split == "train" else 0, seed=s, rng=rng)
        if split == "train":
            tokens |= {f"seeds_{name}": int(t.cost.sum()) for name, t in seeds.items()}
        for name, traces in RECIPES[a.recipe](c, models, seeds).items():
            print(f"  {name}, {split}: {len(traces):,} traces, {int(traces.labelled.sum()):,} labels, "
                  f"{int(traces.cost.sum()):,} tokens sampled")
            tokens[f"{name}_{split}"] = int(traces.cost.sum())
            run.save_traces(f"{name}_{split}", traces)
    return {"tokens": tokens}


# ---- 3 verifiers

def verifier(run, a, name, data, init, steps, select=lambda traces: traces):
    """Train one verifier and report it on held-out problems."""
    train, held_out = (select(run.traces(f"{data}_{split}")) for split in ("train", "validation"))
    if not train.labelled.any():
        raise Fail(f"{name}: there is not one label to train on; raise --problems or --n_cov")
    model, r = train_verifier(
        run.model(init), train, held_out, steps=steps, batch_size=a.batch_size, lr_muon=a.lr_muon_verifier,
        lr_adamw=a.lr_adamw_verifier, seed=run.seed(name), log=run.logger(name, steps), balance=a.balance,
        target=a.target, micro_batch=a.micro_batch, keeper=run.keeper(name))
    files = model.save(run.out / name)
    print(f"  Brier {r.brier:.4f}  AUC {r.auc:.3f}, {r.auc_within:.3f} in a problem; see {name}/held_out.csv")
    write_csv(run.out / name / "held_out.csv", ["step", "labels", "predicted", "observed", "brier"], r.steps)
    return {k: round(v, 5) for k, v in vars(r).items() if k != "steps"} | {"files": files}


# ---- 4 evaluation

def cells(a, seed):
    """What is measured here: re-ranking and beams, at every budget."""
    ns = tuple(sorted({a.max_n, *(2 ** k for k in range(a.max_n.bit_length()))}))
    narrow = tuple(w for w in a.widths if w <= 4) or tuple(a.widths[:1])
    fixed = dict(problems=a.test_problems, seed=seed, quota=a.quota)
    yield Cell("greedy", **fixed)
    for search in ("pass", "majority", "best_of_n:orm", "best_of_n:q_pi"):
        yield Cell.parse(search, ns=ns, **fixed)
    yield Cell("beam", "q_pi", tuple(a.widths), **fixed)
    yield Cell("beam", "effective", tuple(a.widths), prover=f"bo{a.K}", alpha=a.alpha, **fixed)
    for mu in provers(a):
        yield Cell("beam", "effective", narrow, prover=mu, alpha=a.alpha, **fixed)


def main():
    a, task = parse(Flags, __doc__, more=lambda known: TASKS[known.task],
                    defaults=lambda known: TASKS[known.task].defaults | (SMOKE if known.smoke else {}))
    tune_process()
    if a.q_from == "strong" and not a.prover_rollouts:
        raise Fail("--q_from strong: needs --prover_rollouts above 0")
    if a.init and TASKS[a.task].phrases:
        raise Fail(f"--init: for tasks in words; {a.task} has an encoding of its own")
    a.quota = a.quota or ("state" if TASKS[a.task].state else "grandparent")
    check_quota(a.quota, task)
    few(problems=a.problems, n_cov=a.n_cov)
    few(test_problems=a.test_problems, max_n=a.max_n)
    few(test_problems=a.test_problems, widths=max(a.widths))
    a.device, a.widths = pick_device(a.device), sorted(a.widths)
    a.dtype = pick_dtype(a.dtype, a.device)
    size = open_pretrained(a.init).config if a.init else GPTConfig(1, **SIZES[a.size])
    a.max_tokens_in_flight = a.max_tokens_in_flight or tokens_in_flight(size, a.device, a.dtype)
    a.out = a.out or Path("runs") / f"{a.task}-seed{a.seed}"
    fit(a, size, task, a.out)
    config = {k: v for k, v in vars(a).items() if k not in ("out", "resume")}
    task.check(a.problems, a.test_problems, a.seed)
    run = Run(a.out, config | {"dials": asdict(task)}, a.resume)
    run.stage("policies", lambda: policies(run, a))
    run.stage("rollouts", lambda: rollouts(run, a))
    run.stage("q_pi", lambda: verifier(run, a, "q_pi", "base", a.q_from, a.q_steps))
    run.stage("orm", lambda: verifier(run, a, "orm", "base", "q_pi", a.orm_steps, outcome_only))
    for mu in provers(a):
        run.stage(f"q_{mu}", lambda mu=mu: verifier(run, a, f"q_{mu}", mu, "q_pi", a.mu_steps))
    bench, seed = Bench(run), run.seed("evaluation")
    tables = [bench.measure(cell) for cell in cells(a, seed)]
    stages = [*TRAINED, *(f"q_{mu}" for mu in provers(a))]
    made = {"tables": [str(t.relative_to(run.out)) for t in tables], "stages": stages}
    run.stage("example", lambda: describe(bench, a, seed, tables) | made)
    report_training([run.out], run.out)
    run.close()


if __name__ == "__main__":
    main_guard(main)

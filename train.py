"""The whole of minipav, from nothing to a figure, in the order of the paper.

    python train.py                       # calculator, 2 CPU cores: 11 to 15 minutes; a GPU is used if there is one
    python train.py --smoke --out /tmp/x  # every stage at toy size, seconds
    python train.py --resume              # go on where an interrupted run stopped: same result as without the interruption

1 policies    SFT of the base policy pi, and of a weaker and a stronger prover
2 rollouts    seed rollouts, Monte-Carlo labels, first pits, wrong steps (section 4.2, App. D)
3 verifiers   Q^pi, the ORM, and Q^mu of both provers
4 evaluation  re-ranking and beam search on held-out problems (section 4.1)

Each stage writes into --out what the next one reads.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from minipav import report
from minipav.advantage import (
    Traces,
    complete,
    first_pit_data,
    high_value_branches,
    random_places,
    seed_rollouts,
    wrong_steps,
)
from minipav.evaluate import evaluate
from minipav.model import GPT, GPTConfig
from minipav.run import Run
from minipav.sft import train_policy
from minipav.tokenizer import pad_token
from minipav.utils import Fail, derive_seed, main_guard, pick_device, progress, tune_process
from minipav.verifier import outcome_only, train_verifier

SIZES = {"nano": dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=128),          # 0.1M parameters: the tests
         "mini": dict(),                                                               # 0.5M: the default
         "midi": dict(n_layer=6, n_head=8, n_kv_head=2, n_embd=256, n_ffn=640),         # 4M
         "maxi": dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, n_ffn=2048)}      # 76M: a GPU


def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    # run
    p.add_argument("--task", default="calculator", help="calculator or countdown")
    p.add_argument("--size", default="mini", help=f"of policies and verifiers: {', '.join(SIZES)}")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    p.add_argument("--seed", type=int, default=0, help="of everything; the same seed gives the same run on a machine")
    p.add_argument("--out", type=Path, help="run folder (default runs/TASK-seedS)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_argument("--smoke", action="store_true", help="toy size, to see every stage work")
    # difficulty
    p.add_argument("--H", type=int, help="calculator: most steps (8)")
    p.add_argument("--min_steps", type=int, help="calculator: steps that every problem needs (5)")
    p.add_argument("--numbers", type=int, help="countdown: how many numbers (4)")
    p.add_argument("--directed", type=float, default=0.15, help="share of the demonstrations that reach the target")
    # SFT
    p.add_argument("--sft_steps", type=int, default=400)
    p.add_argument("--weak_at", type=float, default=0.45, help="the weaker prover is the base after this share of its SFT")
    p.add_argument("--strong_steps", type=int, default=320, help="the stronger one: the base, trained on with ...")
    p.add_argument("--strong_directed", type=float, default=1.0, help="... this share of directed demonstrations")
    p.add_argument("--batch_size", type=int, default=256)
    p.add_argument("--lr_muon", type=float, default=0.02, help="0: AdamW alone")
    p.add_argument("--lr_adamw", type=float, default=3e-3)
    # rollouts
    p.add_argument("--top_p", type=float, default=0.98, help="nucleus of every sample of every policy; 1: all of it")
    p.add_argument("--problems", type=int, default=10000, help="training problems with seed rollouts of pi")
    p.add_argument("--n_cov", type=int, default=4, help="seed rollouts a problem")
    p.add_argument("--branches", type=int, default=40000, help="completions of prefixes of right seeds, n_mc a prefix")
    p.add_argument("--n_mc", type=int, default=3, help="completions a prefix; 4 n_mc up to a first pit")
    p.add_argument("--pit_traces", type=int, default=250, help="wrong branches that are searched for a first pit")
    p.add_argument("--pit_threshold", type=float, default=0.2, help="Q above which a state is a high-value one")
    p.add_argument("--wrong_share", type=float, default=0.15, help="seeds copied with a wrong step, like right branches; 0: none")
    p.add_argument("--mu_rollouts", type=int, default=20000, help="of each prover: half its own, half on from pi's prefixes")
    # verifiers
    p.add_argument("--q_steps", type=int, default=500, help="of Q^pi, which starts from the stronger policy")
    p.add_argument("--orm_steps", type=int, default=60, help="of the ORM, which starts from Q^pi")
    p.add_argument("--mu_steps", type=int, default=50, help="of each Q^mu, which starts from Q^pi")
    p.add_argument("--lr_muon_verifier", type=float, default=0.01)
    p.add_argument("--lr_adamw_verifier", type=float, default=1e-3)
    p.add_argument("--balance", action="store_true", help="weigh labels Q < .5 and Q >= .5 the same, as in the paper")
    # search
    p.add_argument("--test_problems", type=int, default=500)
    p.add_argument("--max_n", type=int, default=64, help="samples a problem for best-of-N")
    p.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16, 24], help="beam widths")
    p.add_argument("--alpha", type=float, default=0.2, help="weight of A^mu in the effective reward (Eq. 5)")
    p.add_argument("--K", type=int, default=4, help="the prover of the PAV beam is best-of-K of pi (Eq. 30)")
    p.add_argument("--max_tokens_in_flight", type=int, help="bound on rows x slots of the sampler's KV buffers")
    if p.parse_known_args(argv)[0].smoke:                       # toy defaults; flags given beside it still count
        p.set_defaults(size="nano", sft_steps=60, strong_steps=10, batch_size=64, problems=150, n_cov=4, branches=400,
                          n_mc=2, pit_traces=20, mu_rollouts=200, orm_steps=20, q_steps=25, mu_steps=8, test_problems=40,
                       max_n=8, widths=[1, 2])
    args = p.parse_args(argv)
    if args.size not in SIZES:
        raise Fail(f"--size {args.size}: unknown; choose one of {', '.join(SIZES)}")
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1 and name not in ("seed", "resume", "smoke", "balance"):
            raise Fail(f"--{name} {value}: must be at least 1")
    for name in ("directed", "strong_directed", "weak_at", "wrong_share", "pit_threshold", "top_p"):
        if not 0 <= getattr(args, name) <= 1:
            raise Fail(f"--{name} {getattr(args, name)}: must be between 0 and 1")
    for name in ("lr_muon", "lr_adamw", "lr_muon_verifier", "lr_adamw_verifier"):
        value = getattr(args, name)
        if not (value > 0 or value == 0 and "muon" in name):
            raise Fail(f"--{name} {value}: must be above 0 (for Muon also 0: AdamW alone)")
    if not args.alpha >= 0 or args.seed < 0 or min(args.widths) < 1:
        raise Fail(f"--alpha {args.alpha} and --seed {args.seed} must be 0 or more, --widths {args.widths} at least 1")
    if args.top_p == 0:
        raise Fail("--top_p 0: leaves no token to sample; use a value above 0")
    args.widths = sorted(set(args.widths))
    args.device = pick_device(args.device)
    if args.max_tokens_in_flight is None:                       # fp32 keys and values: 0.4 GB on a CPU, 4 GB on a GPU
        c = GPTConfig(vocab_size=1, **SIZES[args.size])
        a_slot = 8 * c.n_layer * c.n_kv_head * c.n_embd // c.n_head
        args.max_tokens_in_flight = (4 << 30 if args.device == "cuda" else 400 << 20) // a_slot
    args.out = args.out or Path("runs") / f"{args.task}-seed{args.seed}"
    return args


# ---- 1 policies -----------------------------------------------------------------------------------------------------

def policies(run, a, seed):
    """pi; the weaker prover is pi early in its training, the stronger one pi trained on with directed demonstrations."""
    torch.manual_seed(seed)
    room = 32 + 2 * run.task.max_new_tokens                     # a prompt, a long prefix, a whole completion behind it
    config = GPTConfig(vocab_size=run.enc.n_vocab, block_size=max(128, room), **SIZES[a.size])
    model = GPT(config).to(a.device)
    kw = dict(batch_size=a.batch_size, lr_muon=a.lr_muon, lr_adamw=a.lr_adamw)
    print(f"  {sum(p.numel() for p in model.parameters()):,} parameters on {a.device}")
    show = run.logger("base", a.sft_steps)

    def log(step, steps, loss):
        show(step, steps, loss)
        if step == max(1, int(a.weak_at * steps)):
            model.save(run.out / "weak")
    train_policy(model, run.enc, run.task, a.directed, steps=a.sft_steps, seed=seed, log=log, **kw)
    model.save(run.out / "base")
    train_policy(model, run.enc, run.task, a.strong_directed, steps=a.strong_steps, seed=seed + 1,
                 log=run.logger("strong", a.strong_steps), **kw)
    model.save(run.out / "strong")


# ---- 2 rollouts -----------------------------------------------------------------------------------------------------

def rollouts(run, a, seed):
    """Labelled traces of pi: seed rollouts, branches off right ones (its own and the stronger prover's), first pits, wrong
    steps; and of each prover: its own rollouts and its completions of pi's prefixes, which the search will ask about."""
    task, enc = run.task, run.enc
    rng, pad = np.random.default_rng(seed), pad_token(enc)
    base = run.model("base")
    for split, share in (("train", 1.0), ("validation", 0.05)):
        problems, s = run.problems(split, int(max(20, share * a.problems))), derive_seed(seed, split)
        n_mu = int(max(20, share * a.mu_rollouts // 2))
        with progress(f"seeds, {split}", len(problems) * a.n_cov) as bar:
            seeds = seed_rollouts(base, task, enc, problems, a.n_cov, s, progress=bar.to, **run.how)
        own = {}
        for name in ("weak", "strong"):
            own[name] = seed_rollouts(run.model(name), task, enc, [problems[i % len(problems)] for i in range(n_mu)], 1, s + 3,
                                      **run.how)
            own[name].problem %= len(problems)
            print(f"  {name}: {float(own[name].reward.mean()):.1%} right by itself")
        with progress(f"branches, {split}", int(share * a.branches)) as bar:
            branches, q = high_value_branches(base, task, enc, problems, Traces.cat([seeds, own["strong"]], pad), n_mc=a.n_mc,
                                              count=int(share * a.branches), seed=s + 1, rng=rng, progress=bar.to, **run.how)
        parts, wrong = [seeds, branches], seeds[:0]
        if a.wrong_share:
            some = Traces.cat([seeds[random_rows(seeds, a.wrong_share, rng)], branches[branches.reward == 1]], pad)
            wrong = wrong_steps(task, enc, problems, some, rng)
            parts.append(wrong)
        print(f"  {len(seeds):,} seeds, {float(seeds.reward.mean()):.1%} right, {distinct(seeds):.1%} distinct; "
              f"{len(branches):,} branches, {float(branches.reward.mean()):.1%} right")
        if split == "train":
            fell = ((q.repeat_interleave(a.n_mc) > a.pit_threshold) & (branches.reward == 0)).nonzero()[:, 0]
            fell = branches[fell[torch.from_numpy(rng.permutation(len(fell))[:a.pit_traces])]]
            if len(fell):
                parts.append(first_pit_data(base, task, enc, problems, fell, n_probe=a.n_mc, n_mc=4 * a.n_mc,
                                            threshold=a.pit_threshold, seed=s + 2, **run.how))
                print(f"  {len(parts[-1]):,} of {len(fell):,} wrong branches off a high-value state have a first pit")
        run.save_traces(f"base_{split}", Traces.cat(parts, pad))
        of_pi = Traces.cat([seeds, branches], pad)
        for name in ("weak", "strong"):
            rows = random_rows(of_pi, n_mu / len(of_pi), rng)
            places = random_places(of_pi.ends[rows], rng)
            again = complete(run.model(name), task, enc, problems, of_pi, rows, places, 1, s + 4, **run.how)
            few = wrong[random_rows(wrong, 2 * n_mu * a.wrong_share / max(1, len(wrong)), rng)]
            run.save_traces(f"{name}_{split}", Traces.cat([own[name], again, few], pad))


def random_rows(traces, share, rng):
    """Row indices of a random share (at least one row, at most all)."""
    n = min(len(traces), max(1, round(share * len(traces))))
    return torch.from_numpy(rng.permutation(len(traces))[:n])


def distinct(traces):
    """Share of the rollouts that no other rollout equals."""
    return len(torch.unique(traces.tokens, dim=0)) / len(traces)


# ---- 3 verifiers ----------------------------------------------------------------------------------------------------

def verifier(run, a, seed, name, data, init, steps, select=lambda traces: traces):
    """Train one verifier and report it on held-out problems."""
    model, r = train_verifier(
        run.model(init), select(run.traces(f"{data}_train")), select(run.traces(f"{data}_validation")), steps=steps,
        batch_size=a.batch_size, lr_muon=a.lr_muon_verifier, lr_adamw=a.lr_adamw_verifier, seed=seed,
        log=run.logger(name, steps), balance=a.balance)
    model.save(run.out / name)
    print(f"  Brier {r.brier:.4f}  AUC {r.auc:.3f}  cross-entropy {r.loss:.4f}\n"
          "    step    labels  predicted  observed     Brier")
    for h, n, predicted, observed, brier in r.steps:
        print(f"    {h:>4}{n:>10}{predicted:>11.4f}{observed:>10.4f}{brier:>10.4f}")
    report.write_csv(run.out / name / "held_out.csv", ["step", "labels", "predicted", "observed", "brier"], r.steps)


def main():
    args = get_args()
    tune_process()
    run = Run(args.out, {k: v for k, v in vars(args).items() if k not in ("out", "resume")}, args.resume)
    run.stage("policies", lambda s: policies(run, args, s))
    run.stage("rollouts", lambda s: rollouts(run, args, s))
    run.stage("q_pi", lambda s: verifier(run, args, s, "q_pi", "base", "strong", args.q_steps))
    run.stage("orm", lambda s: verifier(run, args, s, "orm", "base", "q_pi", args.orm_steps, outcome_only))
    run.stage("q_weak", lambda s: verifier(run, args, s, "q_weak", "weak", "q_pi", args.mu_steps))
    run.stage("q_strong", lambda s: verifier(run, args, s, "q_strong", "strong", "q_pi", args.mu_steps))
    run.stage("evaluation", lambda s: evaluate(run, s, test_problems=args.test_problems, max_n=args.max_n,
                                               widths=args.widths, alpha=args.alpha, K=args.K))
    report.finish(run, f"{args.task}, {args.size}, seed {args.seed}")


if __name__ == "__main__":
    main_guard(main)

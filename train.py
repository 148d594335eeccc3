"""The whole of minipav, from nothing to a figure, in the order of the paper.

    python train.py                       # calculator, 2 CPU cores: about 13 minutes; a GPU is used if there is one
    python train.py --smoke --out /tmp/x  # every stage at toy size, seconds
    python train.py --resume              # go on where an interrupted run stopped: same result as without the interruption

1 policies    SFT of the base policy pi, and of a weaker and a stronger prover
2 rollouts    seed rollouts, Monte-Carlo labels, first pits, wrong steps (section 4.2, App. D)
3 verifiers   the ORM, Q^pi, and Q^mu of both provers
4 evaluation  re-ranking and beam search on held-out problems (section 4.1)

Each stage writes into --out what the next one reads.
"""
import argparse
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minipav import report
from minipav.advantage import Traces, advantage, complete, effective_reward, first_pit_data, monte_carlo, q_best_of_k
from minipav.advantage import seed_rollouts, wrong_steps
from minipav.model import GPT, GPTConfig
from minipav.search import beam_search, best_of_n, majority_vote, pass_at_n
from minipav.sft import train_policy
from minipav.tasks import get_task
from minipav.tokenizer import decode_rows, pad_token, synthetic_encoding
from minipav.utils import Fail, derive_seed, main_guard, pick_device, progress, tune_process, write_whole
from minipav.verifier import outcome_only, score, train_verifier

SIZES = {"nano": dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=128),          # 0.1M parameters: the tests
         "mini": dict(),                                                               # 0.5M: the default
         "midi": dict(n_layer=6, n_head=8, n_kv_head=2, n_embd=256, n_ffn=640),         # 4M
         "maxi": dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, n_ffn=2048)}      # 80M: a GPU


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
    p.add_argument("--min_steps", type=int, help="calculator: steps that every problem needs (4)")
    p.add_argument("--numbers", type=int, help="countdown: how many numbers (4)")
    p.add_argument("--directed", type=float, default=0.15, help="share of the demonstrations that reach the target")
    # SFT
    p.add_argument("--sft_steps", type=int, default=500)
    p.add_argument("--weak_at", type=float, default=0.45, help="the weaker prover is the base after this share of its SFT")
    p.add_argument("--strong_steps", type=int, default=150, help="the stronger one: the base, trained on with ...")
    p.add_argument("--strong_directed", type=float, default=1.0, help="... this share of directed demonstrations")
    p.add_argument("--batch_size", type=int, default=128)
    p.add_argument("--lr_muon", type=float, default=0.02)
    p.add_argument("--lr_adamw", type=float, default=3e-3)
    # rollouts
    p.add_argument("--problems", type=int, default=15000, help="training problems with seed rollouts of pi")
    p.add_argument("--n_cov", type=int, default=4, help="seed rollouts a problem")
    p.add_argument("--pit_seeds", type=int, default=2000, help="seed rollouts probed for a first pit")
    p.add_argument("--n_probe", type=int, default=4, help="completions a prefix when probing")
    p.add_argument("--n_mc", type=int, default=16, help="completions a prefix up to the pit")
    p.add_argument("--pit_threshold", type=float, default=0.2, help="Q above which a state is a high-value one")
    p.add_argument("--wrong_share", type=float, default=0.15, help="traces with a wrong step, as a share of the seeds")
    p.add_argument("--mu_problems", type=int, default=10000, help="rollouts of each prover of its own, and as many of pi")
    # verifiers
    p.add_argument("--verifier_steps", type=int, default=600, help="of the ORM and of Q^pi")
    p.add_argument("--mu_steps", type=int, default=150, help="of each Q^mu, which starts from Q^pi")
    p.add_argument("--lr_muon_verifier", type=float, default=0.01)
    p.add_argument("--lr_adamw_verifier", type=float, default=1e-3)
    p.add_argument("--balance", action="store_true", help="weigh labels Q < .5 and Q >= .5 the same, as in the paper")
    # search
    p.add_argument("--test_problems", type=int, default=500)
    p.add_argument("--max_n", type=int, default=64, help="samples a problem for best-of-N")
    p.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="beam widths")
    p.add_argument("--alpha", type=float, default=0.5, help="weight of A^mu in the effective reward (Eq. 5)")
    p.add_argument("--K", type=int, default=16, help="the prover of the PAV beam is best-of-K of pi (Eq. 30)")
    p.add_argument("--max_tokens_in_flight", type=int, help="bound on rows x slots of the sampler's KV buffers")
    args = p.parse_args(argv)
    if args.smoke:
        args.size = "nano"
        vars(args).update(sft_steps=60, strong_steps=10, batch_size=64, problems=150, n_cov=4, pit_seeds=40, n_probe=2,
                          n_mc=4, mu_problems=100, verifier_steps=25, mu_steps=8, test_problems=40, max_n=8, widths=[1, 2])
    if args.size not in SIZES:
        raise Fail(f"--size {args.size}: unknown; choose one of {', '.join(SIZES)}")
    for name, value in vars(args).items():
        if isinstance(value, int) and value < 1 and name not in ("seed", "resume", "smoke", "balance"):
            raise Fail(f"--{name} {value}: must be at least 1")
    for name in ("directed", "strong_directed", "weak_at", "wrong_share", "pit_threshold"):
        if not 0 <= getattr(args, name) <= 1:
            raise Fail(f"--{name} {getattr(args, name)}: must be between 0 and 1")
    if args.alpha < 0 or min(args.widths) < 1:
        raise Fail(f"--alpha {args.alpha} must be 0 or more and --widths {args.widths} at least 1")
    args.widths = sorted(set(args.widths))
    args.device = pick_device(args.device)
    args.max_tokens_in_flight = args.max_tokens_in_flight or (1 << 18 if args.device == "cpu" else 1 << 22)
    args.out = args.out or Path("runs") / f"{args.task}-seed{args.seed}"
    return args


class Run:
    """The run folder: its configuration, its stages, their clock, and the log of every training step."""

    def __init__(self, args):
        self.args, self.out = args, args.out
        self.config = {k: v for k, v in vars(args).items() if k not in ("resume", "out")}
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Fail(f"--out {self.out}: cannot make this folder ({e.strerror})") from None
        path = self.out / "config.json"
        if path.exists():
            if not args.resume:
                raise Fail(f"--out {self.out} already holds a run: add --resume to go on with it, or choose another --out")
            try:
                old = json.loads(path.read_text())
            except ValueError:
                raise Fail(f"{path} is damaged: delete the folder or choose another --out") from None
            for k, v in self.config.items():
                if old.get(k) != v:
                    raise Fail(f"--{k} is {v}, but the run in {self.out} was started with {old.get(k)}: "
                               "repeat its flags to resume it, or choose another --out")
        write_whole(path, lambda p: p.write_text(json.dumps(self.config, indent=1)))
        stages = self.out / "stages.json"
        self.stages = json.loads(stages.read_text()) if stages.exists() else {}
        self.task = get_task(args.task, H=args.H, min_steps=args.min_steps, numbers=args.numbers)
        self.enc = synthetic_encoding(self.task.phrases)
        self.how = dict(max_tokens_in_flight=args.max_tokens_in_flight)

    def stage(self, name, work):
        """Run work() unless a finished run of it is on disk; its result counts once `name` is in stages.json."""
        if name in self.stages:
            print(f"{name}: done before")
            return
        print(name, flush=True)
        start, rows = time.time(), []
        self.log_rows = rows
        work(self.seed(name))
        log = self.out / "log.csv"
        old = log.read_text() if log.exists() else "stage,step,loss,held_out_loss\n"
        write_whole(log, lambda p: p.write_text(old + "".join(f"{name},{r}\n" for r in rows)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
        self.stages[name] = {"seconds": round(time.time() - start, 1), "peak_memory_gb": round(peak, 2)}
        write_whole(self.out / "stages.json", lambda p: p.write_text(json.dumps(self.stages, indent=1)))

    def seed(self, *names):
        return derive_seed(self.args.seed, *names)

    def logger(self, name, steps):
        """log(step, steps, loss, held-out loss) -> a bar on the screen and a row of log.csv."""
        bar = progress(name, steps)

        def log(step, steps, loss, held_out=float("nan")):
            bar.set_postfix_str(f", loss {loss:.3f}" + ("" if held_out != held_out else f", held out {held_out:.4f}"), False)
            bar.update()
            self.log_rows.append(f"{step},{loss:.5f},{held_out:.5f}")
            if step == steps:
                bar.close()
        return log

    def model(self, name):
        return GPT.load(self.out / name, self.args.device)

    def problems(self, split, n):
        return self.task.problems(split, n, self.args.seed)

    def save_traces(self, name, traces):
        state = {f.name: getattr(traces, f.name).contiguous() for f in dataclasses.fields(Traces)}
        write_whole(self.out / f"{name}.safetensors", lambda p: save_file(state, p))

    def traces(self, name):
        return Traces(**load_file(self.out / f"{name}.safetensors"))


# ---- 1 policies -----------------------------------------------------------------------------------------------------

def policies(run, seed):
    """pi; the weaker prover is pi early in its training, the stronger one pi trained on with directed demonstrations."""
    a = run.args
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=run.enc.n_vocab, block_size=128, **SIZES[a.size])
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

def rollouts(run, seed):
    """Labelled traces of pi: its seed rollouts (one free label a prefix), first pits, wrong steps; and of each prover:
    its own rollouts and its completions of pi's prefixes, which are what the search will ask about."""
    a, task, enc = run.args, run.task, run.enc
    rng, pad = np.random.default_rng(seed), pad_token(enc)
    base = run.model("base")
    for split, n in (("train", a.problems), ("validation", max(20, a.problems // 20))):
        problems, s = run.problems(split, n), derive_seed(seed, split)
        bar = progress(f"seeds, {split}", n * a.n_cov)
        seeds = seed_rollouts(base, task, enc, problems, a.n_cov, s, progress=lambda d: bar.update(d - bar.n), **run.how)
        bar.close()
        wrong = wrong_steps(task, enc, problems, seeds[random_rows(seeds, a.wrong_share, rng)], rng)
        parts = [seeds, wrong]
        if split == "train":
            pits = first_pit_data(base, task, enc, problems, seeds[random_rows(seeds, a.pit_seeds / len(seeds), rng)],
                                  n_probe=a.n_probe, n_mc=a.n_mc, threshold=a.pit_threshold, seed=s + 1, **run.how)
            parts.append(pits)
            print(f"  {len(seeds):,} seeds, {float(seeds.reward.mean()):.1%} right, {distinct(seeds):.1%} distinct; "
                  f"{len(pits):,} of {a.pit_seeds:,} have a first pit")
        run.save_traces(f"base_{split}", Traces.cat(parts, pad))
        for name in ("weak", "strong"):
            mu, n_mu = run.model(name), a.mu_problems if split == "train" else max(20, a.mu_problems // 20)
            own = seed_rollouts(mu, task, enc, problems[:n_mu], 1, s + 2, **run.how)
            rows = random_rows(seeds, n_mu / len(seeds), rng)
            steps = (seeds.ends[rows] >= 0).sum(1) - 1                          # a place before the last one
            places = (torch.from_numpy(rng.random(len(rows))) * steps).long()
            of_pi = complete(mu, task, enc, problems, seeds, rows, places, 1, s + 3, **run.how)
            few = wrong[random_rows(wrong, n_mu * 2 * a.wrong_share / len(wrong), rng)]
            run.save_traces(f"{name}_{split}", Traces.cat([own, of_pi, few], pad))
            print(f"  {name}: {float(own.reward.mean()):.1%} right by itself")


def random_rows(traces, share, rng):
    """Row indices of a random share (at least one row, at most all)."""
    n = min(len(traces), max(1, round(share * len(traces))))
    return torch.from_numpy(rng.permutation(len(traces))[:n])


def distinct(traces):
    """Share of the rollouts that no other rollout equals."""
    return len(torch.unique(traces.tokens, dim=0)) / len(traces)


# ---- 3 verifiers ----------------------------------------------------------------------------------------------------

def verifiers(run, seed, name, data, init, steps, select=lambda traces: traces):
    """Train one verifier and report it on held-out problems."""
    a = run.args
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


# ---- 4 evaluation ---------------------------------------------------------------------------------------------------

def evaluation(run, seed):
    """Every method on the test problems: per-problem accuracy and tokens, saved for the report."""
    a, task, enc = run.args, run.task, run.enc
    base, orm, q_pi = run.model("base"), run.model("orm"), run.model("q_pi")
    problems = run.problems("test", a.test_problems)
    P, M = len(problems), a.max_n
    greedy = seed_rollouts(base, task, enc, problems, 1, seed, temperature=0, **run.how)
    bar = progress("samples", P * M)
    s = seed_rollouts(base, task, enc, problems, M, seed, progress=lambda d: bar.update(d - bar.n), **run.how)
    bar.close()
    last = (s.ends >= 0).sum(1, keepdim=True) - 1
    end, finished = s.ends.gather(1, last), s.tokens[torch.arange(P * M), s.lengths - 1] == enc.eot_token
    ranks = {m: torch.where(finished, score(v, s.tokens, end)[:, 0], -1.0).view(P, M) for m, v in (("orm", orm), ("best_q", q_pi))}
    texts = [t.removeprefix(task.prompt(problems[i])) for i, t in zip(s.problem.tolist(), decode_rows(enc, s.tokens, s.lengths))]
    reward = s.reward.view(P, M)
    tokens = (s.lengths - s.ends[:, 0] - 1).view(P, M).float().mean(1)          # of one rollout, a mean for each problem
    verdicts = [task.judge(problems[i], t) for i, t in zip(s.problem.tolist(), texts)]
    answers = [[task.answer(t) for t in texts[i * M:(i + 1) * M]] for i in range(P)]

    ns = [2 ** k for k in range(M.bit_length()) if 2 ** k <= M]
    points = {"greedy": [(1, greedy.reward, (greedy.lengths - greedy.ends[:, 0] - 1).float())],
              "sample": [(1, reward.mean(1), tokens)],
              "majority": [(n, majority_vote(answers, reward, n), n * tokens) for n in ns],
              "orm": [(n, best_of_n(ranks["orm"], reward, n), n * tokens) for n in ns],
              "best_q": [(n, best_of_n(ranks["best_q"], reward, n), n * tokens) for n in ns],
              "pass": [(n, pass_at_n(reward, n), n * tokens) for n in ns]}
    shown = None
    for method, alpha in (("q_beam", 0.0), ("pav_beam", a.alpha)):
        bar, points[method] = progress(method, sum(a.widths)), []
        for width in a.widths:
            r = beam_search(base, q_pi, task, enc, problems, width=width, alpha=alpha, K=a.K, seed=seed, **run.how)
            points[method].append((width, r.reward, r.tokens.float()))
            bar.set_postfix_str(f", width {width}: {float(r.reward.mean()):.3f} at {float(r.tokens.float().mean()):.0f} tokens", False)
            bar.update(width)
            if method == "pav_beam" and r.reward.any():
                shown = int(r.reward.argmax()), r.responses[int(r.reward.argmax())]
        bar.close()
    state = {}
    for m, rows in points.items():
        n, acc, tok = zip(*rows)
        state |= {f"{m}/n": torch.tensor(n), f"{m}/acc": torch.stack(acc), f"{m}/tokens": torch.stack(tok)}
    write_whole(run.out / "eval.safetensors", lambda p: save_file(state, p))
    failures = [v for v in verdicts if v != "right"]
    facts = {"base_sampled": round(float(reward.mean()), 4), "base_greedy": round(float(greedy.reward.mean()), 4),
             "planning_failure_share": round(failures.count("planning") / max(1, len(failures)), 4)}
    write_whole(run.out / "facts.json", lambda p: p.write_text(json.dumps(facts)))
    text = explain(run, problems[shown[0]], shown[1], q_pi) if shown else "no problem was solved\n"
    write_whole(run.out / "example.txt", lambda p: p.write_text(text))


def explain(run, problem, response, q_pi):
    """One solved problem as text, each step with Q^pi, Q^mu, A^mu and the effective reward beside it."""
    a, prompt, task = run.args, run.task.prompt(problem), run.task
    from minipav.advantage import label_with_outcome
    from minipav.tokenizer import encode_rows
    tokens, lengths = encode_rows(run.enc, [prompt + response])
    t = label_with_outcome(task, run.enc, [problem], torch.tensor([0]), tokens, lengths, encode_rows(run.enc, [prompt])[1])
    q = score(q_pi, t.tokens, t.ends)[0]
    mu = q_best_of_k(q, a.K)
    adv = advantage(mu)
    mc = monte_carlo(run.model("base"), task, run.enc, [problem], t, t.ends >= 0, 256, run.seed("example"), **run.how)
    lines = [f"{prompt.strip()}", f"{'':<32}{'Q^pi':>8}{'(256 rollouts)':>16}{f'Q^Bo{a.K}':>9}{'A^mu':>8}{'Q+aA':>8}",
             f"{'(the bare prompt)':<32}{q[0]:>8.3f}{mc.q[0, 0]:>16.3f}{mu[0]:>9.3f}"]
    for h, step in enumerate(task.steps(response)):
        lines.append(f"{step:<32}{q[h + 1]:>8.3f}{mc.q[0, h + 1]:>16.3f}{mu[h + 1]:>9.3f}{adv[h]:>8.3f}"
                     f"{effective_reward(q[h + 1], adv[h], a.alpha):>8.3f}")
    return "\n".join(lines) + "\n"


def finish(run):
    """The table, the figure, the summary and the example, from the files of the stages."""
    a = run.args
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10,
                                cwd=Path(__file__).parent).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    device = torch.cuda.get_device_name() if a.device == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    facts = {"command": "python " + " ".join(sys.argv), "commit": commit, "config": run.config, "seeds": [a.seed],
             "hardware": f"{device}, torch {torch.__version__}",
             "minutes": round(sum(s["seconds"] for s in run.stages.values()) / 60, 2),
             "peak_memory_gb": max(s["peak_memory_gb"] for s in run.stages.values()),
             **json.loads((run.out / "facts.json").read_text())}
    text, summary = report.write_report([report.Curves(run.out / "eval.safetensors")], run.out,
                                        f"{a.task}, {a.size}, seed {a.seed}", facts)
    print(f"\n{text}\n\n{(run.out / 'example.txt').read_text()}\n"
          f"base policy: {summary['base_sampled']:.1%} sampled, {summary['base_greedy']:.1%} greedy; "
          f"{summary['planning_failure_share']:.1%} of its failures are planning failures")
    for name in ("pav_minus_orm_points", "token_ratio_to_match_best_orm"):
        print(f"{name}: {json.dumps(summary[name])}")
    print(f"\n{summary['minutes']:.1f} minutes, {summary['peak_memory_gb']:.1f} GB; written to {run.out}: table.txt, "
          f"accuracy.png, curves.csv, summary.json, example.txt, log.csv\n"
          f"next: another --seed, then python -m minipav.report {run.out} ... --out DIR for the mean over seeds")


def main():
    args = get_args()
    tune_process()
    run = Run(args)
    run.stage("policies", lambda s: policies(run, s))
    run.stage("rollouts", lambda s: rollouts(run, s))
    run.stage("orm", lambda s: verifiers(run, s, "orm", "base", "base", args.verifier_steps, outcome_only))
    run.stage("q_pi", lambda s: verifiers(run, s, "q_pi", "base", "base", args.verifier_steps))
    run.stage("q_weak", lambda s: verifiers(run, s, "q_weak", "weak", "q_pi", args.mu_steps))
    run.stage("q_strong", lambda s: verifiers(run, s, "q_strong", "strong", "q_pi", args.mu_steps))
    run.stage("evaluation", lambda s: evaluation(run, s))
    finish(run)


if __name__ == "__main__":
    main_guard(main)

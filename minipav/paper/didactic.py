"""The didactic example (section 3.3, App. B): find a planted sub-sequence, with a prover that half knows it.

    python -m minipav.paper.didactic                      # Fig. 3, 3 seeds
    python -m minipav.paper.didactic --seeds 10 --all     # where the paper's gap holds, and where it does not

The task and the policy are in planted.py. A condition is (alpha, gamma, baseline): the reward of Eq. 5 with
the prover mu_gamma; baseline: minus its mean over the policy's actions. All conditions x seeds train at once.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch

from minipav.files import write_csv, write_json
from minipav.paper.figures import draw, over_runs
from minipav.paper.planted import EOS, Made, Planted
from minipav.utils import Fail, command, commit, hardware, main_guard, progress

GAMMAS = [1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 100]
BATCH, LR, EVERY, PROBE = 64, 1e-3, 10, 100     # accuracy is measured EVERY 10 iterations, with care at PROBE


def log_likelihood(logp, x):
    """log pi (..., L) of the tokens x (..., L), 0 behind the end token; and 1 up to the end token, else 0."""
    end = (x == EOS).long()
    alive = (end.cumsum(-1) == end).float()
    return logp.gather(-1, x[..., None])[..., 0] * alive, alive


def update(adam, loss):
    loss.backward()
    adam.step()
    adam.zero_grad()


def base_policies(task, seeds, steps):
    """SFT on samples of mu_5, one policy a seed (App. B)."""
    pi = Made(seeds, task.L)
    adam = torch.optim.Adam(pi.parameters(), lr=LR)
    demos = [task.demos(BATCH * steps, 5.0, torch.Generator().manual_seed(s + 1)) for s in seeds]
    for x in torch.stack(demos).split(BATCH, 1):
        logp, alive = log_likelihood(pi(x), x)
        update(adam, -logp.sum() / alive.sum() * len(seeds))        # one mean for all: Adam forgets the scale
    return pi


def mc_q(pi, task, x, n_mc, generator):
    """Monte-Carlo Q^pi after each token, V^pi before it, each (E, B, L): n_mc rollouts a prefix (Eq. 1)."""
    E, B, L = x.shape
    q = torch.zeros(E, B, L + 1)
    for p in range(L):
        u, prefix = torch.rand(E, B * n_mc, L, generator=generator), x[:, :, :p].repeat_interleave(n_mc, 1)
        q[:, :, p] = task.reward(pi.sample(u, prefix.unbind(-1))).view(E, B, n_mc).mean(-1)
    q[:, :, L] = task.reward(x)
    return q[:, :, 1:], q[:, :, :-1]


def train(task, conditions, seeds, iterations, *, n_mc=0, sft=50, name="RL"):
    """SFT, then REINFORCE with Eq. 5 for each condition x seed. n_mc: rollouts a prefix for Q^pi; 0: the
    outcome stands for it, its batch mean for V^pi. -> accuracy (conditions, seeds, iterations / EVERY + 1)"""
    C, S, pi = len(conditions), len(seeds), base_policies(task, seeds, sft)
    for p in pi.parameters():                                           # E = C x S members: condition-major
        p.data = p.data.repeat(C, 1, 1)
    adam, generator = torch.optim.Adam(pi.parameters(), lr=LR), torch.Generator().manual_seed(seeds[0] + 2)
    # alpha A^mu of every action, (E, L, states, V)
    A = torch.stack([alpha * task.advantage(gamma) for alpha, gamma, _ in conditions]).repeat_interleave(S, 0)
    baseline = torch.tensor([float(b) for _, _, b in conditions]).repeat_interleave(S)[:, None, None]
    member, place, curve = torch.arange(C * S)[:, None, None], torch.arange(task.L), []

    def sample(n):                                                      # the conditions share their luck
        return pi.sample(torch.rand(S, n, task.L, generator=generator).repeat(C, 1, 1))
    with progress(name, iterations) as bar:
        for i in range(iterations + 1):
            if i > 0:
                x = sample(BATCH)
                logp, k, reward = pi(x), task.states(x)[..., :-1], task.reward(x)[..., None]
                q, v = mc_q(pi, task, x, n_mc, generator) if n_mc else (reward, reward.mean(1, keepdim=True))
                mean = v + (logp.detach().exp() * A[member, place, k]).sum(-1)  # E_{a~pi}[Q^pi + alpha A^mu]
                w = q + A[member, place, k, x] - baseline * mean    # Eq. 5, each step its own: never summed
                update(adam, -(w * log_likelihood(logp, x)[0]).sum() / BATCH)
                bar.update()
            if i % EVERY == 0:
                times = 16 if i in (0, PROBE) else 1
                right = [task.reward(sample(256)).mean(1) for _ in range(times)]
                curve.append(torch.stack(right).mean(0).view(C, S))
    return torch.stack(curve, -1)


def to_90(accuracy):
    """Iterations (...) until accuracy (..., T) first reaches .9; infinite if it never does."""
    hit = accuracy >= 0.9
    return torch.where(hit.any(-1), hit.int().argmax(-1) * float(EVERY), float("inf"))


def measure(summary, rows, name, task, conditions, seeds, iterations, **how):
    """Train; note in the summary and the rows of map.csv how soon each condition reaches 90%. -> accuracy"""
    accuracy = train(task, list(conditions.values()), seeds, iterations, name=name, **how)
    start = summary["start"][name] = [round(x, 5) for x in accuracy[0, :, 0].tolist()]
    summary["horizon"][name], summary["iterations_to_90"][name], median = iterations, {}, {}
    for c, hits in zip(conditions, to_90(accuracy).numpy()):
        median[c], solved = float(np.median(hits)), [int(h) for h in hits if h < np.inf]
        summary["iterations_to_90"][name][c] = [int(h) if h < np.inf else None for h in hits]
        rows.append((name, c, round(float(np.mean(start)), 5), len(solved), len(hits),
                     median[c] if median[c] < np.inf else "",
                     min(solved, default=""), max(solved, default="")))
    for end in ("", ", none", ", baseline"):
        if "gamma 10" + end in median:
            ours, q = median["gamma 10" + end], median["only Q" + end]          # q infinite: at least this
            summary["ratio_of_medians"][f"{name}; gamma 10{end}"] = {           # 0: it never gets there
                "ratio": round(min(q, iterations) / ours, 2), "at_least": ours <= iterations < q}
    return accuracy


def fig3(summary, rows, out, label, baseline, seeds, iterations):
    """Fig. 3: learning curves, accuracy by the prover's gamma, pass@N."""
    conditions = {"only Q": (0, 10, baseline), **{f"gamma {g}": (1, g, baseline) for g in GAMMAS}}
    accuracy = measure(summary, rows, f"Fig. 3, {label}", Planted(), conditions, seeds, iterations)
    two = {"Q + A^mu, gamma 10": accuracy[1 + GAMMAS.index(10)], "only Q": accuracy[0]}
    mean, steps, N = accuracy.mean(-1), range(0, iterations + 1, EVERY), 2 ** np.arange(1, 9)

    def pass_at(p):
        return over_runs(N, 1 - (1 - p.numpy()[:, None]) ** N)
    draw(out / f"fig3_{label.split()[0]}", f"Fig. 3, {label} ({len(seeds)} seeds: mean, lowest, highest)", [
        ("3a", "iteration", "accuracy", {k: over_runs(steps, a) for k, a in two.items()}),
        ("3b", "gamma of the prover", "accuracy, mean over the run", {
            "Q + A^mu": over_runs(GAMMAS, mean[1:].T),
            "only Q": over_runs(GAMMAS, mean[:1].T.expand(-1, len(GAMMAS)))}),
        ("3c, iteration 100", "N", "pass@N", {
            **{k: pass_at(a[:, PROBE // EVERY]) for k, a in two.items()},
            "after SFT": pass_at(accuracy[0, :, 0])})])
    summary["useful_gamma"][label] = [g for g, x in zip(GAMMAS, mean[1:].mean(1)) if x > mean[0].mean()]


def whole_map(summary, rows, seeds, iterations):
    """Readings of the task, longer SFT, longer y*, Monte-Carlo Q^pi."""
    both = {f"{name}, {b}": (alpha, gamma, b == "baseline") for b in ("none", "baseline")
            for name, alpha, gamma in (("gamma 10", 1, 10), ("gamma 20", 1, 20), ("only Q", 0, 10))}
    few = {name: c for name, c in both.items() if "20" not in name}
    measure(summary, rows, "with gaps", Planted(gaps=True), both, seeds, iterations)
    for sft in (200, 800):
        measure(summary, rows, f"SFT {sft}", Planted(), both, seeds, iterations, sft=sft)
    for y in ((3, 6, 0, 3, 5, 1), (3, 6, 0, 3, 5, 1, 8)):
        measure(summary, rows, f"{len(y)} tokens", Planted(y), both, seeds, 2 * iterations)
    measure(summary, rows, "Monte-Carlo Q, 100 rollouts", Planted(), few, seeds[:3], 100, n_mc=100)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--all", action="store_true", help="the map: readings, longer y* and SFT, Monte-Carlo Q")
    p.add_argument("--iterations", type=int, default=1000)
    p.add_argument("--out", type=Path, default=Path("runs/didactic"))
    args = p.parse_args()
    if args.seeds < 1 or args.iterations < 100:
        raise Fail(f"--seeds {args.seeds} must be at least 1 and --iterations {args.iterations} at least 100")
    start, seeds, rows, out = time.time(), list(range(args.seeds)), [], args.out
    exact = {g: float(Planted().values(Planted().prover(g))[1][0, 0]) for g in GAMMAS}
    print("exact V^mu(s0): " + ", ".join(f"gamma {g}: {v:.4f}" for g, v in exact.items()))
    summary = {"command": command(), "seeds": seeds, "commit": commit(), "hardware": hardware("cpu"),
               "V_mu": exact, "horizon": {},
               "iterations_to_90": {}, "start": {}, "useful_gamma": {}, "ratio_of_medians": {}}
    for label, baseline in (("no baseline", False), ("state baseline", True)):
        fig3(summary, rows, out, label, baseline, seeds, args.iterations)
    if args.all:
        whole_map(summary, rows, seeds, args.iterations)
    write_csv(out / "map.csv", ["setting", "reward", "accuracy after SFT", "seeds at 90%", "seeds",
                                "median iterations to 90%", "first", "last"], rows)
    summary["minutes"] = round((time.time() - start) / 60, 2)
    write_json(out / "summary.json", summary)
    print(f"{summary['minutes']} minutes; in {out}: fig3_no, fig3_state (PNG and CSV), map.csv, summary.json")


if __name__ == "__main__":
    main_guard(main)

"""The didactic example (section 3.3, App. B): find a planted sub-sequence, with a prover that half knows it.

    python -m minipav.didactic                      # Fig. 3, 3 seeds
    python -m minipav.didactic --seeds 10 --all     # where the paper's gap holds, and where it does not

The task and the policy are in minipav/planted.py. Every curve of a figure is one member of an ensemble that is trained at once.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from minipav.figures import draw
from minipav.planted import EOS, Made, Planted
from minipav.report import write_csv
from minipav.run import commit, hardware
from minipav.utils import Fail, main_guard, progress, write_whole


def mc_q(model, task, tokens, n_mc, generator):
    """Monte-Carlo Q^pi after each token and V^pi before it, each (E, B, L): fresh rollouts, n_mc a prefix (Eq. 1)."""
    E, B, L = tokens.shape
    q = torch.zeros(E, B, L + 1)
    for p in range(L):
        again = tokens[:, :, :p].repeat_interleave(n_mc, 1) if p else None
        done = model.sample(torch.rand(E, B * n_mc, L, generator=generator), again)
        q[:, :, p] = (task.states(done)[..., -1] == task.m).float().view(E, B, n_mc).mean(-1)
    q[:, :, L] = (task.states(tokens)[..., -1] == task.m).float()
    return q[:, :, 1:], q[:, :, :-1]


def train(task, conditions, seeds, iterations, *, n_mc=0, sft=50, batch=64, lr=1e-3, every=10, name="RL", probe=100):
    """SFT on mu_5, then REINFORCE with Eq. 5 for each condition x seed. A condition is a dict: alpha, gamma (of the prover),
    baseline (True: minus E_{a~pi}[Q^pi + alpha A^mu] at the state). n_mc: rollouts a prefix for Q^pi; 0: a trace's outcome
    stands for it, and the mean outcome of the batch for V^pi.
    -> {"accuracy" (conditions, seeds, iterations / every), "at_probe": accuracy at iteration `probe`, "start"}."""
    S, C = len(seeds), len(conditions)
    model = Made(seeds, task.L)
    demos = torch.stack([task.demos(batch * sft, 5.0, torch.Generator().manual_seed(s + 1)) for s in seeds])
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    for i in range(sft):
        x = demos[:, i * batch:(i + 1) * batch]
        logp, alive = _chosen(model(x), x), _alive(x)
        (-(logp * alive).sum() / alive.sum() * S).backward()                    # one mean for all: Adam forgets the scale
        opt.step()
        opt.zero_grad()
    model = model.expand([s for _ in range(C) for s in range(S)])               # members: condition-major
    opt = torch.optim.Adam(model.parameters(), lr=lr)
    alpha, base = (torch.tensor([float(c[k]) for c in conditions for _ in seeds])[:, None, None] for k in ("alpha", "baseline"))
    tables = [task.values(task.prover(c["gamma"])) for c in conditions for _ in seeds]
    A = torch.stack([(Q - v[:-1, :, None]).float() for Q, v in tables])         # (E, L, states, V) A^mu of every action
    gen = torch.Generator().manual_seed(seeds[0] + 2)
    curve, member, at = [], torch.arange(C * S)[:, None, None], torch.arange(task.L)
    with progress(name, iterations) as bar:
        for i in range(iterations + 1):
            if i % every == 0 or i == probe:
                acc = torch.stack([(task.states(model.sample(torch.rand(S, 256, task.L, generator=gen).repeat(C, 1, 1)))[..., -1]
                                    == task.m).float().mean(1) for _ in range(16 if i in (0, probe) else 1)]).mean(0).view(C, S)
                curve += [acc] if i % every == 0 else []
                if i == probe:
                    at_probe = acc
                bar.set_postfix_str(f", accuracy {acc.mean(1).min():.2f} to {acc.mean(1).max():.2f}", False)
            if i == iterations:
                break
            x = model.sample(torch.rand(S, batch, task.L, generator=gen).repeat(C, 1, 1))      # the conditions share their luck
            k, logp = task.states(x), model(x)
            reward = (k[..., -1:] == task.m).float()                            # (E, B, 1)
            if n_mc:
                q, v = mc_q(model, task, x, n_mc, gen)
            else:
                q, v = reward, reward.mean(1, keepdim=True)
            adv = A[member, at, k[..., :-1]]                                    # (E, B, L, V)
            own = adv.gather(-1, x[..., None])[..., 0]                          # each step's own A^mu, never summed
            expected = v + alpha * (logp.detach().exp() * adv).sum(-1)          # E_{a~pi}[Q^pi + alpha A^mu]
            w = (q + alpha * own - base * expected) * _alive(x)
            loss = -(w * _chosen(logp, x)).sum() / batch
            if not torch.isfinite(loss):
                raise Fail(f"the loss is not finite at iteration {i}: lower alpha")
            loss.backward()
            opt.step()
            opt.zero_grad()
            bar.update()
    return {"accuracy": torch.stack(curve, -1), "at_probe": at_probe if iterations >= probe else None, "start": curve[0]}


def _chosen(logp, x):
    return logp.gather(-1, x[..., None])[..., 0]


def _alive(x):
    """(..., L) 1 for every token up to the end token."""
    before = torch.nn.functional.pad((x == EOS).cumsum(-1), (1, 0))[..., :-1]
    return (before == 0).float()


def to_90(accuracy, every=10):
    """Iterations (...) until accuracy (..., k) first reaches .9; NaN if it never does."""
    hit = accuracy >= 0.9
    return torch.where(hit.any(-1), hit.int().argmax(-1) * float(every), float("nan"))


def condition(gamma=10.0, alpha=1.0, baseline=False):
    return dict(gamma=gamma, alpha=alpha, baseline=baseline)


Q_ONLY = dict(alpha=0.0)


def band(x):
    """(mean, lowest, highest) over the seeds, the dimension 0."""
    x = np.asarray(x, float)
    return x.mean(0), x.min(0), x.max(0)


def write_map(out, summary):
    """map.csv: each setting and reward, how many seeds reached 90%, in how many iterations; and the verdicts."""
    rows, ratio = [], {}
    for name, by in summary["iterations_to_90"].items():
        median = {}
        for c, hits in by.items():
            known = sorted(h if h is not None else float("inf") for h in hits)
            median[c] = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
            solved = [h for h in hits if h is not None]
            rows.append((name, c, round(float(np.mean(summary["start"][name])), 5), len(solved), len(hits),
                         median[c] if median[c] < float("inf") else "", min(solved, default=""), max(solved, default="")))
        for c in median:                                        # "gamma 10, none" is held against "only Q, none"
            if c.split(",")[0] == "gamma 10":
                q, horizon = median["only Q" + "".join(c.partition(",")[1:])], summary["horizon"][name]
                # only Q not within the run: the ratio is at least horizon / median
                ratio[f"{name}; {c}"] = (min(q, horizon) / median[c], q > horizon) if median[c] <= horizon else None
    write_csv(out / "map.csv", ["setting", "reward", "accuracy after SFT", "seeds at 90%", "seeds", "median iterations to 90%",
                                "first", "last"], rows)
    summary["ratio_of_medians"] = {k: r and {"ratio": round(r[0], 2), "at_least": r[1]} for k, r in ratio.items()}
    ten, text = [bool(r) and r[0] >= 10 for r in ratio.values()], "; ".join(
        f"{k}: " + (f"{'>' if r[1] else ''}{r[0]:.1f}" if r else "gamma 10 never") for k, r in ratio.items())
    summary["verdicts"] = {
        "the effective reward needs 10 times fewer iterations to 90% than only Q":
            f"{'reproduced' if all(ten) else f'partly, in {sum(ten)} of {len(ten)} settings' if any(ten) else 'not reproduced'}: "
            f"{text} (medians over the seeds; >: only Q does not get there within the run)",
        "provers of middling strength are the useful ones": f"gammas above only Q: {summary['useful_gamma']} (paper: 8 to 15)"}


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--all", action="store_true", help="the map: readings of the task, longer y*, longer SFT, Monte-Carlo Q^pi")
    p.add_argument("--iterations", type=int, default=1000)
    p.add_argument("--out", type=Path, default=Path("runs/didactic"))
    args = p.parse_args()
    if args.seeds < 1 or args.iterations < 100:
        raise Fail(f"--seeds {args.seeds} must be at least 1 and --iterations {args.iterations} at least 100")
    start, seeds, out = time.time(), list(range(args.seeds)), args.out
    out.mkdir(parents=True, exist_ok=True)
    gammas = [1, 2, 3, 5, 8, 10, 12, 15, 20, 30, 50, 100]
    exact = {g: float(Planted().values(Planted().prover(g))[1][0, 0]) for g in gammas}
    print("exact V^mu(s0): " + ", ".join(f"gamma {g}: {v:.4f}" for g, v in exact.items()))

    summary = {"command": " ".join(["python -m minipav.didactic", *sys.argv[1:]]), "seeds": seeds,
               "commit": commit(), "hardware": hardware("cpu"), "V_mu": exact, "horizon": {}, "iterations_to_90": {}, "start": {}}

    def measure(name, task, conditions, **kw):
        """Train, and note the iterations to 90% of each condition and seed (None: not within the run)."""
        horizon = summary["horizon"][name] = kw.pop("iterations", args.iterations)
        r = train(task, list(conditions.values()), seeds, horizon, name=name, **kw)
        hits = [[None if h != h else int(h) for h in row] for row in to_90(r["accuracy"]).tolist()]
        summary["iterations_to_90"][name] = dict(zip(conditions, hits))
        summary["start"][name] = [round(x, 5) for x in r["start"][0].tolist()]
        return r

    for baseline, label in ((False, "no baseline"), (True, "state baseline")):
        conditions = {"only Q": condition(baseline=baseline, **Q_ONLY)} | {
            f"gamma {g}": condition(gamma=g, baseline=baseline) for g in gammas}
        r = measure(f"Fig. 3, {label}", Planted(), conditions)
        acc, x = r["accuracy"], list(range(0, args.iterations + 1, 10))
        which = {"Q + A^mu, gamma 10": list(conditions).index("gamma 10"), "only Q": 0}
        mean = acc.mean(-1)                                                     # (C, S) accuracy averaged over the run
        N = [2 ** i for i in range(1, 9)]
        draw(out / f"fig3_{label.split()[0]}", f"Fig. 3, {label} ({args.seeds} seeds: mean, lowest, highest)", [
            ("3a", "iteration", "accuracy", {k: (x, *band(acc[c])) for k, c in which.items()}),
            ("3b", "gamma of the prover", "accuracy, mean over the run", {
                "Q + A^mu": (gammas, *band(mean[1:].T)), "only Q": (gammas, *band(mean[:1].T.expand(-1, len(gammas))))}),
            ("3c, iteration 100", "N", "pass@N", {k: (N, *band(1 - (1 - r["at_probe"][c].numpy()[:, None]) ** np.array(N)))
                                                  for k, c in which.items()} | {
                "after SFT": (N, *band(1 - (1 - r["start"][0].numpy()[:, None]) ** np.array(N)))})])
        better = mean[1:].mean(1) > mean[0].mean()
        summary.setdefault("useful_gamma", {})[label] = [g for g, ok in zip(gammas, better) if ok]
    if args.all:
        pair = {f"{k}, {b}": condition(baseline=b == "baseline", **v) for b in ("none", "baseline")
                for k, v in (("gamma 10", {}), ("gamma 20", dict(gamma=20.0)), ("only Q", Q_ONLY))}
        measure("with gaps", Planted(gaps=True), pair)
        for sft in (200, 800):
            measure(f"SFT {sft}", Planted(), pair, sft=sft)
        for m, target in ((6, (3, 6, 0, 3, 5, 1)), (7, (3, 6, 0, 3, 5, 1, 8))):
            measure(f"{m} tokens", Planted(target), pair, iterations=2 * args.iterations)
        few = {k: c for k, c in pair.items() if "20" not in k}
        seeds = seeds[:3]
        measure("Monte-Carlo Q, 100 rollouts", Planted(), few, iterations=100, n_mc=100)
    write_map(out, summary)
    summary["minutes"] = round((time.time() - start) / 60, 2)
    write_whole(out / "summary.json", lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"))
    print(f"{summary['minutes']} minutes; in {out}: fig3_no and fig3_state (PNG and CSV), map.csv, summary.json")
    for claim, verdict in summary["verdicts"].items():
        print(f"{claim}\n    {verdict}")


if __name__ == "__main__":
    main_guard(main)

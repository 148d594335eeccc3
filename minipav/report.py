"""From per-problem results to the table, the figure and the summary of one run or of several seeds.

    python -m minipav.report runs/a runs/b runs/c --out results/train        # the same experiment with three seeds

Intervals are 95% bootstrap intervals over problems, the same resampled problems for every method (paired); with several
runs the runs are resampled too, so that the spread over seeds is in them.
"""
import argparse
import csv
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from minipav.model import GPT
from minipav.utils import Fail, main_guard, write_whole

LABELS = {"greedy": "greedy decoding", "sample": "one sample", "majority": "majority vote", "orm": "best-of-N, ORM",
          "best_q": "best-of-N, Q^pi", "q_beam": "beam, Q^pi", "pav_beam": "beam, PAV", "weak_beam": "beam, PAV weak mu",
          "strong_beam": "beam, PAV strong mu", "pass": "pass@N (oracle)"}
BUDGETS = (4, 8, 16, 32, 64, 128)                                   # in rollouts: N of best-of-N


class Curves:
    """One run's evaluation. by: for each method the points n (k,), and acc and tokens (k, P), one column a problem; also: what
    else was measured at each point (k, P)."""

    def __init__(self, by, also=None):
        self.by, self.also = by, also or {}
        self.P = next(iter(by.values()))[1].shape[1]

    @classmethod
    def load(cls, path):
        try:
            flat = load_file(path)
        except Exception as e:
            raise Fail(f"{path} is missing or damaged ({e}): has train.py finished in that folder?") from None
        methods = sorted({key.rpartition("/")[0] for key in flat})
        return cls({m: tuple(flat[f"{m}/{x}"] for x in ("n", "acc", "tokens")) for m in methods},
                   {m: {x: flat[f"{m}/{x}"] for x in ("passed", "scored", "seconds")} for m in methods})

    def resampled(self, weights):
        """{method: (n (k,), acc (R, k), tokens (R, k))} under R weightings (R, P) of the problems."""
        w = weights / weights.sum(1, keepdims=True)
        return {m: (n, w @ acc.T, w @ tok.T) for m, (n, acc, tok) in self.by.items()}


def at_tokens(curve, tokens, beyond=True):
    """Accuracy (R,) of a curve at a budget of `tokens` (R,), linear in log tokens between measured points. A method never
    has to spend its whole budget, so its best affordable point counts; a budget below the cheapest point is NaN, and so is
    one beyond the last point (by more than 5%) where beyond is False."""
    _, acc, tok = curve
    out = np.full(len(acc), np.nan)
    for r in range(len(acc)):
        if tokens[r] >= tok[r, 0] * (1 - 1e-9) and (beyond or tokens[r] <= 1.05 * tok[r, -1]):
            affordable = acc[r][tok[r] <= tokens[r] * (1 + 1e-9)].max(initial=0)
            out[r] = max(affordable, np.interp(np.log(tokens[r]), np.log(tok[r]), acc[r]))
    return out


def tokens_to_reach(curve, level):
    """The fewest tokens (R,) at which the curve reaches `level` (R,), interpolated as above; NaN if it never does."""
    _, acc, tok = curve
    out = np.full(len(acc), np.nan)
    for r in range(len(acc)):
        k = int((acc[r] >= level[r]).argmax())
        if acc[r, k] >= level[r]:
            x = np.log(tok[r])
            rise = acc[r, k] - acc[r, k - 1]
            out[r] = np.exp(x[k] if k == 0 else x[k - 1] + (x[k] - x[k - 1]) * (level[r] - acc[r, k - 1]) / rise)
    return out


def compare(curves):
    """The claims, each an array (R,): PAV minus each baseline in points at equal tokens, by budget N; by beam width, the
    tokens that ORM best-of-N needs to reach PAV's accuracy over PAV's own; the tokens of ORM best-of-N at its best over
    those of PAV at that accuracy. NaN where best-of-N never gets there; the last one is 0 where the beam never does."""
    orm, pav = curves["orm"], curves["pav_beam"]
    against = {"pav_minus_orm_points": "orm", "pav_minus_best_q_points": "best_q", "pav_minus_qbeam_points": "q_beam"}
    out = {claim: {} for claim in against}
    for N in BUDGETS:
        if N in orm[0]:
            k = list(orm[0]).index(N)
            mine = at_tokens(pav, orm[2][:, k])
            for claim, baseline in against.items():
                out[claim][str(N)] = 100 * (mine - at_tokens(curves[baseline], orm[2][:, k]))
    out["orm_over_pav_tokens_by_width"] = {
        str(w): tokens_to_reach(orm, pav[1][:, k]) / pav[2][:, k] for k, w in enumerate(pav[0])}
    rows, best = np.arange(len(orm[1])), orm[1].argmax(1)
    out["token_ratio_to_match_best_orm"] = np.nan_to_num(orm[2][rows, best] / tokens_to_reach(pav, orm[1][rows, best]))
    return out


def average(runs):
    """The curves of several runs (dicts of `resampled`), averaged point by point."""
    return {m: (runs[0][m][0], np.mean([r[m][1] for r in runs], 0), np.mean([r[m][2] for r in runs], 0)) for m in runs[0]}


def bootstrap(runs, R=1000, seed=0):
    """(curves of the data, curves of R two-level resamples): runs first, then problems within each."""
    exact = average([r.resampled(np.ones((1, r.P))) for r in runs])
    rng = np.random.default_rng(seed)
    drawn = {m: ([], []) for m in exact}
    each = [r.resampled(rng.multinomial(r.P, np.full(r.P, 1 / r.P), R * len(runs)).astype(float)) for r in runs]
    pick = rng.integers(len(runs), size=(R, len(runs)))
    for b in range(R):
        rows = [(i, b * len(runs) + j) for j, i in enumerate(pick[b])]
        for m in exact:
            drawn[m][0].append(np.mean([each[i][m][1][r] for i, r in rows], 0))
            drawn[m][1].append(np.mean([each[i][m][2][r] for i, r in rows], 0))
    return exact, {m: (exact[m][0], np.array(a), np.array(t)) for m, (a, t) in drawn.items()}


def interval(point, draws):
    """{"mean", "lo", "hi"}, rounded; None where it is not defined: a budget too small for the method, an accuracy that is
    never reached. A resample in which it is not defined counts as infinite, and an infinite bound is None."""
    if not np.isfinite(point):
        return None
    lo, hi = np.percentile(np.where(np.isfinite(draws), draws, np.inf), [2.5, 97.5], method="nearest")
    return {k: round(float(x), 4) if np.isfinite(x) else None for k, x in (("mean", point), ("lo", lo), ("hi", hi))}


def claims(exact, drawn):
    """`compare` with an interval for each number."""
    a, b = compare(exact), compare(drawn)
    return {k: interval(v[0], b[k]) if isinstance(v, np.ndarray) else {n: interval(x[0], b[k][n]) for n, x in v.items()}
            for k, v in a.items()}


def rows(exact, drawn, methods=tuple(LABELS)):
    """Table rows (method, n, tokens a problem, accuracy, lo, hi)."""
    for m in methods:
        n, acc, tok = exact[m]
        lo, hi = np.percentile(drawn[m][1], [2.5, 97.5], axis=0)
        for k in range(len(n)):
            yield m, int(n[k]), round(float(tok[0, k]), 1), *(round(float(x), 4) for x in (acc[0, k], lo[k], hi[k]))


def table(table_rows, labels=LABELS):
    lines = [f"{'method':<20}{'N or width':>10}{'tokens/problem':>16}{'accuracy':>10}   95% interval"]
    lines += [f"{labels[m]:<20}{n:>10}{tok:>16.0f}{acc:>10.3f}   [{lo:.3f}, {hi:.3f}]"
              for m, n, tok, acc, lo, hi in table_rows]
    return "\n".join(lines)


def figure(exact, drawn, path, title):
    """Accuracy against policy tokens a problem."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(7, 4.6))
    style = {"pav_beam": ("C3", "o-"), "q_beam": ("C1", "s-"), "orm": ("C0", "^-"), "best_q": ("C9", "v:"),
             "majority": ("C7", "x:"), "pass": ("k", "--"), "greedy": ("C2", "D")}
    for m, (color, mark) in style.items():
        _, acc, tok = exact[m]
        ax.plot(tok[0], acc[0], mark, color=color, label=LABELS[m].replace("^pi", "$^\\pi$"), ms=5)
        if len(tok[0]) > 1:
            ax.fill_between(tok[0], *np.percentile(drawn[m][1], [2.5, 97.5], axis=0), color=color, alpha=0.15, lw=0)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="policy tokens generated a problem", ylabel="accuracy on held-out problems", title=title)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    fig.tight_layout()
    write_whole(path, lambda p: fig.savefig(p, dpi=150, format="png"))
    plt.close(fig)


def write_csv(path, header, body):
    def write(p):
        with open(p, "w", newline="") as f:
            csv.writer(f).writerows([header, *body])
    write_whole(path, write)


def write_report(runs, out, title, facts):
    """table.txt, curves.csv, accuracy.png and summary.json in `out` for Curves of one or more runs. Returns the table."""
    exact, drawn = bootstrap(runs)
    body = list(rows(exact, drawn))
    write_csv(out / "curves.csv", ["method", "n", "tokens_per_problem", "accuracy", "lo", "hi"], body)
    figure(exact, drawn, out / "accuracy.png", title)
    summary = {**facts, **claims(exact, drawn)}
    write_whole(out / "summary.json", lambda p: p.write_text(json.dumps(summary, indent=1) + "\n"))
    text = table(body)
    write_whole(out / "table.txt", lambda p: p.write_text(text + "\n"))
    return text, summary


def finish(run, title):
    """The report of one finished run, on disk and on the screen."""
    facts = {**run.facts(), **run.read("facts.json")}
    text, s = write_report([Curves.load(run.out / "eval.safetensors")], run.out, title, facts)
    logs = "".join((run.out / f"{stage}.log.csv").read_text() for stage in run.stages)
    write_whole(run.out / "log.csv", lambda p: p.write_text("model,step,loss,held_out_loss\n" + logs))
    print(f"\n{text}\n\n{(run.out / 'example.txt').read_text()}\n"
          f"base policy: {s['base_sampled']:.1%} sampled, {s['base_greedy']:.1%} greedy; "
          f"{s['planning_failure_share']:.1%} of its failures are planning failures\n"
          f"AUC of right traces against the same with a wrong step put in: {json.dumps(s['wrong_step_auc'])}")
    print("\npoints ahead at the tokens of N rollouts" + "".join(f"{'N = ' + n:>20}" for n in s["pav_minus_orm_points"]))
    for name, label in (("pav_minus_orm_points", "PAV beam - best-of-N, ORM"),
                        ("pav_minus_best_q_points", "PAV beam - best-of-N, Q^pi"),
                        ("pav_minus_qbeam_points", "PAV beam - beam, Q^pi")):
        cells = ["-" if c is None else f"{c['mean']:.1f} [{c['lo']:.1f}, {c['hi']:.1f}]" for c in s[name].values()]
        print(f"{label:<40}" + "".join(f"{c:>20}" for c in cells))
    print("tokens that best-of-N by the ORM needs for the accuracy of the PAV beam, over the beam's own, by beam width: "
          + ", ".join(f"{w}: {c and round(c['mean'], 2)}" for w, c in s["orm_over_pav_tokens_by_width"].items())
          + " (None: more than all its samples)")
    print(f"\n{s['minutes']:.1f} minutes, {s['peak_memory_gb']:.1f} GB; in {run.out}: table.txt, accuracy.png, curves.csv, "
          f"summary.json, example.txt, log.csv\n"
          f"next: python search.py --run {run.out}; or other seeds, then python -m minipav.report {run.out} ... --out DIR for "
          "their mean")


def mean_of(values):
    """Of one number a seed: {"mean", "lo", "hi"}, where lo and hi are the lowest and the highest seed's."""
    return {"mean": round(float(np.mean(values)), 4), "lo": min(values), "hi": max(values)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote, one a seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, the figure and the summary")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        each = [json.loads((r / "summary.json").read_text()) for r in args.runs]
    except (OSError, ValueError) as e:
        raise Fail(f"no summary of a finished run: {e}") from None
    curves = [Curves.load(r / "eval.safetensors") for r in args.runs]
    if len({s["config"]["seed"] for s in each}) < len(each):
        raise Fail("two of these runs have the same seed: each counts once")
    same = {json.dumps({k: v for k, v in s["config"].items() if k != "seed"}) for s in each}
    if len(same) > 1:
        raise Fail("these runs differ in more than their seed: their numbers cannot be averaged")
    facts = {"command": [s["command"] for s in each], "commit": sorted({s["commit"] for s in each}),
             "hardware": each[0]["hardware"], "seeds": [s["config"]["seed"] for s in each],
             "test_problems": sum(c.P for c in curves), "config": {k: v for k, v in each[0]["config"].items() if k != "seed"}}
    for key in ("minutes", "peak_memory_gb", "base_sampled", "base_greedy", "planning_failure_share"):
        facts[key] = mean_of([s[key] for s in each])
    if all(s["wrong_step_auc"]["q_pi"] is not None for s in each):
        facts["wrong_step_auc"] = {k: mean_of([s["wrong_step_auc"][k] for s in each]) for k in ("orm", "q_pi")}
    text, _ = write_report(curves, args.out, f"{each[0]['config']['task']}: mean of {len(each)} seeds", facts)
    for r, s in zip(args.runs, each):
        seed = s["config"]["seed"]
        for name in ("curves.csv", "eval.safetensors", "log.csv", "summary.json", "example.txt", "orm/held_out.csv",
                     "q_pi/held_out.csv"):
            copy_to = args.out / f"seed{seed}.{name.replace('/', '.')}"
            write_whole(copy_to, lambda p, source=r / name: p.write_bytes(source.read_bytes()))
    for name in ("base", "q_pi"):                               # small enough to ship: the tests look at them too
        GPT.load(args.runs[0] / name).save(args.out / name)
    print(text)
    print(f"\nwritten to {args.out}: table.txt, curves.csv, accuracy.png, summary.json and the files of each seed")


if __name__ == "__main__":
    main_guard(main)

"""From the trainings of rl.py, of one run or of several seeds, to tables, figures, claims and a summary."""
import numpy as np
import pandas as pd

from minipav.files import read_csv, write_csv, write_text
from minipav.paper.claims import RL
from minipav.paper.figures import draw, line, rl_figures
from minipav.paper.report import finish, judged, provenance, stage
from minipav.paper.statistics import Curve, bootstrap, interval, pass_at_n, read_table, spread


class Trained:
    """Trainings of several runs: stages, of each run, {label: stage}."""

    def __init__(self, runs, stages):
        self.runs, self.labels = [run.out for run in runs], list(stages[0])
        self.records = {n: [stage(run, s[n]) for run, s in zip(self.runs, stages)] for n in self.labels}
        self.trained, self.seeds = [n for n in self.labels
                                    if n not in ("sft", "rft")], [r.config["seed"] for r in runs]
        self.logs, self.by, self.hard, each = {}, {}, [], []
        for run, names in zip(self.runs, stages):
            columns = {}
            for n in self.labels:
                rows = read_table(run / names[n] / "rows.csv",
                                  ["iteration", "problem", "n", "right", "greedy"])
                end, curve = rows[rows.iteration == "end"], rows[rows.iteration != "end"].astype({"iteration": int})
                count = int(end.n.iloc[0])
                passes = {2 ** k: pass_at_n(count, end.right.to_numpy(float),
                                            2 ** k) for k in range(count.bit_length())}
                columns |= {(n, "end", N): x for N,
                            x in passes.items()} | {(n, "greedy", 1): end.greedy.to_numpy(float)}
                columns |= {(n, "curve", i): (g.right / g.n).to_numpy() for i,
                            g in curve.groupby("iteration")}
                if n in self.trained:
                    log = read_csv(run / names[n] / "log.csv", ["iteration", "kl", "tokens", "seconds"])
                    self.logs.setdefault(n, []).append(pd.DataFrame(log).apply(pd.to_numeric))
            each.append(pd.DataFrame(columns))
            if ("sft", "end", 1) in columns:  # problems that no sample of SFT solves
                self.hard.append(columns["sft", "end", 1] == 0)
        self.each, self.boot = each, bootstrap(each)
        self.most = max(N for n, kind, N in self.boot if kind == "end" and n in self.trained)

    def spec(self, n):
        return self.records[n][0]["spec"]

    def differs(self, a, b):
        """The flags, but for the reward, in which two trainings differ."""
        one, other = ({k: v for k, v in self.spec(x).items() if k != "reward"} for x in (a, b))
        return {k for k in one.keys() & other.keys() if one[k] != other[k]}

    def control(self, n):
        """The training with outcome reward that differs in nothing else; for pav_sum and pav_pi, whose
        gradient is
        1 + alpha times as large, one whose KL counts so much less. None if there is none."""
        if n not in self.trained:
            return None
        f, scale = self.spec(n), 1
        if f["reward"] in ("pav_sum", "pav_pi"):
            scale += f["alpha"]
        same = [m for m in self.trained if self.spec(m)["reward"] == "outcome" and m != n
                and self.differs(m, n) <= {"kl"} and abs(self.spec(m)["kl"] - f["kl"] / scale) < 1e-9]
        return same[0] if same else None

    def end(self, n, N=1):
        """pass@N (R + 1,) in the end, or None."""
        return self.boot[n, "end", N].to_numpy() if (n, "end", N) in self.boot else None

    def curve(self, n):
        """Accuracy by iteration, or None."""
        x = sorted(i for m, kind, i in self.boot if (m, kind) == (n, "curve"))
        return Curve(np.array(x), self.boot[[(n, "curve", i) for i in x]].to_numpy(), None,
                     None) if x else None

    def passes(self, n, most=64):
        ns = [N for m, kind, N in self.boot if (m, kind) == (n, "end") and most >= N]
        return line(ns, np.stack([self.end(n, N) for N in ns], 1))

    def unsolved(self):
        return sum(int(h.sum()) for h in self.hard)

    def on_unsolved(self, n):
        """(N, mean, lo, hi) of pass@N on the problems that no sample of SFT solves; lo, hi: the extreme
        runs."""
        ns = [N for m, kind, N in self.boot if (m, kind) == (n, "end")]
        each = [x[[(n, "end", N) for N in ns]][hard].to_numpy() for x,
                hard in zip(self.each, self.hard) if hard.any()]
        by_run = [x.mean(0) for x in each] or [np.zeros(len(ns))]
        return ns, np.concatenate(each or [np.zeros((1,
                                                     len(ns)))]).mean(0), np.min(by_run, 0), np.max(by_run, 0)

    def mean(self, n, column):
        """Mean over the runs of a column of the log, at each evaluation."""
        return np.mean([log[column] for log in self.logs[n]], 0)

    def before(self, n):
        """(tokens, seconds) that a training had cost before its first iteration, mean of the runs: the
        rollouts that RFT is trained on, and for a verifier all of its data and its training. What every
        training starts from (SFT, the stronger policy) is not in it; of the time of all rollouts the share is
        that of the tokens."""
        f, out = self.spec(n), []
        for run in self.runs:
            rollouts = stage(run, "rollouts")
            tokens, names = dict(rollouts["tokens"]), set()
            if "prover" in f and "refresh" in f:                # a verifier; each starts from Q^pi
                names = {"base", f["policy"] if f["prover"][:2] == "bo" else f["prover"]}
            spent = sum(x for k, x in tokens.items() if k.rpartition("_")[0] in names
                        and not k.startswith("seeds"))
            if not f["no_rft"] and f["policy"] not in names:
                spent += tokens[f"seeds_{f['policy']}"]
            if names and "strong" not in names | {f["policy"]}:  # whose right traces Q^pi's data branches off
                spent += tokens.get("seeds_strong", 0)
            training = sum(stage(run, {"base": "q_pi"}.get(k, f"q_{k}"))["seconds"] for k in names)
            everything = sum(x for k, x in tokens.items() if not k.startswith("seeds"))
            out.append((spent, training + rollouts["seconds"] * spent / max(1, everything)))
        return np.mean(out, 0)

    def table(self):
        """Rows (training, iterations, minutes, KL to where RL started, accuracy, lo, hi, greedy, pass@16,
        pass@64)."""
        for n in self.labels:
            x, minutes = interval(self.end(n)), spread(r.get("training_seconds",
                                                             0) / 60 for r in self.records[n])["mean"]
            kl = round(self.mean(n, "kl")[-1], 3) if n in self.trained else ""
            more = ["" if self.end(n, N) is None else round(self.end(n, N)[0], 4) for N in (16, 64)]
            yield n, self.spec(n).get("iterations", 0), round(minutes,
                                                              2), kl, *x.values(), round(self.boot[n,
                                                                                                   "greedy", 1][0], 4), *more


def report_rl(runs, stages, out):
    """Of the trainings of rl.py: stages has, for each run, {label: stage}."""
    t, made = Trained(runs, stages), []

    def figure(name, title, panels):
        draw(out / name, title, panels)
        made.append(f"{name}.png")
    body = list(t.table())
    header = ["training", "iterations", "minutes", "kl", "accuracy", "lo", "hi", "greedy", "pass@16",
              "pass@64"]
    write_csv(out / "table.csv", header, body)
    logs = pd.concat([log.assign(training=n, run=seed) for n, ls in t.logs.items() for seed,
                      log in zip(t.seeds, ls)])
    write_text(out / "curves.csv", logs.to_csv(index=False))
    rl_figures(t, figure)
    text = "\n".join([f"{'training':<28}{'minutes':>8}{'KL':>6}{'accuracy':>10}   {'95% interval':<16}  greedy  pass@16  pass@64", *(
        f"{n:<28}{m:>8.1f}{kl and format(kl, '.2f'):>6}{a:>10.3f}   {f'[{lo:.3f}, {hi:.3f}]':<18}{g:>7.3f}{p:>9}{q:>9}"
        for n, _, m, kl, a, lo, hi, g, p, q in body)])
    facts = provenance(t.runs, [list(s.values()) for s in stages]) | {
        "seeds": t.seeds, "controls": {n: t.control(n) for n in t.trained},
        "before": {n: dict(zip(("tokens", "seconds"), map(float, t.before(n)))) for n in t.trained},
        "accuracy_by_seed": {n: [round(float(x[n, "end", 1].mean()), 4) for x in t.each] for n in t.labels}}
    finish(out, facts, judged(RL, t), text, [*made, "table.csv", "curves.csv"],
           "python rl.py --all; or other seeds of train.py, then python rl.py --run RUN RUN ... --out DIR for their mean")

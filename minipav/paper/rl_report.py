"""From the trainings of rl.py, of one run or of several seeds, to tables, figures, claims and a summary."""
import numpy as np
import pandas as pd

from minipav.files import read_json, write_csv, write_text
from minipav.paper.claims import RL
from minipav.paper.figures import line, rl_figures
from minipav.paper.report import finish, judged, keep, provenance, stage
from minipav.paper.statistics import NONE, Curve, bootstrap, interval, pass_at_n, read_table, spread
from minipav.prover import Prover, verifier_of
from minipav.rewards import REWARDS, gradient_ratio

ROWS = ["iteration", "problem", "n", "right", "greedy"]      # of rows.csv: right of n; greedy in the end only


def columns_of(rows):
    """{(kind, x): value of each problem} of a training's rows: pass@N and greedy decoding in the end,
    accuracy by iteration before."""
    end, before = rows[rows.iteration == "end"], rows[rows.iteration != "end"]
    n = int(end.n.iloc[0])
    out = {("end", 2 ** k): pass_at_n(n, end.right.to_numpy(float), 2 ** k) for k in range(n.bit_length())}
    out["greedy", 1] = end.greedy.to_numpy(float)
    return out | {("curve", int(i)): (g.right / g.n).to_numpy() for i, g in before.groupby("iteration")}


class Trained:
    """Trainings of several runs: stages, of each run, {label: stage}."""

    def __init__(self, runs, stages):
        self.runs, self.seeds = [r.out for r in runs], [r.config["seed"] for r in runs]
        self.labels = list(stages[0])
        self.records = {n: [stage(run, s[n]) for run, s in zip(self.runs, stages)] for n in self.labels}
        self.trained = [n for n in self.labels if n not in ("sft", "rft")]
        wanted = ["iteration", "tokens", "seconds", "accuracy", "greedy", "kl", "entropy", "length",
                  "train_reward"]
        self.logs = {n: [read_table(run / s[n] / "log.csv", wanted)
                         for run, s in zip(self.runs, stages)] for n in self.trained}
        self.each, self.rows = [], []
        for run, seed, names in zip(self.runs, self.seeds, stages):
            tables = {n: read_table(run / names[n] / "rows.csv", ROWS, ("iteration",)) for n in self.labels}
            self.rows += [x.assign(training=n, run=seed) for n, x in tables.items()]
            self.each.append(pd.DataFrame({(n, *x): v for n in tables for x,
                                           v in columns_of(tables[n]).items()}))
        self.boot = bootstrap(self.each)
        self.most = max(N for n, kind, N in self.boot if kind == "end" and n in self.trained)

    def xs(self, n, kind):
        return sorted(x for m, k, x in self.boot if (m, k) == (n, kind))

    def spec(self, n):
        return self.records[n][0]["spec"]

    def differs(self, a, b):
        """The flags, but for the reward, in which two trainings differ; each reward may have its own lr."""
        def flags(f):
            own = f.get("lr") == REWARDS[f["reward"]].lr if "reward" in f else False
            return {k: "own" if own and k == "lr" else v for k, v in f.items() if k != "reward"}
        one, other = flags(self.spec(a)), flags(self.spec(b))
        return {k for k in one.keys() & other.keys() if one[k] != other[k]}

    def control(self, n):
        """The training with outcome reward that differs in nothing else; for pav_sum and pav_pi, whose
        gradient is 1 + alpha times as large, one whose KL counts so much less. None if there is none."""
        f = self.spec(n) if n in self.trained else {}
        if "kl" not in f:               # training on a search has none in its loss
            return None
        return self.outcome(n, f["kl"] / (1 + f["alpha"] if f["reward"] in ("pav_sum", "pav_pi") else 1))

    def fair(self, n):
        """The same whose KL weighs as little against its reward as it does in n, a PAV-RL under boK."""
        f = self.spec(n)
        mu = Prover.parse(f["prover"], f["policy"])
        same = mu.policy == f["policy"]
        return self.outcome(n, f["kl"] / gradient_ratio(f["alpha"], mu.K)) if same else None

    def outcome(self, n, kl):
        """The training with outcome reward and this KL that differs from n in nothing else, or None."""
        same = [m for m in self.trained if self.spec(m)["reward"] == "outcome" and m != n
                and self.differs(m, n) <= {"kl"} and abs(self.spec(m)["kl"] - kl) < 1e-9]
        return same[0] if same else None

    def end(self, n, N=1):
        """pass@N (R + 1,) in the end, or None."""
        return self.boot[n, "end", N].to_numpy() if (n, "end", N) in self.boot else None

    def curve(self, n):
        """Accuracy by iteration, or None."""
        x = self.xs(n, "curve")
        return Curve(np.array(x), self.boot[[(n, "curve", i) for i in x]].to_numpy(), None,
                     None) if x else None

    def by_tokens(self, n):
        """The curve by all tokens sampled so far, its data included, in the place of iterations."""
        return self.curve(n)._replace(n=self.before(n)[0] + self.mean(n, "tokens"))

    def passes(self, n):
        ns = [N for N in self.xs(n, "end") if N <= self.most]
        return line(ns, np.stack([self.end(n, N) for N in ns], 1))

    def unsolved(self):
        """Of each run, which problems no sample of SFT solves (Fig. 8b)."""
        return [x["sft", "end", 1] == 0 for x in self.each]

    def on_unsolved(self, n):
        """(N, mean, lo, hi) of pass@N on those problems; lo, hi: the extreme runs."""
        ns = self.xs(n, "end")
        each = [x[[(n, "end", N) for N in ns]][hard].to_numpy() for x,
                hard in zip(self.each, self.unsolved())]
        each = [x for x in each if len(x)] or [np.zeros((1, len(ns)))]
        by_run = [x.mean(0) for x in each]
        return ns, np.concatenate(each).mean(0), np.min(by_run, 0), np.max(by_run, 0)

    def mean(self, n, column):
        """Mean over the runs of a column of the log, at each evaluation."""
        return np.mean([log[column] for log in self.logs[n]], 0)

    def before(self, n):
        """(tokens, seconds) that a training had cost before its first iteration, mean of the runs: the
        rollouts that RFT is trained on, and for a verifier all of its data and its training. What every
        training starts from (SFT, the stronger policy) is not in it; of the time of all rollouts the share is
        that of the tokens."""
        f, out, names = self.spec(n), [], set()
        orm = REWARDS[f["reward"]].values == "attention"
        if orm or REWARDS[f["reward"]].values == "verifier":                    # each starts from Q^pi
            prover = f.get("prover", "bo1")
            own = prover if prover in ("base", "weak", "strong") else f["policy"]
            names = {"base"} if orm else {"base", own}
        for run in self.runs:
            rollouts, q_from = stage(run, "rollouts"), read_json(run / "config.json", q_from=str)["q_from"]
            tokens = rollouts["tokens"]
            data = {k: v for k, v in tokens.items() if not k.startswith("seeds_")}
            spent = sum(v for k, v in data.items() if k.rpartition("_")[0] in names)
            # RFT's rollouts, and those of the policy whose right traces Q^pi's data branches off
            others = {k for k, needed in ((f["policy"], not f["no_rft"]),
                                          ("strong", names and q_from == "strong"))
                      if needed} - names
            spent += sum(tokens.get(f"seeds_{k}", 0) for k in others)
            training = sum(stage(run, k)["seconds"] for k in [verifier_of(k) for k in names] + ["orm"] * orm)
            out.append((spent, training + rollouts["seconds"] * spent / max(1, sum(data.values()))))
        return np.mean(out, 0)

    def table(self):
        """Rows (training, iterations, policy and other tokens sampled, minutes, KL to where RL started,
        accuracy, lo, hi, greedy, pass@16, pass@64, points over `outcome`, lo, hi)."""
        for n in self.labels:
            minutes = spread(r.get("training_seconds", 0) / 60 for r in self.records[n])["mean"]
            kl = round(self.mean(n, "kl")[-1], 3) if n in self.trained else ""
            more = ["" if self.end(n, N) is None else round(self.end(n, N)[0], 4) for N in (16, 64)]
            start = {"policy", "problems", "seed"}
            alike = "outcome" in self.trained and not self.differs(n, "outcome") & start
            over = self.end(n) - self.end("outcome") if alike else np.array([np.nan])
            tokens = round(self.mean(n, "tokens")[-1]) if n in self.trained else 0
            yield (n, self.spec(n).get("iterations", 0), tokens, round(minutes, 2), kl,
                   *interval(self.end(n)).values(), round(self.boot[n, "greedy", 1][0], 4), *more,
                   *(interval(100 * over) or NONE).values())


def report_rl(runs, stages, out):
    """Of the trainings of rl.py: stages has, for each run, {label: stage}."""
    t = Trained(runs, stages)
    header = ["training", "iterations", "tokens", "minutes", "kl", "accuracy", "lo", "hi", "greedy",
              "pass@16", "pass@64", "over_outcome", "over_outcome_lo", "over_outcome_hi"]
    body = list(t.table())
    write_csv(out / "table.csv", header, body)
    logs = [log.assign(training=n, run=seed) for n, ls in t.logs.items() for seed, log in zip(t.seeds, ls)]
    write_text(out / "curves.csv", pd.concat(logs).to_csv(index=False))
    keep(out / "rows.csv.gz", t.rows)
    rl_figures(t, out)
    head = ("training", "minutes", "KL", "accuracy", "95% interval", "greedy", "pass@16", "pass@64")
    text = ["{:<28}{:>8}{:>7}{:>10}   {:<14}{:>10}{:>9}{:>9}".format(*head)]
    for n, _, _, m, kl, acc, lo, hi, g, p, q, *_ in body:
        text.append(f"{n:<28}{m:>8.1f}{kl:>7}{acc:>10.3f}   [{lo:.3f}, {hi:.3f}]{g:>10.3f}{p:>9}{q:>9}")
    facts = provenance(t.runs, [list(s.values()) for s in stages]) | {
        "seeds": t.seeds, "controls": {n: t.control(n) for n in t.trained},
        "before": {n: dict(zip(("tokens", "seconds"), map(float, t.before(n)))) for n in t.trained},
        "accuracy_by_seed": {n: [round(float(x[n, "end", 1].mean()), 4) for x in t.each] for n in t.labels}}
    finish(out, facts, judged(RL, t), "\n".join(text),
           f"python rl.py --run {runs[0].out} --all; or other seeds, then --run RUN RUN ... --out DIR")

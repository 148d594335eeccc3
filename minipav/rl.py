"""Online RL with process advantages (section 5, App. E): REINFORCE with the effective reward.

An iteration (`RL.iterate`): sample problems and traces -> outcome Rex and Q^mu at every place -> a return for each step, minus a
baseline for each token, w_h = Rex + alpha A^mu(s_h, a_h) - b(state) -> one step of the policy and one of the value network.
What a step is worth is in minipav/rewards.py.
"""
import copy
import json
import math
import sys
import time

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minipav.advantage import Traces, complete, q_best_of_k, random_places, responses, seed_rollouts, wrong_steps
from minipav.report import write_csv
from minipav.rewards import (
    REWARDS,
    close,
    known_values,
    prover_of,
    q_by_rollouts,
    q_exact,
    step_baseline,
    step_of_token,
    step_returns,
    to_tokens,
)
from minipav.search import pass_at_n
from minipav.tokenizer import pad_token
from minipav.utils import Fail, apply_step, make_optimizers, progress, write_whole
from minipav.verifier import label_weights, score, verifier_loss

# ---- losses ---------------------------------------------------------------------------------------------------------

def policy_loss(policy, ref, tokens, step, weight, kl_coef):
    """REINFORCE with KL to the initial policy, summed over rows: (loss, KL, entropy, tokens). tokens, step, weight (N, T).

    The KL of each token is exact, over the whole vocabulary, at the states that were visited. Padding and prompt have no part
    in the loss; the end token has.
    """
    rows, cols = (step[:, 1:] >= 0).nonzero(as_tuple=True)                      # a token is predicted one position before it
    hidden = policy.trunk(tokens[:, :-1])
    logp = policy.head(hidden[rows, cols]).log_softmax(-1)                      # (tokens of all responses, V)
    with torch.no_grad():
        ref_logp = ref.head(ref.trunk(tokens[:, :-1])[rows, cols]).log_softmax(-1)
    chosen = logp.gather(1, tokens[rows, cols + 1][:, None])[:, 0]
    p = logp.exp()
    kl, entropy = (p * (logp - ref_logp)).sum(), -(p * logp).sum().detach()
    return -(weight[rows, cols + 1] * chosen).sum() + kl_coef * kl, kl.detach(), entropy, len(rows)


def value_loss(value, tokens, step, target):
    """Squared error of the value network, which sees all before a token, against the token's return, summed: (loss, its
    predictions (N, T), 0 outside of the response)."""
    rows, cols = (step[:, 1:] >= 0).nonzero(as_tuple=True)
    v = value.head(value.trunk(tokens[:, :-1])[rows, cols])[:, 0]
    out = torch.zeros(tokens.shape, device=tokens.device)
    out[rows, cols + 1] = v.detach()
    return ((v - target[rows, cols + 1]) ** 2).sum(), out


# ---- the loop -------------------------------------------------------------------------------------------------------

# a row of log.csv: sampled so far; of held-out problems; means over the iterations since the row before, a trace (length, kl), a
# token (entropy, value_error) or a share of the traces: right, with a step that is wrong or not allowed, with return 0 throughout
COLUMNS = ("iteration", "tokens", "seconds", "accuracy", "greedy", "pass_n", "length", "kl", "entropy", "value_error",
           "train_reward", "illegal", "zero_return", "tokens_per_s")


class RL:
    """One training: `a` holds the flags of rl.py, `folder` its checkpoint and log.csv; `init` is the initial policy."""

    def __init__(self, run, init, folder, a):
        self.run, self.a, self.folder = run, a, folder
        self.policy, self.ref = copy.deepcopy(init), init
        torch.manual_seed(run.seed("value network", a.seed))
        self.value = init.as_verifier()
        self.value_optimizers = make_optimizers(self.value, a.value_lr_muon, a.value_lr)
        self.optimizers = [*make_optimizers(self.policy, 0.0, a.lr), *self.value_optimizers]
        self.rule, self.source = REWARDS[a.reward]
        (self.K, who), self.mu, self.verifier = prover_of(a), None, None
        if self.source == "verifier":
            self.verifier = run.model("q_pi" if who == "base" else f"q_{who}")
            if a.refresh:
                c = run.config
                self.verifier_optimizers = make_optimizers(self.verifier, c["lr_muon_verifier"] / 4, c["lr_adamw_verifier"] / 4)
                self.optimizers += self.verifier_optimizers
                self.old = run.traces(f"{who}_train")
        elif self.source in ("rollouts", "current"):
            self.mu = run.model(who) if self.source == "rollouts" else self.policy
        self.whole = dict(max_tokens_in_flight=run.how["max_tokens_in_flight"])     # samples of the whole distribution: no top_p
        self.curve = torch.zeros(0, a.problems)
        self.state, self.rows, self.facts = {"iteration": 0, "tokens": 0, "seconds": 0.0, "running": 0.0}, [], []

    def train(self):
        """Train to the end, from the checkpoint if there is one. -> the trained policy"""
        a, s = self.a, self.state
        if (self.folder / "checkpoint.safetensors").exists():
            self.load()
        problems = self.run.problems(a.split, a.problems)
        with progress(self.folder.name, a.iterations) as bar:
            bar.update(s["iteration"])
            while True:
                i = s["iteration"]
                if (i % a.eval_every == 0 or i == a.iterations) and (not self.rows or self.rows[-1]["iteration"] < i):
                    r = self.log(problems)
                    self.save()
                    bar.write(f"  {self.folder.name:<24} iteration {i:>4}   accuracy {r['accuracy']:.3f}   greedy "
                              f"{r['greedy']:.3f}   pass@{a.eval_n} {r['pass_n']:.3f}   KL {r['kl'] or 0:5.2f}   "
                              f"{r['tokens_per_s']:>7.0f} tokens/s", file=sys.stderr)
                if i == a.iterations:
                    return self.policy
                start = time.time()
                self.facts.append(self.iterate(i))
                s["iteration"], s["seconds"] = i + 1, s["seconds"] + time.time() - start
                bar.update()

    def iterate(self, i):
        """One iteration. -> what it saw, for the log"""
        a, run, s = self.a, self.run, self.state
        problems = run.task.problems("train", a.batch // a.group, run.seed("rl problems", a.seed, i))
        fresh = seed_rollouts(self.policy, run.task, run.enc, problems, a.group, run.seed("rl traces", a.seed, i), **self.whole)
        traces = close(fresh)
        n, step = len(traces), step_of_token(traces.tokens, traces.ends)
        s["tokens"] += int((step >= 0).sum())
        q_mu = self.q_mu(problems, traces, run.seed("rl rollouts", a.seed, i))
        if not torch.isfinite(q_mu[traces.ends >= 0]).all():
            self.stop(i, traces, q_mu)
        q_mu = q_mu.masked_fill(traces.ends < 0, float("nan")) if a.no_known else known_values(q_mu, traces, run.task.max_steps)
        returns = step_returns(self.rule, traces.reward, q_mu, a.alpha)
        target, baseline = to_tokens(returns, step), None
        if self.rule == "alone":                                                # A^pi needs none
            baseline = torch.zeros_like(target)
        elif a.baseline != "value":
            baseline = to_tokens(step_baseline(a.baseline, returns, traces.ends, a.group, s["running"]), step)
            s["running"] += 0.1 * (float(target.sum() / (step >= 0).sum()) - s["running"])
        device, sums = self.policy.device, torch.zeros(4)
        for at in range(0, n, a.micro_batch or n):                              # gradients add up: the size changes nothing
            rows = slice(at, at + (a.micro_batch or n))
            T = int(traces.lengths[rows].max())
            tokens, where, g = (x[rows, :T].to(device) for x in (traces.tokens, step, target))
            if baseline is None:
                v_loss, b = value_loss(self.value, tokens, where, g)
                (v_loss / n).backward()
                sums[3] += v_loss.item()
            else:
                b = baseline[rows, :T].to(device)
            loss, kl, entropy, count = policy_loss(self.policy, self.ref, tokens, where, g - b, a.kl)
            if not torch.isfinite(loss) or not torch.isfinite(sums).all():
                self.stop(i, traces, q_mu)
            (loss / n).backward()
            sums[:3] += torch.tensor([float(kl), float(entropy), count])
        if not all(torch.isfinite(p.grad).all() for m in (self.policy, self.value) for p in m.parameters() if p.grad is not None):
            self.stop(i, traces, q_mu)
        if self.verifier is not None and a.refresh and i % a.refresh == 0 and not self.refresh(i, problems, fresh):
            self.stop(i, traces, q_mu)
        factor = min((i + 1) / max(1, a.warmup * a.iterations), (1 + math.cos(math.pi * i / a.iterations)) / 2)
        apply_step(self.policy, self.optimizers[:1], factor)
        if baseline is None:
            apply_step(self.value, self.value_optimizers, 1.0)
        texts = responses(run.enc, traces.tokens, traces.lengths, traces.ends[:, 0] + 1)
        judged = [run.task.judge(problems[i], text) for i, text in zip(traces.problem.tolist(), texts)]
        return {"length": float(sums[2] / n), "kl": float(sums[0] / n), "entropy": float(sums[1] / sums[2]),
                "value_error": float(sums[3] / sums[2]), "train_reward": float(traces.reward.mean()),
                "illegal": judged.count("illegal") / n, "zero_return": float((returns == 0).all(1).float().mean())}

    def q_mu(self, problems, traces, seed):
        """Q^mu (N, S + 1) of the reward's prover at every place."""
        if self.source == "verifier":
            return q_best_of_k(score(self.verifier, traces.tokens, traces.ends), self.K)
        if self.source == "exact":
            return q_exact(self.K, self.run, problems, traces)
        if self.source is None:
            return torch.zeros(traces.ends.shape)
        how = self.whole if self.source == "current" else self.run.how          # a fixed prover: as its verifier's data was made
        q, tokens = q_by_rollouts(self.mu, self.K, self.run, problems, traces, self.a.n_mc, seed, **how)
        self.state["tokens"] += tokens
        return q

    def refresh(self, i, problems, traces):
        """One step of the verifier, on rollouts of the policy as it now is: this iteration's traces, and completions of prefixes
        that are hotter, which show it what the policy may try next; and on wrong steps and old rollouts. The prover is then
        best-of-K of a policy between the initial and the present one. -> True if the loss is finite"""
        a, run, task, enc = self.a, self.run, self.run.task, self.run.enc
        seed = run.seed("refresh", a.seed, i)
        rng = np.random.default_rng(seed)
        hot = seed_rollouts(self.policy, task, enc, problems, a.group, seed, temperature=2.0, **self.whole)
        places = random_places(hot.ends, rng)
        branches = complete(self.policy, task, enc, problems, hot, torch.arange(len(hot)), places, 1, seed + 1, **self.whole)
        starts = hot.ends[:, 0].sum() + hot.ends.gather(1, places[:, None]).sum() + 2 * len(hot)
        self.state["tokens"] += int(hot.lengths.sum() + branches.lengths.sum() - starts)
        old = self.old[torch.from_numpy(rng.integers(len(self.old), size=2 * a.batch))]
        wrong = wrong_steps(task, enc, problems, traces[:max(1, a.batch // 2)], rng)
        data = Traces.cat([traces, branches, wrong, old], pad_token(enc))
        tokens, ends, q, w = (x.to(self.policy.device) for x in (data.tokens, data.ends, data.q, label_weights(data)))
        loss = verifier_loss(self.verifier, tokens, ends, q, w)
        loss.backward()
        apply_step(self.verifier, self.verifier_optimizers, min(1.0, (i + 1) / 50))
        return bool(torch.isfinite(loss))

    def stop(self, i, traces, q_mu):
        """A number is not finite: keep the batch for inspection and the last checkpoint, and end with an error."""
        path = self.folder / "bad_batch.safetensors"
        state = {"tokens": traces.tokens, "ends": traces.ends, "reward": traces.reward, "q_mu": q_mu}
        write_whole(path, lambda p: save_file({k: v.contiguous() for k, v in state.items()}, p))
        raise Fail(f"{self.folder.name}: the loss is not finite at iteration {i}: its batch is in {path}, the state of iteration "
                   f"{self.rows[-1]['iteration']} in checkpoint.safetensors; lower --lr or --alpha")

    # ---- log and checkpoint -----------------------------------------------------------------------------------------

    def log(self, problems):
        """Evaluate on held-out problems, and write one row. -> the row"""
        a, s = self.a, self.state
        reward = outcomes(self.policy, self.run, problems, a.eval_n, self.run.seed("rl evaluation", a.seed))
        greedy = outcomes(self.policy, self.run, problems, 1, 0, temperature=0.0)
        self.curve = torch.cat([self.curve, reward.mean(1)[None]])
        mean = {k: sum(f[k] for f in self.facts) / len(self.facts) for k in (self.facts or [{}])[0]}
        spent = (s["tokens"] - (self.rows[-1]["tokens"] if self.rows else 0)), s["seconds"] - (
            self.rows[-1]["seconds"] if self.rows else 0)
        row = {"iteration": s["iteration"], "tokens": s["tokens"], "seconds": round(s["seconds"], 2),
               "accuracy": float(reward.mean()), "greedy": float(greedy.mean()),
               "pass_n": float(pass_at_n(reward, a.eval_n).mean()), **mean, "tokens_per_s": spent[0] / max(spent[1], 1e-9)}
        self.rows.append({k: round(row[k], 5) if k in row else "" for k in COLUMNS})
        self.facts = []
        write_csv(self.folder / "log.csv", COLUMNS, [list(r.values()) for r in self.rows])
        return self.rows[-1]

    def save(self):
        """All of the state in one file, written whole."""
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        tensors |= {f"value.{k}": v for k, v in self.value.state_dict().items()} | {"curve": self.curve}
        if self.verifier is not None and self.a.refresh:
            tensors |= {f"verifier.{k}": v for k, v in self.verifier.state_dict().items()}
        for j, opt in enumerate(self.optimizers):
            tensors |= {f"opt.{j}.{p}.{k}": v for p, st in opt.state_dict()["state"].items() for k, v in st.items()}
        tensors = {k: v.detach().cpu().clone() for k, v in tensors.items()}
        meta = {"state": json.dumps(self.state), "rows": json.dumps(self.rows)}
        write_whole(self.folder / "checkpoint.safetensors", lambda p: save_file(tensors, p, metadata=meta))

    def load(self):
        path = self.folder / "checkpoint.safetensors"
        try:
            with safe_open(path, "pt") as f:
                meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
            for name in ("policy", "value", "verifier"):
                mine = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith(f"{name}.")}
                if mine:
                    getattr(self, name).load_state_dict(mine)
            for j, opt in enumerate(self.optimizers):
                state = {}
                for k, v in tensors.items():
                    if k.startswith(f"opt.{j}."):
                        p, key = k.split(".")[2:]
                        state.setdefault(int(p), {})[key] = v
                opt.load_state_dict(opt.state_dict() | {"state": state})
            self.state.update(json.loads(meta["state"]))
            self.rows, self.curve = json.loads(meta["rows"]), tensors["curve"]
        except Exception as e:
            raise Fail(f"{path} is damaged or of another version ({e}): delete its folder") from None


def outcomes(policy, run, problems, n, seed, **how):
    """Rex (P, n) of n samples of each problem, with the run's top_p, as everywhere but in training."""
    t = seed_rollouts(policy, run.task, run.enc, problems, n, seed, **run.how | how)
    return t.reward.view(len(problems), n)

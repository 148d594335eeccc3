"""Online RL with process advantages (section 5, App. E): REINFORCE with the effective reward.

    sample    problems, and a group of traces of each, from the whole distribution of the policy
    credit    a return for each step, by default Rex + alpha A^mu(s_h, a_h)
    update    one step of the policy along sum_h grad log pi(a_h | s_h) (return_h - b) (Eq. 5, the gradient of
              Eq. 4), with a KL to the initial policy; one of the value network, which b is from
    log       accuracy on held-out problems, every eval_every iterations
"""
import copy
import math
import time

import numpy as np
import torch

from minipav import checkpoint, parallel, rewards
from minipav.advantage import rollout_from, seed_rollouts
from minipav.data import corrupted_steps, random_h
from minipav.files import write_csv, write_tensors
from minipav.precision import in_chunks, mixed
from minipav.prover import Prover, verifier_of
from minipav.sampler import WHOLE
from minipav.tokenizer import pad_token
from minipav.traces import Traces, responses
from minipav.utils import Fail, NotFinite, apply_step, backward, make_optimizers, micro_batches, progress
from minipav.verifier import label_weights, verifier_loss

# totals so far; on held-out problems accuracy, greedy, pass_n; then means since the row before: length and
# kl a trace, entropy and value_error a token, shares of the traces (train_reward, illegal, zero_return)
COLUMNS = ("iteration", "tokens", "seconds", "accuracy", "greedy", "pass_n", "length", "kl", "entropy",
           "value_error", "train_reward", "illegal", "zero_return", "tokens_per_s")


# ---- losses

@mixed
def policy_loss(policy, ref, tokens, step, weight, kl_coef):
    """REINFORCE with a KL to the initial policy, summed over rows: (loss, KL, entropy, tokens). The KL is
    exact at every state visited, over the whole vocabulary. Prompt and padding have no part; the end token
    has."""
    rows, cols = at = (step[:, 1:] >= 0).nonzero(as_tuple=True)     # the positions that predict a response
    with torch.no_grad():
        ref_hidden = ref.trunk(tokens[:, :-1], at=at)

    def sums(hidden, ref_hidden, token, w):
        logp = policy.head(hidden).float().log_softmax(-1)                      # (tokens of responses, V)
        with torch.no_grad():
            ref_logp = ref.head(ref_hidden).float().log_softmax(-1)
        p, chosen = logp.exp(), logp.gather(1, token[:, None])[:, 0]
        kl, entropy = (p * (logp - ref_logp)).sum(), -(p * logp).sum()
        return kl_coef * kl - (w * chosen).sum(), kl.detach(), entropy.detach()
    hidden, of = policy.trunk(tokens[:, :-1], at=at), (rows, cols + 1)
    return *in_chunks(sums, policy.config.vocab_size, hidden, ref_hidden, tokens[of], weight[of]), len(rows)


def value_loss(value, tokens, step, target):
    """Squared error of the value network, which sees all before a token, against the token's return, summed:
    (loss, its predictions (N, T), 0 outside of the response)."""
    rows, cols = at = (step[:, 1:] >= 0).nonzero(as_tuple=True)
    v = value.head(value.trunk(tokens[:, :-1], at=at))[:, 0]
    out = torch.zeros(tokens.shape, device=tokens.device)
    out[rows, cols + 1] = v.detach()
    return ((v - target[rows, cols + 1]) ** 2).sum(), out


def outcomes(policy, env, problems, n, seed, **sampling):
    """Rex (P, n) of n samples of each problem, by the run's temperature and top_p (RL's own: WHOLE)."""
    return seed_rollouts(policy, env, problems, n, seed, **sampling).reward.view(len(problems), n)


# ---- the loop

class Reinforce:
    """One training; `folder` gets log.csv and the checkpoint. init: the initial policy; a: a Trial (rl.py);
    split: of the problems it is evaluated on; micro_batch: as in SFT."""

    def __init__(self, run, init, folder, reward, a, split="test", micro_batch=0):
        self.run, self.a, self.folder, self.split, self.micro_batch = run, a, folder, split, micro_batch
        self.reward, self.mu = rewards.REWARDS[reward], Prover.parse(a.prover, a.policy)
        self.policy, self.ref = copy.deepcopy(init), init
        self.optimizers = {"policy": make_optimizers(self.policy, 0.0, a.lr)}
        self.learned = a.baseline == "value" and self.reward.baseline
        if self.learned:
            torch.manual_seed(run.seed("value network", a.seed))
            self.value = init.as_verifier()     # its raw output is b(s): no sigmoid
            self.optimizers["value"] = make_optimizers(self.value, a.value_lr_muon, a.value_lr)
        if self.reward.values == "verifier":
            self.verifier, c = run.model(verifier_of(self.mu.policy)), run.config
            if a.refresh:
                lrs = c["lr_muon_verifier"] / 4, c["lr_adamw_verifier"] / 4
                self.optimizers["verifier"] = make_optimizers(self.verifier, *lrs)
                self.old = run.traces(f"{a.policy}_train")
        self.orm = run.model("orm") if self.reward.values == "attention" else None
        self.mu_policy = run.model(self.mu.policy) if self.reward.values == "rollouts" else None
        self.state = {"iteration": 0, "tokens": 0, "seconds": 0.0, "running": 0.0}
        # log.csv; of the iterations since; accuracy on each problem, by evaluation
        self.rows, self.facts, self.curve = [], [], torch.zeros(0, a.problems)

    def train(self):
        """Train to the end, from the checkpoint if there is one. -> the trained policy"""
        a, s = self.a, self.state
        if (self.folder / "checkpoint.safetensors").exists():
            self.curve, state, self.rows = checkpoint.load(*self.saved())
            self.state.update(state)
        problems = self.run.problems(self.split, a.problems)
        with progress(self.folder.name, a.iterations) as bar:
            bar.update(s["iteration"])
            while True:
                i = s["iteration"]
                due = i % a.eval_every == 0 or i >= a.iterations
                if due and (not self.rows or self.rows[-1]["iteration"] < i):
                    r = self.log(problems)
                    checkpoint.save(*self.saved(), self.curve, self.state, self.rows)
                    bar.write(f"  {self.folder.name:<20} iteration {i:>4}   accuracy {r['accuracy']:.3f}   "
                            f"greedy {r['greedy']:.3f}   pass@{a.eval_n} {r['pass_n']:.3f}   "
                            f"KL {r['kl'] or 0:5.2f}   {r['tokens_per_s']:>7.0f} tokens/s")
                if i >= a.iterations:
                    return self.policy
                start = time.time()
                self.facts.append(self.iterate(i))
                s["iteration"], s["seconds"] = i + 1, s["seconds"] + time.time() - start
                bar.update()

    def iterate(self, i):
        """One iteration. -> what it saw, for the log"""
        problems, fresh = self.sample(i)
        traces = rewards.close(fresh)
        step = rewards.step_of_token(traces.tokens, traces.ends)
        q_mu, returns = self.credit(i, problems, traces)
        try:
            if "verifier" in self.optimizers and i % self.a.refresh == 0:
                self.refresh(i, problems, fresh)
            sums = self.update(i, traces, step, returns)
        except NotFinite:
            self.stop(i, traces, q_mu)
        return self.seen(problems, traces, returns, sums)

    def sample(self, i):
        a, run = self.a, self.run
        problems = run.task.problems("train", a.batch // a.group, run.seed("rl problems", a.seed, i))
        seed = run.seed("rl traces", a.seed, i)
        return problems, seed_rollouts(self.policy, run, problems, a.group, seed, **WHOLE)

    def credit(self, i, problems, traces):
        """(Q^mu (N, S + 1), the return (N, S) of each step)"""
        q_mu, tokens = torch.zeros(traces.ends.shape), 0
        if self.reward.values:
            seed = self.run.seed("rl rollouts", self.a.seed, i)
            q_mu, tokens = rewards.VALUES[self.reward.values](self, problems, traces, seed)
        self.state["tokens"] += tokens + int(traces.cost.sum())
        if not torch.isfinite(q_mu[traces.ends >= 0]).all():
            self.stop(i, traces, q_mu)
        if self.a.trust_verifier or not self.reward.known:
            q_mu = q_mu.masked_fill(traces.ends < 0, float("nan"))
        else:
            q_mu = rewards.with_terminal_values(q_mu, traces, self.run.task.max_steps)
        return q_mu, rewards.step_returns(self.reward, traces.reward, q_mu, self.a.alpha)

    def update(self, i, traces, step, returns):
        """One step of the policy, and one of the value network if it is the baseline. -> sums over the batch
        of KL, entropy, tokens, squared value error"""
        a, n, device, sums = self.a, len(traces), self.policy.device, torch.zeros(4)
        target = rewards.to_tokens(returns, step)
        if not self.learned:
            kind = a.baseline if self.reward.baseline else "none"
            b = rewards.step_baseline(kind, returns, traces.ends, a.group, self.state["running"])
            baseline = rewards.to_tokens(b, step)
            self.state["running"] += 0.1 * (float(target.sum() / (step >= 0).sum()) - self.state["running"])
        for rows in micro_batches(traces.lengths, self.micro_batch):            # gradients add up
            T = int(traces.lengths[rows].max())
            tokens, step_of, returned = (x[rows, :T].to(device) for x in (traces.tokens, step, target))
            if self.learned:
                v_loss, b = value_loss(self.value, tokens, step_of, returned)
                (v_loss / n).backward()
                sums[3] += v_loss.item()
            else:
                b = baseline[rows, :T].to(device)
            weight = returned - b  # of each token: its step's return minus b(s) (Eq. 5)
            loss, kl, entropy, count = policy_loss(self.policy, self.ref, tokens, step_of, weight, a.kl)
            (loss / n).backward()
            sums[:3] += torch.tensor([float(kl), float(entropy), count])
        parallel.add_up(sums)
        apply_step(self.policy, self.optimizers["policy"], self.rate(i))
        if self.learned:
            apply_step(self.value, self.optimizers["value"], 1.0)
        return sums

    def rate(self, i):
        """Factor of the policy's learning rate: the lower one of a linear warm-up and a cosine to 0."""
        cosine = (1 + math.cos(math.pi * i / self.a.iterations)) / 2
        return min((i + 1) / max(1, self.a.warmup * self.a.iterations), cosine)

    def refresh(self, i, problems, traces):
        """One step of the verifier, on rollouts of the policy as it now is: these traces, and completions of
        prefixes sampled at temperature 2, which show what it may try next; on corrupted steps and old
        rollouts too. mu is then best-of-K of a policy between the initial and the present one."""
        a, run, seed = self.a, self.run, self.run.seed("refresh", self.a.seed, i)
        rng = np.random.default_rng(seed)
        hot = seed_rollouts(self.policy, run, problems, a.group, seed, **WHOLE | {"temperature": 2.0})
        rows, h = torch.arange(len(hot)), random_h(hot.ends, rng)
        branches = rollout_from(self.policy, run, problems, hot, rows, h, 1, seed + 1, **WHOLE)
        self.state["tokens"] += int(hot.cost.sum() + branches.cost.sum())
        old = self.old[torch.from_numpy(rng.integers(len(self.old), size=2 * a.batch))]
        wrong = corrupted_steps(run, problems, traces[:max(1, a.batch // 2)], rng)
        data = Traces.cat([traces, branches, wrong, old], pad_token(run.enc))
        batch = data.tokens, data.ends, data.q, data.n, label_weights(data)
        backward(verifier_loss, self.verifier, batch, data.lengths, batch[-1].sum(), self.micro_batch)
        apply_step(self.verifier, self.optimizers["verifier"], min(1.0, (i + 1) / 50))

    def seen(self, problems, traces, returns, sums):
        n, task = len(traces), self.run.task
        texts = responses(self.run.enc, traces.tokens, traces.lengths, traces.ends[:, 0] + 1)
        judged = [task.judge(problems[i], text) for i, text in zip(traces.problem.tolist(), texts)]
        return {"length": float(sums[2] / n), "kl": float(sums[0] / n), "entropy": float(sums[1] / sums[2]),
                "value_error": float(sums[3] / sums[2]), "train_reward": float(traces.reward.mean()),
                "illegal": judged.count("illegal") / n,
                "zero_return": float((returns == 0).all(1).float().mean())}

    def stop(self, i, traces, q_mu):
        """A number is not finite: keep the batch and the last checkpoint, and end with an error."""
        path = self.folder / "bad_batch.safetensors"
        write_tensors(path, {k: getattr(traces, k) for k in ("tokens", "ends", "reward")} | {"q_mu": q_mu})
        parallel.barrier()              # it is on the disk before one ends them all
        raise Fail(f"{self.folder.name}: the loss is not finite at iteration {i}: its batch is in {path}, "
                   f"the state of iteration {self.rows[-1]['iteration']} in checkpoint.safetensors; "
                   "lower --lr or --alpha")

    # ---- log and checkpoint

    def log(self, problems):
        """Evaluate on held-out problems, and write one row. -> the row"""
        a, s = self.a, self.state
        reward = outcomes(self.policy, self.run, problems, a.eval_n, self.run.seed("rl evaluation", a.seed))
        greedy = outcomes(self.policy, self.run, problems, 1, 0, temperature=0.0)
        self.curve = torch.cat([self.curve, reward.mean(1)[None]])
        mean = {k: sum(f[k] for f in self.facts) / len(self.facts) for k in (self.facts or [{}])[0]}
        before = self.rows[-1] if self.rows else {"tokens": 0, "seconds": 0.0}
        row = {"iteration": s["iteration"], "tokens": s["tokens"], "seconds": round(s["seconds"], 2),
               "accuracy": float(reward.mean()), "greedy": float(greedy.mean()),
               "pass_n": float(reward.amax(1).mean()), **mean,
               "tokens_per_s": (s["tokens"] - before["tokens"]) / max(s["seconds"] - before["seconds"], 1e-9)}
        self.rows.append({k: round(row[k], 5) if k in row else "" for k in COLUMNS})
        self.facts = []
        write_csv(self.folder / "log.csv", COLUMNS, [list(r.values()) for r in self.rows])
        return self.rows[-1]

    def saved(self):
        modules = {name: getattr(self, name) for name in self.optimizers}
        return self.folder / "checkpoint.safetensors", modules, self.optimizers

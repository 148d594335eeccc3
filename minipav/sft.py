"""Supervised fine-tuning of a policy on demonstrations of the task, and rejection fine-tuning on its own right samples.

expert_fraction of the demonstrations reach the target: the rest compute faithfully and go nowhere in particular, and
so will the policy. Every step sees new problems.
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from minipav.tokenizer import encode_rows, join, pad_token
from minipav.utils import Fail, apply_step, derive_seed, make_optimizers, schedule


def sft_loss(model, tokens, lengths, prompt_lengths):
    """Mean cross-entropy of the response tokens, END included; prompt and padding give none. tokens (B, T)."""
    hidden = model.trunk(tokens[:, :-1])                                        # (B, T - 1, C)
    t = torch.arange(1, tokens.shape[1], device=tokens.device)
    inside = (t >= prompt_lengths[:, None]) & (t < lengths[:, None])            # (B, T - 1)
    return F.cross_entropy(model.head(hidden[inside]), tokens[:, 1:][inside])


def train_policy(model, env, expert_fraction, *, steps, batch_size, lr_muon, lr_adamw, seed, log):
    """Train `model` in place. log(step, steps, loss) is called after every step."""
    task, enc, optimizers = env.task, env.enc, make_optimizers(model, lr_muon, lr_adamw)
    rng = np.random.default_rng(derive_seed(seed, "sft"))
    ahead = 20                                                                  # batches of demonstrations made at once
    for step in range(steps):
        if step % ahead == 0:
            problems = task.problems("train", batch_size * ahead, derive_seed(seed, "sft problems", step))
            prompts, prompt_lengths = encode_rows(enc, [task.prompt(p) for p in problems])
            demos, demo_lengths = encode_rows(enc, task.demonstrations(problems, expert_fraction, rng))
            data = (*join(prompts, prompt_lengths, demos, demo_lengths, pad_token(enc)), prompt_lengths)
        at = slice(step % ahead * batch_size, (step % ahead + 1) * batch_size)
        tokens, lengths, prompt_lengths = (x[at].to(model.device) for x in data)
        loss = sft_loss(model, tokens[:, :int(lengths.max())], lengths, prompt_lengths)
        loss.backward()
        apply_step(model, optimizers, schedule(step, steps))
        log(step + 1, steps, loss.item())


def rft(policy, seeds, seed, name="", epochs=2, batch_size=64, lr=3e-4):
    """Rejection fine-tuning: a copy of `policy`, trained on with the right ones of its seed rollouts (App. E; there
    with the settings of SFT). Raises Fail if none is right."""
    policy, right = copy.deepcopy(policy), seeds[seeds.reward == 1]
    if len(right) == 0:
        raise Fail(f"no seed rollout of the policy {name} is right: there is nothing to fine-tune on; use --no_rft")
    optimizers, generator = make_optimizers(policy, 0.0, lr), torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(right), generator=generator) for _ in range(epochs)])
    steps = max(1, len(order) // batch_size)
    for step in range(steps):
        t = right[order[step * batch_size:(step + 1) * batch_size]]
        batch = t.tokens[:, :int(t.lengths.max())], t.lengths, t.ends[:, 0] + 1
        sft_loss(policy, *(x.to(policy.device) for x in batch)).backward()
        apply_step(policy, optimizers, schedule(step, steps))
    return policy

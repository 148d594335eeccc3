"""Supervised fine-tuning of a policy on demonstrations, and rejection fine-tuning on its own right samples.

expert_fraction of the demonstrations reach the target: the rest compute faithfully and go nowhere in
particular, and so will the policy. Every step sees new problems (in text: whole epochs).
"""
import copy

import numpy as np
import torch
import torch.nn.functional as F

from minipav.checkpoint import NOT_KEPT
from minipav.precision import in_chunks, mixed
from minipav.tokenizer import encode_rows, join, pad_token
from minipav.utils import Fail, apply_step, backward, derive_seed, make_optimizers, schedule


@mixed
def sft_loss(model, tokens, lengths, prompt_lengths):
    """Cross-entropy of the response tokens, END included, summed; prompt and padding give none."""
    t = torch.arange(1, tokens.shape[1], device=tokens.device)
    at = ((t >= prompt_lengths[:, None]) & (t < lengths[:, None])).nonzero(as_tuple=True)
    def loss(hidden, token):
        return [F.cross_entropy(model.head(hidden).float(), token, reduction="sum")]
    hidden = model.trunk(tokens[:, :-1], at=at)                                 # (response tokens, C)
    return in_chunks(loss, model.config.vocab_size, hidden, tokens[at[0], at[1] + 1])[0]


def _train(model, batches, steps, lr_muon, lr_adamw, log=lambda *x: None, micro_batch=0, keeper=NOT_KEPT):
    """Train `model` in place on `batches` of (tokens, lengths, prompt lengths)."""
    optimizers = make_optimizers(model, lr_muon, lr_adamw)
    done, _ = keeper.resume({"model": model}, {"model": optimizers})
    for step, batch in zip(range(steps), batches):
        if step < done:
            continue
        count = (batch[1] - batch[2]).sum()                                     # tokens of responses
        loss = backward(sft_loss, model, batch, batch[1], count, micro_batch)
        apply_step(model, optimizers, schedule(step, steps))
        log(step + 1, steps, loss)
        keeper.save(step + 1, step + 1 == steps)


def train_policy(model, env, expert_fraction, *, steps, batch_size, lr_muon, lr_adamw, seed, log,
                 micro_batch=0, keeper=NOT_KEPT):
    """Train `model` in place. log(step, steps, loss) is called after every step; micro_batch: rows of
    mean length in one backward pass (0: all); keeper: saves a long training (run.keeper)."""
    def batches(ahead=20):  # demonstrations for 20 steps at once
        task, enc, rng = env.task, env.enc, np.random.default_rng(derive_seed(seed, "sft"))
        for step in range(0, steps, ahead):
            problems = task.batches(batch_size, min(ahead, steps - step), seed, step)
            prompts, prompt_lengths = encode_rows(enc, [task.prompt(p) for p in problems])
            demos, demo_lengths = encode_rows(enc, task.demonstrations(problems, expert_fraction, rng))
            data = (*join(prompts, prompt_lengths, demos, demo_lengths, pad_token(enc)), prompt_lengths)
            yield from zip(*(x.split(batch_size) for x in data))
    _train(model, batches(), steps, lr_muon, lr_adamw, log, micro_batch, keeper)


def rft(policy, seeds, seed, name="", epochs=2, batch_size=64, lr=3e-4, micro_batch=0):
    """Rejection fine-tuning: a copy of `policy`, trained on with the right ones of its seed rollouts (App. E;
    there with the settings of SFT). Raises Fail if none is right."""
    policy, right = copy.deepcopy(policy), seeds[seeds.reward == 1]
    if len(right) == 0:
        raise Fail(f"no seed rollout of the policy {name} is right: nothing to fine-tune on; use --no_rft")
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(right), generator=generator) for _ in range(epochs)])
    parts = (right[rows] for rows in order.split(batch_size))
    batches = ((t.tokens, t.lengths, t.ends[:, 0] + 1) for t in parts)
    _train(policy, batches, max(1, len(order) // batch_size), 0.0, lr, micro_batch=micro_batch)
    return policy

"""--minutes: how much of a run fits into a time, by the speed of one training step and of one batch."""
import time
from dataclasses import replace

import torch

from minipav import parallel
from minipav.files import read_json
from minipav.model import GPT
from minipav.sampler import sample
from minipav.sft import sft_loss
from minipav.utils import backward

FEWEST = dict(sft_steps=1, strong_steps=0, problems=20, branches=0, prover_rollouts=0, q_steps=6, orm_steps=1,
              mu_steps=1, test_problems=20)


def fit(a, config, task, out):
    """Cut the counts of train.py's flags `a`, all by one factor, so that the run takes about a.minutes. What
    was cut is said, and stands in the run's configuration, from which a resumed run takes it. config: of the
    model."""
    if a.minutes == 0:
        return
    if (out / "config.json").exists():
        old = read_json(out / "config.json", **dict.fromkeys(FEWEST, int))
        vars(a).update({k: old[k] for k in FEWEST})
        return
    step, token = speeds(a, config, length := task.max_new_tokens // 2)
    paper = a.recipe == "paper"                                 # n_mc completions at every prefix
    each = (1 + paper * a.n_mc * task.max_steps / 2) * length * token
    seconds = dict.fromkeys(FEWEST, step) | {
        "mu_steps": 2 * step * (a.prover_rollouts > 0),         # two provers
        "problems": a.n_cov * each, "branches": 0 if paper else length * token,
        "prover_rollouts": (1 if paper else 2) * each,          # dense: as many completions of pi's prefixes
        "test_problems": (a.max_n + 6 * sum(a.widths)) * length * token}    # 2 beams, 3 samples a place
    share = torch.tensor(min(1.0, 60 * a.minutes / sum(getattr(a, k) * s for k, s in seconds.items())))
    parallel.add_up(share)                                      # several processes cut alike
    share = float(share) / parallel.world()
    fewest = FEWEST | {"prover_rollouts": int(a.q_from == "strong")}                # Q^pi branches off them
    cut = {k: min(getattr(a, k), max(low, int(share * getattr(a, k)))) for k, low in fewest.items()}
    print(f"--minutes {a.minutes:g}: {share:.0%} of it all: " + ", ".join(
        f"--{k} {n} (of {getattr(a, k)})" for k, n in cut.items() if n < getattr(a, k)), flush=True)
    vars(a).update(cut)


def speeds(a, config, length):
    """Seconds of an optimizer step, and of a sampled token in a full batch."""
    rows, prompt = a.micro_batch or a.batch_size, 32
    tokens, lengths = torch.ones(rows, prompt + length).long(), torch.full((rows,), prompt + length)
    with torch.device(a.device):
        model = GPT(replace(config, vocab_size=max(config.vocab_size, 400), block_size=prompt + length + 16))
    model.bf16, model.checkpointing = a.dtype == "bf16", a.checkpointing
    for _ in range(2):                                          # the first one warms up
        start = time.time()
        backward(sft_loss, model, (tokens, lengths, lengths - length), lengths, rows)
        step = (time.time() - start) * a.batch_size / rows
    n, P = max(1, min(128, a.max_tokens_in_flight // (prompt + 16))), parallel.world()
    for _ in range(2):
        start = time.time()
        sample(model, torch.ones(P, prompt).long(), torch.full((P,), prompt), n, max_new_tokens=16, stop=[])
    return step, (time.time() - start) / (16 * n * P)

"""Several processes, one run: torchrun --nproc_per_node=G train.py, and so for search.py and rl.py.

Every process does the same things in the same order. What is divided are rows: of samples (sampler.py), of a
search (beam.py, tree.py), of scores (verifier.py), of a batch, whose gradients are summed (apply_step); and
the states of AdamW. A sample's randomness belongs to its number, so it is the same in whatever process. Files
are the first process's.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def start(device):
    """Join the other processes of torchrun, if there are any. -> device"""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=2))
        if rank():
            sys.stdout = open(os.devnull, "w")
    return device


def stop():
    """The last thing that one of several processes does: leave the others, and Python without its clean-up,
    in which now and then one would abort (gloo, torch 2.13)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def share(n):
    """The slice of n things that is this process's."""
    return slice(n * rank() // world(), n * (rank() + 1) // world())


def add_up(*tensors):
    """Put into each tensor the sum of the processes' ones."""
    for t in tensors if world() > 1 else ():
        on = t.cuda() if dist.get_backend() == "nccl" else t.cpu()
        dist.all_reduce(on)
        t.copy_(on)


def divided(params, **how):
    """AdamW, each process with the states of a share of the parameters (ZeRO, stage 1)."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # takes as long as torch itself
    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, **how)


def agreed(yes):
    """What the first process says."""
    said = torch.tensor([float(yes and not rank())])
    add_up(said)
    return bool(said)


def exchange(rows, *tensors):
    """Of tensors (N, ...) this process has filled in `rows`: fill in those of the others."""
    for t in tensors if world() > 1 else ():
        missing = torch.ones(len(t), dtype=torch.bool)
        missing[rows] = False
        t[missing] = 0
        add_up(t)


def exchange_list(mine, items):
    """As exchange, for a list of which this process has filled in its share, the slice `mine`."""
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, items[mine])
        items[:] = [x for part in parts for x in part]

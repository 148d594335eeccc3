"""What a verifier's head is trained to say: soft labels by cross-entropy, and the labels and losses of two
relatives."""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class Target:
    loss: object  # (outputs (K, n_out), labels q (K,), counts n (K,)) -> loss (K,) of each label
    value: object                   # outputs (..., n_out) -> Q (...)
    n_out: int = 1
    labels: object = None           # traces -> traces with the labels that are learned; None: their own


def bce(out, q, n):
    return F.binary_cross_entropy_with_logits(out[:, 0], q, reduction="none")


def first(out):
    return out[..., 0].sigmoid()


def smoothed(traces, a=1.0):
    """Labels that are estimates, c right outcomes of n, become (c + a) / (n + 2a): the mean of the posterior
    behind a Beta(a, a). SEER (arXiv 2405.18688) smooths labels of preferences; its formula was not found."""
    q = (traces.q * traces.n + a) / (traces.n + 2 * a)
    outcome = torch.arange(q.shape[1]) == traces.last[:, None]
    known = traces.exact | outcome | (traces.cost == 0)[:, None]                # the last: corrupted copies
    return replace(traces, q=torch.where(known, traces.q, q))


def in_support_max(traces):
    """SEER's conservative Q: Q(s, a) = max over the actions that were logged behind it, on the tree of the
    prefixes of these traces. Here only the last step is rewarded, so it is the best outcome among the traces
    that a prefix is part of: a lower bound of the best policy's value, not pi's."""
    generator = torch.Generator().manual_seed(0)
    salt = torch.randint(-2**62, 2**62, (traces.tokens.shape[1] + 1,), generator=generator)
    key = (traces.tokens + 1).mul(salt[1:]).cumsum(1).gather(1, traces.ends.clamp(min=0))       # of prefixes
    key = key + (traces.problem[:, None] + 1) * salt[0]
    ids = key.unique(return_inverse=True)[1]                                    # (N, S + 1)
    there = traces.ends >= 0
    outcome = traces.reward[:, None].expand(ids.shape)
    best = torch.zeros(int(ids.max()) + 1).scatter_reduce(0, ids[there], outcome[there], "amax")
    return replace(traces, q=torch.where(traces.labelled, best[ids], traces.q))


def gaussian(out, q, n):
    """DRE-MARL (arXiv 2210.07636): the likelihood of a label under a predicted mean and variance, and .1 of
    the variance. There each action has such a head; here each prefix."""
    variance = F.softplus(out[:, 1]) + 1e-3
    return (variance.log() + (q - first(out)) ** 2 / variance) / 2 + 0.1 * variance


TARGETS = {"bce": Target(bce, first),                           # App. D
           "seer": Target(bce, first, labels=smoothed), "dre": Target(gaussian, first, n_out=2),
           "in_support": Target(bce, first, labels=in_support_max)}

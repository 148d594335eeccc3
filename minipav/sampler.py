"""KV-cached, batched sampling: many prompts of different lengths, n samples of each, in one batch.

What makes it fast, in the order of the code: requests are sorted by length and cut into chunks that fit
`max_tokens_in_flight`; each distinct row of prompts is read once, and all samples behind it, or behind a part
of it, share its keys and values (KVCache); every row stops by itself at any of several stop tokens; stopped
rows are compacted away; on a GPU a step is recorded, then replayed (graphs.py, kernels.py).

What makes it exact: the randomness of a sample's t-th token is one uniform number, a hash of the call's seed,
the sample's number and t. So a sample does not depend on the batch it is computed in, on the chunks or on
compaction; the same seed gives the same samples on every device up to rounding (under top_p more differ).
"""
import copy
from dataclasses import dataclass
from zlib import crc32

import torch

from minipav import kernels, parallel
from minipav.cache import KVCache
from minipav.checkpoint import Partial
from minipav.graphs import Recorded
from minipav.precision import mixed
from minipav.tokenizer import stop_mask
from minipav.utils import tokens_per_forward

LENGTH = -1                         # Samples.finish_reason of a row that met no stop token
WHOLE = dict(temperature=1.0, top_p=None)           # a policy's own distribution, as its gradient asks for
SPAN = 16                           # tokens for which shapes stay (on a GPU: until half of the rows stopped)


@dataclass
class Samples:
    """Rows are prompt-major: row b * n + j is sample j of prompt b."""
    tokens: torch.Tensor            # (B * n, T) new tokens, the stop token included, right-padded
    lengths: torch.Tensor           # (B * n,) number of new tokens
    finish_reason: torch.Tensor     # (B * n,) the stop token that ended the row, or LENGTH
    logprobs: torch.Tensor = None   # (B * n, T) log-probability of each under the model (no filter), if asked


def uniform(seed, row, t):
    """A number in [0, 1) for the t-th token of each sample row (R,): the 23 highest bits of a hash (the
    finaliser of splitmix64, twice)."""
    def signed(x):
        x %= 1 << 64
        return x - (1 << 64) if x >> 63 else x
    x = row * signed(0x9E3779B97F4A7C15) + signed(seed * 0xD1B54A32D192ED03)
    x = x + torch.as_tensor(t, device=row.device) * signed(0x8CB92BA72F3D8DD7)
    for _ in range(2):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * signed(factor)
        x = x ^ (x >> 31 & (1 << 33) - 1)
    return (x >> 41 & (1 << 23) - 1).float() * 2.0 ** -23


def _inverse_cdf(p, u):
    """The outcome in which u (R,) of the total of p (R, V) falls, and how far into it, in [0, 1]."""
    cdf, u = p.cumsum(-1), u[:, None]
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=p.shape[1] - 1)
    size, end = p.gather(1, token), cdf.gather(1, token)
    return token[:, 0], (1 - (end - u * cdf[:, -1:]) / size).clamp(0, 1 - 2 ** -23)[:, 0]


def choose(logits, u, temperature=1.0, top_p=None):
    """Token (R,) by inverse CDF at the uniform numbers u (R,) from logits (R, V). Temperature 0: argmax.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it. No sort: a token is drawn
    from the whole distribution; if those that are likelier reach top_p already, it is drawn again from the
    nucleus, by what is left of u: its place within the token's interval.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() if temperature == 1 else logits.float() / temperature).softmax(-1)      # (R, V)
    token, rest = _inverse_cdf(p, u)
    if top_p is None or top_p >= 1:
        return token
    outside = ((p > p.gather(1, token[:, None])) * p).sum(-1) >= top_p
    token[outside] = _nucleus(p[outside], rest[outside], top_p)
    return token


def _nucleus(p, u, top_p):
    ranked = p.sort(descending=True).values
    inside = (ranked.cumsum(-1) - ranked < top_p * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)
    return _inverse_cdf(p.masked_fill(p < ranked.gather(1, inside - 1), 0.0), u)[0]


@mixed
def sample(model, prompts, lengths, n=1, *, which=None, max_new_tokens, stop, seed=0, logprobs=False,
           max_tokens_in_flight=1 << 18, pad=0, progress=None, partial_folder=None, **choice):
    """n samples behind each of B prefixes. -> Samples on the CPU

    Prefix b is the first lengths[b] tokens of the row which[b] (default: b) of prompts (P, T); stop: token
    ids that end a row and are kept in it; choice: temperature, top_p; max_tokens_in_flight bounds rows
    x slots of the KV buffers (not the outputs, which grow with n); progress(rows_done) is called after each
    chunk; partial_folder: where a long call saves what it has, to go on from there. Raises ValueError if a
    prefix is empty or a row would not fit the model's block_size.
    """
    longest = int(lengths.max()) + max_new_tokens
    which = torch.arange(len(lengths)) if which is None else which
    if int(lengths.min()) < 1 or longest - 1 > model.config.block_size:
        raise ValueError(f"prompts must hold 1 token or more, and {longest - 1} positions fit into "
                         f"block_size {model.config.block_size}")
    R = len(lengths) * n
    out = Samples(torch.full((R, max_new_tokens), pad), torch.zeros(R, dtype=torch.long),
                  torch.full((R,), LENGTH), torch.zeros(R, max_new_tokens) if logprobs else None)
    read = torch.zeros(len(prompts), dtype=torch.long).scatter_reduce(0, which, lengths, "amax")
    order = (read[which] * len(prompts) + which).argsort(stable=True)           # short ones first
    order = order[parallel.rank()::parallel.world()]
    order = (order[:, None] * n + torch.arange(n)).flatten()
    slots = read[which[order // n]] + max_new_tokens
    outputs = [x for x in vars(out).values() if x is not None]
    how = n, seed, max_new_tokens, choice, list(stop), pad, logprobs, model.bf16
    saved = Partial(partial_folder, outputs, [model], prompts, lengths, which, crc32(repr(how).encode()))
    at = saved.at
    stops = stop_mask(stop, model.config.vocab_size, model.device)
    while at < len(order):
        need = slots[at:at + max(1, max_tokens_in_flight // int(slots[at]))]
        fit = int((need * torch.arange(1, len(need) + 1) <= max_tokens_in_flight).sum())
        rows = order[at:at + max(1, fit)]
        cache, hidden = prefill(model, prompts, which[rows // n], lengths[rows // n])
        result = decode(model, cache, hidden, rows.to(hidden.device), seed, max_new_tokens,
                        stops, pad, logprobs, **choice)
        for output, value in zip(outputs, result):
            output[rows] = value.cpu()
        at += len(rows)
        saved.save(at, at >= len(order))
        if progress:
            progress(min(at * parallel.world(), R))
    parallel.exchange(order, *outputs)
    return out


@torch.no_grad()
@mixed
def prefill(model, prompts, which, lengths):
    """Read prompts. -> the cache of rows (R,) behind the first lengths[r] tokens of the row which[r] (equal
    ones side by side) of prompts (P, T), and the hidden state (R, C) of the last of those tokens"""
    device = model.device
    distinct, group = torch.unique_consecutive(which, return_inverse=True)
    T = int(lengths.max())
    tokens, at = prompts[distinct, :T].to(device), lengths.to(device) - 1
    kv = KVCache.buffers(model.config, len(tokens), T, device, model.dtype)
    hidden, step = [], max(1, tokens_per_forward(model) // T)
    first = torch.searchsorted(group, torch.arange(0, len(tokens) + step, step)).tolist()
    for i, a, b in zip(range(0, len(tokens), step), first, first[1:]):
        here = [(k[i:i + step], v[i:i + step]) for k, v in kv]
        hidden.append(model.trunk(tokens[i:i + step], kv_out=here, at=((group[a:b] - i).to(device), at[a:b])))
    return KVCache(kv, group.to(device), at + 1), torch.cat(hidden)


class Drawn:
    """What R rows have drawn. row, ids, token, alive (rows,) are of those still in the batch; all of it is
    written in place (graphs.py)."""

    def __init__(self, ids, max_new, pad, logprobs):
        R, device = len(ids), ids.device
        self.tokens = torch.full((R, max_new), pad, device=device)
        self.count, self.reason = torch.zeros_like(ids), torch.full_like(ids, LENGTH)
        self.logp = torch.zeros(R, max_new, device=device) if logprobs else None
        self.row, self.ids, self.pad = torch.arange(R, device=device), ids, pad
        self.token, self.alive = torch.zeros_like(ids), torch.ones(R, dtype=torch.bool, device=device)
        self.t = torch.zeros(1, dtype=torch.long, device=device)

    def draw(self, logits, stops, seed, **choice):
        """The t-th token of every row, from logits (rows, V)."""
        row, alive, u, ask = self.row, self.alive, uniform(seed, self.ids, self.t), self.logp is not None
        if kernels.there(logits.device.type) and choice.get("temperature") != 0:
            token, logp = kernels.choose(logits, u, logprobs=ask, **choice)
        else:
            token = choose(logits, u, **choice)
            logp = logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0] if ask else None
        if ask:
            self.logp[row, self.t] = torch.where(alive, logp, 0.0)
        self.token.copy_(token)
        self.tokens[row, self.t] = torch.where(alive, token, self.pad)
        self.count[row] += alive
        stopped = alive & stops[self.token]
        self.reason[row] = torch.where(stopped, self.token, self.reason[row])
        alive.logical_and_(~stopped)
        self.t.add_(1)

    def keep(self, rows):
        self.row, self.ids, self.token, self.alive = (
            x[rows] for x in (self.row, self.ids, self.token, self.alive))


@torch.no_grad()
@mixed
def decode(model, cache, hidden, ids, seed, max_new, stops, pad=0, logprobs=False, whole=False, **choice):
    """Sample up to max_new tokens behind the rows of the cache, whose last token has the hidden state
    `hidden` (R, C). ids (R,): of the samples, for their randomness; stops (V,): which tokens end a row. ->
    tokens (R, max_new), lengths (R,), finish reasons (R,), log-probabilities (R, max_new) or None. whole: the
    cache then holds every new token but the last one of each row."""
    d, every = Drawn(ids, max_new, pad, logprobs), cache if whole else None
    step = Recorded(lambda: d.draw(model.head(model.trunk(d.token[:, None], cache)[:, 0]), stops, seed,
                                   **choice), hidden.device)
    ask = 1 if hidden.device.type == "cpu" else 8           # asking who is alive waits for the GPU
    span = max_new if step.on else SPAN
    d.draw(model.head(hidden), stops, seed, **choice)
    for i in range(max_new - 1):
        if i % ask == 0:
            living = int(d.alive.sum())
            if living == 0:
                break
            if living < len(d.row) * (0.5 * (len(d.row) > 64) if step.on else 0.8):  # dead leave
                if cache is every:
                    cache = copy.copy(cache)
                elif whole:
                    every.put(d.row[~d.alive], cache, ~d.alive)
                living = d.alive.nonzero()[:, 0]
                cache.keep(living)
                d.keep(living)
                step.calls = 0          # shapes have changed: it is recorded anew
        if i % span == 0:
            cache.widen(min(i + span, max_new - 1), step.on)
        step()
    if whole and cache is not every:
        every.put(d.row, cache, slice(None))
    return d.tokens, d.count, d.reason, d.logp

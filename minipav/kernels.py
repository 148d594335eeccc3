"""Decoding on a GPU: attention over the KV cache, and the choice of a token, each in one kernel (Triton).

They do for one new token a row what KVCache.attend and sampler.choose do, but read the filled slots only and
write nothing of the size of the cache or of the vocabulary. Shapes as in cache.py and model.py.
"""
import functools
import subprocess
import sys
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                 # torch for CUDA brings it, on Linux
    triton, tl, jit = None, SimpleNamespace(constexpr=None), lambda f: f

BLOCK, WARPS = 16, 1                # of attention: slots that are read at once, warps that do it


@functools.cache
def there(kind):
    """Whether kernels work on this kind of device; tried once: they ask for a compiler, and no old GPU."""
    if triton is None or kind != "cuda":
        return False
    try:
        choose(torch.zeros(1, 16, device=kind), torch.zeros(1, device=kind))
        return True
    except (RuntimeError, OSError, subprocess.CalledProcessError, triton.TritonError) as e:
        print(f"  sampling is slow: Triton does not work here ({str(e)[:200]})", file=sys.stderr)
        return False


# ---- attention

@jit
def _rotated(x, cos, sin, d, D):
    """model.rotate of the heads that begin at the pointers x."""
    here = tl.load(x + d, d < D, 0.0).to(tl.float32)
    other = tl.load(x + tl.where(d < D // 2, d + D // 2, d - D // 2), d < D, 0.0).to(tl.float32)
    return here * cos + other * sin


@jit
def _read(query, top, total, y, keys, values, count, d, D, BLOCK: tl.constexpr):
    """Online softmax, as in FlashAttention: from the maximum (N,), the sum (N,) and weighted values (N, D)
    so far to those with `count` more slots."""
    slot = tl.arange(0, BLOCK)
    for s in range(0, count, BLOCK):
        filled = s + slot < count
        at, here = (s + slot)[:, None] * D + d, filled[:, None] & (d < D)
        key = tl.load(keys + at, here, 0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")           # (N, BLOCK)
        scores = tl.where(filled[None, :], scores, float("-inf"))
        now = tl.maximum(top, tl.max(scores, 1))
        before, w = tl.exp(top - now), tl.exp(scores - now[:, None])
        value = tl.load(values + at, here, 0.0)
        y = y * before[:, None] + tl.dot(w.to(value.dtype), value, input_precision="ieee")
        top, total = now, total * before + tl.sum(w, 1)
    return top, total, y


@jit
def _attend(q, k, v, cos, sin, old_k, old_v, new_k, new_v, group, lengths, count, out, G, N, D, S, room,
            scale, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Row r, key head g, and the N query heads that read it."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, d = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    head, filled = row * G + g, tl.load(count)
    cos, sin = tl.load(cos + row * D + d, d < D, 0.0), tl.load(sin + row * D + d, d < D, 0.0)
    key = _rotated(k + head * D, cos, sin, d, D).to(new_k.dtype.element_ty)
    value = tl.load(v + head * D + d, d < D, 0.0).to(new_v.dtype.element_ty)
    here = head * room * D
    tl.store(new_k + here + filled * D + d, key, d < D)
    tl.store(new_v + here + filled * D + d, value, d < D)
    heads = (head * N + tl.minimum(n, N - 1)) * D                               # behind N: the last again
    query = (_rotated(q + heads, cos, sin, d, D) * scale).to(key.dtype)
    top = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1)                  # first of all: itself
    y = tl.zeros((HEADS, WIDTH), tl.float32) + value.to(tl.float32)
    total = tl.full((HEADS,), 1.0, tl.float32)
    read, first = tl.load(lengths + row), (tl.load(group + row) * G + g) * S * D
    top, total, y = _read(query, top, total, y, old_k + first, old_v + first, read, d, D, BLOCK)
    top, total, y = _read(query, top, total, y, new_k + here, new_v + here, filled, d, D, BLOCK)
    tl.store(out + heads + d, (y / total[:, None]).to(out.dtype.element_ty), (n < N) & (d < D))


def attend(cache, layer, q, k, v, rope):
    """Append the keys and values k, v (R, 1, G, D) of the next token of every row, k not yet rotated by rope,
    to a cache whose count is on the device; what the queries q (R, 1, H, D) read. -> (R, 1, H * D)"""
    assert q.shape[1] == 1, "a cache whose count is on the device takes a token at a time"
    (R, _, H, D), G, (old, new) = q.shape, k.shape[2], (cache.prefix[layer], cache.new[layer])
    out = torch.empty(R, 1, H * D, dtype=old[0].dtype, device=q.device)
    _attend[R, G](q.contiguous(), k.contiguous(), v.contiguous(), *rope, *old, *new, cache.group,
                  cache.lengths, cache.count, out, G, H // G, D, old[0].shape[2], cache.room, D ** -0.5,
                  HEADS=max(16, triton.next_power_of_2(H // G)), WIDTH=max(16, triton.next_power_of_2(D)),
                  BLOCK=BLOCK, num_warps=WARPS)
    return out


# ---- a token

@jit
def _weights(logits, s, V, high, sharp, BLOCK: tl.constexpr):
    """exp((logit - high) / temperature) of the tokens s, s + 1, ...; 0 behind the last."""
    i = s + tl.arange(0, BLOCK)
    return tl.exp((tl.load(logits + i, i < V, float("-inf")).to(tl.float32) - high) * sharp)


@jit
def _mass(logits, V, high, sharp, floor, BLOCK: tl.constexpr):
    """The sum of the weights that are floor or more."""
    total = 0.0
    for s in range(0, V, BLOCK):
        w = _weights(logits, s, V, high, sharp, BLOCK)
        total += tl.sum(tl.where(w >= floor, w, 0.0))
    return total


@jit
def _inverse_cdf(logits, V, high, sharp, floor, u, BLOCK: tl.constexpr):
    """The token in whose weight u falls, of those with a weight of floor or more; how far into it."""
    before, token, rest, last, i = 0.0, -1, 0.0, 0, tl.arange(0, BLOCK)
    for s in range(0, V, BLOCK):
        w = _weights(logits, s, V, high, sharp, BLOCK)
        w = tl.where(w >= floor, w, 0.0)
        cdf = before + tl.cumsum(w, 0)
        at = tl.min(tl.where((cdf > u) & (w > 0), i, BLOCK))
        size, end = tl.sum(tl.where(i == at, w, 0.0)), tl.sum(tl.where(i == at, cdf, 0.0))
        found = (at < BLOCK) & (token < 0)
        token, rest = tl.where(found, s + at, token), tl.where(found, 1 - (end - u) / size, rest)
        before += tl.sum(w)
        last = tl.maximum(last, tl.max(tl.where(w > 0, s + i, 0)))
    token = tl.where(token < 0, last, token)                                    # u was the total, by rounding
    return token, tl.minimum(tl.maximum(rest, 0.0), 0.9999999)


@jit
def _choose(logits, u, tokens, logprobs, V, sharp, top_p, LOGPROBS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    high, i = float("-inf"), tl.arange(0, BLOCK)
    for s in range(0, V, BLOCK):
        high = tl.maximum(high, tl.max(tl.load(logits + s + i, s + i < V, float("-inf")).to(tl.float32)))
    total = _mass(logits, V, high, sharp, 0.0, BLOCK)
    token, rest = _inverse_cdf(logits, V, high, sharp, 0.0, tl.load(u + row) * total, BLOCK)
    if top_p < 1:
        weight = tl.exp((tl.load(logits + token).to(tl.float32) - high) * sharp)
        # the bits of positive floats, read as integers, are in the same order: from above this one to 1
        least, most = weight.to(tl.int32, bitcast=True) + 1, 0x3F800001
        if _mass(logits, V, high, sharp, least.to(tl.float32, bitcast=True), BLOCK) >= top_p * total:
            while most - least > 1:     # bisect for the largest floor at which what remains reaches top_p
                middle = (least + most) // 2
                reached = _mass(logits, V, high, sharp, middle.to(tl.float32, bitcast=True), BLOCK)
                least, most = (tl.where(reached >= top_p * total, middle, least),
                               tl.where(reached >= top_p * total, most, middle))
            floor = least.to(tl.float32, bitcast=True)
            total = _mass(logits, V, high, sharp, floor, BLOCK)
            token, rest = _inverse_cdf(logits, V, high, sharp, floor, rest * total, BLOCK)
    tl.store(tokens + row, token)
    if LOGPROBS:
        chosen = tl.load(logits + token).to(tl.float32) - high
        tl.store(logprobs + row, chosen - tl.log(_mass(logits, V, high, 1.0, 0.0, BLOCK)))


def choose(logits, u, temperature=1.0, top_p=None, logprobs=False):
    """As sampler.choose, at a temperature above 0. -> tokens (R,), their log-probabilities (R,) or None"""
    R, V = logits.shape
    tokens, logp = u.new_empty(R, dtype=torch.long), u.new_empty(R) if logprobs else None
    _choose[R,](logits.contiguous(), u, tokens, logp, V, 1 / temperature, 1.0 if top_p is None else top_p,
                LOGPROBS=logprobs, BLOCK=min(4096, triton.next_power_of_2(V)), num_warps=8)
    return tokens, logp

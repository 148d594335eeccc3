"""What makes large models fit and fast devices fast: bf16, and losses in pieces.

A model's weights are fp32. If it is set to bf16 (GPT.bf16), its matrix products are computed in bf16; norms,
softmax, losses and, on a CPU, the attention of training in fp32 (its backward pass is slower in bf16, but for
large models on rows of up to 256 tokens).
"""
import functools

import torch
from torch.utils.checkpoint import checkpoint

from minipav.utils import Fail

CHUNK = 1 << 28                     # numbers (tokens x vocabulary) of a loss that are in memory at once


def pick_dtype(name, device):
    """"auto" is bf16 where the device has instructions for it. -> "bf16" or "fp32" """
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = device == "cpu" and cpu
    if name == "bf16" and device == "mps":
        raise Fail("--dtype bf16: not on this device; use --dtype fp32")
    return ("bf16" if fast else "fp32") if name == "auto" else name


def mixed(f):
    """f(model, ...) in the model's precision."""
    @functools.wraps(f)
    def g(model, *args, **kw):
        with torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16):
            return f(model, *args, **kw)
    return g


def lowered(x):
    """x in bf16, cast once where each product that reads it would cast it again. Not in training: there
    the products' gradients of x are to be added in fp32."""
    low = torch.is_autocast_enabled(x.device.type) and not torch.is_grad_enabled()
    return x.to(torch.bfloat16) if low else x


def in_chunks(f, vocab_size, *tensors):
    """The sums that f returns for `tensors` (K, ...), K tokens with logits (K, vocab_size): if those are
    large, in chunks of tokens, each computed again for the backward pass."""
    size = max(1, CHUNK // vocab_size)
    if len(tensors[0]) <= size:
        return f(*tensors)
    parts = [checkpoint(f, *x, use_reentrant=False) for x in zip(*(t.split(size) for t in tensors))]
    return [sum(x) for x in zip(*parts)]

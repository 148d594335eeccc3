"""What this machine can do, and the time that rollouts would take at that."""
import time
from statistics import median

import torch


def seconds(functions, rounds, device):
    """{name: median seconds} of these functions, run in turns."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):     # the first one warms up
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] * (i > 0)
    return {name: median(t) for name, t in times.items()}


def operations(functions, device):
    """Of one call of each function, after `seconds`: (name, operation, calls, seconds in it alone, share of
    all), from the longest down to a hundredth; on a GPU of its kernels."""
    rows = []
    for name, f in functions.items():
        with torch.profiler.profile() as profile:
            f()
        own = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
        found = [(getattr(e, own) / 1e6, e.key, e.count) for e in profile.key_averages()
                 if e.device_type.name.lower() == device]
        total = sum(s for s, *_ in found)
        rows += [(name, key, n, f"{s:.4f}", f"{s / total:.3f}")
                 for s, key, n in sorted(found, reverse=True) if s >= total / 100]
    return rows


def rates(device, dtype, rounds):
    """(FLOP a second of the best of three matrix products, bytes a second of a copy, read and write)"""
    shapes = [(2048, 2048, 2048), (2048, 128, 256), (512, 256, 640)]
    ab = [(torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype))
          for m, k, n in shapes]
    x = torch.randn(1 << 25, device=device)
    y = torch.empty_like(x)
    f = {i: lambda a=a, b=b: [a @ b for _ in range(10)] for i, (a, b) in enumerate(ab)}
    t = seconds(f | {"copy": lambda: y.copy_(x)}, rounds, device)
    return max(20 * m * k * n / t[i] for i, (m, k, n) in enumerate(shapes)), 8 * len(x) / t["copy"]


def products(c, tokens, reads):
    """FLOP of `tokens` tokens through the blocks, which attend to `reads` others in all, without the head."""
    D = c.n_embd // c.n_head
    block = 2 * c.n_embd * (2 * c.n_head * D + 2 * c.n_kv_head * D + 3 * c.n_ffn)
    return c.n_layer * (tokens * block + 4 * reads * c.n_head * D)


def rollout_floor(c, B, n, P, T, rate, copy, width):
    """Seconds: the prompts read once, then step by step the larger of products and bytes; a prompt's keys and
    values are read once for its n samples. width: bytes of a number."""
    weights = products(c, 1, 0) / 2 + c.n_embd * c.vocab_size
    slot = 2 * c.n_layer * c.n_kv_head * c.n_embd // c.n_head
    total = products(c, B * P, B * P * P / 2) / rate
    for t in range(T):
        flop = 2 * B * n * c.n_embd * c.vocab_size + (products(c, B * n, B * n * (P + t)) if t else 0)
        read = weights + slot * (B * P + B * n * t)
        total += max(flop / rate, read * width / copy)
    return total

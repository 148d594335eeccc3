"""Small things that every file needs: errors for the user, devices, seeds, optimizers, what ran, progress."""
import ctypes
import os
import platform
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from minipav import parallel


class Fail(Exception):
    """A mistake of the user's, or of the disk's, told in a line: the flag or file, what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).split())[:600])


class NotFinite(Fail):
    """A loss or a gradient is not a finite number."""


def on_stop(handler):
    """What Ctrl-C and SIGTERM do, but in a process that was started to ignore them."""
    for s in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(s) != signal.SIG_IGN:
            signal.signal(s, handler)


def main_guard(main):
    """Run main(); a Fail, or a full GPU, ends the program with a line on stderr and exit status 1."""
    on_stop(signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
        parallel.stop()
    except (Fail, torch.OutOfMemoryError) as e:
        if not isinstance(e, Fail):
            e = "the GPU's memory is full; docs/troubleshooting.md, Out of memory, says which flags need less"
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()                                                         # the error is the last line
        print(f"error: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        on_stop(signal.SIG_IGN)                                                 # timeout sends two
        tqdm.write("stopped: what was finished is on disk; the same command goes on from there (train.py "
                   "with --resume)", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                                     # piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name):
    """'auto' is CUDA, else Apple's MPS, else the CPU; processes of torchrun take one GPU each. Raises Fail if
    the device asked for is not there."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in have if have[d])
    if not have[name]:
        raise Fail(f"--device {name}: torch {torch.__version__} finds no such device here; use --device auto")
    if name == "cuda" and (n := torch.cuda.device_count()) < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        raise Fail(f"torchrun --nproc_per_node: more processes than GPUs, of which there are {n}")
    return parallel.start(name)


def glibc(name, *args):
    """Call this function, if the C library has it."""
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), name)(*args)


def tune_process():
    """Two settings for speed. glibc returns each large tensor's memory to the system and asks for it again at
    the next step; keeping it is 15-20% faster in training on a CPU. TF32 is a GPU's fast path for fp32
    products."""
    torch.set_float32_matmul_precision("high")
    glibc("mallopt", -3, 1 << 30)                       # M_MMAP_THRESHOLD: serve large blocks from the heap
    glibc("mallopt", -1, 2**31 - 1)                     # M_TRIM_THRESHOLD: keep the heap's top


def give_back():
    """At most every 15 seconds: return freed memory all the same, since holes add up to gigabytes."""
    if time.monotonic() > give_back.next:
        glibc("malloc_trim", 0)
        give_back.next = time.monotonic() + 15


give_back.next = 0.0


def tokens_per_forward(model):
    """Tokens in one forward pass without gradients: on a CPU few enough for its caches."""
    return 1 << 13 if model.device.type == "cpu" else max(1 << 13, (1 << 27) // model.config.n_ffn)


def derive_seed(seed, *names):
    """A seed of its own for each named use of randomness: stages can be re-run one by one."""
    return zlib.crc32(repr((seed, *names)).encode())


class Muon(torch.optim.Optimizer):
    """As torch.optim.Muon (Nesterov momentum, its direction made orthogonal by Newton-Schulz), for many small
    matrices: those of one shape at once. torch's is in bf16; off a GPU it is in fp32 here, but for large
    models in bf16."""

    def __init__(self, params, lr, momentum=0.95, bf16=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, bf16=bf16))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(m, group["momentum"])))
            for (rows, cols), pairs in by_shape.items():
                stack = torch.stack([x for _, x in pairs])
                low = stack.bfloat16() if stack.is_cuda or group["bf16"] else stack
                step = orthogonal(low).to(stack.dtype)
                for (p, _), x in zip(pairs, step):
                    p.sub_(x, alpha=group["lr"] * max(1, rows / cols) ** 0.5)


def orthogonal(x, steps=5):
    """Matrices (N, rows, cols) with all singular values brought near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizers(model, lr_muon, lr_adamw):
    """Muon for the matrices in the blocks, AdamW for the rest; lr_muon 0: AdamW for all (the paper: Adam)."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and lr_muon]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    how = dict(lr=lr_adamw, weight_decay=0.0, betas=(0.9, 0.95), fused=model.config.large)
    adamw = (parallel.divided if parallel.world() > 1 else torch.optim.AdamW)(others, **how)
    return [Muon(matrices, lr_muon, bf16=model.bf16 and model.config.large), adamw] if matrices else [adamw]


def schedule(step, steps, warmup=0.05, decay=0.5):
    """Learning-rate factor: linear warm-up, constant, then linear to a twentieth over the last `decay`."""
    x = (step + 1) / steps
    return min(1.0, x / warmup, 0.05 + 0.95 * (1 - x) / decay)


def backward(loss, model, batch, lengths, total, micro_batch=0):
    """The gradient of loss(model, *batch) / total, a sum over rows, of which this process takes its share;
    the tokens batch[0] (B, T) are cut at the longest row. -> that loss, of all processes"""
    out = torch.zeros(1)
    for rows in micro_batches(lengths, micro_batch):
        parts = batch[0][rows, :int(lengths[rows].max())], *(x[rows] for x in batch[1:])
        part = loss(model, *(x.to(model.device) for x in parts)) / float(total)
        part.backward()
        out += part.detach().cpu()
    parallel.add_up(out)
    return out.item()


def micro_batches(lengths, size=0):
    """Indices of this process's share of N rows of these lengths (N,): in one piece (size 0, or its rows or
    more), or in pieces of no more tokens, padding included, than `size` rows of mean length (or of one row),
    similar lengths together."""
    every = torch.arange(len(lengths), device=lengths.device)
    if 0 < size * parallel.world() < len(every):
        order, room = lengths.argsort()[parallel.rank()::parallel.world()], size * lengths.float().mean()
    else:
        order, room = every[parallel.share(len(every))], float("inf")
    while len(order):
        fit = max(1, int((lengths[order] * (every[:len(order)] + 1) <= room).sum()))
        yield order[:fit]
        order = order[fit:]
        give_back()


def apply_step(model, optimizers, factor):
    """Add up the processes' gradients, clip the sum to norm 1, take one step with every learning rate times
    `factor`, clear the gradient. Raises NotFinite, before any weight is changed, if the gradient (hence the
    loss) is not finite."""
    if parallel.world() > 1:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            parallel.add_up(p.grad)
    if not torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
        raise NotFinite("the loss or its gradient is not a finite number: lower the learning rate")
    for opt in optimizers:
        for group in opt.param_groups:
            group["lr"] = group.setdefault("base_lr", group["lr"]) * factor
        opt.step()
        opt.zero_grad()


def command():
    """The command line of this process, without the folder that the code is in."""
    path, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent.parent
    name = str(path.relative_to(root)) if path.is_relative_to(root) else path.name
    if name.startswith("minipav/"):
        name = "-m " + name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    return " ".join(["python", name, *sys.argv[1:]])


def commit():
    """The commit of the code, "-dirty" if files differ from it, or "unknown" outside of a checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True,
                              timeout=10, cwd=Path(__file__).parent)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


class Bar(tqdm):
    def to(self, n):
        """Move to n of the total."""
        self.update(n - self.n)


def progress(name, total):
    """A tqdm bar with a fixed-width name; in a log file a line every half minute."""
    return Bar(total=total, disable=parallel.rank() > 0, desc=f"  {name:<24}",
               mininterval=0.5 if sys.stderr.isatty() else 30,
               bar_format="{desc} {percentage:3.0f}% {n_fmt:>7}/{total_fmt} [{elapsed}<{remaining}{postfix}]")

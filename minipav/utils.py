"""Small things that every file needs: errors for the user, files written whole, devices, seeds, the optimizer."""
import ctypes
import os
import sys
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm


class Fail(Exception):
    """A mistake of the user's, or of the disk's, told in one line that names the flag or file and what to do."""


def main_guard(main):
    """Run main(); a Fail ends the program with its one line on stderr and exit status 1, without a traceback."""
    try:
        main()
    except Fail as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: what was finished is on disk; train.py goes on from there with --resume, the others by themselves")


def write_whole(path, write):
    """Call write(temporary path), then rename it to `path`: readers see the old file or the whole new one."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(tmp)
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise Fail(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        tmp.unlink(missing_ok=True)


def make_folder(path):
    """Raises Fail if this folder cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise Fail(f"--out {path}: cannot make this folder ({e.strerror}); choose another") from None


def pick_device(name):
    """'auto' is CUDA, else Apple's MPS, else the CPU. Raises Fail if the device asked for is not there."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next(d for d in ("cuda", "mps", "cpu") if have[d])
    if not have[name]:
        raise Fail(f"--device {name}: torch {torch.__version__} finds no such device here; use --device auto")
    return name


def tune_process():
    """Two settings for speed.

    glibc returns each large tensor's memory to the system and asks for it again at the next step; keeping it is 15-20%
    faster in training on a CPU. TF32 is a GPU's fast path for fp32 products; it rounds them to 10 bits of mantissa.
    """
    torch.set_float32_matmul_precision("high")
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)                   # M_MMAP_THRESHOLD: serve large blocks from the heap
            libc.mallopt(-1, 2**31 - 1)                 # M_TRIM_THRESHOLD: keep the heap's top
        except (OSError, AttributeError):               # not glibc: only slower
            pass


def pass_tokens(device):
    """Tokens in one forward pass without gradients: on a CPU few enough for its caches (1.7 times faster than 2^18)."""
    return 1 << 13 if torch.device(device).type == "cpu" else 1 << 19


def derive_seed(seed, *names):
    """A seed of its own for each named use of randomness: stages can be re-run one by one with the same result."""
    return zlib.crc32(repr((seed, *names)).encode())


def make_optimizers(model, lr_muon, lr_adamw):
    """Muon for the matrices inside the blocks, AdamW for embedding, head, norms and biases; lr_muon 0: AdamW for all.

    The paper uses Adam (README, "Where we depart from the paper").
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and lr_muon]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    adamw = torch.optim.AdamW(others, lr=lr_adamw, weight_decay=0.0, betas=(0.9, 0.95))
    return [torch.optim.Muon(matrices, lr=lr_muon, weight_decay=0.0, momentum=0.95), adamw] if matrices else [adamw]


def schedule(step, steps, warmup=0.05, decay=0.5):
    """Learning-rate factor: linear warm-up, constant, then linear to a twentieth over the last `decay` of the run."""
    x = (step + 1) / steps
    return min(1.0, x / warmup, 0.05 + 0.95 * (1 - x) / decay)


def apply_step(model, optimizers, factor):
    """Clip the gradient to norm 1, take one step with every learning rate times `factor`, clear the gradient."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for opt in optimizers:
        for group in opt.param_groups:
            group.setdefault("base_lr", group["lr"])
            group["lr"] = group["base_lr"] * factor
        opt.step()
        opt.zero_grad(set_to_none=True)


class Bar(tqdm):
    def to(self, n):
        """Move to n of the total."""
        self.update(n - self.n)


def progress(name, total):
    """A tqdm bar with a fixed-width name; in a log file a line every half minute."""
    return Bar(total=total, desc=f"  {name:<24}", mininterval=0.5 if sys.stderr.isatty() else 30,
                bar_format="{desc} {percentage:3.0f}% {n_fmt:>7}/{total_fmt} [{elapsed}<{remaining}{postfix}]")

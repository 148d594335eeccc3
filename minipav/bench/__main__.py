"""How fast is it, and how far from what this machine can do?

    python -m minipav.bench                      # 0.5M and 4M parameters: 9 minutes on 2 cores
    python -m minipav.bench --sizes 30M 0.5B --rows 64 512 4096                 # on a GPU: rollouts alone
    python -m minipav.bench --quick              # the smallest, within a minute
    python -m minipav.bench --against FOLDER     # another checkout: the ratio of its training steps to ours
    python -m minipav.bench --only rollouts --profile       # and where the time goes, by operation

Random weights; everything is timed in turns, several rounds, after a warm-up; medians. `generate` is that of
transformers (if installed) for the same shape, its best of dynamic and static cache and of fp32 and bf16;
on a GPU in bf16, compiled if static.
The floor of rollouts is the time of their products at this machine's matrix rate, or that of reading weights
and cache at its copy rate, whichever is larger, both rates measured in the same run.
"""
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from minipav.bench.cases import SIZES, Case
from minipav.bench.machine import operations, rates, rollout_floor, seconds
from minipav.files import make_folder, write_csv, write_json
from minipav.flags import flag, parse
from minipav.precision import pick_dtype
from minipav.utils import Fail, command, commit, hardware, main_guard, pick_device, tune_process


@dataclass
class Flags:
    sizes: list = flag(["0.5M", "4M"], "of the models, by parameters", choices=list(SIZES))
    rounds: int = flag(5, "timings of each; the median counts", low=1)
    rows: list = flag([], "time rollouts alone, of this many samples at once", kind=int, low=1)
    only: list = flag([], "time these alone, by their names in bench.csv", kind=str)
    generate: list = flag(["dynamic", "static"], "caches of transformers' generate",
                          choices=["dynamic", "static"])
    quick: bool = flag(False, "0.5M, a quarter of the prompts, 3 rounds")
    profile: bool = flag(False, "write profile.csv, too: each operation's share of the time")
    against: Path = flag(None, "folder of another checkout, to time its training steps too", kind=Path)
    device: str = flag("auto", "where it runs", choices=("auto", "cpu", "cuda"))
    dtype: str = flag("auto", "of matrix products", choices=("auto", "fp32", "bf16"))
    out: Path = flag(Path("runs/bench"), "where bench.csv and summary.json go", kind=Path)


def report(case, t, rate, copied, a):
    """What summary.json says of a size."""
    floor = rollout_floor(case.c, case.B, case.n, case.P, case.T, rate, copied, 2 if a.dtype == "bf16" else 4)
    found = {"matrix_gflops": rate / 1e9, "copy_gb_s": copied / 1e9}
    if "rollouts" in t:
        found["share_of_floor"] = floor / t["rollouts"]
    generate = {k: t[k] for k in t if k.startswith("generate")}
    if generate and "rollouts" in t:
        found["ratio_to_generate"] = min(generate.values()) / t["rollouts"]
        found |= {f"ratio_to_{k}".replace(" ", "_"): x / t["rollouts"] for k, x in generate.items()}
    if {"labelling", "labelling, nothing shared"} <= t.keys():
        found["labelling_ratio"] = t["labelling, nothing shared"] / t["labelling"]
    found |= {f"{k}_step_ratio": t[f"{k} step, against"] / t[f"{k} step"] for k in ("sft", "verifier")
              if f"{k} step, against" in t}
    print("  " + "   ".join(f"{k} {x:.2f}" for k, x in found.items()), flush=True)
    return {k: round(x, 3) for k, x in found.items()}


def main():
    a = parse(Flags, __doc__)
    tune_process()
    if a.rows and a.against:
        raise Fail("--rows: times rollouts alone; leave --against out")
    a.device = pick_device(a.device)
    a.dtype = pick_dtype(a.dtype, a.device)
    make_folder(a.out)
    if a.quick:
        a.sizes, a.rounds = ["0.5M"], 3
    dtype = torch.bfloat16 if a.dtype == "bf16" else torch.float32
    rows, profile = [], []
    facts = {"command": command(), "commit": commit(), "hardware": hardware(a.device), "dtype": a.dtype}
    for size, samples in itertools.product(a.sizes, a.rows or [None]):
        case, (rate, copied) = Case(size, a, samples), rates(a.device, dtype, a.rounds)
        size += f" x {case.B * case.n}" if samples else ""
        print(f"{size}: products {rate / 1e9:.0f} GFLOP/s, copies {copied / 1e9:.0f} GB/s")
        t = seconds(case.functions, a.rounds, a.device)
        for name in t:
            n = case.count(name)
            rows.append((size, name, n, f"{t[name]:.5f}", round(n / t[name])))
            print(f"  {name:<36}{rows[-1][-1]:>9,} tokens/s")
        for k, x in report(case, t, rate, copied, a).items():
            facts.setdefault(k, {})[size] = x
        if size == "135M" and "sft step" in t:
            facts["train_135M_tokens_per_s"] = round(case.count("sft step") / t["sft step"])
        write_csv(a.out / "bench.csv", ["size", "what", "tokens", "seconds", "tokens_per_s"], rows)
        if a.profile:
            profile += [(size, *row) for row in operations(case.functions, a.device)]
            write_csv(a.out / "profile.csv", ["size", "what", "operation", "calls", "seconds", "share"],
                      profile)
        write_json(a.out / "summary.json", facts)
    print(f"all in {a.out}")


if __name__ == "__main__":
    main_guard(main)

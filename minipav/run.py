"""A run folder: its configuration, its stages and their clock, its models and traces. train.py fills it; whoever comes
later reads it.

    run = Run(Path("runs/calculator-seed0"), config)      # start, or with resume=True go on
    run.stage("orm", work)                                # work(seed) unless it is done; what it wrote is then final
    run.model("q_pi"), run.traces("base_train"), run.problems("test", 500)

A stage counts as done once its name is in stages.json, which is written last. A stage that was killed is run again from
its start, from its own seed and the files of the stages before it, so the result is that of the uninterrupted run.
"""
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minipav.advantage import Traces
from minipav.model import GPT
from minipav.tasks import get_task
from minipav.tokenizer import synthetic_encoding
from minipav.utils import Fail, derive_seed, make_folder, progress, write_whole


class Run:
    def __init__(self, out, config, resume=False):
        """config: all flags but --out and --resume, as plain values. Raises Fail if the folder cannot be made, already
        holds a run that is not to be resumed, or holds one that was started with other flags."""
        self._prepare(out, config)
        make_folder(self.out)
        for left_over in self.out.rglob(".*.tmp"):                              # of a process that was killed
            left_over.unlink()
        if (self.out / "config.json").exists():
            if not resume:
                raise Fail(f"--out {out} already holds a run: add --resume to go on with it, or choose another --out")
            old = self.read("config.json")
            for k, v in config.items():
                if old.get(k) != v:
                    raise Fail(f"--{k} is {v}, but the run in {out} was started with {old.get(k)}: repeat its flags to "
                               "resume it, or choose another --out")
        self.write("config.json", config)
        self.stages = self.read("stages.json") if (self.out / "stages.json").exists() else {}

    def _prepare(self, out, config):
        self.out, self.config = Path(out), config
        self.task = get_task(config["task"], **{k: config[k] for k in ("H", "min_steps", "numbers")})
        self.enc = synthetic_encoding(self.task.phrases)
        self.how = dict(top_p=None if config["top_p"] == 1 else config["top_p"],          # for every call of the sampler
                        max_tokens_in_flight=config["max_tokens_in_flight"])

    @classmethod
    def open(cls, out, device):
        """The finished run in a folder, to be read on any device. Raises Fail if train.py has not finished there."""
        run = object.__new__(cls)
        run.out = Path(out)
        if not (run.out / "config.json").exists():
            raise Fail(f"--run {out}: no run of train.py is there; make one with python train.py --out {out}")
        config = run.read("config.json")
        run.stages = run.read("stages.json") if (run.out / "stages.json").exists() else {}
        if "evaluation" not in run.stages:
            raise Fail(f"--run {out}: train.py has not finished there (done: {', '.join(run.stages) or 'nothing'}); finish it "
                       "with its flags and --resume")
        try:
            run._prepare(out, config | {"device": device})
        except (KeyError, TypeError) as e:
            raise Fail(f"{run.out / 'config.json'} is not of this version of minipav ({e}): train again") from None
        return run

    def read(self, name):
        try:
            return json.loads((self.out / name).read_text())
        except (OSError, ValueError) as e:
            raise Fail(f"{self.out / name} is missing or damaged ({e}): start again with another --out") from None

    def write(self, name, value):
        write_whole(self.out / name, lambda p: p.write_text(json.dumps(value, indent=1) + "\n"))

    def stage(self, name, work):
        """Run work(seed), unless it has been finished before; its training log is STAGE.log.csv."""
        print(name + (": done before" if name in self.stages else ""), flush=True)
        if name in self.stages:
            return
        start, self.log_rows = time.time(), []
        work(self.seed(name))
        write_whole(self.out / f"{name}.log.csv", lambda p: p.write_text("".join(self.log_rows)))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 30 if sys.platform == "darwin" else 1 << 20)
        if self.config["device"] == "cuda":
            peak = torch.cuda.max_memory_allocated() / (1 << 30)
        self.stages[name] = {"seconds": round(time.time() - start, 1), "peak_memory_gb": round(peak, 2),
                             "command": " ".join(["python", *sys.argv]), "commit": commit(),
                             "hardware": hardware(self.config["device"])}
        self.write("stages.json", self.stages)

    def seed(self, *names):
        return derive_seed(self.config["seed"], *names)

    def logger(self, name, steps):
        """log(step, steps, loss, held-out loss) -> a progress bar and a row of the stage's log."""
        bar = progress(name, steps)

        def log(step, steps, loss, held_out=float("nan")):
            bar.set_postfix_str(f", loss {loss:.3f}" + ("" if held_out != held_out else f", held out {held_out:.4f}"), False)
            bar.update()
            self.log_rows.append(f"{name},{step},{loss:.5f},{held_out:.5f}\n")
            if step == steps:
                bar.close()
        return log

    def problems(self, split, n):
        return self.task.problems(split, n, self.config["seed"])

    def model(self, name):
        return GPT.load(self.out / name, self.config["device"])

    def save_traces(self, name, traces):
        state = {f.name: getattr(traces, f.name).contiguous() for f in dataclasses.fields(Traces)}
        write_whole(self.out / f"{name}.safetensors", lambda p: save_file(state, p))

    def traces(self, name):
        path = self.out / f"{name}.safetensors"
        try:
            return Traces(**load_file(path))
        except Exception as e:
            raise Fail(f"{path} is missing or damaged ({e}): start again with another --out") from None

    def facts(self):
        """What a result must be quoted with: command, commits, hardware, minutes, peak memory, of the stages as they ran."""
        stages = self.stages.values()
        return {"command": self.stages["policies"]["command"],
                "commit": ", ".join(sorted({s["commit"] for s in stages})), "config": self.config, "seeds": [self.config["seed"]],
                "hardware": ", ".join(sorted({s["hardware"] for s in stages})),
                "minutes": round(sum(s["seconds"] for s in stages) / 60, 2),
                "peak_memory_gb": max(s["peak_memory_gb"] for s in stages)}


def open_runs(folders, device):
    """Finished runs that differ in their seed and in nothing else. Raises Fail otherwise."""
    runs = [Run.open(folder, device) for folder in folders]
    for run in runs[1:]:
        same = {k: v for k, v in run.config.items() if k != "seed"} == {k: v for k, v in runs[0].config.items() if k != "seed"}
        if not same or [r.config["seed"] for r in runs].count(run.config["seed"]) > 1:
            raise Fail(f"--run {run.out}: the runs must differ in their seed and in nothing else")
    return runs


def commit():
    """The commit of the code, "-dirty" if files differ from it, or "unknown" outside of a checkout."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10,
                              cwd=Path(__file__).parent)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware(device):
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"

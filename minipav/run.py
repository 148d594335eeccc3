"""A run folder: its configuration, its stages, its models and traces. train.py starts it; search.py and rl.py
go on.

    run = Run(Path("runs/calculator-seed0"), config)      # start, or with resume=True go on
    run.stage("orm", work)                                # work() unless it is done; what it wrote is final
    run.model("q_pi"), run.traces("base_train"), run.problems("test", 500)

A stage is done once stages/NAME.json is there, which is written last. A stage that was killed is run again
from its own seed and the files of the stages before it; a training, sampling or beam in it that was long goes
on where it last saved (checkpoint.py). The result is that of the uninterrupted run.
"""
import dataclasses
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

from minipav import files, parallel
from minipav.cache import tokens_in_flight
from minipav.checkpoint import Keeper
from minipav.model import GPT
from minipav.precision import pick_dtype
from minipav.pretrained import open_pretrained, read_encoding
from minipav.tasks import TASKS, make_task
from minipav.tasks.task import Task
from minipav.tokenizer import synthetic_encoding
from minipav.traces import Traces
from minipav.utils import Fail, NotFinite, command, commit, derive_seed, hardware, progress

TRAINED = ("policies", "rollouts", "q_pi", "orm")               # stages that search.py and rl.py build on
CONFIG = dict(task=str, dials=dict, seed=int, device=str, dtype=str, checkpointing=bool,
              temperature=(int, float), top_p=(int, float), max_tokens_in_flight=int)
MEMORY = ("max_tokens_in_flight", "micro_batch", "checkpointing")       # change no result but in rounding


class Run:
    def __init__(self, out, config, resume=False):
        """config: all flags of train.py but --out and --resume. Raises Fail if the folder cannot be made, is
        in use, already holds a run that is not to be resumed, or one that was started with other flags."""
        self.out, path = Path(out), Path(out) / "config.json"
        files.lock(self.out)
        found = path.exists() or (self.out / "stages").exists()
        parallel.barrier()
        if found:
            if not resume:
                raise Fail(f"--out {out} already holds a run: add --resume to go on, or choose another --out")
            old, new = files.read_json(path, **CONFIG), json.loads(json.dumps(config))
            old, new = ({k: v for k, v in x.items() if k != "dials"} | x["dials"] for x in (old, new))
            config["data_crc"] = old.get("data_crc", 0)
            for k, v in new.items():
                if old.get(k) != v and k not in MEMORY:
                    raise Fail(f"--{k} is {v}, but the run in {out} was started with {old.get(k)}: repeat "
                               "its flags to resume it, or choose another --out")
        elif resume:
            print(f"--resume: no run is in {out}; a new one begins", flush=True)
        if not found and config.get("init"):
            open_pretrained(config["init"]).describe(self.out / "init")
        parallel.barrier()
        self._prepare(config)
        files.write_json(path, config)                          # MEMORY may have changed
        parallel.barrier()

    def _prepare(self, config):
        self.config, self.log_rows, self.moved = config, [], False
        self.task = make_task(config["task"], config["dials"])
        init = self.out / "init"
        self.enc = read_encoding(init) if config.get("init") else synthetic_encoding(self.task.phrases)
        self.task.fits(self.enc)
        if config.setdefault("data_crc", self.task.data_crc) != self.task.data_crc:
            raise Fail(f"--data: other problems are in {self.task.data} than when the run began")
        self.sampling = {k: config[k] for k in ("temperature", "top_p", "max_tokens_in_flight")}
        self.sampling["partial_folder"] = self.out / "partial" / "calls"

    @classmethod
    def open(cls, out, device, dtype="auto"):
        """The run in a folder, to go on with on any device; dtype "auto" is the run's own on a device of the
        same kind. Raises Fail if it is not trained."""
        run = object.__new__(cls)
        run.out = Path(out)
        if not (run.out / "config.json").exists():
            raise Fail(f"--run {out}: no run of train.py is there; make one with python train.py --out {out}")
        config = files.read_json(run.out / "config.json", **CONFIG)
        missing = [s for s in TRAINED if not (run.out / "stages" / f"{s}.json").exists()]
        if missing:
            raise Fail(f"--run {out}: train.py has not finished there ({', '.join(missing)} not done); "
                       "finish it with its flags and --resume")
        files.lock(run.out, "--run")
        same = device == config["device"]
        dtype = config["dtype"] if same and dtype == "auto" else pick_dtype(dtype, device)
        try:
            run._prepare(config | {"device": device, "dtype": dtype})
            run.moved = not same
        except Fail as e:
            raise e if "data" in config["dials"] else files.damaged(run.out / "config.json", e) from None
        return run

    # ---- stages

    def stage(self, name, work, spec=None):
        """Do work(), which may return facts, unless stages/NAME.json says that it was done. spec: what it
        depends on beside the run's configuration. -> the record: facts, spec, seconds, memory, command,
        commit, hardware, checksums of its files"""
        path, spec = self.out / "stages" / f"{name}.json", json.loads(json.dumps(spec or {}))
        done = path.exists()
        parallel.barrier()              # nobody has written it since
        if done:
            record = stage(self.out, name)
            if record["spec"] != spec:
                raise files.damaged(path, "made with other flags")
            print(f"{name}: done before", flush=True)
            return record
        print(name, flush=True)
        spent, self.log_rows = self.out / "partial" / f"{name}.json", []        # by tries that were stopped
        start = time.time() - (files.read_json(spent, seconds=float)["seconds"] if spent.exists() else 0)
        try:
            facts = work() or {}
        except NotFinite as e:
            raise Fail(f"{name}: {e}") from None
        except KeyboardInterrupt:
            files.write_json(spent, {"seconds": time.time() - start})
            raise
        if self.log_rows:
            files.write_csv(self.out / "logs" / f"{name}.csv", ["model", "step", "loss", "held_out_loss"],
                            self.log_rows)
        record = {"spec": spec, "seconds": round(time.time() - start, 1),
                  "peak_memory_gb": self.peak_memory(), "command": command(), "commit": commit(),
                  "hardware": f"{hardware(self.config['device'])}, {self.config['dtype']}", **facts}
        if parallel.rank() == 0:
            record["files"] = {str(f.relative_to(self.out)): files.file_checksum(f)
                               for f in facts.get("files", ())}
            files.write_json(path, record)
            for path in [spent, *(self.out / "partial").glob("*.safetensors")]:         # its trainings'
                path.unlink(missing_ok=True)
        parallel.barrier()
        return record

    def close(self):
        """The command has come to its end: nothing that was saved within a call is asked for again."""
        shutil.rmtree(self.out / "partial", ignore_errors=True)

    def keeper(self, name):
        """What saves a long training of this stage."""
        return Keeper(self.out / "partial" / f"{name}.safetensors", self.log_rows)

    def peak_memory(self):
        if self.config["device"] == "cuda":
            return round(torch.cuda.max_memory_allocated() / 2**30, 2)
        unit = 2**30 if sys.platform == "darwin" else 2**20
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 2)

    def logger(self, name, steps):
        """log(step, steps, loss, held-out loss) -> a progress bar and a row of the stage's log."""
        bar = progress(name, steps)

        def log(step, steps, loss, held_out=float("nan")):
            bar.set_postfix_str(f", loss {loss:.3f}" + ("" if held_out != held_out
                                                        else f", held out {held_out:.4f}"), False)
            bar.to(step)
            self.log_rows.append((name, step, f"{loss:.5f}", f"{held_out:.5f}"))
            if step == steps:
                bar.close()
        return log

    # ---- what it holds

    def seed(self, *names):
        return derive_seed(self.config["seed"], *names)

    def problems(self, split, n):
        return self.task.problems(split, n, self.config["seed"])

    def model(self, name):
        """A model of this run, or of another folder by its absolute path."""
        model = GPT.load(self.out / name, self.config["device"])
        if (n := model.config.vocab_size) != self.enc.n_vocab:
            raise Fail(f"{self.out / name}: a model of {n} tokens, where this run's task has "
                       f"{self.enc.n_vocab}: it is of another task, or the task was changed")
        if self.moved:                                          # the bound in config.json is another device's
            fits = tokens_in_flight(model.config, self.config["device"], self.config["dtype"])
            self.sampling["max_tokens_in_flight"] = fits
        model.bf16, model.checkpointing = self.config["dtype"] == "bf16", self.config["checkpointing"]
        return model

    def save_traces(self, name, traces):
        files.write_tensors(self.out / f"{name}.safetensors", vars(traces), {"name": name})

    def traces(self, name):
        path = self.out / f"{name}.safetensors"
        dims = {f.name: 1 for f in dataclasses.fields(Traces)}
        dims |= dict.fromkeys(("tokens", "ends", "q", "n", "labelled", "exact"), 2)
        tensors, meta = files.read_tensors(path, dims)
        t = Traces(**{k: tensors[k] for k in dims})
        same = len({len(x) for x in tensors.values()}) == 1 and t.ends.shape == t.q.shape == t.labelled.shape
        if meta.get("name") != name or not same or len(t) and t.tokens.max() >= self.enc.n_vocab:
            raise files.damaged(path, "it holds other traces, or they do not fit together")
        return t


def stage(folder, name):
    """The record of a finished stage of the run in this folder. Raises Fail if a file that it lists is not as
    the stage left it."""
    record = files.read_json(Path(folder) / "stages" / f"{name}.json", spec=dict, seconds=(int, float),
                             command=str, commit=str, hardware=str)
    for file, crc in record.get("files", {}).items():
        if files.file_checksum(Path(folder) / file) != crc:
            raise files.damaged(Path(folder) / file, "not as its stage left it")
    return record


def keyed(name, spec):
    """NAME-HASH: a name of its own for what depends on `spec`, whatever today's defaults are."""
    return f"{name}-{files.checksum(spec):08x}"


def task_of(folder):
    """The class of a run's task; of a folder that holds no run, Task."""
    path = Path(folder) / "config.json"
    return TASKS.get(files.read_json(path, task=str)["task"], Task) if path.exists() else Task


def differ(one, other):
    """Whether configurations differ in more than their seed and what changes no result."""
    return any(one.get(k) != other.get(k) for k in {*one, *other} - {"seed", *MEMORY})


def check_out(folders, out):
    """Make the folder `out` for the results of these runs (None: that of the only one). Raises Fail if it
    cannot be made."""
    if len(folders) > 1 and out is None:
        raise Fail(f"--run {' '.join(map(str, folders))}: several folders need an --out for their mean")
    if out:
        files.make_folder(out)


def open_runs(folders, device, dtype="auto"):
    """Runs that differ in their seed and in nothing else. Raises Fail otherwise."""
    runs = [Run.open(folder, device, dtype) for folder in folders]
    seeds = [run.config["seed"] for run in runs]
    for run in runs[1:]:
        if differ(run.config, runs[0].config) or seeds.count(run.config["seed"]) > 1:
            raise Fail(f"--run {run.out}: the runs must differ in their seed and in nothing else")
    return runs

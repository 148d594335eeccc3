"""The state of a training in one safetensors file: weights, optimizers, the curve so far, numbers and log;
and what a long call has so far."""
import json
import signal
import sys
import time

import torch

from minipav import parallel
from minipav.files import read_tensors, reading, tensor_checksum, write_tensors
from minipav.utils import on_stop

EVERY = 600                             # seconds between two saves of a long training, sampling or beam


def save(path, modules, optimizers, curve, state, rows):
    """modules {name: module}, optimizers {name: [its optimizers]}, curve (evaluations, problems)."""
    for opt in divided(optimizers):
        opt.consolidate_state_dict()                        # in the first process, which writes
    if parallel.rank():
        return
    tensors = {"curve": curve}
    for name, module in modules.items():
        tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for j, opt in enumerate(optimizers[name]):
            tensors |= {f"opt.{name}.{j}.{p}.{k}": v for p, values in opt.state_dict()["state"].items()
                        for k, v in values.items()}
    write_tensors(path, tensors, {"state": json.dumps(state), "rows": json.dumps(rows)})


def divided(optimizers):
    """The optimizers whose states are divided among the processes."""
    return [o for every in optimizers.values() for o in every if hasattr(o, "consolidate_state_dict")]


def load(path, modules, optimizers):
    """Put the saved state back. -> (curve, state, rows). Raises Fail if the file is not of this training."""
    tensors, meta = read_tensors(path, {"curve": 2})
    with reading(path, RuntimeError, ValueError, KeyError, IndexError, TypeError):
        for name, module in modules.items():
            module.load_state_dict(below(tensors, f"{name}."))
            for j, opt in enumerate(optimizers[name]):
                state = {}
                for key, v in below(tensors, f"opt.{name}.{j}.").items():
                    p, k = key.split(".")
                    state.setdefault(int(p), {})[k] = v
                groups = torch.optim.Optimizer.state_dict(opt)["param_groups"]
                opt.load_state_dict({"state": state, "param_groups": groups})
        for opt in divided(optimizers):                      # its step counts to where fused AdamW wants them
            opt.optim.state.update({p: v for p, v in opt.state.items() if v})
        state, rows = json.loads(meta["state"]), json.loads(meta["rows"])
        if len(rows) != len(tensors["curve"]) or rows[-1]["iteration"] != state["iteration"]:
            raise ValueError("its log and its state do not fit together")
        return tensors["curve"], state, rows


class Keeper:
    """Saves a long training every ten minutes, and when it is told to stop; started again, it goes on from
    there to the same end. Without a path nothing is saved."""

    def __init__(self, path=None, log_rows=()):
        self.path, self.log_rows, self.saved, self.told = path, log_rows, time.time(), 0.0

    def tell(self, *_):
        """The first Ctrl-C or SIGTERM (timeout sends two) lets the step end, one a second later does not."""
        if self.told and time.time() > self.told + 1:
            raise KeyboardInterrupt
        if not self.told:
            self.told = time.time()
            print("\n  stops after this step, saved (again: at once, unsaved)", file=sys.stderr)

    def resume(self, modules, optimizers):
        """Put back what was saved, if anything was. -> (optimizer steps done, facts)"""
        if self.path is None:
            return 0, {}
        self.what = modules, optimizers
        if not self.path.exists():
            return 0, {}
        _, state, _ = load(self.path, *self.what)
        self.log_rows[:] = state["log"]
        return state["iteration"], state["facts"]

    def save(self, step, last, **facts):
        """After each step; the last one too, if an earlier one was saved: other trainings may follow."""
        if not self.path:
            return
        due = time.time() - self.saved > EVERY or last and self.path.exists()
        if self.told or parallel.agreed(due):
            state = {"iteration": step, "facts": facts, "log": self.log_rows}
            save(self.path, *self.what, torch.zeros(1, 0), state, [{"iteration": step}])
            self.saved = time.time()
        if self.told:
            raise KeyboardInterrupt
        if parallel.world() == 1:
            on_stop(signal.default_int_handler if last else self.tell)


class Partial:
    """Saves the outputs of a long call every ten minutes; the same call, made again, goes on from there."""

    def __init__(self, folder, outputs, models, *call, texts=None):
        """outputs, texts: tensors, and a list, that the call fills; call: all that they depend on, beside the
        models' weights. Without a folder, and in one of several processes, nothing is saved."""
        self.folder, self.texts = folder if parallel.world() == 1 else None, [] if texts is None else texts
        self.outputs, self.saved, self.at, self.of = outputs, time.time(), 0, (models, call)
        if self.folder and folder.exists() and self.path.exists():
            found, meta = read_tensors(self.path)
            self.at, self.texts[:] = int(found["0"]), json.loads(meta.get("texts", "[]"))
            for i, to in enumerate(outputs):
                to.copy_(found[str(i + 1)])

    @property
    def path(self):
        models, call = self.of
        weights = [p.detach() for m in models for p in m.parameters()]
        of = [(p.cpu() if p.is_mps else p).double().sum() for p in weights]     # a Mac's GPU has no doubles
        of = map(torch.as_tensor, (torch.stack(of).cpu(), *call))
        return self.folder / f"{tensor_checksum(named(of), {})}.safetensors"

    def save(self, at, last=False):
        """The call has come to `at`; last: others may follow, so its end is saved if it took a minute."""
        if self.folder and time.time() - self.saved > (EVERY / 10 if last else EVERY):
            write_tensors(self.path, named([torch.tensor(at), *self.outputs]),
                          {"texts": json.dumps(self.texts)})
            self.saved = time.time()


NOT_KEPT = Keeper()


def named(tensors):
    return {str(i): x for i, x in enumerate(tensors)}


def below(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

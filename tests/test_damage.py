"""Every file that a command reads, damaged in every way: the command says in one line which file it is, or
the result is that of the undamaged run. Nonsense flags; losses that are not finite; two processes in one
folder."""
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rl
import search
import train
from minipav import files, reinforce, sft, verifier
from minipav.paper import report
from minipav.run import Run
from minipav.utils import Fail, NotFinite

ROOT = Path(__file__).parent.parent
NAN, INF = float("nan"), float("inf")

# ---- a finished run of train.py, search.py and rl.py, and an RL training that was stopped in the middle

TOY = ("--smoke --device cpu --H 4 --min_steps 2 --sft_steps 250 --problems 400 --q_steps 60").split()
SMALL = ("--smoke --device cpu --H 2 --min_steps 1 --sft_steps 4 --strong_steps 2 --problems 20 "
         "--branches 40 --pit_traces 0 --prover_rollouts 20 --q_steps 3 --orm_steps 2 --mu_steps 2 "
         "--test_problems 8 --max_n 4 --widths 1 2 --batch_size 16").split()
SEARCH = ("--device cpu --problems 5 --n 4 --widths 1 2 --validation 5 --search pass best_of_n:orm beam:q_pi "
          "beam:effective").split()
RL = ("--device cpu --reward pav --refresh 1 --iterations 4 --eval_every 2 --batch 8 --problems 5 --eval_n 2 "
      "--n 4").split()


class Hang(BaseException):
    """A command that took too long."""


@contextlib.contextmanager
def limits(seconds=60, gigabytes=6):
    """A command that hangs ends in Hang; one that asks for more memory gets none."""
    def stop(*_):
        raise Hang(f"more than {seconds} s")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (gigabytes << 30), before[1]))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def unlock():
    """What the end of a process does."""
    for f in files.LOCKS.values():
        f.close()
    files.LOCKS.clear()


def main(module, *args, cwd=ROOT):
    """What main() of a script prints with these flags."""
    unlock()
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()):
            m.chdir(cwd)
            m.setattr(sys, "argv", ["script.py", *map(str, args)])
            try:
                module.main()
            finally:
                unlock()
    return out.getvalue()


class Toy:
    """folder: the finished run; stopped: what its RL training had written when it was stopped."""

    def __init__(self, folder, flags, rl_flags):
        self.folder, self.flags, self.rl_flags = folder / "run", flags, rl_flags
        self.stopped = folder / "stopped"
        main(train, *flags, "--out", self.folder)
        main(search, "--run", self.folder, *SEARCH)
        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            go_on = reinforce.Reinforce.iterate
            m.setattr(reinforce.Reinforce, "iterate",
                      lambda loop, i: interrupt() if i == 3 else go_on(loop, i))
            main(rl, "--run", self.folder, *rl_flags)
        [half] = self.folder.glob("rl/pav-*")
        shutil.copytree(half, self.stopped)
        main(rl, "--run", self.folder, *rl_flags)
        main(report, "--runs", self.folder, "--out", self.folder / "mean")
        shutil.copytree(ROOT / "results" / "didactic", self.folder / "didactic")
        self.names, self.claims = self._names(), main(report, "--claims", self.folder / "didactic")
        self.sums = self._sums()

    def _names(self):
        """Names for the hashed files: T_* of train.py, S_* of search.py, R_* of rl.py."""
        names = {}
        for path in sorted((self.folder / "stages").glob("*/*.json")):
            s = json.loads(path.read_text())["spec"]
            if "method" not in s:
                names["R_" + path.stem.partition("-")[0]] = path.stem
                continue
            who = "V" if s["split"] == "validation" else "S" if s["problems"] == 5 else "T"
            names.setdefault(f"{who}_{s['method']}_{s['score']}".rstrip("_"), path.stem)
        return names

    def _sums(self):
        return {p: zlib.crc32(p.read_bytes()) for p in self.folder.parent.rglob("*") if p.is_file()}

    def clone(self, to):
        """A copy by hard links: what is damaged has to be copied first."""
        for folder, _, names in os.walk(self.folder):
            where = to / Path(folder).relative_to(self.folder)
            where.mkdir(parents=True)
            for name in names:
                if name != ".lock":
                    os.link(Path(folder) / name, where / name)
        shutil.rmtree(to / "mean")
        return to


def interrupt():
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A base policy that is right at times."""
    t = Toy(tmp_path_factory.mktemp("toy"), TOY, RL)
    yield t
    assert t.sums == t._sums(), "a case has changed the run that all are copied from"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Made in seconds, never right; figures are not drawn."""
    with pytest.MonkeyPatch.context() as m:
        from matplotlib.figure import Figure
        m.setattr(Figure, "savefig", lambda fig, path, **kw: Path(path).write_bytes(b"png"))
        m.setattr(Figure, "tight_layout", lambda fig: None)
        t = Toy(tmp_path_factory.mktemp("small"), SMALL, [*RL, "--no_rft"])
        yield t
    assert t.sums == t._sums(), "a case has changed the run that all are copied from"


# ---- damages: functions of a path. What edits a value takes its checksum away too, as if another version had
# written the file; "a bit" leaves it.

def edited_json(change):
    """change(value) edits it in place."""
    def damage(path):
        value = json.loads(path.read_text())
        value.pop("crc", None)
        change(value)
        path.write_text(json.dumps(value))
    return damage


def without(*keys):
    def change(value):
        for k in keys[:-1]:
            value = value[k]
        del value[keys[-1]]
    return edited_json(change)


def put(*keys_and_value):
    *keys, last, new = keys_and_value

    def change(value):
        for k in keys:
            value = value[k]
        value[last] = new
    return edited_json(change)


def written(data):
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def halved(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def folder_instead(path):
    path.unlink()
    path.mkdir()


BYTES = {"missing": Path.unlink, "empty": written(""), "half": halved,
         "random": written(random.Random(0).randbytes(3000)), "a folder": folder_instead, "a bit": flipped,
         "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size))}
TEXT = BYTES | {"not utf-8": lambda path: path.write_bytes(b"\xff\xfe\x80" + path.read_bytes())}
FEW = {k: BYTES[k] for k in ("missing", "empty", "half", "random", "a bit")}
JSON = TEXT | {k: written(x) for k, x in {
    "[]": "[]", "3": "3", "null": "null", "{}": "{}", "a string": '"text"', "NaN": "NaN",
    "deep": "[" * 100_000, "deep objects": '{"spec":' * 100_000,
    "5000 digits": '{"seed": ' + "9" * 5000 + "}",
    "two values": "{} {}", "list of objects": "[{}]"}.items()}
WRONG = {"null": None, "text": "text", "[]": [], "{}": {}, "NaN": NAN, "-1": -1, "0": 0, "1e30": 10**30,
         "inf": INF, "true": True}


def keys(*names, wrong=tuple(WRONG)):
    """Each of these keys (k, or (k, l) in an object in it) missing, and with each wrong value."""
    for k in names:
        path = k if isinstance(k, tuple) else (k,)
        yield f"no {'.'.join(path)}", without(*path)
        for w in wrong:
            yield f"{'.'.join(path)} {w}", put(*path, WRONG[w])


def edited_tensors(change):
    """change(tensors, metadata) edits them in place."""
    def damage(path):
        with safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("minipav", "{}"))
        tensors = load_file(path)
        meta.pop("crc", None)
        change(tensors, meta)
        path.unlink()
        save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path,
                  metadata={"minipav": json.dumps(meta)})
    return damage


def tensor(name, change):
    """One tensor replaced by change(tensor); name: or the beginning of it."""
    def edit(tensors, meta):
        k = next(k for k in tensors if k.startswith(name))
        tensors[k] = change(tensors[k])
    return edited_tensors(edit)


def no_tensor(name):
    def edit(tensors, meta):
        del tensors[next(k for k in tensors if k.startswith(name))]
    return edited_tensors(edit)


def filled(x, at=0):
    """The element `at` of a tensor is x."""
    def change(t):
        t = t.clone()
        t.view(-1)[at] = x
        return t
    return change


def copied_from(name):
    """Another file of the run in its place."""
    def damage(path):
        run = next(p for p in path.parents if (p / "config.json").exists() and (p / "stages").exists())
        path.write_bytes((run / name).read_bytes())
    return damage


WEIGHTS = BYTES | {
    "traces": copied_from("base_train.safetensors"), "NaN": tensor("blocks.0.attn.wq.weight", filled(NAN)),
    "inf": tensor("norm.weight", filled(INF, -1)), "no embedding": no_tensor("embed.weight"),
    "no norm": no_tensor("norm.weight"),
    "one too many": edited_tensors(lambda t, m: t.update(x=torch.ones(2))),
    "flat": tensor("embed.weight", torch.flatten), "cut": tensor("embed.weight", lambda t: t[:-1]),
    "integers": tensor("embed.weight", lambda t: t.long()),
    "complex": tensor("embed.weight", lambda t: t + 0j),
    "no tensors": edited_tensors(lambda t, m: t.clear()), "header": written((1 << 60).to_bytes(8, "little")),
    "half header": lambda path: path.write_bytes(path.read_bytes()[:100])}
MODEL = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd", "n_ffn", "rope_theta",
         "norm_eps", "qkv_bias", "tied", "head", "n_out", "target")
ONE, TWO = ("problem", "lengths", "reward", "cost"), ("tokens", "ends", "q", "n", "labelled", "exact")
TRACES = BYTES | {f"no {k}": no_tensor(k) for k in ONE + TWO} | {
    f"{k} flat": tensor(k, torch.flatten) for k in TWO} | {
    f"{k} 2-d": tensor(k, lambda t: t[:, None]) for k in ONE} | {
    f"{k} cut": tensor(k, lambda t: t[:-1]) for k in ("problem", "tokens", "ends", "exact")} | {
    f"{k} float": tensor(k, torch.Tensor.float) for k in ("tokens", "ends", "lengths", "n", "labelled")} | {
    f"{k} integers": tensor(k, torch.Tensor.long) for k in ("q", "reward", "labelled", "exact")} | {
    f"{k} {x}": tensor(k, filled(x)) for k, x in (
        ("q", NAN), ("q", INF), ("q", 2.0), ("q", -1.0), ("reward", NAN), ("reward", 0.5), ("tokens", -1),
        ("tokens", 1 << 40), ("lengths", 0), ("lengths", -1), ("lengths", 1 << 40), ("ends", -2),
        ("ends", 1 << 40), ("n", -1), ("problem", -1), ("problem", 1 << 40))} | {
    "no rows": edited_tensors(lambda t, m: t.update({k: v[:0] for k, v in t.items()})),
    "no labels": tensor("labelled", torch.zeros_like),
    "a label behind the end": tensor("labelled", torch.ones_like),
    "one too many": edited_tensors(lambda t, m: t.update(x=t["cost"])),
    "a model": copied_from("base/model.safetensors")}


def edited_csv(change):
    """change(header, rows) edits them in place."""
    def damage(path):
        with open(path, newline="", encoding="utf-8") as f:
            header, *rows = csv.reader(f)
        change(header, rows)
        with open(path, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])
    return damage


def cell(column, value, row=1):
    def change(header, rows):
        rows[row][header.index(column)] = value
    return edited_csv(change)


def no_column(column):
    def change(header, rows):
        i = header.index(column)
        for row in (header, *rows):
            del row[i]
    return edited_csv(change)


TABLE = TEXT | {
    "header only": edited_csv(lambda h, rows: rows.clear()),
    "no header": edited_csv(lambda h, rows: h.clear()),
    "a cell is missing": edited_csv(lambda h, rows: rows[1].pop()),
    "a cell too many": edited_csv(lambda h, rows: rows[1].append("1")),
    "half of the rows": edited_csv(lambda h, rows: rows.__delitem__(slice(len(rows) // 2, None))),
    "the last row is missing": edited_csv(lambda h, rows: rows.pop()),
    "a row twice": edited_csv(lambda h, rows: rows.append(list(rows[-1]))),
    "an open quote": lambda path: path.write_text(path.read_text() + '"'),
    "a NUL": lambda path: path.write_bytes(path.read_bytes()[:-5] + b"\0" + path.read_bytes()[-5:]),
    "a cell of 200 KB": edited_csv(lambda h, rows: rows[1].__setitem__(0, "x" * 200_000))}


def columns(names, wrong=("", "text")):
    for c in names:
        yield f"no {c}", no_column(c)
        for x in wrong:
            yield f"{c} {x!r}", cell(c, x)


def edited_meta(change):
    """change(state, rows) edits a checkpoint's metadata in place."""
    def edit(tensors, meta):
        state, rows = json.loads(meta["state"]), json.loads(meta["rows"])
        change(state, rows)
        meta.update(state=json.dumps(state), rows=json.dumps(rows))
    return edited_tensors(edit)


def meta(**texts):
    return edited_tensors(lambda t, m: m.update(texts))


CHECKPOINT = BYTES | {
    "a model": copied_from("base/model.safetensors"), "traces": copied_from("base_train.safetensors"),
    "no state": edited_tensors(lambda t, m: m.pop("state")),
    "no rows": edited_tensors(lambda t, m: m.pop("rows")),
    "no metadata": edited_tensors(lambda t, m: m.clear()),
    **{f"state {x[:9]}": meta(state=x) for x in ("", "[]", "3", "null", "{}", "NaN", "[" * 100_000)},
    **{f"rows {x[:9]}": meta(rows=x)
       for x in ("", "[]", "3", "null", "{}", "[{}, {}]", "[3, 3]", "[" * 100_000)},
    **{f"no {k}": edited_meta(lambda s, r, k=k: s.pop(k))
       for k in ("iteration", "tokens", "seconds", "running")},
    **{f"{k} {w}": edited_meta(lambda s, r, k=k, w=w: s.update({k: WRONG[w]}))
       for k, w in itertools.product(("tokens", "seconds", "running"), ("null", "text", "[]", "NaN"))},
    **{f"iteration {x}": edited_meta(lambda s, r, x=x: (s.update(iteration=x), r[-1].update(iteration=x)))
       for x in (None, "2", [], NAN, -1, 1.5, 99, 10**30, True)},
    "iteration of another row": edited_meta(lambda s, r: s.update(iteration=1)),
    "a row is missing": edited_meta(lambda s, r: r.pop(0)),
    **{f"a row without {k}": edited_meta(lambda s, r, k=k: r[0].pop(k))
       for k in ("iteration", "tokens", "kl")},
    **{f"a row's {k} {w}": edited_meta(lambda s, r, k=k, w=w: r[-1].update({k: WRONG[w]})) for k, w in (
        ("tokens", "text"), ("tokens", "null"), ("seconds", "null"), ("seconds", "NaN"),
        ("accuracy", "text"))},
    **{f"no {k}*": no_tensor(k) for k in ("policy.", "value.", "verifier.", "opt.policy.", "opt.value.1.",
                                          "opt.verifier.", "curve")},
    "no optimizer": edited_tensors(lambda t, m: [t.pop(k) for k in list(t) if k.startswith("opt.policy")]),
    **{f"{k}* {n}": tensor(k, f)
       for k in ("policy.", "opt.policy.0.0.exp_avg", "opt.value.1.", "opt.value.0.", "curve")
       for n, f in (("NaN", filled(NAN)), ("flat", torch.flatten),
                    ("cut", lambda t: t[:-1] if t.dim() else t[None]))},
    "a step that is not": tensor("opt.policy.0.0.step", lambda t: t.expand(3)),
    "negative second moments": tensor("opt.policy.0.0.exp_avg_sq", lambda t: -t - 1),
    "an optimizer too many": edited_tensors(lambda t, m: t.update({"opt.policy.0.x.y": torch.ones(1)})),
    "a parameter too many": edited_tensors(
        lambda t, m: t.update({"opt.policy.0.999.exp_avg": torch.ones(1)})),
    "a curve of other problems": tensor("curve", lambda t: t[:, :-1]),
    "a curve above 1": tensor("curve", filled(7.0))}


# ---- commands: what is read, which records have to go for that, and how it is called

class Command(NamedTuple):
    module: object
    args: object                    # (toy, folder) -> its flags
    drop: tuple = ()                # what must not be there for the damaged file to be read
    stopped: bool = False           # RL starts from its checkpoint


def resume(*drop):
    return Command(train, lambda t, f: [*t.flags, "--resume", "--out", f], drop)


def searching(*drop, more=()):
    return Command(search, lambda t, f: ["--run", f, *SEARCH, *more], drop)


def learning(*drop, stopped=False):
    return Command(rl, lambda t, f: ["--run", f, *t.rl_flags], drop, stopped)


COMMANDS = {
    "resume": resume(), "resume rollouts": resume("stages/rollouts.json"),
    "resume q_pi": resume("stages/q_pi.json"),
    "resume orm": resume("stages/orm.json"), "resume q_weak": resume("stages/q_weak.json"),
    "resume example": resume("stages/example.json"), "resume pass": resume("stages/search/{T_pass}.json"),
    "resume beam": resume("stages/search/{T_beam_effective}.json"),
    "search": searching(), "search beam": searching("stages/search/{S_beam_effective}.json"),
    "search pass": searching("stages/search/{S_pass}.json"),
    "search orm": searching("stages/search/{S_best_of_n_orm}.json"),
    "rl": learning(), "rl pav": learning("stages/rl/{R_pav}.json", "rl/{R_pav}/*"),
    "rl sft": learning("stages/rl/{R_sft}.json", "rl/{R_sft}/*"),
    "rl rft": learning("stages/rl/{R_rft}.json", "rl/{R_rft}/*"),
    "rl stopped": learning("stages/rl/{R_pav}.json", "rl/{R_pav}/*", stopped=True),
    "report": Command(report, lambda t, f: ["--runs", f, "--out", f / "mean"]),
    "claims": Command(report, lambda t, f: ["--claims", f / "didactic"])}


class Case(NamedTuple):
    command: str
    file: str                       # {NAME}: a hashed name, see Toy._names
    what: str
    damage: object

    def __str__(self):
        return f"{self.command}: {self.file}: {self.what}"


def of(command, file, damages):
    return [Case(command, file, *x) for x in dict(damages).items()]


def of_configs():
    config = sorted(set(train.Flags.__dataclass_fields__) - {"out", "resume"})
    out = of("resume", "config.json", JSON | dict(keys(*config, "dials", wrong=("text",))))
    dials = {f"dials = {json.dumps(x)}": put("dials", x) for x in (
        {}, {"H": 4}, {"min_steps": 2}, {"H": "4", "min_steps": 2}, {"H": 4.0, "min_steps": 2},
        {"H": None, "min_steps": 2}, {"H": 10**30, "min_steps": 2}, {"H": -1, "min_steps": 2},
        {"H": NAN, "min_steps": 2}, {"H": [4], "min_steps": 2}, {"H": True, "min_steps": 1},
        {"H": 4, "min_steps": 2, "x": 1})} | {
        f"task {x}": put("task", x) for x in ("chess", "countdown", "", 3, ["calculator"])}
    out += of("search pass", "config.json", JSON | dials) + of("search pass", "config.json", keys(
        "task", "dials", "seed", "device", "temperature", "top_p", "max_tokens_in_flight", "K",
        wrong=("null", "text", "[]", "NaN", "-1", "0", "1e30", "inf")))
    out += of("rl pav", "config.json", FEW | dict(keys(
        "lr_muon_verifier", "lr_adamw_verifier", "seed", "top_p", wrong=("null", "text", "NaN", "-1"))))
    out += of("report", "config.json", JSON | dict(keys("seed", "task", "alpha", "K", wrong=("null", "[]"))))
    return out


def of_records():
    """Of finished stages."""
    record = ("spec", "seconds", "peak_memory_gb", "command", "commit", "hardware")
    few = ("null", "text", "NaN")
    out = of("resume", "stages/q_pi.json", JSON | dict(keys(*record, wrong=few)))
    facts = ("planning_failure_share", "corrupted_step_auc", "tables", "stages")
    example = FEW | dict(keys(*facts, wrong=("null", "text", "[]", "{}", "NaN"))) | {
        f"{k} {x}": put(k, x) for k in ("tables", "stages")
        for x in ([3], [None], [[]])}
    out += of("resume", "stages/example.json", JSON | example) + of("report", "stages/example.json", example)
    out += of("resume", "stages/policies.json", FEW) + of("resume", "stages/orm.json", FEW)
    out += of("resume", "stages/rollouts.json", {k: x for k, x in FEW.items() if k != "missing"})
    out += of("resume", "stages/search/{T_pass}.json", JSON | dict(keys("spec", "seconds", wrong=few)))
    out += of("search", "stages/search/{S_beam_effective}.json", JSON | dict(keys(
        *record, ("spec", "alpha"), ("spec", "ns"), wrong=few)))
    out += of("search", "stages/q_pi.json", FEW) + of("rl", "stages/policies.json", FEW)
    out += of("rl", "stages/rl/{R_pav}.json", JSON | dict(keys(
        *record, "accuracy", "greedy", "tokens", "training_seconds", ("spec", "kl"), ("spec", "policy"),
        wrong=few)))
    out += of("rl", "stages/rl/{R_rft}.json", FEW | dict(keys("spec", "seconds", "accuracy", wrong=few)))
    out += of("rl", "stages/rl/{R_sft}.json", FEW)
    out += of("rl", "stages/q_pi.json", dict(keys("seconds", wrong=few)))
    out += of("rl", "stages/rollouts.json", FEW | dict(keys(
        "tokens", "seconds", ("tokens", "seeds_base"), ("tokens", "base_train"), wrong=(*few, "-1", "inf"))))
    out += of("report", "stages/q_pi.json", FEW | dict(keys("seconds", "commit", wrong=few)))
    return out


def of_models():
    policy = WEIGHTS | {"a verifier": copied_from("q_pi/model.safetensors")}
    critic = WEIGHTS | {"a policy": copied_from("base/model.safetensors")}
    out = of("search beam", "base/model.safetensors", policy)
    out += of("search beam", "q_pi/model.safetensors", critic)
    for command, name in (
            ("search orm", "orm"), ("resume q_pi", "strong"), ("resume orm", "q_pi"), ("resume beam", "q_pi"),
            ("resume rollouts", "weak"), ("resume example", "orm"), ("rl pav", "q_pi"),
            ("rl pav", "rl/{R_rft}"), ("rl rft", "base"), ("report", "q_pi")):
        out += of(command, f"{name}/model.safetensors", FEW | {k: WEIGHTS[k] for k in ("traces", "NaN")})
        out += of(command, f"{name}/config.json", FEW | {k: JSON[k] for k in ("[]", "{}")})
    out += of("search beam", "q_pi/config.json", JSON | dict(keys(
        *MODEL, wrong=("null", "text", "NaN", "0", "1e30"))) | {f"{k} {x}": put(k, x) for k, x in (
            ("block_size", 1), ("block_size", 1 << 24), ("n_layer", 1 << 20), ("head", "lm"), ("n_out", 2),
            ("vocab_size", 1 << 24), ("rope_theta", -10000.0), ("norm_eps", -1.0), ("x", 1))})
    out += of("search beam", "base/config.json", keys(
        "block_size", "n_head", "rope_theta", "head", "tied", "target", wrong=("text", "NaN", "0", "true")))
    return out


def of_traces():
    other = copied_from("weak_train.safetensors")
    out = of("resume q_pi", "base_train.safetensors", TRACES | {"of another policy": other})
    for command, name in (
            ("resume q_pi", "base_validation"), ("resume orm", "base_train"), ("rl pav", "base_train"),
            ("resume q_weak", "weak_train"), ("resume q_weak", "weak_validation")):
        out += of(command, f"{name}.safetensors", FEW | {k: TRACES[k] for k in (
            "no q", "q nan", "q 2.0", "no rows", "no labels", "lengths 0", "ends float", "a model")})
    out += of("rl rft", "seeds_base_train.safetensors", {
        k: x for k, x in TRACES.items() if k[0] not in "nqe" or k == "no q"})
    return out


def of_tables():
    """Of searches and of trainings, and a training's checkpoint."""
    rows = ("method", "score", "policy", "prover", "alpha", "spread", "quota", "split", "sample_seed", "n",
            "problem", "right", "solved", "tokens", "verifier_tokens", "text")
    numbers = {f"{c} {x}": cell(c, x) for c in ("n", "problem", "right", "tokens")
               for x in ("-1", "inf", "1e999", "9" * 30)}
    out = of("resume", "search/{T_beam_q_pi}.csv", TABLE | dict(columns(rows)) | numbers)
    out += of("resume example", "search/{T_beam_effective}.csv", TABLE | dict(columns(rows, ("", "text"))))
    out += of("search", "search/{S_beam_effective}.csv", TABLE | dict(columns(rows, ("text",))))
    out += of("search", "search/{V_beam_effective}.csv", TABLE | dict(columns((
        "n", "right", "problem", "alpha"))))
    out += of("report", "search/{T_pass}.csv", TABLE | dict(columns(("n", "right", "method", "tokens"))))
    log = ("iteration", "tokens", "seconds", "accuracy", "greedy", "pass_n", "length", "kl", "entropy",
           "train_reward")
    out += of("rl", "rl/{R_pav}/log.csv", TABLE | dict(columns(log)))
    each = columns(("iteration", "problem", "n", "right", "greedy"), ("", "text", "nan", "-1", "99"))
    out += of("rl", "rl/{R_pav}/rows.csv", TABLE | dict(each))
    out += of("rl", "rl/{R_sft}/rows.csv", TABLE | {
        "greedy text": cell("greedy", "text"), "n 0": cell("n", "0")})
    out += of("rl stopped", "rl/{R_pav}/checkpoint.safetensors", CHECKPOINT)
    out += of("rl stopped", "rl/{R_pav}/log.csv", TEXT)
    return out


def of_the_rest():
    """What is rebuilt, or not read; and the numbers of the didactic example and of the theory."""
    out = []
    for name in ("table.txt", "summary.json", "curves.csv", "accuracy.csv", "accuracy.png", "rows.csv.gz",
                 "example.txt", "logs/q_pi.csv", "q_pi/held_out.csv"):
        out += of("resume", name, {k: TEXT[k] for k in ("missing", "empty", "random", "a folder")})
    out += of("resume example", "example.txt", {k: TEXT[k] for k in ("missing", "random", "a folder")})
    for command, name in (("search", "search/summary.json"), ("search", "search/table.txt"),
                          ("rl", "rl/table.csv"), ("rl", "rl/summary.json")):
        out += of(command, name, {k: TEXT[k] for k in ("missing", "random", "a folder")})
    for name in ("summary.json", "theory.json"):
        found = json.loads((ROOT / "results" / "didactic" / name).read_text())
        found = JSON | dict(keys(*(k for k in found if k != "crc"), wrong=("null", "[]", "NaN")))
        out += of("claims", f"didactic/{name}", {k: x for k, x in found.items() if k != "missing"})
    return out


# ---- a case: the command ends in one line that names the file, or its result is that of the undamaged run

VOLATILE = {"seconds", "peak_memory_gb", "command", "commit", "hardware", "seconds_by_n", "training_seconds",
            "minutes", "before", "config", "tokens_per_s", "crc", "files"}


def strict(text):
    def refuse(x):
        raise ValueError(f"{x} in a JSON file")
    return json.loads(text, parse_constant=refuse)


def content(path):
    """What must be the same in two runs."""
    data = path.read_bytes()
    if path.suffix == ".json" and "didactic" not in path.parts:
        value = strict(data)
        return {k: v for k, v in value.items() if k not in VOLATILE} if isinstance(value, dict) else value
    if path.suffix == ".png" or path.parent.name == "rl" and path.name in ("table.txt", "fig7.csv"):
        return path.suffix                                                      # minutes are in them
    if path.suffix == ".csv" and "rl" in path.parts[-3:]:
        return [{k: v for k, v in row.items() if k not in VOLATILE}
                for row in csv.DictReader(io.StringIO(data.decode()))]
    return gzip.decompress(data) if path.suffix == ".gz" else data


def different(toy, folder, damaged, bytes_then):
    """The files of a run that are not those of the undamaged one; the damaged one may be as it was then."""
    for path in toy.folder.rglob("*"):
        name = path.relative_to(toy.folder)
        now = folder / name
        if path.is_dir() or name.name == ".lock":
            continue
        if name.parts[0] == "mean" and not (folder / "mean").exists():         # another command's
            continue
        if not now.is_file():
            if now != damaged or bytes_then is not None:
                yield f"{name} is not there"
        elif not now.samefile(path) and not (now == damaged and now.read_bytes() == bytes_then):
            try:
                same = content(now) == content(path)
            except ValueError as e:
                yield f"{name}: {e}"
            else:
                if not same:
                    yield f"{name} is another"


def names(message, path, folder, what):
    """Whether an error names the file; or, of what is not there, the stage; of config.json, a flag of it."""
    near = str(Path(path.parent.name) / path.name)
    flag = path == folder / "config.json" and f"the run in {folder} was started with" in message
    gone = what in ("missing", "a folder") and str(folder) in message and (
        path.stem in message or "no run of" in message)
    return str(path) in message or path.parent != folder and near in message or flag or gone


def where(e):
    """An exception and the lines of the project that it came through, the last one first."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if Path(__file__) != Path(f.filename)
              and ROOT in Path(f.filename).parents]
    lines = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:3])
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]} at {lines}"


def check(toy, case, folder):
    command = COMMANDS[case.command]
    toy.clone(folder)
    for pattern in command.drop:
        for path in sorted(folder.glob(pattern.format_map(toy.names))):
            path.unlink()
    if command.stopped:
        for path in toy.stopped.iterdir():
            shutil.copy(path, folder / "rl" / toy.names["R_pav"] / path.name)
    path = folder / case.file.format_map(toy.names)
    if case.damage:
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
        case.damage(path)
    then = path.read_bytes() if path.is_file() else None
    start = time.time()
    try:
        with limits():
            printed = main(command.module, *command.args(toy, folder))
    except Fail as e:
        assert case.damage, f"undamaged, and yet: {e}"
        assert "\n" not in str(e) and len(str(e)) < 700, f"NOT ONE LINE {e}"
        assert names(str(e), path, folder, case.what), f"NOT NAMED {e}".replace(str(folder), "RUN")
        return
    except (Hang, Exception) as e:
        pytest.fail(f"TRACEBACK {where(e)}".replace(str(folder), "RUN"), pytrace=False)
    assert time.time() - start < 60
    wrong = [*different(toy, folder, path, then)]
    if case.command == "claims" and printed != toy.claims:
        wrong.append("what it prints is another")
    assert not wrong, f"SILENT exit 0, and {'; '.join(wrong[:4])}"
    assert not list(folder.rglob("*.tmp"))


CASES = of_configs() + of_records() + of_models() + of_traces() + of_tables() + of_the_rest()
SLOW_FIRST = ("rl rft", "rl sft", "resume rollouts")            # need a policy that is right, or seconds
QUICK = [c for c in CASES if c.command not in SLOW_FIRST and "rft" not in c.file]
SAMPLE = {c.file: c for c in QUICK if c.what == "half"}.values()                # every file once


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_undamaged(toy, command, tmp_path):
    check(toy, Case(command, "config.json", "undamaged", None), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_damaged(toy, case, tmp_path):
    check(toy, case, tmp_path / "run")


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_damaged_sample(small, case, tmp_path):
    check(small, case, tmp_path / "run")


# ---- nonsense flags: one line that names the flag, before any work is done and any file is written

class Started(BaseException):
    """The flags were accepted."""


BIG, HUGE, LONG = "9" * 20, "9" * 5000, "x" * 5000
INTS = ("text", "", "1.5", "²", "-1", "nan", "inf", "\0", BIG, HUGE)
FLOATS = ("text", "", "²", "-1", "nan", "inf", "-inf", "1e400", "\0", HUGE)
PROVERS = ("bo0", "bo", "bo-1", "bo²", "bo1.5", "bo" + BIG, "bo" + HUGE, "BO4", "bo4 ", "bo4\n", "",
           "nonsense", "/", "/dev/null", "\0", LONG, "{tmp}", "{run}", "{run}/base")


def each(script, flag, *values):
    """(script, its flags, what the message has to name). {run}: a finished run, {copy}: another with the same
    seed, {tmp}: an empty folder, {file}: a file."""
    return [(script, (flag, *(v if isinstance(v, tuple) else (v,))), flag) for v in values]


def to_train(t="train"):
    yield from each(t, "--problems", *INTS, "0", "1e3", "1000000000")
    yield from each(t, "--alpha", *FLOATS, "1001")
    yield from each(t, "--K", "0", "1000000", BIG, "²")
    yield from each(t, "--widths", (), "0", "-1", "text", "", BIG, ("1", "1"), ("1", "2", "1"), "4097")
    yield from each(t, "--seed", "-1", BIG, HUGE, str(2**32), "nan")
    yield from each(t, "--top_p", "0", "1.5", "nan", "-1")
    yield from each(t, "--temperature", "0", "1000", "nan", "-1")
    yield from each(t, "--lr_muon", "-1", "11", "nan", "inf")
    yield from each(t, "--lr_adamw_verifier", "0", "-1", "1e38", "nan")
    for flag in ("--expert_fraction", "--weak_at", "--pit_threshold", "--corrupted_fraction"):
        yield from each(t, flag, "1.1", "-0.1", "nan")
    for flag in ("--batch_size", "--n_cov", "--n_mc", "--q_steps", "--orm_steps", "--mu_steps",
                 "--test_problems", "--max_n", "--max_tokens_in_flight"):
        yield from each(t, flag, "0", BIG)
    for flag in ("--branches", "--pit_traces", "--prover_rollouts", "--sft_steps", "--strong_steps"):
        yield from each(t, flag, "-1", BIG)
    yield from each(t, "--prover_rollouts", "1000000000")                       # no memory holds them
    yield t, ("--problems", "10000000", "--n_cov", "4096"), "--n_cov"
    yield t, ("--test_problems", "1000000", "--max_n", "65536"), "--max_n"
    yield from each(t, "--task", "chess", "", "Calculator", "\0", LONG)
    for flag in ("--size", "--recipe", "--target", "--device"):
        yield from each(t, flag, "nonsense", "")
    yield from each(t, "--H", "0", "21", "²", "text", "nan", BIG)
    yield t, ("--H", "3"), "--min_steps"
    yield t, ("--H", "4", "--min_steps", "5"), "--min_steps"
    yield t, ("--task", "countdown", "--H", "4"), "--H"
    yield t, ("--numbers", "4"), "--numbers"
    for x in ("2", "7", "text", "²"):
        yield t, ("--task", "countdown", "--numbers", x), "--numbers"
    yield t, ("--resume", "yes"), "yes"
    yield t, ("--prob", "20"), "--prob"
    yield from each(t, "--out", (), "/dev/null/x", "/dev/null", "\0", LONG, "{file}", "{file}/x", "")


def to_search(s="search"):
    yield from each(s, "--run", (), "/nothing", "/dev/null", "", "\0", LONG, "{tmp}", "{file}", "{file}/x",
                    ("{run}", "{run}"))
    yield from each(s, "--search", (), "nonsense", "nonsense:q_pi", "beam:nonsense", ":", "", "greedy:q_pi",
                    "pass:orm", "majority:q_pi", "beam:effective:x", "BEAM:effective", ("greedy", "greedy"),
                    ("greedy", "nonsense"), "\0", LONG)
    yield from each(s, "--n", *INTS, "0", "65537")
    yield from each(s, "--widths", "0", ("1", "1"), "", "4097", "text")
    yield from each(s, "--alpha", *FLOATS, "1001")
    yield from each(s, "--prover", *PROVERS)
    yield from each(s, "--problems", "0", BIG, "text")
    yield from each(s, "--problems", "1000000")                                 # no memory holds them
    yield from each(s, "--validation", "0", BIG)
    yield from each(s, "--seeds", (), "-1", BIG, HUGE, ("0", "0"), "text", "²")
    yield from each(s, "--show", "-1", "text", BIG)
    yield from each(s, "--policy", "nonsense", "")
    yield from each(s, "--device", "tpu", "")
    yield from each(s, "--out", "/dev/null/x", "\0", LONG, "{file}", "{file}/x")
    yield s, ("--run", "{run}", "{tmp}"), "--out"
    yield s, ("--run", "{run}", "{copy}", "--out", "{tmp}"), "--run"


def to_rl(r="rl"):
    yield from each(r, "--run", "/nothing", "{tmp}", ("{run}", "{run}"), "\0", LONG)
    yield from each(r, "--reward", (), "nonsense", "", ("pav", "pav"), ("pav", "nonsense"))
    yield from each(r, "--prover", *PROVERS)
    yield from each(r, "--kl", *FLOATS, "1001")
    yield from each(r, "--lr", "0", "-1", "nan", "inf", "11")
    yield from each(r, "--alpha", "-1", "nan", "inf", "1001")
    yield from each(r, "--warmup", "-1", "2", "nan")
    yield from each(r, "--value_lr", "0", "nan")
    yield from each(r, "--value_lr_muon", "-1", "inf")
    yield from each(r, "--batch", *INTS, "0", "7", "65540")
    yield from each(r, "--seed", "-1", BIG)
    for flag in ("--group", "--iterations", "--eval_every", "--eval_n", "--n", "--problems", "--n_mc"):
        yield from each(r, flag, "0", BIG, "text")
    for flag in ("--refresh", "--micro_batch"):
        yield from each(r, flag, "-1", BIG)
    for flag in ("--policy", "--baseline", "--tune", "--device"):
        yield from each(r, flag, "nonsense", "")
    yield r, ("--batch", "8", "--group", "16"), "--batch"
    yield r, ("--group", "1", "--baseline", "group"), "--group"
    yield r, ("--reward", "pav_exact", "--prover", "weak"), "--prover"
    yield r, ("--reward", "pav", "--refresh", "1", "--prover", "strong"), "--prover"
    yield r, ("--reward", "pav_rollout", "--prover", "bo16"), "--n_mc"
    yield r, ("--tune", "lr", "--sweep"), "--sweep"
    yield r, ("--problems", "1000000", "--n", "65536"), "--problems"            # no memory holds them
    yield from each(r, "--out", "/dev/null/x", "\0", "{file}", "{file}/x")


def to_report(p="report"):
    yield p, (), "--runs"
    yield p, ("--runs", "{run}"), "--out"
    yield p, ("--out", "{tmp}/x"), "--runs"
    yield p, ("--runs", "--out", "{tmp}/x"), "--runs"
    for run in ("/nothing", "{tmp}", "{file}", "", LONG):
        yield p, ("--runs", run, "--out", "{tmp}/x"), "--runs"
    yield p, ("--runs", "{run}", "{run}", "--out", "{tmp}/x"), "--runs"
    yield p, ("--runs", "{run}", "{copy}", "--out", "{tmp}/x"), "seed"
    yield from each(p, "--claims", (), "/nothing", "{tmp}", "{file}", "\0", LONG, "")
    for out in ("/dev/null/x", "{file}", "{file}/x", "\0", LONG):
        yield p, ("--runs", "{run}", "--out", out), "--out"


SCRIPTS = {"train": train, "search": search, "rl": rl, "report": report}
NONSENSE = [(script, flags, flags[0]) for script in SCRIPTS
            for flags in (("--nonsense",), ("--nonsense", "3"), ("surplus",))]
NONSENSE += [*to_train(), *to_search(), *to_rl(), *to_report()]


def shown(case):
    return " ".join([case[0], *(x if len(x) < 30 else x[:20] + "~" for x in case[1])]).replace("\0", "NUL")


@pytest.fixture(scope="module")
def places(small, tmp_path_factory):
    """What {run} and so on stand for."""
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "empty").mkdir()
    (tmp / "file").write_text("text")
    return {"run": str(small.clone(tmp / "run")), "copy": str(small.clone(tmp / "copy")),
            "tmp": str(tmp / "empty"), "file": str(tmp / "file")}


def flags_of(script, args, places):
    args = [x.format_map(places) if "{" in x else x for x in args]
    if script in ("search", "rl") and "--run" not in args:
        args = [*args, "--run", places["run"]]
    return [*args, "--out", "new"] if script == "train" and "--out" not in args else args


def tree(places):
    return {p for p in Path(places["run"]).parent.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("case", NONSENSE, ids=shown)
def test_nonsense_flags(places, case, monkeypatch, tmp_path):
    script, args, flag = case

    def started(*_, **__):
        raise Started
    monkeypatch.setattr(Run, "stage", started)
    monkeypatch.setattr(search, "show", started)
    monkeypatch.setattr(report, "load", started)
    before, start = tree(places), time.time()
    try:
        with limits(20):
            main(SCRIPTS[script], *flags_of(script, args, places), cwd=tmp_path)
    except Fail as e:
        message = str(e)
    except Started:
        pytest.fail("ACCEPTED: work begins", pytrace=False)
    except (Hang, SystemExit, Exception) as e:
        pytest.fail(f"TRACEBACK {where(e)}", pytrace=False)
    else:
        pytest.fail("ACCEPTED, exit 0", pytrace=False)
    assert flag.format_map(places) in message, f"NOT NAMED {message[:300]}"
    assert "\n" not in message, f"NOT ONE LINE {message[:300]!r}"
    assert time.time() - start < 10
    assert tree(places) == before and not list(tmp_path.rglob("*")), "it has written something"


def real(*args, **kw):
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, **kw)


REAL = [("train.py", ("--problems", "²"), "--problems"), ("-m minipav.paper.report", (), "--runs"),
        *[pytest.param(*x, marks=pytest.mark.slow) for x in (
            ("search.py", ("--search", "no:q_pi"), "--search"), ("rl.py", ("--batch", "7"), "--batch"),
            ("train.py", ("--task", "chess"), "--task"), ("train.py", ("--out", "/dev/null/x"), "--out"),
            ("train.py", ("--problems", HUGE), "--problems"),
            ("train.py", ("--task", "countdown", "--H", "4"), "--H"),
            ("search.py", ("--prover", "bo²"), "--prover"), ("search.py", ("--run", "/nothing"), "--run"),
            ("rl.py", ("--kl", "nan"), "--kl"), ("rl.py", ("--seed", BIG), "--seed"),
            ("-m minipav.paper.report", ("--runs", "/nothing", "--out", "/tmp/nothing"), "/nothing"))]]


@pytest.mark.parametrize("script, args, flag", REAL)
def test_nonsense_flags_of_a_real_process(script, args, flag):
    done = real(*script.split(), *args)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and flag in done.stderr


# ---- a loss that is not finite ends the stage, and what comes later goes on from there

def spoiled(function, since=0):
    """The function with NaN for its (first) result, from its call number `since` on."""
    calls = itertools.count()

    def f(*args, **kw):
        out, nan = function(*args, **kw), NAN if next(calls) >= since else 1.0
        return (out[0] * nan, *out[1:]) if isinstance(out, tuple) else out * nan
    return f


NOT_FINITE = [  # stage, command that runs it, what it has to redo, the loss
    ("q_pi", "resume q_pi", ("q_pi/*",), verifier, "verifier_loss", 1),
    ("rl/{R_pav}", "rl pav", (), reinforce, "policy_loss", 3),
    *[pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("policies", "resume", ("stages/policies.json", "base/*"), sft, "sft_loss", 2),
        ("orm", "resume orm", ("orm/*",), verifier, "verifier_loss", 0),
        ("q_weak", "resume q_weak", ("q_weak/*",), verifier, "verifier_loss", 0),
        ("rl/{R_pav}", "rl pav", (), reinforce, "policy_loss", 0),
        ("rl/{R_pav}", "rl pav", (), reinforce, "value_loss", 2),
        ("rl/{R_pav}", "rl stopped", (), reinforce, "verifier_loss", 0))]]


@pytest.mark.parametrize("stage, command, drop, module, loss, since", NOT_FINITE)
def test_a_loss_that_is_not_finite(small, tmp_path, stage, command, drop, module, loss, since):
    c, folder, stage = COMMANDS[command], small.clone(tmp_path / "run"), stage.format_map(small.names)
    for pattern in (*c.drop, *drop):
        for path in folder.glob(pattern.format_map(small.names)):
            path.unlink()
    if c.stopped:
        for path in small.stopped.iterdir():
            shutil.copy(path, folder / stage / path.name)
    with pytest.MonkeyPatch.context() as m, pytest.raises(Fail) as e:
        m.setattr(module, loss, spoiled(getattr(module, loss), since))
        main(c.module, *c.args(small, folder))
    message = str(e.value)
    assert "\n" not in message and "not finite" in message.replace("not a finite number", "not finite")
    assert stage.removeprefix("rl/") in message
    assert not (folder / "stages" / f"{stage}.json").exists() and not list(folder.rglob("*.tmp"))
    if stage != "policies":
        assert not (folder / stage / "model.safetensors").exists()
    main(c.module, *c.args(small, folder))                      # the loss is finite again
    assert not [*different(small, folder, None, None)]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--lr_muon 10 --lr_adamw 10", "--lr_muon_verifier 10 --lr_adamw_verifier 10", "--lr_muon_verifier 10"])
def test_the_highest_learning_rates_end_in_an_error_or_in_finite_numbers(tmp_path, flags):
    try:
        main(train, *SMALL, *flags.split(), "--out", tmp_path / "run")
    except Fail as e:
        stage = str(e).partition(":")[0]
        assert "finite" in str(e) and stage in ("policies", "q_pi", "orm", "q_weak", "q_strong")
        assert not (tmp_path / "run" / "stages" / f"{stage}.json").exists()
    else:
        strict((tmp_path / "run" / "summary.json").read_text())
    for path in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(path).values()), path


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--lr 10", "--kl 1000 --alpha 1000", "--value_lr 10 --value_lr_muon 10"])
def test_the_highest_learning_rates_in_rl(small, tmp_path, flags):
    folder = small.clone(tmp_path / "run")
    try:
        main(rl, "--run", folder, *small.rl_flags, *flags.split())
    except Fail as e:
        assert "finite" in str(e) and len(list(folder.glob("stages/rl/pav*"))) == 1
    else:
        strict((folder / "rl" / "summary.json").read_text())


# ---- one process a folder

HOLD = """
import sys
from minipav.files import lock
lock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder):
    p = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert p.stdout.readline() == "held\n"
        yield p
    finally:
        p.kill()
        p.wait()
        p.stdin.close()
        p.stdout.close()


def test_a_second_process_is_told_whose_the_folder_is(small, tmp_path):
    folder = small.clone(tmp_path / "run")
    with holder(folder) as p:
        half_written = folder / "rl" / f".log.csv.{p.pid}.tmp"
        half_written.write_text("half")
        before = {x: x.stat().st_mtime_ns for x in folder.rglob("*") if x.is_file()}
        for command in ("resume", "search", "rl"):
            with pytest.raises(Fail) as e:
                main(COMMANDS[command].module, *COMMANDS[command].args(small, folder))
            message = str(e.value)
            assert f"process {p.pid}" in message and str(folder) in message and "\n" not in message
        assert before == {x: x.stat().st_mtime_ns for x in folder.rglob("*") if x.is_file()}
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        main(train, *small.flags, "--resume", "--out", folder)  # a lock does not outlive its process
        assert not half_written.exists() and not [*different(small, folder, None, None)]


@pytest.mark.parametrize("left", [b"", b"99999999", b"\xff\xfe\0", b"x" * 10_000])
def test_what_stands_in_a_lock_that_nobody_holds_does_not_matter(tmp_path, left):
    (tmp_path / ".lock").write_bytes(left)
    try:
        files.lock(tmp_path)
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    finally:
        unlock()


def test_a_lock_that_cannot_be_taken_is_a_one_line_error(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(Fail, match=str(tmp_path)) as e:
        files.lock(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_running_training_is_not_disturbed(small, tmp_path):
    """Nor is it by one that is refused over and over while it writes its files."""
    folder, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    p = subprocess.Popen([sys.executable, "train.py", *small.flags, "--out", str(folder)], cwd=ROOT,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert p.stdout.readline() == "policies\n"
    second = real("train.py", *small.flags, "--resume", "--out", folder)
    refused, told = 0, str(p.pid) in second.stderr and second.stderr.count("\n") == second.returncode == 1
    while p.poll() is None:
        with contextlib.suppress(Fail):
            files.lock(folder)
            break
        refused += 1
        time.sleep(0.05)
    unlock()
    rest = p.stdout.read()
    assert p.wait() == 0 and "next:" in rest and refused and (told or second.returncode == 0)
    assert told, "the training had ended before the second process came"
    for name in ("table.txt", "curves.csv", "q_pi/model.safetensors", "base_train.safetensors"):
        assert (folder / name).read_bytes() == (small.folder / name).read_bytes(), name


# ---- a file is written whole or not at all

@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("x"), NotFinite("x"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("there", [True, False])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, error, there):
    path = tmp_path / "a.csv"
    if there:
        path.write_text("old")

    def write(tmp):
        tmp.write_text("half of the n")
        raise error
    with pytest.raises(Fail if isinstance(error, OSError) else type(error)) as e:
        files.write_whole(path, write)
    if isinstance(error, OSError):
        assert str(path) in str(e.value) and "No space left" in str(e.value) and "\n" not in str(e.value)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({"a.csv": "old"} if there else {})


@pytest.mark.parametrize("write", [
    lambda p: files.write_text(p, "text"), lambda p: files.write_json(p, {}),
    lambda p: files.write_csv(p, ["a"], [["text"]]), lambda p: files.write_tensors(p, {"a": torch.ones(2)})])
def test_what_cannot_be_written_is_a_one_line_error(tmp_path, write):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "folder", tmp_path / "file" / "x", Path("/dev/null/x"), tmp_path / ("x" * 300)):
        with pytest.raises(Fail) as e:
            write(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"


KILLED = """
import os, sys, signal
from pathlib import Path
from minipav.files import write_whole
def write(tmp):
    tmp.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole(Path(sys.argv[1]) / "a.txt", write)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    assert real("-c", KILLED, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.glob(".*.tmp"))) == 1
    try:
        files.lock(tmp_path)                                    # what it left is cleared by the next one
    finally:
        unlock()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.txt"]

"""Every file that a command reads, damaged in every way: the command says in one line which file it is, or
the result is that of the undamaged run. Losses that are not finite; two processes in one folder."""
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, Hang, call, limits, run_main, unlock, where
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rl
import search
import train
from minipav import files, reinforce, sft, verifier
from minipav.paper import report
from minipav.utils import Fail

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


class Toy:
    """folder: the finished run; stopped: what its RL training had written when it was stopped."""

    def __init__(self, folder, flags, rl_flags):
        self.folder, self.flags, self.rl_flags = folder / "run", flags, rl_flags
        self.stopped = folder / "stopped"
        run_main(train, *flags, "--out", self.folder)
        run_main(search, "--run", self.folder, *SEARCH)
        with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
            go_on = reinforce.Reinforce.iterate
            m.setattr(reinforce.Reinforce, "iterate",
                      lambda loop, i: interrupt() if i == 3 else go_on(loop, i))
            run_main(rl, "--run", self.folder, *rl_flags)
        [half] = self.folder.glob("rl/pav-*")
        shutil.copytree(half, self.stopped)
        run_main(rl, "--run", self.folder, *rl_flags)
        run_main(report, "--runs", self.folder, "--out", self.folder / "mean")
        shutil.copytree(ROOT / "results" / "didactic", self.folder / "didactic")
        self.names, self.claims = self._names(), run_main(report, "--claims", self.folder / "didactic")
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
            printed = run_main(command.module, *command.args(toy, folder))
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
        run_main(c.module, *c.args(small, folder))
    message = str(e.value)
    assert "\n" not in message and "not finite" in message.replace("not a finite number", "not finite")
    assert stage.removeprefix("rl/") in message
    assert not (folder / "stages" / f"{stage}.json").exists() and not list(folder.rglob("*.tmp"))
    if stage != "policies":
        assert not (folder / stage / "model.safetensors").exists()
    run_main(c.module, *c.args(small, folder))                  # the loss is finite again
    assert not [*different(small, folder, None, None)]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    "--lr_muon 10 --lr_adamw 10", "--lr_muon_verifier 10 --lr_adamw_verifier 10", "--lr_muon_verifier 10"])
def test_the_highest_learning_rates_end_in_an_error_or_in_finite_numbers(tmp_path, flags):
    try:
        run_main(train, *SMALL, *flags.split(), "--out", tmp_path / "run")
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
        run_main(rl, "--run", folder, *small.rl_flags, *flags.split())
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
                run_main(COMMANDS[command].module, *COMMANDS[command].args(small, folder))
            message = str(e.value)
            assert f"process {p.pid}" in message and str(folder) in message and "\n" not in message
        assert before == {x: x.stat().st_mtime_ns for x in folder.rglob("*") if x.is_file()}
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        run_main(train, *small.flags, "--resume", "--out", folder)  # a lock does not outlive its process
        assert not half_written.exists() and not [*different(small, folder, None, None)]


@pytest.mark.slow
def test_a_running_training_is_not_disturbed(small, tmp_path):
    """Nor is it by one that is refused over and over while it writes its files."""
    folder, env = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}
    p = subprocess.Popen([sys.executable, "train.py", *small.flags, "--out", str(folder)], cwd=ROOT,
                         text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env)
    assert p.stdout.readline() == "policies\n"
    second = call("train.py", *small.flags, "--resume", "--out", folder)
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

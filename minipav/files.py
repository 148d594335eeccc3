"""Files: written whole or not at all; read by readers that name what is damaged; one lock a folder."""
import csv
import fcntl
import io
import json
import os
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minipav import parallel
from minipav.utils import Fail

LOCKS = {}  # folders that this process holds, with their open lock files


def write_whole(path, write):
    """Call write(temporary path), flush it to the disk, then rename it to `path`: readers see the old file or
    the whole new one. Raises Fail if it cannot be written."""
    path = Path(path)
    if parallel.rank():             # of several processes the first one writes
        return
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, SafetensorError) as e:
        raise Fail(f"cannot write {path}: {getattr(e, 'strerror', None) or e}") from None
    finally:
        with suppress(OSError):
            tmp.unlink()


def write_text(path, text):
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def checksum(value):
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def write_json(path, value):
    """An object, with a checksum of it."""
    value = json.loads(json.dumps(value))
    write_text(path, json.dumps(value | {"crc": checksum(value)}, indent=1) + "\n")


def write_csv(path, header, rows):
    def write(p):
        with open(p, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows([header, *rows])
    write_whole(path, write)


def write_tensors(path, tensors, metadata=None):
    """Tensors and metadata (text by name), with a checksum of them."""
    if parallel.rank():
        return
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    memory = {}                         # copies only of what shares it (a tied head): weights can be large
    for k, v in tensors.items():
        if memory.setdefault(v.untyped_storage().data_ptr(), k) != k:
            tensors[k] = v.clone()
    metadata = dict(metadata or {})
    meta = json.dumps(metadata | {"crc": tensor_checksum(tensors, metadata)}, sort_keys=True)
    write_whole(path, lambda p: save_file(tensors, p, {"minipav": meta}))       # several keys: in no order


def tensor_checksum(tensors, metadata):
    crc = checksum(metadata)
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode() + tensors[name].numpy().tobytes(), crc)
    return str(crc)


def file_checksum(path):
    with reading(path):
        return zlib.crc32(Path(path).read_bytes())


def damaged(path, why):
    """The error for a file that is there and is not what it should be, or is not there."""
    if isinstance(why, FileNotFoundError):
        return Fail(f"{path} does not exist: is this the right folder?")
    if isinstance(why, OSError):
        return Fail(f"cannot read {path}: {why.strerror or why}")
    saved = "partial" in Path(path).parts or Path(path).name == "checkpoint.safetensors"
    how = ("delete it, and what was saved there starts anew" if saved else
           "restore it; what a run's stage wrote is made again once its record in stages/ is deleted")
    return Fail(f"{path} is damaged or of another version ({str(why)[:200]}): {how}")


@contextmanager
def reading(path, *errors):
    """The disk's errors, and these, are the file's: it is damaged."""
    try:
        yield
    except (OSError, *errors) as e:
        raise damaged(path, e) from None


def read_text(path):
    with reading(path, UnicodeDecodeError):
        return Path(path).read_bytes().decode()


def read_json(path, signed=True, **fields):
    """The JSON object in `path`; fields: the keys that it must have, and the type (or types) of each."""
    with reading(path, ValueError, RecursionError):
        value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise damaged(path, f"a {type(value).__name__} where an object is expected")
    if signed and value.pop("crc", None) != checksum(value):
        raise damaged(path, "its checksum is missing or another")
    for name, kind in fields.items():
        if name not in value or not isinstance(value[name], kind):
            raise damaged(path, f"{name} is {repr(value.get(name, 'missing'))[:40]}")
    return value


def read_csv(path, columns):
    """The rows of a table as dicts of text; it must have these columns, and a value for each in every row."""
    with reading(path, csv.Error):
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
    for i, row in enumerate(rows or [{}]):
        if None in row or any(row.get(c) is None for c in columns):
            raise damaged(path, f"line {i + 2} lacks a column of {', '.join(columns)}")
    return rows


def read_tensors(path, dims=None):
    """({name: tensor}, metadata) of a safetensors file; dims: the names it must have, and of how many
    dimensions. Every number must be finite."""
    with reading(path, SafetensorError, TypeError, KeyError, ValueError), safe_open(path, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        metadata = dict(json.loads(f.metadata()["minipav"]))
    for name, dim in (dims or {}).items():
        if name not in tensors or tensors[name].dim() != dim:
            raise damaged(path, f"no tensor {name} of {dim} dimensions in it")
    if wrong := [k for k, t in tensors.items() if not torch.isfinite(t).all()]:
        raise damaged(path, f"{wrong[0]} is not finite")
    if metadata.pop("crc", None) != tensor_checksum(tensors, metadata):
        raise damaged(path, "its checksum is missing or another")
    return tensors, metadata


def make_folder(path, flag="--out"):
    """Raises Fail if this folder cannot be made, or not be written."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "it is read-only")
    except OSError as e:
        raise Fail(f"{flag} {path}: cannot make or write it ({e.strerror}); choose another") from None


def lock(folder, flag="--out"):
    """Make the folder and hold it until the process ends; clear what dead processes left half-written. Raises
    Fail if it cannot be made, or, with its process number, if another process holds it."""
    make_folder(folder, flag)
    folder = Path(folder).resolve()
    if folder in LOCKS or parallel.rank():
        return
    try:
        f = open(folder / ".lock", "a+")
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.seek(0)
        holder = f.read().strip() or "?"
        raise Fail(f"{folder} is in use by process {holder}: wait for it, or choose another folder") from None
    except OSError as e:
        raise Fail(f"{flag} {folder}: cannot make or write it ({e.strerror}); choose another") from None
    LOCKS[folder] = f
    f.truncate(0)
    f.write(str(os.getpid()))
    f.flush()
    for left_over in folder.rglob(".*.tmp"):  # nobody else may write here: its process is dead
        left_over.unlink()

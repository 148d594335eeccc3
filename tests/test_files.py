"""Files: what is written is read again to the bit, whole or not at all, and what is damaged is named."""
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call, unlock

from minipav import files
from minipav.files import damaged, read_csv, read_json, read_tensors, write_csv, write_json, write_tensors
from minipav.paper.statistics import read_table
from minipav.utils import Fail, NotFinite, command


def test_any_text_survives_in_a_table(tmp_path):
    """A policy that was hardly trained says all kinds of characters, and its answers are in the tables."""
    texts = [f"a{chr(i)}b" for i in [*range(128), 0x85, 0xa0, 0x2028, 0x2029, 0xfeff, 0xfffd, 0x6771]]
    texts += ["", '"', ' "a", b', "+2 = 3\n+9 = 12<|endoftext|>", "a\r\nb"]
    write_csv(tmp_path / "t.csv", ["text", "n"], [[t, i] for i, t in enumerate(texts)])
    rows = read_csv(tmp_path / "t.csv", ["text", "n"])
    assert [int(r["n"]) for r in rows] == list(range(len(texts)))
    assert [r["text"] for r in rows] == texts
    assert read_table(tmp_path / "t.csv", ["n"])["n"].tolist() == list(range(len(texts)))


def test_a_table_without_a_number_is_nan_there(tmp_path):
    """The first row of an RL log has no KL."""
    write_csv(tmp_path / "t.csv", ["iteration", "kl", "name"], [[0, "", "x"], [2, 0.5, ""]])
    table = read_table(tmp_path / "t.csv", ["iteration", "kl", "name"], text=("name",))
    assert table["iteration"].tolist() == [0, 2] and table["name"].tolist() == ["x", ""]
    assert table["kl"].isna().tolist() == [True, False] and table["kl"][1] == 0.5


def test_json_and_tensors_survive(tmp_path):
    value = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "v.json", value)
    assert read_json(tmp_path / "v.json", a=list, b=dict) == value
    tensors = {"x": torch.rand(3, 2), "y": torch.arange(4), "z": torch.tensor([True, False])}
    write_tensors(tmp_path / "deep" / "t.safetensors", tensors, {"note": "mine"})
    got, metadata = read_tensors(tmp_path / "deep" / "t.safetensors", {"x": 2, "y": 1})
    assert all(torch.equal(got[k], v) and got[k].dtype == v.dtype for k, v in tensors.items())
    assert got.keys() == tensors.keys() and metadata["note"] == "mine"


@pytest.mark.parametrize("damage", [lambda b: b[:-20], lambda b: b"", lambda b: b"[1]", lambda b: b"\xff" + b,
                                    lambda b: b.replace(b"seed", b"need"), lambda b: b.replace(b"17", b"18"),
                                    lambda b: b.replace(b"17", b'"17"')])
def test_a_damaged_record_is_named(tmp_path, damage):
    """Cut off, empty, another kind, no text, without a field, a number changed, a number that is none."""
    path = tmp_path / "record.json"
    write_json(path, {"seed": 17, "name": "x"})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(Fail, match="record.json") as e:
        read_json(path, seed=int)
    assert "\n" not in str(e.value)


def test_what_is_to_be_done_about_a_damaged_file_depends_on_it():
    for path, words in (("partial/q_pi.safetensors", "delete it"), ("a/checkpoint.safetensors", "delete it"),
                        ("run/q_pi/model.safetensors", "restore it; .* stages/")):
        with pytest.raises(Fail, match=words):
            raise damaged(path, "half of it")
    with pytest.raises(Fail, match="cannot read x: Permission"):
        raise damaged("x", PermissionError(13, "Permission denied"))


def test_damaged_tensors_are_named(tmp_path):
    """Cut off, a bit flipped, not finite, another name or another number of dimensions."""
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"x": torch.rand(50)})
    whole = path.read_bytes()
    for bad in (whole[:-10], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
        path.write_bytes(bad)
        with pytest.raises(Fail, match="t.safetensors"):
            read_tensors(path)
    path.write_bytes(whole)
    for dims in ({"y": 1}, {"x": 2}):
        with pytest.raises(Fail, match="no tensor"):
            read_tensors(path, dims)
    write_tensors(path, {"x": torch.tensor([1.0, float("inf")])})
    with pytest.raises(Fail, match="x is not finite"):
        read_tensors(path)


def test_shipped_results_are_not_damaged():
    """Every JSON of results/ is whole; most are of the code before checksums."""
    found = [p for p in (ROOT / "results").rglob("*.json")]
    assert len(found) > 5 and all(read_json(p, signed=False) for p in found)


def test_a_command_says_nothing_of_where_the_code_is(monkeypatch):
    for path, want in ((ROOT / "train.py", "train.py"), ("/x/script.py", "script.py"),
                       (ROOT / "minipav/paper/report.py", "-m minipav.paper.report"),
                       (ROOT / "minipav/bench/__main__.py", "-m minipav.bench")):
        monkeypatch.setattr("sys.argv", [str(path), "--seed", "1"])
        assert command() == f"python {want} --seed 1"


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
    assert call("-c", KILLED, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.glob(".*.tmp"))) == 1
    try:
        files.lock(tmp_path)                                    # what it left is cleared by the next one
    finally:
        unlock()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.txt"]


# ---- locks

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

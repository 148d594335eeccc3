"""Nonsense flags: one line that names the flag, before any work is done and any file is written."""
import shutil
import time
from pathlib import Path

import pytest
from conftest import Hang, call, limits, run_main, where

import rl
import search
import train
from minipav.paper import report
from minipav.run import Run
from minipav.utils import Fail


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
def places(smoke_run, tmp_path_factory):
    """What {run} and so on stand for."""
    tmp = tmp_path_factory.mktemp("places")
    (tmp / "tmp").mkdir()
    (tmp / "file").write_text("text")
    for name in ("run", "copy"):
        shutil.copytree(smoke_run[0], tmp / name)
    return {name: str(tmp / name) for name in ("run", "copy", "tmp", "file")}


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
            run_main(SCRIPTS[script], *flags_of(script, args, places), cwd=tmp_path)
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
    done = call(*script.split(), *args)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and flag in done.stderr

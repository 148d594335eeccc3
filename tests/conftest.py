"""Shared pieces: a tiny random GPT, policies that speak the sampler's language, scripts, a smoke run."""
import contextlib
import fcntl
import io
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"                        # before it is imported: test_kernels.py

from minipav import files  # noqa: E402
from minipav.advantage import standard_error  # noqa: E402
from minipav.model import GPT, GPTConfig  # noqa: E402
from minipav.tasks import make_task  # noqa: E402
from minipav.tasks.calculator import Calculator, parse, transitions  # noqa: E402
from minipav.tokenizer import END, synthetic_encoding  # noqa: E402
from minipav.traces import Env, Traces  # noqa: E402
from minipav.utils import Fail  # noqa: E402

torch.set_num_threads(1)                # the models are tiny, and another process has the other core
ONE_CORE = os.environ | {"OMP_NUM_THREADS": "1"}
# flags for a train.py and an rl.py of seconds
SMOKE = ("--smoke --device cpu --dtype fp32 --H 5 --min_steps 3 --batch_size 32 --sft_steps 20 "
         "--strong_steps 6 --q_steps 12 --orm_steps 6 --mu_steps 4").split()
SMALL = "--device cpu --iterations 4 --batch 8 --eval_every 2 --problems 5 --eval_n 2 --n 4".split()


# ---- models

def tiny(seed=0, std=0.3, **kw):
    """A GPT with weights large enough that its distribution is far from uniform."""
    torch.manual_seed(seed)
    config = dict(vocab_size=29, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ffn=48)
    model = GPT(GPTConfig(**{**config, **kw}))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std)
    return model.eval()


class WalkPolicy(torch.nn.Module):
    """The calculator policy that takes a uniformly random legal operation, computes it right and stops at the
    target or after H steps: tabular, so that dynamic programming gives its exact Q. It keeps the tokens it
    saw in the cache."""

    def __init__(self, env, problems):
        super().__init__()
        self.task, self.enc, self.device = env.task, env.enc, torch.device("cpu")
        self.config = GPTConfig(vocab_size=self.enc.n_vocab, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.dtype, self.bf16 = torch.float32, False
        self.by_prompt, self.known = {self.task.prompt(p): (p, transitions([p])[0]) for p in problems}, {}

    def trunk(self, idx, cache=None, kv_out=None, at=None):
        as_key = idx[..., None, None].float().expand(-1, -1, 1, 2)              # (B, T, 1, 2)
        if cache is None:
            kv_out[0][0][:, 0, :idx.shape[1], 0] = idx
            rows = idx.tolist()
            prefixes = [[tuple(row[:t + 1]) for t in range(len(row))] for row in rows]
        else:
            cache.append(0, as_key, as_key)
            cache.count += idx.shape[1]
            old, new = cache.prefix[0][0][cache.group, 0, :, 0], cache.new[0][0][:, 0, :cache.count, 0]
            rows = zip(old.long().tolist(), cache.lengths.tolist(), new.long().tolist())
            rows = [a[:n] + b for a, n, b in rows]
            prefixes = [[tuple(row[:len(row) - t]) for t in reversed(range(idx.shape[1]))] for row in rows]
        for prefix in {p for row in prefixes for p in row} - self.known.keys():
            self.known[prefix] = self.next(list(prefix))
        out = torch.stack([torch.stack([self.known[p] for p in row]) for row in prefixes])
        return out if at is None else out[at]

    def head(self, hidden):
        return hidden

    def next(self, tokens):
        """Log-probabilities of the next token."""
        out = torch.full((self.enc.n_vocab,), float("-inf"))
        prompt, _, response = self.enc.decode(tokens).partition("\n")
        if prompt + "\n" not in self.by_prompt or END in response:
            out[0] = 0.0                                        # inside the prompt or past the end
            return out
        problem, nxt = self.by_prompt[prompt + "\n"]
        words = self.words(problem, nxt, response)
        for w in words:
            out[self.enc.encode(w, allowed_special="all")[0]] = -np.log(len(words))
        return out

    def words(self, problem, nxt, response):
        *done, line = response.split("\n")
        value = parse(done[-1])[2] if done else problem.start
        words = [f"{s}{x} = " for s, x in zip("+-*/", problem.ops)]
        if not line:
            return [w for w, v in zip(words, nxt[value]) if v]
        if line in words:
            return [str(nxt[value][words.index(line)])]
        ran = parse(line)                                       # None: padding
        return ["\n"] if ran and ran[2] != problem.target and len(done) + 1 < self.task.H else [END]


class Says(WalkPolicy):
    """Says these words in this order, and then the last of them for ever, whatever it is asked."""

    def __init__(self, env, problems, *script):
        super().__init__(env, problems)
        self.script = script

    def words(self, problem, nxt, response):
        said = len(self.enc.encode(response))
        return [self.script[min(said, len(self.script) - 1)]]


# ---- traces and values

def make_traces(tokens, lengths, ends, **fields):
    """Traces, by default with a label 0 from one outcome at every step end."""
    N, labelled = len(tokens), ends >= 0
    default = dict(problem=torch.arange(N), q=torch.zeros(ends.shape), n=labelled.long(), labelled=labelled,
                   exact=torch.zeros_like(labelled), reward=torch.zeros(N), cost=torch.zeros(N).long())
    return Traces(tokens=tokens, lengths=lengths, ends=ends, **{**default, **fields})


def q_best_of_k_error(q, n, K):
    """Standard error of `q_best_of_k(q, K)`, to first order: K (1 - q)^(K-1) times that of q."""
    return K * (1 - q) ** (K - 1) * standard_error(q, n)


@pytest.fixture(scope="session")
def calculator():
    """(Env, ten test problems) of the calculator at H = 4, at least 2 steps."""
    task = make_task("calculator", dict(H=4, min_steps=2))
    return Env(task, synthetic_encoding(task.phrases)), task.problems("test", 10, 0)


@pytest.fixture
def batch():
    """Three traces: two steps ended by 2, one step ended by 3 (end of text), one cut off in its second step.
    0 pads."""
    tokens = torch.tensor([[5, 6, 7, 2, 8, 9, 3, 0], [5, 6, 7, 8, 3, 0, 0, 0], [5, 6, 7, 2, 8, 9, 9, 9]])
    ends = torch.tensor([[1, 3, 6], [1, 4, -1], [1, 3, -1]])
    return make_traces(tokens, torch.tensor([7, 5, 8]), ends, reward=torch.tensor([1., 0, 0]))


# ---- scripts

def call(*args):
    """Run python with these arguments as a user would."""
    args = [sys.executable, *map(str, args)]
    return subprocess.run(args, cwd=ROOT, capture_output=True, text=True, env=ONE_CORE)


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


def run_main(script, *args, cwd="."):
    """What main() of a script (a module, or a path for a fresh copy) prints with these flags."""
    main, out = script.main if hasattr(script, "main") else runpy.run_path(str(script))["main"], io.StringIO()
    unlock()
    with pytest.MonkeyPatch.context() as m, contextlib.redirect_stdout(out):
        m.chdir(cwd)
        m.setattr(sys, "argv", ["script.py", *map(str, args)])
        try:
            main()
        finally:
            unlock()
    return out.getvalue()


def where(e):
    """An exception and the lines of the project that it came through, the last one first."""
    frames = [f for f in traceback.extract_tb(e.__traceback__) if ROOT in Path(f.filename).parents
              and Path(__file__).parent != Path(f.filename).parent]
    lines = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:3])
    return f"{type(e).__name__}: {' '.join(str(e).split())[:150]} at {lines}"


def fails(script, *args):
    """The one line in which a script says what is wrong with these flags or files."""
    with pytest.raises(Fail) as e:
        run_main(script, *args)
    assert "\n" not in str(e.value)
    return str(e.value)


def even(task, problem, response):
    """Another outcome for a task, a text of even length: by its own the smoke run's policy is never right."""
    return int(len(response) % 2 == 0)


@pytest.fixture(scope="module")
def right_at_times():
    """The policy of the smoke run is right at times in this module."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Calculator, "outcome", even)
        yield


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """(folder, what it printed) of python train.py --smoke with fewer steps. Not to be changed: copy it. The
    processes of pytest-xdist make it once."""
    out, base = tmp_path_factory.mktemp("run") / "a", tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smoke"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        if not (shared / "stdout").exists():
            shutil.rmtree(shared / "a", ignore_errors=True)                     # another process failed
            done = call("train.py", *SMOKE, "--out", shared / "a")
            assert done.returncode == 0, done.stderr
            (shared / "stdout").write_text(done.stdout)
    shutil.copytree(shared / "a", out)
    return out, (shared / "stdout").read_text()

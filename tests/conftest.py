"""Shared pieces: a tiny random GPT, a tabular policy that speaks the sampler's language, a smoke run of train.py."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from minipav.advantage import Traces  # noqa: E402
from minipav.model import GPT, GPTConfig  # noqa: E402
from minipav.tasks import get_task  # noqa: E402
from minipav.tasks.calculator import parse, transitions  # noqa: E402
from minipav.tokenizer import END, synthetic_encoding  # noqa: E402

SMALL = ("--device", "cpu", "--iterations", "4", "--batch", "8", "--eval_every", "2", "--problems", "5", "--eval_n", "2",
         "--n", "4")                                            # flags for an rl.py of seconds


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
    """The calculator policy that takes a uniformly random legal operation, computes it right and stops at the target or
    after H steps: tabular, so that dynamic programming gives its exact Q. It keeps the tokens it has seen in the cache."""

    def __init__(self, task, enc, problems):
        super().__init__()
        self.config = GPTConfig(vocab_size=enc.n_vocab, n_layer=1, n_head=1, n_kv_head=1, n_embd=2)
        self.embed = torch.nn.Embedding(1, 1)
        self.task, self.enc, self.device = task, enc, torch.device("cpu")
        self.by_prompt = {task.prompt(p): (p, transitions([p])[0]) for p in problems}

    def trunk(self, idx, cache=None, pos=None, span=None):
        pos = torch.arange(idx.shape[1]).expand(len(idx), -1) if pos is None else pos
        as_key = idx[..., None, None].float().expand(-1, -1, 1, 2)
        cache.write(0, as_key, as_key, pos)
        seen = cache.k[0][:, :, 0, 0].long()
        return torch.stack([torch.stack([self.next(seen[b, :p + 1].tolist()) for p in row])
                            for b, row in enumerate(pos.tolist())])

    def head(self, hidden):
        return hidden

    def next(self, tokens):
        """Log-probabilities of the next token."""
        out = torch.full((self.enc.n_vocab,), float("-inf"))
        prompt, _, response = self.enc.decode(tokens).partition("\n")
        if prompt + "\n" not in self.by_prompt or END in response:
            out[0] = 0.0                                                        # inside the prompt or past the end
            return out
        problem, nxt = self.by_prompt[prompt + "\n"]
        *done, line = response.split("\n")
        value = parse(done[-1])[2] if done else problem.start
        words = [f"{s}{x} = " for s, x in zip("+-*/", problem.ops)]
        if not line:
            legal = [w for w, v in zip(words, nxt[value]) if v]
        elif line in words:
            legal = [str(nxt[value][words.index(line)])]
        else:
            stop = parse(line)[2] == problem.target or len(done) + 1 == self.task.H
            legal = [END] if stop else ["\n"]
        for w in legal:
            out[self.enc.encode(w, allowed_special="all")[0]] = -np.log(len(legal))
        return out


def call(script, *args):
    """Run train.py, search.py or rl.py as a user would."""
    return subprocess.run([sys.executable, script, *map(str, args)], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """(folder, what it printed) of python train.py --smoke. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("run") / "a"
    done = call("train.py", "--smoke", "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="session")
def calculator():
    """(task, encoding, ten test problems) at H = 4, at least 2 steps."""
    task = get_task("calculator", H=4, min_steps=2)
    return task, synthetic_encoding(task.phrases), task.problems("test", 10, 0)


@pytest.fixture
def batch():
    """Three traces: two steps ended by 2, one step ended by 3 (end of text), one cut off in its second step. 0 pads."""
    tokens = torch.tensor([[5, 6, 7, 2, 8, 9, 3, 0], [5, 6, 7, 8, 3, 0, 0, 0], [5, 6, 7, 2, 8, 9, 9, 9]])
    ends = torch.tensor([[1, 3, 6], [1, 4, -1], [1, 3, -1]])
    return Traces(torch.arange(3), tokens, torch.tensor([7, 5, 8]), ends, torch.zeros(3, 3), torch.zeros(3, 3).long(),
                  torch.tensor([1., 0, 0]))

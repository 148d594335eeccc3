r"""Problems in words, from JSONL files: DATA/train.jsonl and DATA/test.jsonl, an object a line.

    Question: A robe takes 2 bolts of blue fiber and half that much white fiber. How many in total?
    Answer:                                                                         <- prompt
    It takes 2/2=1 bolt of white fiber                                              <- a step is a line
    So the total amount of fabric is 2+1=3 bolts of fabric
    #### 3<|endoftext|>

Test problems are those of test.jsonl; a tenth of train.jsonl is for validation, by a hash of the question;
what stands in both files is a test problem.
"""
import json
import re
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from minipav.files import read_text
from minipav.flags import Words, flag
from minipav.tasks.answers import LONGEST, boxed, normal, number, same
from minipav.tasks.task import LOWER, Task
from minipav.tokenizer import CHAT, END, encode_rows
from minipav.utils import Fail

PROMPTS = {"plain": "Question: {question}\nAnswer:\n",
           "chatml": "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
           "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
                     "<|start_header_id|>assistant<|end_header_id|>\n\n"}
ROWS = 32 if torch.cuda.is_available() else 4     # of a micro-batch: of few a GPU waits for Python
# of a calculation: the number behind its last =
RESULT = re.compile(r"\d[^=]*[-+*/x][^=]*\d[^=]*=(?:.*=)?[^\d=]*(\d[\d,]*(?:\.\d+)?)")


class Problem(NamedTuple):
    question: str
    answer: str                     # the reference's
    solution: str                   # lines


@dataclass
class Text(Task):
    data: str = flag(None, "folder with train.jsonl and test.jsonl", kind=str)
    prompt_format: str = flag("plain", f"{', '.join(PROMPTS)}, or a text with {{question}}", kind=Words)
    max_steps: int = flag(12, "most lines", low=1, high=1000)
    max_step_tokens: int = flag(64, "room for a line", low=1, high=1 << 16)
    max_new_tokens: int = flag(288, "room for a response", low=1, high=1 << 16)

    phrases = []                    # without --init: bytes
    keys = ("question", "answer")   # of a problem and its solution
    # clean(solution) -> its text; extract(text) -> the final answer, or None; end(answer) -> a last line
    defaults = dict(sft_steps=420, batch_size=32, micro_batch=ROWS, lr_muon=0.0, lr_adamw=3e-4,
                    temperature=0.7, problems=3000, n_cov=4, branches=4000, pit_traces=0, prover_rollouts=0,
                    q_steps=400, orm_steps=60, lr_muon_verifier=0.0, lr_adamw_verifier=1e-4,
                    test_problems=300, max_n=16, widths=[1, 2, 4], strong_steps=0)
    search_defaults = dict(n=16, widths=[1, 2, 4, 8], problems=300, validation=150, tuned_at=4)
    rl_defaults = dict(lr=1e-5, rft_lr=5e-5, value_lr=2e-5, value_lr_muon=0.0, batch=32, micro_batch=ROWS,
                       eval_every=10, problems=200, eval_n=1, n=16)

    def __post_init__(self):
        if "{question}" not in self.template:
            raise Fail(f"--prompt_format {self.prompt_format}: choose {', '.join(PROMPTS)} or a text with "
                       "{question} in it")
        if self.data is None:
            raise Fail(f"--task {self.name}: add --data FOLDER, with train.jsonl and test.jsonl")
        self.data = str(Path(self.data).resolve())
        test, self.splits = self.read("test"), {"train": [], "validation": []}
        for p in self.read("train").values():
            if p.question not in test:
                self.splits["train" if zlib.crc32(p.question.encode()) % 10 else "validation"].append(p)
        self.splits["test"] = list(test.values())

    def fits(self, enc):
        known, bos = enc.special_tokens_set | {getattr(enc, "end", END)}, getattr(enc, "bos", "")
        if lacks := [x for x in CHAT if x in self.template and x not in known]:
            raise Fail(f"--prompt_format {self.prompt_format}: this model has no {lacks[0]}")
        if not self.template.startswith(bos):
            raise Fail(f"--prompt_format {self.prompt_format}: this model's texts begin with {bos}; begin "
                       f"your own with it, such as '{bos}{{question}}\\n'")

    def room(self, enc):
        """As of every task; says how many references are longer than what a search may write."""
        every = [p for split in self.splits.values() for p in split]
        steps = [p.solution.split("\n") for p in every]
        prompt, solution, step = (encode_rows(enc, texts)[1] for texts in (
            [self.prompt(p) for p in every], [p.solution for p in every], [x for s in steps for x in s]))
        count = torch.tensor([len(s) for s in steps])
        for what, sizes, dial in (("solutions", count, "max_steps"), ("steps", step + 1, "max_step_tokens"),
                                  ("solutions", solution + 1, "max_new_tokens")):
            if n := int((sizes > getattr(self, dial)).sum()):
                print(f"  {n:,} of {len(sizes):,} reference {what} are longer than --{dial} "
                      f"{getattr(self, dial)} allows in a search")
        longest = max(int(solution.max()) + 1, self.max_new_tokens)
        return int(prompt.max()) + longest + max(self.max_new_tokens, self.max_step_tokens)

    def read(self, name):
        """The problems of a file, by question. Raises Fail, naming the line that is not one."""
        path, found = f"{self.data}/{name}.jsonl", {}
        text = read_text(path)
        self.data_crc = zlib.crc32(text.encode(), self.data_crc)
        for i, line in enumerate(text.split("\n")):
            if not line.strip():
                continue
            try:
                texts = [json.loads(line)[k].replace("<|", "< |").strip() for k in self.keys]
                "".join(texts).encode()                          # half a character is none
                solution = "\n".join(filter(None, map(str.strip, self.clean(texts[1]).splitlines())))
                answer = self.reference(solution)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
                raise Fail(f"{path}, line {i + 1}: not an object with the texts {' and '.join(self.keys)} "
                           f"({type(e).__name__})") from None
            if not texts[0]:
                raise Fail(f"{path}, line {i + 1}: its {self.keys[0]} is empty")
            if not answer:
                raise Fail(f"{path}, line {i + 1}: its {self.keys[1]} has no final answer that is understood")
            found[texts[0]] = Problem(texts[0], answer, solution)
        return found

    def reference(self, solution):
        """The final answer of a reference solution, or None."""
        return self.extract(solution)

    def problems(self, split, n, seed):
        pool = self.splits[split]
        if n > len(pool):
            raise Fail(f"--data {self.data}: has {len(pool)} {split} problems, not {n}: lower {LOWER[split]}")
        rng = np.random.default_rng([("train", "validation", "test").index(split), seed])
        return [pool[i] for i in rng.permutation(len(pool))[:n]]

    def batches(self, size, n, seed, step):
        """In whole epochs, each in an order of its own."""
        pool, out = self.splits["train"], []
        for epoch in range(step * size // len(pool), (step + n) * size // len(pool) + 1):
            order = np.random.default_rng([seed, epoch]).permutation(len(pool))
            first = epoch * len(pool)
            out += [pool[i] for i in order[max(0, step * size - first):max(0, (step + n) * size - first)]]
        return out

    @property
    def template(self):
        return PROMPTS.get(self.prompt_format, self.prompt_format.replace("\\n", "\n"))

    def prompt(self, problem):
        return self.template.replace("{question}", problem.question)

    def demonstrations(self, problems, expert_fraction, rng):
        """The reference solutions, all of which are right: expert_fraction has no part in it."""
        return [p.solution + END for p in problems]

    def steps(self, response):
        """Its lines that are not empty."""
        return list(filter(str.strip, super().steps(response))) or [""]

    def answer(self, response):
        found = self.extract(response.removesuffix(END)) if response.endswith(END) else None
        x = number(text := normal(found or ""))                 # equal numbers are one answer
        return (text or None) if x is None else str(x)

    def judge(self, problem, response):
        """'illegal' is what does not end, has no answer or too many lines, empty ones too."""
        if not response.endswith(END) or len(super().steps(response)) > self.max_steps:
            return "illegal"
        found = self.extract(response.removesuffix(END))
        return "illegal" if not found else "right" if same(found, problem.answer) else "planning"

    def corrupt(self, problems, responses, rng):
        """Another result of a calculation, with which the rest of the text goes on, or of the last line; the
        final answer comes out wrong."""
        texts, where = [], []
        for p, response in zip(problems, responses):
            lines = self.steps(response)[:self.max_steps]
            found = [(i, m) for i, x in enumerate(lines[:-1]) if (m := RESULT.search(x[:LONGEST]))]
            at, m = found[rng.integers(len(found))] if found else (len(lines) - 1, None)
            rest = "\n".join(lines[at:])
            if m:
                new = self.other(m[1], rng)
                later = re.sub(rf"(?<![\d.,]){re.escape(m[1])}(?!\d|[.,]\d)", new, rest[m.end():])
                rest = rest[:m.start(1)] + new + later
            text = "\n".join([*lines[:at], rest]) + END
            if m is None or self.judge(p, text) == "right":
                head = self.steps(text)[:-1]
                text = "\n".join([*head, self.end(self.other(p.answer, rng))]) + END
            texts.append(text)
            where.append(at)
        return texts, where

    def other(self, text, rng):
        """A number near the one that a text is, or 0."""
        x = number(normal(text))
        x = 0 if x is None or x.denominator > 100 else x
        near = [x + d for d in (-10, -2, -1, 1, 2, 10) if x + d >= 0 or x < 0] + [2 * x, 10 * x] * (x > 0)
        y = near[rng.integers(len(near))]
        return str(y) if y.denominator == 1 else f"{float(y):.2f}"


def behind(text):
    """What stands behind the last ####, white space in one form."""
    return " ".join(text.rpartition("####")[2].split())


@dataclass
class GSM8K(Text):
    annotations: bool = flag(False, "keep the calculator annotations <<48/2=24>>, as text: no tool is called")

    name = "gsm8k"

    def clean(self, solution):
        return solution if self.annotations else re.sub(r"<<[^<>\n]*>>", "", solution)

    def extract(self, text):
        """The number behind the last ####, which must be worked out: 12*6 is 12."""
        m = re.match(r"(\$? ?-? ?\$? ?[\d.,]*\d)", behind(text), re.ASCII)
        return m[1] if m and "####" in text else None

    def reference(self, solution):
        """Not 3:30, 1/2 or 5 or 6, of which a part would be taken."""
        found, end = self.extract(solution), behind(solution)
        return found if found and not re.search(r"\d", end.partition(found)[2]) else None

    def end(self, answer):
        return f"#### {answer}"


@dataclass
class Math(Text):
    name = "math"
    keys = ("problem", "solution")

    def __post_init__(self):
        super().__post_init__()
        if find_spec("math_verify") is None:
            raise Fail("--task math: needs pip install -r requirements-text.txt")

    def clean(self, solution):
        return solution

    extract = staticmethod(boxed)

    def end(self, answer):
        return rf"The answer is $\boxed{{{answer}}}$."

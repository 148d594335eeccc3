"""One new thing, one edit: a task, a verifier target, a search score, a search method and a reward, each a
file of a few lines that writes one line into one dict, go through the whole pipeline."""
import csv
import importlib.util
import json
import shutil

import pytest
import torch
from conftest import ROOT, SMALL, run_main

from minipav.advantage import seed_rollouts
from minipav.model import GPT
from minipav.rewards import REWARDS
from minipav.run import Run
from minipav.search import METHODS
from minipav.search.best_of_n import expected_best
from minipav.search.measure import Bench, Cell
from minipav.search.score import SCORES
from minipav.targets import TARGETS
from minipav.tasks import TASKS
from minipav.utils import Fail
from minipav.verifier import score, train_verifier

FILES = {"task": '''
from dataclasses import dataclass
from minipav.flags import flag
from minipav.tasks import TASKS
from minipav.tasks.task import Task
from minipav.tokenizer import END

@dataclass
class Chain(Task):
    links: int = flag(3, "lines to write", low=1, high=9)
    name = "chain"
    phrases = ["write down ", " then ", "done", "lost"]
    max_step_tokens = 4

    def __post_init__(self):
        self.max_steps, self.max_new_tokens = self.links, 2 * self.links

    def draw(self, n, rng):
        return [tuple(map(int, x)) for x in rng.integers(10, 100, (n, 2))]

    def prompt(self, problem):
        return "write down {} then {}\\n".format(*problem)

    def judge(self, problem, response):
        return ("right" if response == "done\\n" * (self.links - 1) + "done" + END else
                "planning" if response.endswith("lost" + END) else "illegal")

    def demonstrations(self, problems, expert_fraction, rng):
        right = "done\\n" * (self.links - 1) + "done" + END
        return [right if rng.random() < expert_fraction else "lost" + END for _ in problems]

TASKS["chain"] = Chain
''', "target": '''
import torch
from torch.nn.functional import softplus
from minipav.targets import TARGETS, Target

def minus_log_likelihood(out, q, n):
    """Of n outcomes, a share q of them right, whose chance is beta-distributed by the numbers of out."""
    (a, b), right, wrong = softplus(out).unbind(-1), q * n, n - q * n
    return (torch.lgamma(a) + torch.lgamma(b) + torch.lgamma(a + b + n)
            - torch.lgamma(a + b) - torch.lgamma(a + right) - torch.lgamma(b + wrong))

def mean(out):
    return softplus(out)[..., 0] / softplus(out).sum(-1)

TARGETS["beta"] = Target(minus_log_likelihood, mean, n_out=2)
''', "score": '''
import torch
from minipav.search.score import SCORES, Score

def lowest(s):
    return torch.minimum(s.path.min(1).values, s.q_pi)

SCORES["lowest"] = Score("lowest Q^pi on the way", lowest, uses=())
''', "method": '''
import torch
from minipav.search import METHODS, Method
from minipav.search.best_of_n import best_of_n
from minipav.search.score import Result

def worst_of_n(s, problems, ns, seed):
    """Right where best-of-N is wrong."""
    return [Result(1 - r.right, r.solved, r.tokens, r.verifier_tokens)
            for r in best_of_n(s, problems, ns, seed)]

METHODS["worst_of_n"] = Method(worst_of_n)
''', "reward": '''
from minipav.rewards import REWARDS, VERIFIER, Reward

REWARDS["gains"] = Reward(lambda rex, q, adv, alpha: rex + alpha * adv.clamp(min=0), "verifier", VERIFIER)
'''}
DICTS = {"task": TASKS, "target": TARGETS, "score": SCORES, "method": METHODS, "reward": REWARDS}
TINY = ("--smoke --device cpu --batch_size 16 --sft_steps 60 --expert_fraction 0.5 --strong_steps 4 "
        "--problems 40 --branches 60 --prover_rollouts 40 --orm_steps 4 --q_steps 40 --mu_steps 4 "
        "--test_problems 20 --max_n 4").split()
LITTLE = ("--device cpu --alpha 0.2 --quota none --problems 15 --validation 16 --n 4 "
          "--widths 2").split()


def rows(path):
    return list(csv.DictReader(path.open()))


def found(out, method, score):
    """The rows of the one search by this method and score with the flags LITTLE."""
    for path in out.glob(f"search/{method}-{score}-*.csv"):
        if len({r["problem"] for r in rows(path)}) == 15:
            return rows(path)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A run of train.py on the new task with the new target, while all of the files are imported."""
    folder, before = tmp_path_factory.mktemp("extensions"), {k: dict(d) for k, d in DICTS.items()}
    for name, text in FILES.items():
        path = folder / f"my_{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        assert len(DICTS[name]) == len(before[name]) + 1
    told = run_main(ROOT / "train.py", *TINY, "--task", "chain", "--links", 2, "--target", "beta",
                    "--out", folder / "run")
    yield folder / "run", told
    for name, d in DICTS.items():
        d.clear()
        d.update(before[name])


def test_a_task(extended):
    """Its dial is a flag; SFT learns its demonstrations; what it does not say (how to corrupt a step, exact
    values) is left out."""
    out, told = extended
    config, summary = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "summary"))
    assert config["task"] == "chain" and config["dials"] == {"links": 2} and "pass@" in told
    assert 0.1 < summary["base_sampled"]["mean"] < 0.8 and summary["planning_failure_share"]["mean"] > 0.5
    assert summary["corrupted_step_auc"] == [{"orm": None, "q_pi": None}]
    [beam] = out.glob("search/beam-q_pi-*.csv")
    assert {r["text"] for r in rows(beam)} >= {"done\ndone<|endoftext|>"}
    with pytest.raises(Fail, match="no exact values"):
        Bench(Run.open(out, "cpu")).measure(Cell("beam", "exact", problems=2))


def test_a_target(extended):
    """A head of two numbers, trained by a likelihood that needs the count of outcomes, searched with like any
    other; it learns the chance that the policy has."""
    run = Run.open(extended[0], "cpu")
    model, held_out = run.model("q_pi"), run.traces("base_validation")
    assert (model.config.n_out, model.config.target) == (2, "beta") and model.head.weight.shape[0] == 2
    seeds = run.traces("seeds_base_validation")
    q = score(model, seeds.tokens, seeds.ends)
    assert abs(q[:, 0].mean() - seeds.reward.mean()) < 0.2
    end = q.gather(1, seeds.last[:, None])[:, 0]
    assert end[seeds.reward == 1].mean() > end[seeds.reward == 0].mean() + 0.3
    again, _ = train_verifier(model, held_out, held_out, steps=2, batch_size=8, lr_muon=0.0, lr_adamw=1e-6,
                              seed=0, log=lambda *x: None, target="beta")
    assert torch.allclose(again.head.weight, model.head.weight, atol=1e-4), "it goes on from the same head"


def test_a_score_of_beams(extended, tmp_path):
    """It ranks by the lowest Q^pi of all prefixes that led to a step."""
    out = extended[0]
    told = run_main(ROOT / "search.py", "--run", out, *LITTLE, "--search", "beam:lowest", "--out", tmp_path)
    assert "lowest Q^pi on the way" in told
    bench = Bench(Run.open(out, "cpu"))
    s = bench.search(Cell("beam", "lowest"))
    s.log = []
    [r] = METHODS["beam"].run(s, bench.run.problems("test", 15), [2], 0)
    for level in s.log:
        step = level["step"]
        want = torch.cat([step.path, step.q_pi[:, None]], 1).min(1).values
        assert torch.equal(level["beam"].score, want)
    assert [float(x["right"]) for x in found(out, "beam", "lowest")] == r.right.tolist()


def test_a_score_of_samples(extended, tmp_path):
    """The same score re-ranks whole samples, of any length: by the lowest Q^pi at all of their step ends."""
    out = extended[0]
    run_main(ROOT / "search.py", "--run", out, *LITTLE, "--search", "best_of_n:lowest", "--out", tmp_path)
    bench = Bench(Run.open(out, "cpu"))
    s, problems = bench.search(Cell("best_of_n", "lowest")), bench.run.problems("test", 15)
    t = seed_rollouts(s.policy, s.env, problems, 4, 0)
    lowest = score(s.verifier, t.tokens, t.ends).nan_to_num(9.0).min(1).values
    ended = t.tokens[torch.arange(len(t)), t.lengths - 1] == s.env.enc.eot_token
    lowest = torch.where(ended, lowest, -torch.inf).view(15, 4)
    assert len(t.last[ended].unique()) > 1
    for n in (1, 2, 4):
        want = expected_best(lowest, t.reward.view(15, 4), n).tolist()
        got = [float(x["right"]) for x in found(out, "best_of_n", "lowest") if x["n"] == str(n)]
        assert got == pytest.approx(want, abs=1e-6)


def test_a_method(extended, tmp_path):
    """With any score, at the budgets of best-of-N, in the tables like the others."""
    out, methods = extended[0], ("worst_of_n", "best_of_n")
    told = run_main(ROOT / "search.py", "--run", out, *LITTLE, "--search", *(f"{m}:q_pi" for m in methods),
                    "--out", tmp_path)
    worst, best = (found(out, m, "q_pi") for m in methods)
    assert "worst" in told and [r["n"] for r in worst] == [str(n) for n in (1, 2, 4) for _ in range(15)]
    assert all(float(a["right"]) + float(b["right"]) == pytest.approx(1) for a, b in zip(worst, best))
    assert {r["search"] for r in rows(tmp_path / "curves.csv")} == {"worst_of_n:q_pi", "best_of_n:q_pi"}


def test_a_reward(extended, tmp_path):
    """Trained, evaluated, in the table; it depends on the flags that it says it uses."""
    out = tmp_path / "run"
    shutil.copytree(extended[0], out)
    run_main(ROOT / "rl.py", "--run", out, *SMALL, "--reward", "gains", "outcome", "--prover", "bo2",
             "--n_mc", 3, "--out", tmp_path / "out")
    [record] = (json.loads(p.read_text()) for p in out.glob("stages/rl/gains-*.json"))
    assert record["spec"]["prover"] == "bo2" and "n_mc" not in record["spec"] and record["accuracy"] >= 0
    assert [r["training"] for r in rows(tmp_path / "out" / "table.csv")] == ["sft", "rft", "gains", "outcome"]
    models = [GPT.load(p.parent) for p in sorted(out.glob("rl/*/log.csv"))]
    assert not torch.equal(models[0].embed.weight, models[1].embed.weight)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["controls"]["gains"] == "outcome" and summary["before"]["gains"]["tokens"] > 0


def test_without_its_file_a_run_is_refused_in_one_line(extended, monkeypatch):
    """A run that was made with an extension names it when the extension is gone."""
    out = extended[0]
    monkeypatch.delitem(TARGETS, "beta")
    with pytest.raises(Fail, match="beta") as e:
        Bench(Run.open(out, "cpu")).measure(Cell("beam", "q_pi", problems=3))
    assert "\n" not in str(e.value)
    monkeypatch.delitem(TASKS, "chain")
    with pytest.raises(Fail, match="chain") as e:
        Run.open(out, "cpu")
    assert "\n" not in str(e.value)

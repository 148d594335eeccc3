"""The trained models under results/train do what the README says of them, on problems drawn here."""
from pathlib import Path

import numpy as np
import pytest
import torch

from minipav.advantage import seed_rollouts, wrong_steps
from minipav.evaluate import tells_apart
from minipav.model import GPT
from minipav.search import beam_search
from minipav.tasks import get_task
from minipav.tokenizer import synthetic_encoding

RESULTS = Path(__file__).parent.parent / "results" / "train"


@pytest.fixture(scope="module")
def shipped():
    task = get_task("calculator")
    enc, problems = synthetic_encoding(task.phrases), task.problems("test", 500, 99)
    return GPT.load(RESULTS / "base"), GPT.load(RESULTS / "q_pi"), task, enc, problems


def test_wrong_steps_do_not_fool_the_trained_verifier(shipped):
    """Right traces of the policy against the same ones with wrong arithmetic that often lands on the target, or with an
    operation that is not offered. A verifier that has never seen a wrong step fails this, in search and above all in RL."""
    base, q_pi, task, enc, problems = shipped
    s = seed_rollouts(base, task, enc, problems, 16, seed=0, top_p=0.98)
    right = s[(s.reward == 1).nonzero()[:, 0]]
    wrong = wrong_steps(task, enc, problems, right, np.random.default_rng(0))
    assert len(right) > 200 and tells_apart(q_pi, right, wrong) > 0.8


def test_search_beats_sampling_with_the_trained_models(shipped):
    """A beam of width 4 costs about a dozen rollouts and solves several times what one sample does."""
    base, q_pi, task, enc, problems = *shipped[:4], shipped[4][:150]
    sampled = seed_rollouts(base, task, enc, problems, 4, seed=0, top_p=0.98).reward.mean()
    r = beam_search(base, q_pi, task, enc, problems, width=4, alpha=0.2, K=4, top_p=0.98)
    assert 0.02 < sampled < 0.1 and r.reward.mean() > 5 * sampled and r.tokens.float().mean() < 300
    assert all(task.outcome(p, t) == y for p, t, y in zip(problems, r.responses, r.reward.tolist()))
    assert torch.equal(r.reward, r.reward.round()) and (r.solved >= r.reward).all()

"""The trained models under results/train do what the README says of them, on problems drawn here."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

from minipav.advantage import seed_rollouts
from minipav.data import corrupted_steps
from minipav.model import GPT
from minipav.search.beam import beam
from minipav.search.inspect import tells_apart
from minipav.search.score import SCORES, Search
from minipav.tasks import make_task
from minipav.tokenizer import synthetic_encoding
from minipav.traces import Env


@pytest.fixture(scope="module")
def shipped():
    """(Search with the shipped policy and verifier, 500 test problems)"""
    task = make_task("calculator", {})
    env = Env(task, synthetic_encoding(task.phrases), {"top_p": 0.98})
    base, q_pi = (GPT.load(ROOT / "results" / "train" / name) for name in ("base", "q_pi"))
    return Search(env, base, SCORES["effective"], q_pi), task.problems("test", 500, 99)


def test_corrupted_steps_do_not_fool_the_trained_verifier(shipped):
    """Right traces of the policy against the same ones with wrong arithmetic that often lands on the target,
    or with an operation that is not offered. A verifier that has never seen a wrong step fails this, in
    search and above all in RL."""
    s, problems = shipped
    t = seed_rollouts(s.policy, s.env, problems, 10, seed=0)
    right = t[(t.reward == 1).nonzero()[:, 0]]
    wrong = corrupted_steps(s.env, problems, right, np.random.default_rng(0))
    assert len(right) > 200 and len(wrong) == len(right) and tells_apart(s.verifier, right, wrong) > 0.8


def test_search_beats_sampling_with_the_trained_models(shipped):
    """A beam of width 4 costs about a dozen rollouts and solves several times what one sample does."""
    s, problems = shipped[0], shipped[1][:150]
    sampled = seed_rollouts(s.policy, s.env, problems, 4, seed=0).reward.mean()
    [r] = beam(replace(s, alpha=0.2, K=4), problems, [4], 0)
    assert 0.02 < sampled < 0.1 and r.right.mean() > 5 * sampled and r.tokens.mean() < 300
    assert all(s.env.task.outcome(p, t) == y for p, t, y in zip(problems, r.text, r.right.tolist()))
    assert torch.equal(r.right, r.right.round()) and (r.solved >= r.right).all()

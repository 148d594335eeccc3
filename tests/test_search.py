"""Search: exact expectations over subsets, distinct prefixes, budgets counted by hand."""
import itertools

import pytest
import torch
from conftest import WalkPolicy

from minipav import search
from minipav.model import GPT, GPTConfig
from minipav.report import at_tokens, bootstrap, compare, tokens_to_reach
from minipav.tasks.calculator import Calculator


@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_best_of_n_equals_enumeration(N):
    """Every subset of five samples; ties share the pick."""
    scores = torch.tensor([[.1, .5, .3, .9, .2], [.5, .5, .1, .5, .1], [.2, .2, .2, .2, .2]])
    reward = torch.tensor([[1., 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
    for p in range(3):
        total = 0.0
        for subset in itertools.combinations(range(5), N):
            best = max(scores[p, i] for i in subset)
            top = [i for i in subset if scores[p, i] == best]
            total += sum(reward[p, i] for i in top) / len(top)
        ways = len(list(itertools.combinations(range(5), N)))
        assert abs(search.best_of_n(scores, reward, N)[p] - total / ways) < 1e-5
    assert (search.best_of_n(scores, reward, N) <= search.pass_at_n(reward, N) + 1e-6).all()


def test_pass_at_n_closed_form():
    """1 - C(wrong, N) / C(M, N)."""
    reward = torch.zeros(1, 64)
    reward[0, :5] = 1
    p = torch.tensor([(59 - i) / (64 - i) for i in range(8)]).prod()
    assert abs(search.pass_at_n(reward, 8) - (1 - p)) < 1e-5 and search.pass_at_n(reward, 64) == 1


def test_majority_vote_counts_answers_not_traces():
    answers, reward = [["7", "8", "8", None, None, None, "9", "7"]], torch.tensor([[0., 1, 1, 0, 0, 0, 0, 1]])
    assert search.majority_vote(answers, reward, 4).tolist() == [0.5]            # 8 wins; then 9 against 7: the first
    assert search.majority_vote(answers, reward, 8).tolist() == [0.0]            # 7 and 8 have two each: 7 came first


def test_duplicates_and_endless_steps_leave_the_beam():
    new = torch.tensor([[5, 1], [5, 1], [6, 1], [5, 1], [7, 8]])
    assert search._distinct(torch.tensor([0, 0, 0, 1, 1]), new, torch.tensor([1, 1, 1, 1, -1])).tolist() == [0, 2, 3]


def test_top_keeps_the_best_of_each_problem():
    value, owner = torch.tensor([.1, .9, .5, .3, .7]), torch.tensor([1, 0, 1, 1, 0])
    assert search._top(value, owner, 2).tolist() == [1, 4, 2, 3] and search._top(value, owner, 1).tolist() == [1, 2]


@pytest.fixture(scope="module")
def small():
    """A uniform walk, an untrained verifier and five problems of two steps at the most."""
    from minipav.tokenizer import synthetic_encoding
    task = Calculator(H=2, min_steps=1)
    enc, problems = synthetic_encoding(task.phrases), task.problems("test", 5, 0)
    torch.manual_seed(0)
    verifier = GPT(GPTConfig(enc.n_vocab, block_size=48, n_layer=1, n_embd=32, n_ffn=32, head="scalar"))
    return WalkPolicy(task, enc, problems), verifier, task, enc, problems


def test_a_wide_beam_holds_every_solution(small):
    """With room for all 16 walks of two steps the beam is exhaustive, and each child is there once."""
    r = search.beam_search(*small, width=20, alpha=0.5, K=4, C=12)
    assert (r.solved == 1).all()
    alone = search.beam_search(*small[:4], small[4][2:3], width=20, alpha=0.5, K=4, C=12)
    assert alone.solved == 1 and alone.tokens.shape == (1,)


def test_tokens_are_counted_by_hand(small):
    """Each step of this policy is three tokens: width * C at the first level, C for each live prefix at the second."""
    _, _, task, _, problems = small
    r = search.beam_search(*small, width=1, alpha=0.0, C=3)
    for spent, response in zip(r.tokens.tolist(), r.responses):
        assert spent == 9 * len(task.steps(response)) and response


def test_alpha_zero_is_the_q_beam_whatever_the_prover(small):
    a, b = (search.beam_search(*small, width=2, alpha=0.0, K=K, seed=3) for K in (1, 16))
    assert a.responses == b.responses and torch.equal(a.tokens, b.tokens)


def test_bad_beams_are_refused(small):
    for kw in (dict(width=0, alpha=0.1), dict(width=1, alpha=-1.0), dict(width=1, alpha=0.1, C=0)):
        with pytest.raises(ValueError, match="width >= 1"):
            search.beam_search(*small, **kw)


class Fake:
    """Curves of a made-up evaluation."""
    P = 50

    def resampled(self, weights):
        import numpy as np
        one = lambda acc, tok: (np.array([4, 8]), np.tile(acc, (len(weights), 1)), np.tile(tok, (len(weights), 1)))  # noqa: E731
        from minipav.report import LABELS
        return {m: one([.6, .8], [50., 100.]) if m == "pav_beam" else one([.3, .6], [100., 200.]) for m in LABELS}


def test_comparisons_at_equal_tokens():
    import numpy as np
    exact, drawn = bootstrap([Fake(), Fake()], R=5)
    claims = compare(exact)
    assert np.allclose(claims["pav_minus_orm_points"]["4"], 50) and np.allclose(claims["pav_minus_orm_points"]["8"], 20)
    assert np.allclose(claims["token_ratio_to_match_best_orm"], 4)
    assert np.allclose(at_tokens(exact["pav_beam"], np.array([50 * 2 ** 0.5])), 0.7)
    assert np.isnan(at_tokens(exact["pav_beam"], np.array([49.]))) and at_tokens(exact["pav_beam"], np.array([1e6])) == 0.8
    assert np.isinf(tokens_to_reach(exact["orm"], np.array([0.9])))

"""Search: exact expectations over subsets, distinct prefixes, budgets counted by hand."""
import itertools

import numpy as np
import pytest
import torch
from conftest import WalkPolicy, tiny

from minipav import search
from minipav.advantage import newline, q_best_of_k, step_ends
from minipav.model import GPT, GPTConfig
from minipav.report import LABELS, at_tokens, bootstrap, compare, interval, tokens_to_reach
from minipav.tasks.calculator import Calculator, dp, transitions
from minipav.tokenizer import END, encode_rows, synthetic_encoding
from minipav.verifier import Oracle, score, start_values


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
    assert search.majority_vote(answers, reward, 8).tolist() == [0.5]            # 7 and 8 tie, 7 came first, half are right


def test_duplicates_and_endless_steps_leave_the_beam():
    new = torch.tensor([[5, 1], [5, 1], [6, 1], [5, 1], [7, 8]])
    assert search._distinct(torch.tensor([0, 0, 0, 1, 1]), new, torch.tensor([1, 1, 1, 1, -1])).tolist() == [0, 2, 3]


def test_top_keeps_the_best_of_each_problem():
    value, owner = torch.tensor([.1, .9, .5, .3, .7]), torch.tensor([1, 0, 1, 1, 0])
    assert search._top(value, owner, 2).tolist() == [1, 4, 2, 3] and search._top(value, owner, 1).tolist() == [1, 2]


@pytest.fixture(scope="module")
def small():
    """A uniform walk, an untrained verifier and five problems of two steps at the most."""
    task = Calculator(H=2, min_steps=1)
    enc, problems = synthetic_encoding(task.phrases), task.problems("test", 5, 0)
    torch.manual_seed(0)
    verifier = GPT(GPTConfig(enc.n_vocab, block_size=48, n_layer=1, n_embd=32, n_ffn=32, head="scalar"))
    return WalkPolicy(task, enc, problems), verifier, task, enc, problems


def test_a_wide_beam_holds_every_solution(small):
    """With room for all 16 walks of two steps the beam is exhaustive."""
    r = search.beam_search(*small, width=20, alpha=0.5, K=4, C=12)
    assert (r.solved == 1).all()
    alone = search.beam_search(*small[:4], small[4][2:3], width=20, alpha=0.5, K=4, C=12)
    assert alone.solved == 1 and alone.tokens.shape == (1,)


def test_tokens_are_counted_by_hand(small):
    """Each step of this policy is three tokens: width * C at the first level, C for each live prefix after it."""
    _, _, task, _, problems = small
    first = search.beam_search(small[0], small[1], Calculator(H=2, min_steps=1), *small[3:], width=4, alpha=0.0, C=3)
    assert (first.tokens >= 36).all() and (first.tokens <= 36 + 4 * 9).all() and (first.tokens % 9 == 0).all()
    r = search.beam_search(*small, width=1, alpha=0.0, C=3)
    for spent, response in zip(r.tokens.tolist(), r.responses):
        assert spent == 9 * len(task.steps(response)) and response


def test_alpha_zero_is_the_q_beam_whatever_the_prover(small):
    a, b = (search.beam_search(*small, width=2, alpha=0.0, K=K, seed=3) for K in (1, 16))
    assert a.responses == b.responses and torch.equal(a.tokens, b.tokens)


def test_fig_2a_flips_above_alpha_a_fifth():
    """Parents 1 and 2 have V = .60 and .30, their steps Q = .55 .50 .70 and .50 .35 .25, and mu = pi. A beam of 2 by Q keeps
    the steps 3 and 1 of the first parent; by A its step 3 and step 1 of the second, and so does Q + alpha A for alpha > .2."""
    q, before = torch.tensor([.55, .50, .70, .50, .35, .25]), torch.tensor([.60] * 3 + [.30] * 3)

    def kept(rule, alpha):
        return set(search.SCORES[rule](q, q, before, alpha).topk(2).indices.tolist())
    assert kept("effective", 0.0) == kept("effective", 0.19) == {0, 2}
    assert kept("effective", 0.21) == kept("advantage", 0) == {2, 3}
    assert kept("bonus", 5.0) == {0, 2}                                          # Q^mu = Q^pi as a bonus changes nothing


def test_width_one_and_one_sample_is_plain_sampling(small):
    """Then nothing is chosen: the trace is the policy's own, of the same uniform numbers."""
    policy, verifier, task, enc, problems = small
    r = search.beam_search(*small, width=1, alpha=0.5, C=1, seed=7)
    prompts, lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    u = torch.rand(task.max_steps, len(problems), 1, task.max_step_tokens, generator=torch.Generator().manual_seed(7))
    for i, response in enumerate(r.responses):
        text = ""
        for step in u[:, i, 0]:                                                  # each token by inverse CDF
            for x in step:
                p = policy.next(enc.encode(task.prompt(problems[i]) + text, allowed_special="all")).exp()
                text += enc.decode([int((p.cumsum(0) <= x * p.sum()).sum())])
                if text.endswith(("\n", END)):
                    break
            if text.endswith(END):
                break
        assert text == response and r.tokens[i] == len(enc.encode(text, allowed_special="all"))


def test_all_problems_at_once_equals_one_at_a_time(small):
    """Also with a bound so small that the problems go in batches of one."""
    policy, verifier, task, enc, problems = small
    whole = search.beam_search(*small, width=2, alpha=0.5, K=4, seed=1)
    split = search.beam_search(*small, width=2, alpha=0.5, K=4, seed=1, max_tokens_in_flight=1)
    assert whole.responses == split.responses
    assert all(torch.equal(getattr(whole, f), getattr(split, f)) for f in ("reward", "solved", "tokens", "scored"))


def test_verifier_tokens_are_counted_by_hand(small):
    """Each prompt once, each distinct candidate step once, for each verifier that is asked."""
    policy, verifier, task, enc, problems = small
    log = []
    r = search.beam_search(*small, width=2, alpha=0.5, K=4, log=log)
    two = search.beam_search(*small, width=2, alpha=0.5, q_mu_model=verifier)
    for i, p in enumerate(problems):
        candidates = [enc.decode(t[:n]) for level in log
                      for o, t, n in zip(*(level[k].tolist() for k in ("owner", "tokens", "lengths"))) if o == i]
        assert len(set(candidates)) == len(candidates)
        assert r.scored[i] == len(enc.encode(task.prompt(p))) + 3 * len(candidates)      # a step of this policy is 3 tokens
    assert (two.scored % 2 == 0).all()


class Stuck(WalkPolicy):
    """Says one thing for ever: every beam is copies of it."""

    def __init__(self, *args, word):
        super().__init__(*args)
        self.word = word

    def next(self, tokens):
        out = torch.full((self.enc.n_vocab,), float("-inf"))
        out[self.enc.encode(self.word, allowed_special="all")[0]] = 0.0
        return out


def test_beams_of_duplicates_and_beams_that_die(small):
    """All the same step: one candidate a level, and H steps without an end leave no answer. A step that never ends is no
    candidate: the beam is dead at once. A trace that ends with its first step costs nothing more."""
    _, verifier, task, enc, problems = small
    levels = []
    r = search.beam_search(Stuck(task, enc, problems, word="\n"), *small[1:], width=4, alpha=0.1, log=levels)
    assert [len(level["owner"]) for level in levels] == [5, 5] and r.responses == [""] * 5 and not r.solved.any()
    assert (r.tokens == 12 + 3).all()                                            # 4 C at the first level, C for one prefix after
    dead = search.beam_search(Stuck(task, enc, problems, word="7"), *small[1:], width=4, alpha=0.1)
    assert dead.responses == [""] * 5 and (dead.tokens == 12 * task.max_step_tokens).all() and not dead.reward.any()
    done = search.beam_search(Stuck(task, enc, problems, word=END), *small[1:], width=4, alpha=0.1)
    assert done.responses == [END] * 5 and (done.tokens == 12).all()


def test_the_oracle_beam_is_exact(small):
    """Exact Q of this very policy: wide enough, it never picks a wrong answer if a right one was found; its value of a
    prefix is the dynamic program's, and 0 behind a wrong step."""
    policy, _, task, enc, problems = small
    r = search.beam_search(policy, Oracle(task, enc), *small[2:], width=20, alpha=0.0, C=12)
    assert (r.reward == 1).all() and torch.equal(r.reward, r.solved)
    value, (Q, V) = task.exact(problems), dp(transitions(problems), np.array([p.target for p in problems]), task.H)
    for i, p in enumerate(problems):
        assert value(i, "") == pytest.approx(V[i, 0, p.start])
        for k, (sign, x) in enumerate(zip("+-*/", p.ops)):
            if v := transitions([p])[0, p.start, k]:
                assert value(i, f"{sign}{x} = {v}" + END) == (v == p.target)
                if v != p.target:                                                # a walk that went on past it is worth less
                    assert value(i, f"{sign}{x} = {v}\n") == pytest.approx(Q[i, 0, p.start, k])
                assert value(i, f"{sign}{x} = {v + 1}\n") == 0


@pytest.mark.parametrize("own_q_mu", [False, True])
def test_the_beam_scores_by_the_effective_reward(small, own_q_mu):
    """Each finished trace's frozen score is Q^pi + alpha A^mu of its last step, from full re-scoring of the two prefixes:
    a wrong sign, a parent mixed up or another step's advantage shows."""
    policy, _, task, enc, problems = small
    verifiers = [tiny(seed, std=0.2, vocab_size=enc.n_vocab, block_size=48, head="scalar") for seed in (1, 2)][:1 + own_q_mu]
    prompts, lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    u = torch.rand(2, 5, 15, task.max_step_tokens, generator=torch.Generator().manual_seed(0))
    slots = prompts.shape[1] + 10
    values = [start_values(v, problems, prompts, lengths, slots) for v in verifiers] + [None] * (2 - len(verifiers))
    f, *_ = search._search(policy, values, task, enc, prompts, lengths, u, slots, 5,
                           lambda *x: search.SCORES["effective"](*x, 0.7), 4, 3, {})
    ends = step_ends(f["tokens"], lengths[f["owner"]], f["lengths"], [newline(enc), enc.eot_token])
    last = (ends >= 0).sum(1, keepdim=True) - 1
    q_pi, q_mu = (score(v, f["tokens"], ends) for v in (verifiers[0], verifiers[-1]))
    q_mu = q_mu if own_q_mu else q_best_of_k(q_mu, 4)
    adv_mu = (q_mu.gather(1, last) - q_mu.gather(1, last - 1))[:, 0]
    assert len(adv_mu) > 5 and adv_mu.std() > 0.01
    assert torch.allclose(f["q_pi"], q_pi.gather(1, last)[:, 0], atol=1e-4)
    assert torch.allclose(f["score"], q_pi.gather(1, last)[:, 0] + 0.7 * adv_mu, atol=1e-4)


def test_bad_beams_are_refused(small):
    for kw in (dict(width=0, alpha=0.1), dict(width=1, alpha=-1.0), dict(width=1, alpha=0.1, C=0)):
        with pytest.raises(ValueError, match="width >= 1"):
            search.beam_search(*small, **kw)


class Fake:
    """Curves of a made-up evaluation: ORM .3 and .6 at 100 and 200 tokens, PAV .6 and .8 at half of them, both on average
    over two runs that differ by `spread`."""
    P = 50

    def __init__(self, spread):
        self.shift = spread - 0.1

    def resampled(self, weights):
        def one(acc, tok):
            return np.array([4, 8]), np.tile(acc, (len(weights), 1)) + self.shift, np.tile(tok, (len(weights), 1))
        return {m: one([.6, .8], [50., 100.]) if m == "pav_beam" else one([.3, .6], [100., 200.]) for m in LABELS}


def test_comparisons_at_equal_tokens():
    exact, drawn = bootstrap([Fake(0.0), Fake(0.2)], R=200)
    assert drawn["orm"][1][:, 1].std() > 0.03                                    # the runs are resampled too
    claims = compare(exact)
    assert np.allclose(claims["pav_minus_orm_points"]["4"], 50) and np.allclose(claims["pav_minus_orm_points"]["8"], 20)
    assert np.allclose(claims["token_ratio_to_match_best_orm"], 4)
    assert np.allclose(at_tokens(exact["pav_beam"], np.array([50 * 2 ** 0.5])), 0.7)
    assert np.isnan(at_tokens(exact["pav_beam"], np.array([49.]))) and at_tokens(exact["pav_beam"], np.array([1e6])) == 0.8
    assert np.isnan(tokens_to_reach(exact["orm"], np.array([0.9])))
    assert np.allclose(claims["orm_over_pav_tokens_by_width"]["4"], 4)           # .6: 200 tokens against 50
    assert np.isnan(claims["orm_over_pav_tokens_by_width"]["8"])                 # .8 is out of the ORM's reach
    assert interval(1.0, np.array([0.5] * 90 + [np.nan] * 10)) == {"mean": 1.0, "lo": 0.5, "hi": None}
    assert interval(np.nan, np.ones(3)) is None

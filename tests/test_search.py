"""Search: exact expectations over subsets, distinct prefixes, budgets counted by hand."""
import copy
import importlib
import itertools
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Says, WalkPolicy, tiny

from minipav.advantage import q_best_of_k, seed_rollouts
from minipav.model import GPT, GPTConfig
from minipav.sampler import uniform
from minipav.search import METHODS
from minipav.search.beam import allot, distinct, kin, prune, search_batch, search_width, top
from minipav.search.best_of_n import (
    at_n,
    best_of_n,
    expected_best,
    greedy,
    majority,
    majority_vote,
    pass_at_n,
    scored,
    weighted_vote,
)
from minipav.search.dvts import dvts
from minipav.search.score import QUOTAS, SCORES, Search, Step
from minipav.search.tree import Tree
from minipav.tasks.calculator import Calculator, dp, transitions
from minipav.tokenizer import END, delimiter_tokens, encode_rows, synthetic_encoding
from minipav.traces import Env, responses, step_ends
from minipav.verifier import score

# ---- whole samples

@pytest.mark.parametrize("N", [1, 2, 3, 5])
def test_best_of_n_equals_enumeration(N):
    """Every subset of five samples; ties share the pick."""
    scores = torch.tensor([[.1, .5, .3, .9, .2], [.5, .5, .1, .5, .1], [.2, .2, .2, .2, .2]])
    reward = torch.tensor([[1., 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 1, 1, 0, 0]])
    for p in range(3):
        total = 0.0
        for subset in itertools.combinations(range(5), N):
            best = max(scores[p, i] for i in subset)
            tied = [i for i in subset if scores[p, i] == best]
            total += sum(reward[p, i] for i in tied) / len(tied)
        ways = len(list(itertools.combinations(range(5), N)))
        assert abs(expected_best(scores, reward, N)[p] - total / ways) < 1e-5


def test_pass_at_n_closed_form():
    """1 - C(wrong, N) / C(M, N)."""
    reward = torch.zeros(1, 64)
    reward[0, :5] = 1
    p = torch.tensor([(59 - i) / (64 - i) for i in range(8)]).prod()
    assert abs(pass_at_n(reward, 8) - (1 - p)) < 1e-5 and pass_at_n(reward, 64) == 1


def test_majority_vote_counts_answers_not_traces():
    answers = [["7", "8", "8", None, None, None, "9", "7"]]
    reward = torch.tensor([[0., 1, 1, 0, 0, 0, 0, 1]])
    assert majority_vote(answers, reward, 4).tolist() == [0.5]  # 8 wins; then 9 against 7: the first
    assert majority_vote(answers, reward, 8).tolist() == [0.5]  # 7 and 8 tie, 7 came first, half are right
    weight = torch.tensor([[.1, .2, .2, 9, 9, 9, .7, .5]])
    assert majority_vote(answers, reward, 8, weight).tolist() == [0]            # 9: .7, 7: .6, 8: .4
    weight[0, 0] = .6
    assert majority_vote(answers, reward, 4, weight).tolist() == [0]            # 7, then 9
    assert majority_vote(answers, reward, 8, weight).tolist() == [0.5]          # 7: 1.1
    assert majority_vote([[None, "1"]], torch.tensor([[1., 1]]), 2, torch.zeros(1, 2)).tolist() == [1]


def test_methods_over_samples_share_them_and_equal_their_formulas(small):
    """pass@N, votes and best-of-N of the same eight samples: by hand from a fresh draw of them."""
    s, problems = replace(small, memo={}), small.problems
    t = seed_rollouts(s.policy, s.env, problems, 8, seed=3)
    reward, ns = t.reward.view(5, 8), [1, 2, 4, 8]
    q = score(s.verifier, t.tokens, t.ends)
    last = q.gather(1, t.last[:, None])[:, 0].view(5, 8)
    answers = [s.env.enc.decode(r[:n].tolist()).removesuffix(END).rpartition(" = ")[2]
               for r, n in zip(t.tokens, t.lengths)]
    answers = [answers[i:i + 8] for i in range(0, 40, 8)]
    want = {at_n: lambda n: pass_at_n(reward, n), majority: lambda n: majority_vote(answers, reward, n),
            best_of_n: lambda n: expected_best(last, reward, n),
            weighted_vote: lambda n: majority_vote(answers, reward, n, last)}
    for method, by_hand in want.items():
        for n, r in zip(ns, method(replace(s, score=SCORES["q_pi"]), problems, ns, 3)):
            assert torch.allclose(r.right, by_hand(n)) and torch.allclose(r.solved, pass_at_n(reward, n))
            spent = (t.lengths - t.ends[:, 0] - 1).float().view(5, 8).mean(1)
            assert torch.allclose(r.tokens, n * spent)
            read = n * t.lengths.float().view(5, 8).mean(1) * (method in (best_of_n, weighted_vote))
            assert torch.allclose(r.verifier_tokens, read)
    assert len([k for k in s.memo if k[0] == "samples"]) == 1
    assert 0 < reward.mean() < 1 and not torch.equal(want[best_of_n](8), want[at_n](8))
    assert not torch.equal(want[weighted_vote](2), want[majority](2))


@pytest.mark.parametrize("own_q_mu", [True, False])
def test_best_of_n_by_the_effective_reward_scores_the_last_step(small, own_q_mu):
    """Q^pi + alpha A^mu of each sample's last step, mu with a verifier of its own or best-of-4 of pi; what
    never ended is only picked if there is nothing else, and in a vote a score below 0 counts 0."""
    mu = tiny(2, std=0.2, vocab_size=small.env.enc.n_vocab, block_size=48, head="scalar")
    pi = tiny(1, std=0.2, vocab_size=small.env.enc.n_vocab, block_size=48, head="scalar")
    s = replace(small, verifier=pi, mu_verifier=mu if own_q_mu else None, K=4, alpha=0.7, memo={})
    [r] = best_of_n(s, small.problems, [6], 4)
    t = seed_rollouts(s.policy, s.env, small.problems, 6, seed=4)
    last = t.last[:, None]
    q_pi, q_mu = (score(v, t.tokens, t.ends) for v in (pi, mu))
    q_mu = q_mu if own_q_mu else q_best_of_k(q_pi, 4)
    value = (q_pi.gather(1, last) + 0.7 * (q_mu.gather(1, last) - q_mu.gather(1, last - 1))).view(5, 6)
    assert torch.allclose(r.right, t.reward.view(5, 6).gather(1, value.argmax(1, keepdim=True))[:, 0])
    assert torch.allclose(scored(s, small.problems, 6, 4)[0], value, atol=1e-5)
    cut = torch.tensor([k for k in range(30) if k % 6])         # all but the first of each problem
    s.memo[("samples", 6, 4)][0].tokens[cut, t.lengths[cut] - 1] = 0
    [r] = best_of_n(s, small.problems, [6], 4)
    assert torch.equal(r.right, t.reward[::6])
    t = replace(t, reward=torch.tensor([1., 1, 1, 0, 0, 0]).repeat(5))
    answers = ["1", "1", "1", "2", "2", "2"] * 5
    s = replace(s, alpha=-100, memo={("samples", 6, 4): (t, 0), ("answers", 6, 4): answers})
    [r] = weighted_vote(s, small.problems, [6], 4)
    value = (q_pi - 100 * q_mu).gather(1, last) + 100 * q_mu.gather(1, last - 1)
    first, second = value.clamp(min=0).view(5, 2, 3).sum(2).T
    assert torch.equal(r.right, (first >= second).float()) and 0 < r.right.sum() < 5


def test_greedy_takes_the_likeliest_token(small):
    word = [f"{s}{x} = " for s, x in zip("+-*/", small.problems[0].ops)][0]
    says = Says(small.env, small.problems, word, "9", "\n", word, "9", END)
    [r] = greedy(replace(small, policy=says), small.problems, [1], 0)
    assert r.text == [f"{word}9\n{word}9{END}"] * 5 and (r.tokens == 6).all() and not r.right.any()


# ---- beams

@pytest.mark.parametrize("sampling", [{"temperature": 1e-5}, {"top_p": 1e-6}])
def test_every_search_samples_at_the_runs_temperature_and_top_p(small, sampling):
    """At nearly 0 all samples are greedy, and so is what a beam finds."""
    class Tilted(WalkPolicy):
        def head(self, hidden):
            return hidden + torch.arange(hidden.shape[1]) / 1000

    env = replace(small.env, sampling=sampling)
    cold = replace(small, env=env, policy=Tilted(env, small.problems), memo={})
    [want] = greedy(cold, small.problems, [1], 0)
    assert not torch.equal(at_n(small, small.problems, [1], 0)[0].tokens, want.tokens)
    [sampled] = at_n(cold, small.problems, [1], 0)
    assert torch.equal(sampled.tokens, want.tokens) and torch.equal(sampled.right, want.right)
    found = search_width(cold, small.problems, 2, 0)
    finished = [i for i, text in enumerate(found.text) if text]
    assert finished and all(found.text[i] == want.text[i] for i in finished)
    [walked] = METHODS["backtrack"].run(cold, small.problems, [2], 0)
    assert any(walked.text) and all(x in ("", y) for x, y in zip(walked.text, want.text))


def test_duplicates_and_endless_steps_leave_the_beam():
    new = torch.tensor([[5, 1], [5, 1], [6, 1], [5, 1], [7, 8]])
    assert distinct(torch.tensor([0, 0, 0, 1, 1]), new, torch.tensor([1, 1, 1, 1, -1])).tolist() == [0, 2, 3]


def test_top_keeps_the_best_of_each_problem():
    value, owner = torch.tensor([.1, .9, .5, .3, .7]), torch.tensor([1, 0, 1, 1, 0])
    assert top(value, owner, 2).tolist() == [1, 4, 2, 3] and top(value, owner, 1).tolist() == [1, 2]
    tier = torch.tensor([0, 0, 0, 1, 0])                        # a lower tier goes first, whatever its values
    assert top(value, owner, 2, tier).tolist() == [1, 4, 2, 0]


@pytest.mark.parametrize("quota", QUOTAS)
def test_a_quota_of_relatives_equals_its_definition(quota, small):
    """Against the rule written out for one candidate at a time, on random scores, relatives and finished
    traces."""
    g = torch.Generator().manual_seed(0)
    rows = namedtuple("Rows", "score owner")
    for _ in range(20):
        finished = rows(torch.rand(4, generator=g), torch.tensor([0, 0, 1, 2]))
        child = rows(torch.rand(30, generator=g), torch.arange(3).repeat_interleave(10))
        parent = 4 * child.owner + torch.randint(4, (30,), generator=g)
        parents, value = torch.arange(12) // 2, torch.randint(3, (30,), generator=g)
        new, count = encode_rows(small.env.enc, [f"1 + 1 = {v}\n" for v in value.tolist()])
        key = {"none": torch.arange(30), "parent": parent, "grandparent": parent // 2,
               "state": 3 * child.owner + value}[quota]
        ended = torch.rand(30, generator=g) < 0.2
        relatives = kin(replace(small, quota=quota), child.owner, parent, parents, new, count)
        best, on = prune(finished, child, ended, 5, relatives)
        score, owner = [*finished.score.tolist(), *child.score.tolist()], [0, 0, 1, 2, *child.owner.tolist()]
        behind = [0] * 4 + [sum(bool(key[j] == key[i]) and score[4 + j] > score[4 + i] for j in range(30))
                            for i in range(30)]
        want = [i for p in range(3) for i in sorted((i for i in range(34) if owner[i] == p),
                                                    key=lambda i: (-behind[i], score[i]), reverse=True)[:5]]
        assert best.tolist() == want and on.tolist() == [i >= 4 and not ended[i - 4] for i in want]


def test_a_level_is_spread_over_the_live_prefixes(small):
    """width * C steps behind all of a problem's prefixes together, the better ones first; so many at the
    first level, or without a bound; or C behind each."""
    owner, s = torch.tensor([0, 0, 0, 0, 0, 2, 2]), replace(small, spread=10)
    assert allot(s, owner, 4, 3).tolist() == [3, 3, 2, 2, 2, 6, 6]
    assert allot(s, torch.arange(2), 4, 0).tolist() == [10, 10]
    assert allot(replace(s, spread=99), torch.arange(2), 4, 0).tolist() == [12, 12]
    each = replace(s, spread=0)
    assert allot(each, owner, 4, 3).tolist() == [3] * 7
    assert allot(each, torch.arange(2), 4, 0).tolist() == [12] * 2


@pytest.fixture(scope="module")
def small():
    """A Search with a uniform walk and an untrained verifier, and five problems of two steps at the most."""
    task = Calculator(H=2, min_steps=1)
    env, problems = Env(task, synthetic_encoding(task.phrases)), task.problems("test", 5, 0)
    torch.manual_seed(0)
    verifier = GPT(GPTConfig(env.enc.n_vocab, block_size=48, n_layer=1, n_embd=32, n_ffn=32, head="scalar"))
    s = Search(env, WalkPolicy(env, problems), SCORES["effective"], verifier)
    s.problems = problems
    return s


def beam(small, width, problems=None, seed=0, **fields):
    return search_width(replace(small, **fields), problems or small.problems, width, seed)


def test_a_wide_beam_holds_every_solution(small):
    """With room for all 16 walks of two steps the beam is exhaustive."""
    for quota in QUOTAS:
        wide = dict(alpha=0.5, K=4, C=12, spread=240, quota=quota)
        assert (beam(small, 20, **wide).solved == 1).all()
    alone = beam(small, 20, small.problems[2:3], **wide)
    assert alone.solved == 1 and alone.tokens.shape == (1,)


def test_tokens_are_counted_by_hand(small):
    """Each step of this policy is three tokens: width * C at each level; without a spread C for each live
    prefix after the first."""
    assert set(beam(small, 4).tokens.tolist()) <= {36, 72}
    first = beam(small, 4, spread=0)
    assert (first.tokens >= 36).all() and (first.tokens <= 36 + 4 * 9).all() and (first.tokens % 9 == 0).all()
    r = beam(small, 1)
    for spent, text in zip(r.tokens.tolist(), r.text):
        assert spent == 9 * len(small.env.task.steps(text)) and text


def test_alpha_zero_is_the_q_beam_whatever_the_prover(small):
    a, b, c = (beam(small, 2, seed=3, **x) for x in (dict(K=1), dict(K=16), dict(score=SCORES["q_pi"])))
    assert a.text == b.text == c.text and torch.equal(a.tokens, b.tokens) and torch.equal(a.tokens, c.tokens)


def test_fig_2a_flips_above_alpha_a_fifth():
    """Parents 1 and 2 have V = .60 and .30, their steps Q = .55 .50 .70 and .50 .35 .25, and mu = pi. A beam
    of 2 by Q keeps the steps 3 and 1 of the first parent; by A its step 3 and step 1 of the second, and so
    does Q + alpha A for alpha > .2."""
    q, before = torch.tensor([.55, .50, .70, .50, .35, .25]), torch.tensor([.60] * 3 + [.30] * 3)

    def kept(name, alpha):
        step = Step(q, q, before, before, before[:, None], 1, torch.zeros(6), alpha)
        return set(SCORES[name].of(step).topk(2).indices.tolist())
    assert kept("effective", 0.0) == kept("effective", 0.19) == kept("q_pi", 1) == kept("orm", 1) == {0, 2}
    assert kept("effective", 0.21) == kept("exact", 0.21) == kept("advantage", 0) == {2, 3}
    assert kept("bonus", 5.0) == {0, 2}                         # Q^mu = Q^pi as a bonus changes nothing
    step = Step(*torch.tensor([[.5], [.9], [.4], [.7]]), None, 1, None, 2.0)
    for name, value in dict(q_pi=.5, effective=.9, exact=.9, advantage=.2, q_mu=.9, bonus=2.3).items():
        assert SCORES[name].of(step) == pytest.approx(value)


def test_width_one_and_one_sample_is_plain_sampling(small):
    """Then nothing is chosen: the trace is the policy's own, of the same uniform numbers."""
    policy, task, enc, problems = small.policy, small.env.task, small.env.enc, small.problems
    r = beam(small, 1, alpha=0.5, C=1, seed=7)
    for i, response in enumerate(r.text):
        text = ""
        for level in range(task.max_steps):                     # each token by inverse CDF
            for t in range(task.max_step_tokens):
                x = float(uniform(7, torch.tensor([i * task.max_steps + level]), t))
                p = policy.next(enc.encode(task.prompt(problems[i]) + text, allowed_special="all")).exp()
                text += enc.decode([int((p.cumsum(0) <= x * p.sum()).sum())])
                if text.endswith(("\n", END)):
                    break
            if text.endswith(END):
                break
        assert text == response and r.tokens[i] == len(enc.encode(text, allowed_special="all"))


def test_all_problems_at_once_equals_one_at_a_time(small):
    """Also with a bound so small that the problems go in batches of one."""
    whole = beam(small, 2, alpha=0.5, K=4, seed=1)
    one = replace(small.env, sampling={"max_tokens_in_flight": 1})
    split = beam(small, 2, alpha=0.5, K=4, seed=1, env=one)
    assert whole.text == split.text
    for f in ("right", "solved", "tokens", "verifier_tokens"):
        assert torch.equal(getattr(whole, f), getattr(split, f))


def test_each_candidate_has_randomness_of_its_own(small, monkeypatch):
    module, ids = importlib.import_module("minipav.search.beam"), []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *a, **k: ids.append(a[3]) or decode(*a, **k))
    beam(small, 3, alpha=0.5)
    assert len(ids) == 2 and len(torch.cat(ids).unique()) == len(torch.cat(ids))


def test_the_answer_of_a_beam_is_the_finished_trace_with_the_highest_q_pi(small):
    """Not the one with the highest score."""
    enc, others = small.env.enc, 0
    pi = tiny(1, std=0.2, vocab_size=enc.n_vocab, block_size=48, head="scalar")
    prompts, lengths = encode_rows(enc, [small.env.task.prompt(p) for p in small.problems])
    s = replace(small, verifier=pi, alpha=0.7, K=4)
    f, *_ = search_batch(s, small.problems, prompts, lengths, prompts.shape[1] + 10, 5, 0)
    r, texts = search_width(s, small.problems, 5, 0), responses(enc, f.tokens, f.lengths, lengths[f.owner])
    for i in range(5):
        rows = (f.owner == i).nonzero()[:, 0]
        best = rows[f.q_pi[rows, -1].argmax()]
        assert r.text[i] == texts[best] and r.q[i] == f.q_pi[best, -1]
        others += bool(best != rows[f.score[rows].argmax()])
    assert others


def test_verifier_tokens_are_counted_by_hand(small):
    """Each prompt once, each distinct candidate step once, for each verifier that is asked."""
    enc, log = small.env.enc, []
    r = beam(small, 2, alpha=0.5, K=4, log=log)
    two = beam(small, 2, alpha=0.5, mu_verifier=small.verifier)
    for i, p in enumerate(small.problems):
        beams = [level["beam"] for level in log]
        candidates = [enc.decode(b.tokens[k, :b.lengths[k]].tolist()) for b in beams
                      for k in (b.owner == i).nonzero()[:, 0].tolist()]
        assert len(set(candidates)) == len(candidates)
        prompt = len(enc.encode(small.env.task.prompt(p)))
        assert r.verifier_tokens[i] == prompt + 3 * len(candidates)     # a step of this policy is 3 tokens
    one = beam(small, 2, alpha=0.5)
    assert torch.equal(two.verifier_tokens, 2 * one.verifier_tokens)
    assert not beam(small, 2, verifier=None).verifier_tokens.any()


def test_the_log_has_each_candidate_with_its_values_and_what_was_kept(small):
    """As --show prints them: the value before a step is its own parent's; the best of each problem stay."""
    task, enc, log = small.env.task, small.env.enc, []
    beam(small, 2, alpha=0.5, K=4, log=log, env=replace(small.env, sampling={"max_tokens_in_flight": 1}))
    assert len(log) >= 2 * 5, "batches of one problem"
    for level in log:
        b, step, kept = level["beam"], level["step"], level["kept"]
        assert torch.equal(b.score, SCORES["effective"].of(step)) and 1 <= kept.sum() <= 2
        assert step.depth < task.H or level["ended"].all(), "a last step without END takes no place"
        assert len(b.owner.unique()) == 1 and (step.logprob < 0).all()
        assert torch.equal(step.path[:, -1], step.q_pi_before)
        start = torch.full_like(b.lengths, len(enc.encode(task.prompt(small.problems[b.owner[0]]))))
        ends = step_ends(b.tokens, start, b.lengths, delimiter_tokens(enc, "\n"))
        q = score(small.verifier, b.tokens, ends)
        assert torch.allclose(q[:, :step.depth], step.path[:, :step.depth], atol=1e-4)
        assert torch.allclose(q[:, step.depth], step.q_pi, atol=1e-4)
    assert sorted({int(level["beam"].owner[0]) for level in log}) == list(range(5))


def test_beams_of_duplicates_and_beams_that_die(small):
    """All the same step: one candidate a level, and H steps without an end leave no answer. A step that never
    ends is no candidate: the beam is dead at once. A trace that ends with its first step costs no more."""
    def says(word):
        return Says(small.env, small.problems, word)
    levels = []
    spread = beam(small, 4, policy=says("\n"), alpha=0.1)
    r = beam(small, 4, policy=says("\n"), alpha=0.1, log=levels, spread=0)
    assert [len(level["beam"].owner) for level in levels] == [5], "none at the last level"
    assert r.text == [""] * 5 and not r.solved.any()
    assert (r.tokens == 12 + 3).all()                           # 4 C at the first level, then C for a prefix
    assert (spread.tokens == 12 + 12).all() and not spread.solved.any()
    dead = beam(small, 4, policy=says("7"), alpha=0.1)
    assert dead.text == [""] * 5 and (dead.tokens == 12 * small.env.task.max_step_tokens).all()
    assert not dead.right.any()
    done = beam(small, 4, policy=says(END), alpha=0.1)
    assert done.text == [END] * 5 and (done.tokens == 12).all()


def test_the_exact_beam_is_exact(small):
    """Exact Q of this very policy: wide enough, it never picks a wrong answer if a right one was found; its
    value of a prefix is the dynamic program's, and 0 behind a wrong step."""
    task, problems = small.env.task, small.problems
    r = beam(small, 20, verifier=None, score=SCORES["exact"], C=12, spread=240)
    assert (r.right == 1).all() and torch.equal(r.right, r.solved)
    value = task.exact(problems)
    Q, V = dp(transitions(problems), np.array([p.target for p in problems]), task.H)
    for i, p in enumerate(problems):
        assert value(i, "") == pytest.approx(V[i, 0, p.start])
        for k, (sign, x) in enumerate(zip("+-*/", p.ops)):
            if v := transitions([p])[0, p.start, k]:
                assert value(i, f"{sign}{x} = {v}" + END) == (v == p.target)
                if v != p.target:                               # a walk that went on past it is worth less
                    assert value(i, f"{sign}{x} = {v}\n") == pytest.approx(Q[i, 0, p.start, k])
                assert value(i, f"{sign}{x} = {v + 1}\n") == 0


@pytest.mark.parametrize("own_q_mu", [False, True])
def test_the_beam_scores_by_the_effective_reward(small, own_q_mu):
    """Each finished trace's frozen score is Q^pi + alpha A^mu of its last step, from full re-scoring of the
    two prefixes: a wrong sign, a parent mixed up or another step's advantage shows."""
    task, enc, problems = small.env.task, small.env.enc, small.problems
    pi, mu = (tiny(seed, std=0.2, vocab_size=enc.n_vocab, block_size=48, head="scalar") for seed in (1, 2))
    prompts, lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    s = replace(small, verifier=pi, mu_verifier=mu if own_q_mu else None, alpha=0.7, K=4)
    with torch.no_grad():
        f, *_ = search_batch(s, problems, prompts, lengths, prompts.shape[1] + 10, 5, 0)
    ends = step_ends(f.tokens, lengths[f.owner], f.lengths, delimiter_tokens(enc, "\n"))
    last = (ends >= 0).sum(1, keepdim=True) - 1
    q_pi, q_mu = score(pi, f.tokens, ends), score(mu if own_q_mu else pi, f.tokens, ends)
    q_mu = q_mu if own_q_mu else q_best_of_k(q_mu, 4)
    adv_mu = (q_mu.gather(1, last) - q_mu.gather(1, last - 1))[:, 0]
    assert len(adv_mu) > 5 and adv_mu.std() > 0.01
    assert torch.allclose(f.q_pi[:, -1], q_pi.gather(1, last)[:, 0], atol=1e-4)
    assert torch.allclose(f.score, q_pi.gather(1, last)[:, 0] + 0.7 * adv_mu, atol=1e-4)


@pytest.mark.parametrize("own_q_mu", [False, True])
def test_a_tree_scores_by_the_effective_reward(small, own_q_mu):
    """Each node Q^pi + alpha A^mu of its step; a step that changes no value has its parent's Q^pi."""
    pi, mu = (tiny(seed, std=0.2, vocab_size=small.env.enc.n_vocab, block_size=48, head="scalar")
              for seed in (1, 2))
    s = replace(small, verifier=pi, mu_verifier=mu if own_q_mu else None, alpha=0.7, K=4)
    with torch.no_grad():
        tree = Tree(s, small.problems, 30, 0, 0)
        new = tree.grow(tree.grow(torch.arange(5), 3), 1)

    def values(nodes):
        q, q_mu = (score(v, tree.tokens[nodes], tree.lengths[nodes, None] - 1)[:, 0] for v in (pi, mu))
        return q, q_mu if own_q_mu else q_best_of_k(q, 4)
    (q, q_mu), (before, q_mu_before) = values(new), values(tree.parent[new])
    assert len(new) > 3 and (tree.depth[new] == 2).all() and (q_mu - q_mu_before).std() > 0.01
    assert torch.allclose(tree.score[new], q + 0.7 * (q_mu - q_mu_before), atol=1e-4)
    assert torch.allclose(tree.still[new], before, atol=1e-4)


@pytest.mark.parametrize("method", ["mcts", "backtrack"])
def test_a_trees_tokens_are_all_that_was_sampled(small, monkeypatch, method):
    """Duplicates too."""
    module, spent = importlib.import_module("minipav.search.beam"), []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda *a, **k: spent.append(decode(*a, **k)) or spent[-1])
    [r] = METHODS[method].run(small, small.problems, [3], 0)
    assert r.tokens.sum() == sum(int(lengths.sum()) for _, lengths, *_ in spent)


def test_the_quota_holds_in_the_beam(small):
    """As long as no trace has ended, every prefix keeps a child, and every grandprefix a grandchild; without
    a quota some do not."""
    longer = replace(small, env=replace(small.env, task=Calculator(H=4, min_steps=4)), C=6)
    problems = longer.env.task.problems("test", 8, 0)
    longer.policy = WalkPolicy(longer.env, problems)

    def missed(quota, relatives):
        search_width(replace(longer, quota=quota, log=(log := [])), problems, 3, 0)
        out = 0
        for level in log[:3]:                                   # shorter than every answer
            for p in range(8):
                here = level["beam"].owner == p
                out += len(set(level[relatives][here].tolist()) - set(
                    level[relatives][here & level["kept"]].tolist()))
        return out

    assert missed("parent", "parent") == 0 < missed("none", "parent")
    assert missed("grandparent", "grandparent") == 0 < missed("none", "grandparent")


def test_log_odds_progress_by_hand():
    step = Step(torch.tensor([0.8]), None, torch.tensor([0.6]), None, None, 1, None, 2.0)
    assert SCORES["log_odds"].of(step) == pytest.approx(3 * np.log(4.0) - 2 * np.log(1.5), abs=1e-5)


def test_sub_trees_are_beams_of_width_one(small):
    """Each with samples of its own; the answer is that of the highest Q^pi; their tokens add up."""
    problems, s = small.problems, replace(small, score=SCORES["q_pi"])
    one, three = dvts(s, problems, [1, 3], 2)
    alone = search_width(s, problems, 1, 2)
    assert one.text == alone.text and torch.equal(one.tokens, alone.tokens) and torch.equal(one.q, alone.q)
    each = search_width(s, [p for p in problems for _ in range(3)], 1, 2)
    q = each.q.view(5, 3)
    assert torch.equal(three.q, q.max(1).values) and torch.equal(three.tokens, each.tokens.view(5, 3).sum(1))
    assert three.text == [each.text[3 * i + int(k)] for i, k in enumerate(q.argmax(1))]
    assert torch.equal(three.right, each.right.view(5, 3).gather(1, q.argmax(1, keepdim=True))[:, 0])
    assert len({each.text[i] for i in range(3)}) > 1 and (three.solved >= three.right).all()


def test_a_search_writes_no_more_than_a_sample(small):
    """A response of two steps has six tokens: with room for five, the answers are those of one step."""
    task = copy.copy(small.env.task)
    task.max_new_tokens = 5
    short = replace(small, env=replace(small.env, task=task))
    for method in ("beam", "backtrack", "mcts"):
        long, left = (METHODS[method].run(s, small.problems, [4], 0)[0].text for s in (small, short))
        assert max(len(task.steps(t)) for t in long) == 2 and max(len(task.steps(t)) for t in left) == 1


def test_a_batch_that_does_not_fit_is_halved(calculator, monkeypatch):
    """To the same results and the same log."""
    env, problems = calculator
    s = Search(env, WalkPolicy(env, problems), SCORES["exact"], log=[])
    want, sizes = search_width(s, problems, 2, 0), []

    def full(s, problems, *args):
        sizes.append(len(problems))
        if len(problems) > 3:
            s.log.append("half done")
            raise torch.OutOfMemoryError
        return search_batch(s, problems, *args)
    monkeypatch.setattr(sys.modules["minipav.search.beam"], "search_batch", full)
    again = replace(s, log=[])
    got = search_width(again, problems, 2, 0)
    assert sizes == [10, 5, 2, 2, 2, 2, 2] and "half done" not in again.log
    assert all(torch.equal(getattr(got, k), getattr(want, k)) for k in ("right", "solved", "tokens", "q"))

"""The equations: closed forms; Monte-Carlo values against dynamic programming."""
import numpy as np
import pytest
import torch
from conftest import Says, WalkPolicy, q_best_of_k_error

from minipav import advantage as adv
from minipav.paper.experiments import theorem_terms
from minipav.tasks.calculator import dp, parse, transitions
from minipav.tokenizer import END


def test_advantages_telescope_to_outcome_minus_the_prompts_value():
    """Trap 1: their sum along a trace is Rex - V(x), so summing them up gives the outcome reward back."""
    q = torch.rand(50, 9, dtype=torch.double)
    assert torch.allclose(adv.advantage(q).sum(-1), q[:, -1] - q[:, 0])
    best = adv.advantage(adv.q_best_of_k(q, 8)).sum(-1)
    assert torch.allclose(best, (1 - q[:, 0]) ** 8 - (1 - q[:, -1]) ** 8)


def test_best_of_k_in_closed_form():
    """Eq. 30 against the binomial sum, its ends, and Remark 3.1: about K Q where Q is small."""
    q, K = torch.linspace(0, 1, 11, dtype=torch.double), 5
    some = sum(torch.tensor([1., 5, 10, 10, 5, 1])[k] * q ** k * (1 - q) ** (K - k) for k in range(1, K + 1))
    assert torch.allclose(adv.q_best_of_k(q, K), some.double()) and torch.allclose(adv.q_best_of_k(q, 1), q)
    assert abs(adv.q_best_of_k(torch.tensor(1e-5), 16) / 1e-5 - 16) < 0.1


def test_standard_errors_are_those_of_repeated_draws():
    """Of a value, and of the two errors that these tests build on it."""
    g, n, p = torch.Generator().manual_seed(0), 20, torch.tensor([.3, .6])
    q = torch.binomial(torch.full((40_000, 2), float(n)), p.expand(40_000, 2), generator=g) / n
    n_ = torch.full((40_000, 2), n)
    assert (q.std(0) / adv.standard_error(q, n_).mean(0) - 1).abs().max() < 0.05
    small = torch.binomial(torch.full((40_000,), 200.), torch.tensor(.1).expand(40_000), generator=g) / 200
    n200 = torch.full_like(small, 200)
    assert abs(adv.q_best_of_k(small, 4).std() / q_best_of_k_error(small, n200, 4).mean() - 1) < 0.1
    assert adv.standard_error(torch.tensor(0.), torch.tensor(4)) > 0.1          # 0 of 4 is not certain


def test_the_terms_of_theorem_3_1():
    """Sanity identities: mu = pi makes the terms equal, a constant prover has none, D <= 1/4, |Al| <=
    sqrt(D(mu) D(pi)), one that disagrees with every step; and a table of two states by hand."""
    q_pi, q_mu = torch.rand(2, 200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    d_pi, al_pi = theorem_terms(q_pi, q_pi)
    d_mu, al_mu = theorem_terms(q_mu, q_pi)
    assert d_pi == pytest.approx(al_pi) and abs(al_mu) <= (d_mu * d_pi) ** 0.5 and 0 < d_mu <= 0.25
    assert all(abs(t) < 1e-15 for t in theorem_terms(torch.full_like(q_pi, 0.7), q_pi))
    d_neg, al_neg = theorem_terms(1 - q_pi, q_pi)
    assert d_neg == pytest.approx(d_pi) and al_neg == pytest.approx(-d_pi)
    by_hand = theorem_terms(torch.tensor([[.1, .5], [.4, .4]]), torch.tensor([[.2, .4], [.0, .6]]))
    assert by_hand == pytest.approx((0.02, 0.01))               # .04 and 0, .02 and 0, each halved


def test_first_pit():
    nan = float("nan")
    q = torch.tensor([[.5, .4, .0, .0], [.1, .0, .0, .0], [.1, .5, .3, .0], [.5, .0, .2, .0],
                      [.5, .0, .0, nan], [.5, .4, nan, nan]])
    assert adv.first_pit(q, torch.zeros(6), 0.3).tolist() == [2, -1, 3, 1, 1, -1]
    assert adv.first_pit(q, torch.ones(6), 0.3).tolist() == [-1] * 6            # a right trace has no pit


def test_monte_carlo_values_are_the_exact_ones(calculator):
    """Seeds, completions and labels of the uniform walk against dynamic programming: the exact Q lies within
    4 standard errors of the estimate at each of some fifty step ends."""
    env, problems = calculator[0], calculator[1][:4]
    walk = WalkPolicy(env, problems)
    seeds = adv.seed_rollouts(walk, env, problems, 3, seed=0)
    target = np.array([p.target for p in problems])
    _, V = dp(transitions(problems), target, env.task.H)
    mc = adv.monte_carlo(walk, env, problems, seeds, seeds.ends >= 0, 40, seed=1)
    checked = 0
    for row in range(len(seeds)):
        i = int(seeds.problem[row])
        response = env.enc.decode(seeds.tokens[row, seeds.ends[row, 0] + 1:seeds.lengths[row]].tolist())
        values = [problems[i].start, *(parse(ln)[2] for ln in env.task.steps(response))]
        assert env.task.judge(problems[i], response) != "illegal"
        assert seeds.reward[row] == (values[-1] == target[i])
        exact = torch.tensor([V[i, h, v] for h, v in enumerate(values)])
        q, n, last = mc.q[row, :len(values)], mc.n[row, :len(values)], len(values) - 1
        assert q[-1] == seeds.reward[row] and mc.exact[row].nonzero().tolist() == [[last]]
        assert (mc.n[row, :last] == 40).all() and mc.labelled[row].sum() == len(values)
        assert ((q - exact)[:-1].abs() <= 4 * adv.standard_error(q, n)[:-1]).all()
        checked += len(values) - 1
    assert checked > 30
    one = adv.seed_rollouts(walk, env, problems, 300, seed=2)   # the free one-sample labels are unbiased
    free = one.q[:, 0].view(4, 300).mean(1)
    exact = torch.tensor([V[i, 0, p.start] for i, p in enumerate(problems)])
    assert ((free - exact).abs() <= 4 * (exact * (1 - exact) / 300).sqrt()).all()


def test_only_what_is_asked_for_is_estimated(calculator):
    """A label that nobody paid for, or one at a step end that is not there, is an estimate of nothing."""
    env, problems = calculator
    walk = WalkPolicy(env, problems)
    seeds = adv.seed_rollouts(walk, env, problems, 1, seed=0)
    wanted = torch.arange(seeds.ends.shape[1]).expand_as(seeds.ends) == 1
    mc = adv.monte_carlo(walk, env, problems, seeds, wanted, 2, seed=1)
    end = torch.arange(seeds.ends.shape[1]) == seeds.last[:, None]
    assert torch.equal(mc.labelled, wanted & (seeds.ends >= 0) | end) and torch.equal(mc.n > 0, mc.labelled)
    nothing = adv.monte_carlo(walk, env, problems, seeds, wanted & False, 2, seed=1)
    assert torch.equal(nothing.labelled, end) and not nothing.cost.any()


def test_completions_are_labelled_from_their_own_step_end_on(calculator):
    """What mu did not choose must not be labelled with mu's outcome."""
    env, problems = calculator
    walk = WalkPolicy(env, problems)
    seeds = adv.seed_rollouts(walk, env, problems, 2, seed=0)
    rows, ends = torch.arange(5), torch.tensor([0, 1, 1, 0, 1])
    done = adv.rollout_from(walk, env, problems, seeds, rows, ends, 3, seed=1)
    for k in range(15):
        row, end = rows[k // 3], ends[k // 3]
        cut = seeds.ends[row, end] + 1
        assert torch.equal(done.tokens[k, :cut], seeds.tokens[row, :cut])
        assert done.cost[k] == done.lengths[k] - cut
        last, labelled = int(done.last[k]), done.labelled[k]
        assert not labelled[:end].any() and labelled[end:last + 1].all() and not labelled[last + 1:].any()
        assert (done.n[k][labelled] == 1).all() and done.exact[k].nonzero().tolist() == [[last]]
        assert (done.q[k][labelled] == done.reward[k]).all()


def test_tokens_that_were_sampled(calculator):
    """Two steps of 3 tokens: a rollout costs 6, a completion of its first step 3, and four completions of
    both of its prefixes 4 (6 + 3): no completion starts at the end."""
    env, problems = calculator[0], calculator[1][:1]
    says = Says(env, problems, "+1 = ", "11", "\n", "+2 = ", "13", END)
    seeds = adv.seed_rollouts(says, env, problems, 1, seed=0)
    one = adv.rollout_from(says, env, problems, seeds, torch.tensor([0]), torch.tensor([1]), 1, seed=0)
    mc = adv.monte_carlo(says, env, problems, seeds, seeds.ends >= 0, 4, seed=0)
    assert seeds.ends[0].diff().tolist() == [3, 3]
    assert [int(t.cost) for t in (seeds, one, mc)] == [6, 3, 36]


def test_a_completion_that_makes_a_response_too_long_is_wrong(calculator, monkeypatch):
    """Of two completions, both right, the one that ends behind the last token that a response may have is
    cut, and wrong: no sample could be so long. Its tokens are paid for."""
    env, problems = calculator[0], calculator[1][:1]
    says = Says(env, problems, "+1 = ", "11", "\n", "+2 = ", "13", END)
    monkeypatch.setattr(env.task, "outcome", lambda problem, text: text.endswith(END))
    seeds, zero = adv.seed_rollouts(says, env, problems, 1, seed=0), torch.tensor([0])
    for room, want in ((6, 1), (5, 0)):
        monkeypatch.setattr(env.task, "max_new_tokens", room)
        one = adv.rollout_from(says, env, problems, seeds, zero, zero + 1, 1, seed=0)
        assert one.reward == want and one.lengths == seeds.ends[0, 0] + 1 + room and one.cost == 3

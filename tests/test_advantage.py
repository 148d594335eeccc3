"""The estimator: closed forms, the paper's worked example, and Monte-Carlo values against dynamic programming."""
import numpy as np
import torch
from conftest import WalkPolicy

from minipav import advantage as adv
from minipav.tasks.calculator import dp, parse, transitions
from minipav.tokenizer import encode_rows, join


def test_the_papers_worked_example():
    """Fig 2a: by Q the beam of two keeps .70 and .55, by A it keeps +.20 and +.10; Q + alpha A flips above alpha = .2."""
    q, v = torch.tensor([[.55, .50, .70], [.50, .35, .25]]), torch.tensor([.60, .30])
    a = adv.advantage(torch.stack([v[:, None].expand(2, 3), q], -1))[..., 0]
    assert torch.allclose(a, torch.tensor([[-.05, -.10, .10], [.20, .05, -.05]]))

    def beam(score):
        return set(score.flatten().topk(2).indices.tolist())
    assert beam(q) == {0, 2} and beam(a) == {2, 3}
    assert beam(adv.effective_reward(q, a, 0.19)) == {0, 2} and beam(adv.effective_reward(q, a, 0.21)) == {2, 3}


def test_advantages_telescope_to_outcome_minus_the_prompts_value():
    """Trap 1: their sum along a trace is Rex - V(x), so summing them up gives the outcome reward back."""
    q = torch.rand(50, 9, dtype=torch.double)
    assert torch.allclose(adv.advantage(q).sum(-1), q[:, -1] - q[:, 0])
    assert torch.allclose(adv.advantage(adv.q_best_of_k(q, 8)).sum(-1), (1 - q[:, 0]) ** 8 - (1 - q[:, -1]) ** 8)


def test_best_of_k_in_closed_form():
    """Eq. 30 against the binomial sum, its ends, and Remark 3.1: about K Q where Q is small."""
    q, K = torch.linspace(0, 1, 11, dtype=torch.double), 5
    some = sum(torch.tensor([1., 5, 10, 10, 5, 1])[k] * q ** k * (1 - q) ** (K - k) for k in range(1, K + 1))
    assert torch.allclose(adv.q_best_of_k(q, K), some.double()) and torch.allclose(adv.q_best_of_k(q, 1), q)
    assert abs(adv.q_best_of_k(torch.tensor(1e-5), 16) / 1e-5 - 16) < 0.1


def test_standard_errors_are_those_of_repeated_draws():
    g, n, p = torch.Generator().manual_seed(0), 20, torch.tensor([.3, .6])
    q = torch.binomial(torch.full((40_000, 2), float(n)), p.expand(40_000, 2), generator=g) / n
    n_ = torch.full((40_000, 2), n)
    assert (q.std(0) / adv.standard_error(q, n_).mean(0) - 1).abs().max() < 0.05
    assert abs(adv.advantage(q).std() / adv.advantage_error(q, n_).mean() - 1) < 0.05
    small = torch.binomial(torch.full((40_000,), 200.), torch.tensor(.1).expand(40_000), generator=g) / 200
    n200 = torch.full_like(small, 200)
    assert abs(adv.q_best_of_k(small, 4).std() / adv.q_best_of_k_error(small, n200, 4).mean() - 1) < 0.1
    assert adv.standard_error(torch.tensor(0.), torch.tensor(4)) > 0.1           # 0 of 4 is not certain


def test_the_terms_of_theorem_3_1():
    """Sanity identities: mu = pi makes the terms equal, a constant prover has none, |Al| <= sqrt(D(mu) D(pi)), D <= 1/4."""
    g = torch.Generator().manual_seed(0)
    pi = torch.rand(200, 4, generator=g, dtype=torch.double).softmax(-1)
    q_pi, q_mu = torch.rand(2, 200, 4, generator=g, dtype=torch.double)
    d_pi, al_pi, _ = adv.theorem_terms(q_pi, q_pi, pi)
    d_mu, al_mu, _ = adv.theorem_terms(q_mu, q_pi, pi)
    assert torch.allclose(d_pi, al_pi) and al_mu.abs() <= (d_mu * d_pi).sqrt() and 0 < d_mu <= 0.25
    assert all(abs(t) < 1e-15 for t in adv.theorem_terms(torch.full_like(q_pi, 0.7), q_pi, pi)[:2])
    d_neg, al_neg, _ = adv.theorem_terms(1 - q_pi, q_pi, pi)
    assert torch.allclose(d_neg, d_pi) and torch.allclose(al_neg, -d_pi)         # a prover that disagrees with every step


def test_first_pit():
    nan = float("nan")
    q = torch.tensor([[.5, .4, .0, .0], [.1, .0, .0, .0], [.1, .5, .3, .0], [.5, .0, .2, .0], [.5, .0, .0, nan],
                      [.5, .4, nan, nan]])
    assert adv.first_pit(q, torch.zeros(6), 0.3).tolist() == [2, -1, 3, 1, 1, -1]
    assert adv.first_pit(q, torch.ones(6), 0.3).tolist() == [-1] * 6             # a right trace has no pit


def test_step_ends_and_join():
    nl, end = 1, 2
    tokens = torch.tensor([[9, nl, 5, 5, nl, 6, end, 0], [9, nl, 5, end, 0, 0, 0, 0], [9, 8, nl, 7, 7, 7, 7, 7]])
    ends = adv.step_ends(tokens, torch.tensor([2, 2, 3]), torch.tensor([7, 4, 8]), [nl, end])
    assert ends.tolist() == [[1, 4, 6], [1, 3, -1], [2, -1, -1]]                 # a prompt's own newlines are no steps
    out, lengths = join(tokens[:, :2], torch.tensor([2, 1, 2]), tokens[:, 2:5], torch.tensor([3, 2, 0]), 0)
    assert out.tolist() == [[9, nl, 5, 5, nl], [9, 5, end, 0, 0], [9, 8, 0, 0, 0]] and lengths.tolist() == [5, 3, 2]


def test_monte_carlo_values_are_the_exact_ones(calculator):
    """Seeds, completions and labels of the uniform walk against dynamic programming, place by place: the exact Q lies
    within 4 standard errors of the estimate at each of some fifty places."""
    task, enc, problems = calculator
    problems = problems[:4]
    walk = WalkPolicy(task, enc, problems)
    seeds = adv.seed_rollouts(walk, task, enc, problems, 3, seed=0)
    nxt, target = transitions(problems), np.array([p.target for p in problems])
    _, V = dp(nxt, target, task.H)
    mc = adv.monte_carlo(walk, task, enc, problems, seeds, seeds.ends >= 0, 40, seed=1)
    checked = 0
    for row in range(len(seeds)):
        i = int(seeds.problem[row])
        response = enc.decode(seeds.tokens[row, seeds.ends[row, 0] + 1:seeds.lengths[row]].tolist())
        values = [problems[i].start, *(parse(ln)[2] for ln in task.steps(response))]
        assert task.judge(problems[i], response) != "illegal" and seeds.reward[row] == (values[-1] == target[i])
        exact = torch.tensor([V[i, h, v] for h, v in enumerate(values)])
        q, n = mc.q[row, :len(values)], mc.n[row, :len(values)]
        assert q[-1] == seeds.reward[row] and (mc.n[row, len(values):] == 0).all()
        assert ((q - exact)[:-1].abs() <= 4 * adv.standard_error(q, n)[:-1]).all()
        assert ((adv.advantage(q) - adv.advantage(exact))[:-1].abs() <= 4 * adv.advantage_error(q, n)[:-1]).all()
        checked += len(values) - 1
    assert checked > 30
    one = adv.seed_rollouts(walk, task, enc, problems, 300, seed=2)              # the free one-sample labels are unbiased
    free = one.q[:, 0].view(4, 300).mean(1)
    exact = torch.tensor([V[i, 0, p.start] for i, p in enumerate(problems)])
    assert ((free - exact).abs() <= 4 * (exact * (1 - exact) / 300).sqrt()).all()


def test_completions_are_labelled_from_their_own_place_on(calculator):
    """What mu did not choose must not be labelled with mu's outcome."""
    task, enc, problems = calculator
    walk = WalkPolicy(task, enc, problems)
    seeds = adv.seed_rollouts(walk, task, enc, problems, 2, seed=0)
    rows, places = torch.arange(5), torch.tensor([0, 1, 1, 0, 1])
    done = adv.complete(walk, task, enc, problems, seeds, rows, places, 3, seed=1)
    for k in range(15):
        row, place = rows[k // 3], places[k // 3]
        cut = seeds.ends[row, place] + 1
        assert torch.equal(done.tokens[k, :cut], seeds.tokens[row, :cut])
        n = done.n[k, :int((done.ends[k] >= 0).sum())]
        assert (n[:place] == 0).all() and (n[place:-1] == 1).all() and n[-1] == adv.KNOWN
        assert (done.q[k][done.n[k] > 0] == done.reward[k]).all()


def test_wrong_steps_are_labelled_zero_and_nothing_before_them_is(calculator):
    task, enc, problems = calculator
    rng = np.random.default_rng(0)
    demos = task.demos(problems, 1.0, rng)
    prompts = [task.prompt(p) for p in problems]
    rows, lengths = encode_rows(enc, [p + d for p, d in zip(prompts, demos)])
    traces = adv.label_with_outcome(task, enc, problems, torch.arange(10), rows, lengths, encode_rows(enc, prompts)[1])
    assert (traces.reward == 1).all() and (traces.q[traces.n > 0] == 1).all()
    wrong = adv.wrong_steps(task, enc, problems, traces, rng)
    assert (wrong.reward == 0).all() and (wrong.q == 0).all() and (wrong.n[:, 0] == 0).all()
    assert (wrong.n.gather(1, (wrong.ends >= 0).sum(1, keepdim=True) - 1) == adv.KNOWN).all()
    for b, first in enumerate((wrong.n > 0).int().argmax(1)):
        before = wrong.ends[b, first - 1] + 1
        assert torch.equal(wrong.tokens[b, :before], traces.tokens[b, :before])

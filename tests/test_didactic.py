"""The didactic example and the theory: dynamic programming == enumeration, exact identities."""
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_main

from minipav.files import read_json
from minipav.paper import didactic, theory
from minipav.paper.planted import EOS, Made, Planted, V


@pytest.mark.parametrize("gamma, value",
                         [(1, 1e-5), (5, .0054), (10, .0455), (15, .118), (30, .363), (100, .815)])
def test_exact_values_of_the_provers(gamma, value):
    task = Planted()
    exact = float(task.values(task.prover(gamma))[1][0, 0])
    assert exact == pytest.approx(value, rel=0.03, abs=4e-6)                    # two digits are given


@pytest.mark.parametrize("gaps", [False, True])
def test_dynamic_programming_equals_enumeration(gaps):
    """All 15^3 responses of a shorter instance, with a sub-sequence that overlaps itself."""
    task = Planted((2, 2), length=3, gaps=gaps)
    mu = task.prover(4.0)
    Q, value = task.values(mu)
    total, after = 0.0, torch.zeros(V, dtype=torch.double)
    for y in itertools.product(range(V), repeat=3):
        text = y[:y.index(EOS)] if EOS in y else y
        hit = sum(a == 2 for a in text) >= 2 if gaps else any(text[i:i + 2] == (2, 2) for i in range(2))
        k, chance = 0, 1.0
        for a in y:
            chance *= float(mu[k, a])
            k = int(task.next[k, a])
        assert (k == task.m) == hit
        total += chance * hit
        after[y[0]] += chance * hit
    assert float(value[0, 0]) == pytest.approx(total, abs=1e-12)
    assert torch.allclose(Q[0, 0] * mu[0], after, atol=1e-12)


def test_rows_of_fig_9():
    task = Planted()
    rows = torch.tensor([[3, 6, 0, 3, 5, 14, 13, 3, 2, 11], [12, 8, 3, 6, 14, 3, 6, 0, 3, 5],
                         [1, 3, 6, 0, 3, 6, 0, 3, 5, 1]])
    assert task.reward(rows).tolist() == [1, 0, 1]
    assert (task.states(rows)[:, -1] == task.m).tolist() == [True, False, True]


def test_the_advantage_of_the_prover_has_mean_zero_under_it():
    task = Planted()
    A = task.advantage(10)
    assert A.shape == (10, task.m + 2, V) and (task.prover(10).float() * A).sum(-1).abs().max() < 1e-6


def test_made_is_autoregressive_and_samples_what_it_says():
    """Changing token t leaves the outputs up to t unchanged, and changes some of the later ones; sampling
    token by token is the inverse CDF of the same probabilities; members do not touch each other."""
    net = Made([0, 1], 10)
    for w in net.w:
        w.data *= 2
    x = torch.randint(0, V, (2, 3, 10))
    for t in range(10):
        y = x.clone()
        y[:, :, t] = (y[:, :, t] + 1) % V
        same = (net(x) == net(y)).all(-1).all(1).all(0)
        assert same[:t + 1].all() and not same[t + 1:].any()
    u = torch.rand(2, 50, 10)
    s = net.sample(u)
    cdf = net(s).exp().cumsum(-1)
    at = cdf.gather(-1, s[..., None])[..., 0]
    before = torch.where(s > 0, cdf.gather(-1, (s - 1).clamp(min=0)[..., None])[..., 0], torch.zeros(()))
    assert ((u <= at + 1e-5) & (u >= before - 1e-5)).all()
    assert torch.equal(net.sample(u, s[:, :, :4].unbind(-1)), s)
    assert torch.equal(net.sample(u, (s[:, :, :4] * 0).unbind(-1))[:, :, :4], s[:, :, :4] * 0)
    alone = Made([1], 10)
    for w in alone.w:
        w.data *= 2
    assert torch.allclose(alone(x[1:]), net(x)[1:], atol=1e-5)


def test_monte_carlo_q_of_the_policy_and_its_telescoping_baseline():
    """A policy that ignores its input has values by dynamic programming: Monte-Carlo is within 5 errors."""
    task, net = Planted((3,), length=4), Made([0], 4)
    for w in net.w[:3]:
        w.data *= 0
    p = net(torch.zeros(1, 1, 4, dtype=torch.long)).exp()[0, 0, 0].detach().double()
    Q, value = task.values(p.expand(task.m + 2, V))
    x = torch.tensor([[[1, 2, 3, 5], [1, EOS, 3, 3]]])
    q, v = didactic.mc_q(net, task, x, 4000, torch.Generator().manual_seed(0))
    k = task.states(x)[0]
    exact = torch.stack([Q[t, k[:, t], x[0, :, t]] for t in range(4)], -1)
    assert torch.allclose(q[0].double(), exact, atol=5 * 0.5 / 4000 ** 0.5)
    assert torch.equal(q[:, :, :-1], v[:, :, 1:])
    assert abs(float(v[0, 0, 0]) - float(value[0, 0])) < 5 * 0.5 / 4000 ** 0.5


def test_the_likelihood_of_a_response_stops_at_its_end():
    x = torch.tensor([[3, EOS, 2, EOS, 1], [3, 2, 1, 0, 4]])
    logp = torch.randn(2, 5, V).log_softmax(-1)
    got, alive = didactic.log_likelihood(logp, x)
    assert alive.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert torch.equal(got[1], logp[1, range(5), x[1]]) and got[0].tolist()[2:] == [0, 0, 0]


def test_training_learns_an_easy_instance_and_members_do_not_depend_on_the_ensemble():
    task, pair = Planted((3,), length=4), [(1, 5, True), (0, 10, False)]
    accuracy = didactic.train(task, pair, [0, 1], 100)
    assert accuracy.shape == (2, 2, 11) and (accuracy[:, :, -1] > accuracy[:, :, 0]).all()
    alone = didactic.train(task, pair[:1], [0, 1], 100)
    assert torch.allclose(alone, accuracy[:1], atol=0.02)


def test_the_weight_of_a_step_is_that_of_eq_5(monkeypatch):
    """Outcome 1 plus alpha A^mu of the step, with a baseline less the mean of that over pi's actions; after
    the first step of this response nothing more can be won."""
    task, x, weights = Planted((3,), length=2), torch.tensor([3, EOS]), []
    monkeypatch.setattr(didactic, "base_policies", lambda task, seeds, sft: Made(seeds, task.L))
    monkeypatch.setattr(Made, "sample", lambda self, u, *_: x.expand(*u.shape[:2], 2))
    monkeypatch.setattr(didactic, "log_likelihood", lambda logp, x: (logp[..., 0] * 0 + 1, None))
    monkeypatch.setattr(didactic, "update", lambda adam, loss: weights.append(-loss.item()))
    for condition in ((2, 10, False), (2, 10, True), (0, 10, False)):
        didactic.train(task, [condition], [0], 1)
    A, p = task.advantage(10)[0, 0], Made([0], 2)(x[None, None])[0, 0, 0].detach().exp()
    want = torch.tensor([2 + 2 * A[3], 2 * (A[3] - p @ A), 2])
    assert torch.allclose(torch.tensor(weights), want, atol=1e-5)


def test_iterations_to_90():
    assert didactic.to_90(torch.tensor([[.1, .95, .8], [.1, .2, .3]])).tolist() == [10, float("inf")]


def test_the_map_counts_the_seeds_and_compares_medians(monkeypatch):
    """gamma 10 is there after 10, 20 and 20 iterations, only Q in one seed of three, after 30."""
    steps, when = torch.arange(5) * 10, torch.tensor([[10, 20, 20], [30, 99, 99], [99, 99, 99]])
    monkeypatch.setattr(didactic, "train", lambda *a, **kw: (steps >= when[:len(a[1]), :, None]).float())
    summary, rows = {k: {} for k in ("start", "horizon", "iterations_to_90", "ratio_of_medians")}, []
    names = dict.fromkeys(("gamma 10, none", "only Q, none", "gamma 20, none"))
    didactic.measure(summary, rows, "a", None, names, [0, 1, 2], 40)
    assert rows == [("a", "gamma 10, none", 0, 3, 3, 20, 10, 20), ("a", "only Q, none", 0, 1, 3, "", 30, 30),
                    ("a", "gamma 20, none", 0, 0, 3, "", "", "")]
    assert summary["iterations_to_90"]["a"]["only Q, none"] == [30, None, None]
    assert summary["ratio_of_medians"] == {"a; gamma 10, none": {"ratio": 2.0, "at_least": True}}
    for first, second in (("only Q", "gamma 10"), ("gamma 10", "only Q")):
        didactic.measure(summary, rows, "b", None, dict.fromkeys((first, second)), [0, 1, 2], 40)
        assert summary["ratio_of_medians"]["b; gamma 10"] == (
            {"ratio": 0.0, "at_least": False} if first == "only Q" else {"ratio": 2.0, "at_least": True})


# ---- theory -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trees():
    """50 trees: leaf, pi, mu, rho."""
    return *theory.random_trees(50), np.random.default_rng(1).dirichlet(np.ones(theory.S))


def test_values_equal_a_sum_over_leaves(trees):
    leaf, pi, *_ = trees
    root = np.zeros(len(leaf))
    for path in itertools.product(range(3), repeat=3):
        s, chance = 0, 1.0
        for a in path:
            chance, s = chance * pi[:, s, a], s * 3 + a + 1
        root += chance * leaf[:, s - theory.S]
    assert np.allclose(theory.value(pi, theory.q_values(leaf, pi))[:, 0], root, atol=1e-12)


def test_performance_difference_lemma(trees):
    """E_rho [V^mu - V^pi] = sum_s d^mu_rho(s) E_{a~mu} A^pi(s, a)."""
    leaf, pi, mu, rho = trees
    Q = theory.q_values(leaf, pi)
    left = (rho * (theory.value(mu, theory.q_values(leaf, mu)) - theory.value(pi, Q))).sum(-1)
    right = (theory.visits(mu, rho) * theory.value(mu, Q - theory.value(pi, Q)[..., None])).sum(-1)
    assert np.allclose(left, right, atol=1e-10)


def test_identities_of_the_two_terms(trees):
    """Al(pi) = D(pi); |Al(mu)| <= sqrt(D(mu) D(pi)); a constant prover has neither; D <= 1/4."""
    leaf, pi, mu, rho = trees
    Q_pi, Q_mu = theory.q_values(leaf, pi), theory.q_values(leaf, mu)
    (d, al), (d_pi, al_pi) = theory.terms(pi, Q_pi, Q_mu), theory.terms(pi, Q_pi, Q_pi)
    assert np.allclose(d_pi, al_pi) and (np.abs(al) <= np.sqrt(d * d_pi) + 1e-12).all() and d.max() <= 0.25
    d, al, d_pi = ((rho * x).sum(-1) for x in (d, al, d_pi))
    assert (np.abs(al) <= np.sqrt(d * d_pi) + 1e-12).all() and d.max() <= 0.25
    assert np.allclose(theory.terms(pi, Q_pi, np.full_like(Q_mu, 0.3)), 0)


def test_the_npg_step_is_the_natural_gradient(trees):
    """The step of Lemma F.2 against pi_t + gamma F^+ grad of Eq. 5, by the Fisher matrix at one state."""
    leaf, pi, mu, _ = trees
    p, q, adv = pi[0, 0], theory.q_values(leaf, pi)[0, 0], theory.q_values(leaf, mu)[0, 0]
    r = q + adv
    fisher = np.diag(p) - np.outer(p, p)
    direction = np.linalg.pinv(fisher) @ (p * (r - p @ r))
    step = theory.softmax(np.log(p) + 0.1 * direction)
    assert np.allclose(step, theory.npg_step(p, q, adv, 0.1), atol=1e-10)


def test_theorem_3_1_on_random_provers_and_where_no_constant_holds():
    """1,000 random trees and provers: the improvement is never below the bound (c = 1). With best-of-K where
    Q = O(1/K), the bound grows as K^2 and the improvement only as K: the c that would hold falls as 1/K. What
    holds always is the first order."""
    bound, gain, first_order = theory.theorem()
    assert (bound > 0).all() and (gain >= 1.0 * bound).all()
    assert np.abs(gain - first_order).max() < 0.02 * first_order.max()
    K, d, al, gain = (np.array(x) for x in zip(*theory.remark()))
    slope = [np.polyfit(np.log(K[3:]), np.log(y[3:]), 1)[0] for y in (d, al, gain)]
    assert abs(slope[0] - 2) < 0.1 and abs(slope[1] - 1) < 0.1 and abs(slope[2] - 1) < 0.1
    assert (np.diff(gain / (d + al)) < 0).all() and gain[-1] / (d + al)[-1] < 0.05


def test_a_weak_prover_helps_a_strong_base():
    eta, _, holds, with_mu, with_pi, without = theory.weak_prover(theory.ROOT)
    assert (eta > 0.2).mean() > 0.9 and 0.4 < holds.mean() < 0.6
    assert (with_mu > without).mean() > 0.7 and (with_pi >= without).all()
    assert (with_mu[holds] / eta[holds] ** 2).min() < 0         # no constant there
    eta, apart, holds, with_mu, *_ = theory.weak_prover(theory.UNIFORM)
    assert (apart <= eta).all()
    assert (with_mu[holds] / eta[holds] ** 2).min() > 0.01


def test_the_numbers_of_the_theory_are_the_published_ones(tmp_path):
    run_main(theory, "--out", tmp_path)
    found, published = (pd.json_normalize(read_json(folder / "theory.json")).iloc[0]
                        for folder in (tmp_path, ROOT / "results" / "didactic"))
    assert found.index.equals(published.index)
    assert all(np.allclose(a, b, rtol=1e-4) for a, b in zip(found, published))

"""Theorem 3.1, Remark 3.1 and Proposition F.1 on small tree MDPs, where every quantity is exact.

    python -m minipav.paper.theory       # seconds; theory.json, theorem, remark, weak_prover in runs/didactic

M trees at once: three levels of states with three actions, S = 13 states numbered level by level, a random
chance of success at each of 27 leaves. Policies pi, mu and values Q are tables (M, S, 3); rho (S,): start.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from minipav.advantage import q_best_of_k
from minipav.files import write_json
from minipav.paper.figures import draw
from minipav.utils import main_guard

S, LEVELS = 13, [slice(0, 1), slice(1, 4), slice(4, 13)]
UNIFORM, ROOT = np.full(S, 1 / S), np.eye(S)[0]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def random_trees(M):
    """Success at the leaves (M, 27), few of them good; random softmax policies, pi and a more peaked mu."""
    rng = np.random.default_rng(0)
    leaf = rng.random((M, 27)) ** 2
    pi, mu = (softmax(peaked * rng.standard_normal((M, S, 3))) for peaked in (1, 2))
    return leaf, pi, mu


def value(pi, Q):
    return (pi * Q).sum(-1)


def q_values(leaf, pi):
    """Exact Q^pi, by one sweep from the leaves to the root (Eq. 1)."""
    Q, below = np.zeros_like(pi), leaf
    for level in reversed(LEVELS):
        Q[:, level] = below.reshape(len(pi), -1, 3)
        below = value(pi[:, level], Q[:, level])
    return Q


def visits(pi, rho):
    """d^pi_rho (M, S): how often each state is visited from rho; sums to more than 1."""
    d = np.tile(rho, (len(pi), 1))
    for level, below in zip(LEVELS, LEVELS[1:]):
        d[:, below] += (d[:, level, None] * pi[:, level]).reshape(len(pi), -1)
    return d


def terms(pi, Q_pi, Q_mu):
    """Theorem 3.1 at each state (M, S): distinguishability Var_pi A^mu, alignment E_pi[A^mu A^pi]."""
    A_pi, A_mu = (Q - value(pi, Q)[..., None] for Q in (Q_pi, Q_mu))    # centred under pi: V^mu drops out
    return value(pi, A_mu ** 2), value(pi, A_mu * A_pi)


def npg_step(pi, Q_pi, A_mu, gamma):
    """Lemma F.2: natural policy gradient of Eq. 4, alpha = 1: pi(a|s) exp(gamma (Q^pi + A^mu)) / Z(s)."""
    return softmax(np.log(pi) + gamma * (Q_pi + A_mu))


def improvement(leaf, pi, A_mu, rho, gamma):
    """E_rho[V^{pi'} - V^pi] (M,) of one exact step, measured. V^mu(s) cancels: Q^mu may stand for A^mu."""
    Q_pi = q_values(leaf, pi)
    new = npg_step(pi, Q_pi, A_mu, gamma)
    return (rho * (value(new, q_values(leaf, new)) - value(pi, Q_pi))).sum(-1)


def theorem(M=1000, gamma=0.01):
    """Theorem 3.1, each (M,): its bound D(mu) + Al(mu), the measured improvement over gamma, and its exact
    first order, which has D(pi) for D(mu): sum_s d^pi_rho(s) E_pi[A^pi (A^pi + A^mu)]."""
    leaf, pi, mu = random_trees(M)
    Q_pi, Q_mu = q_values(leaf, pi), q_values(leaf, mu)
    (D, Al), (D_pi, _) = terms(pi, Q_pi, Q_mu), terms(pi, Q_pi, Q_pi)
    gain = improvement(leaf, pi, Q_mu - value(mu, Q_mu)[..., None], UNIFORM, gamma) / gamma
    bound = (UNIFORM * D).sum(-1) + (UNIFORM * Al).sum(-1)
    return bound, gain, (visits(pi, UNIFORM) * (D_pi + Al)).sum(-1)


def remark(M=200, gamma=0.001, Ks=(2, 4, 8, 16, 32, 64, 128)):
    """Remark 3.1: where Q^pi = O(1/K), best-of-K has K^2 times the distinguishability of pi. -> rows of K and
    D(BoK), Al(BoK), measured gain / gamma, each over D(pi): means over M trees with leaves scaled to 1/K."""
    rows, (leaf, pi, _) = [], random_trees(M)
    for K in Ks:
        Q = q_values(leaf / K, pi)
        Q_mu = q_best_of_k(Q, K)
        D, Al, D_pi = ((UNIFORM * x).sum(-1) for x in (*terms(pi, Q, Q_mu), terms(pi, Q, Q)[0]))
        gain = improvement(leaf / K, pi, Q_mu, UNIFORM, gamma) / gamma
        rows.append((K, *(float((x / D_pi).mean()) for x in (D, Al, gain))))
    return rows


def weak_prover(rho, M=1000, gamma=0.1, steps=50):
    """Prop. F.1, a weak prover of a strong base: the base is mu after natural gradient on its own Q. -> (M,):
    eta = E_rho |V^mu - V^pi|; E_rho E_pi |Q^pi - Q^mu|; whether E_rho Var A^mu > E_rho Var A^pi; over gamma,
    the gain of one step with A^mu, with A^pi (a longer step), with neither."""
    leaf, mu, _ = random_trees(M)
    pi = mu
    for _ in range(steps):
        pi = npg_step(pi, q_values(leaf, pi), 0.0, 2 * gamma)
    Q_pi, Q_mu = q_values(leaf, pi), q_values(leaf, mu)
    eta = (rho * abs(value(mu, Q_mu) - value(pi, Q_pi))).sum(-1)
    apart = (rho * value(pi, abs(Q_pi - Q_mu))).sum(-1)
    D, D_pi = ((rho * terms(pi, Q_pi, Q)[0]).sum(-1) for Q in (Q_mu, Q_pi))
    return eta, apart, D > D_pi, *(improvement(leaf, pi, A, rho, gamma) / gamma for A in (Q_mu, Q_pi, 0.0))


def dots(x, y):
    return {"a tree": (x[:300], y[:300], None, None)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/didactic"))
    out = parser.parse_args().out

    bound, gain, first_order = theorem()
    helps, y = bound > 0, "measured gain / gamma"
    ratio = (gain / bound)[helps]
    title = "Theorem 3.1 on 1,000 random trees: improvement of one natural gradient step, over gamma"
    draw(out / "theorem", title, [
        ("the theorem's two terms", "D(mu) + Al(mu)", y, dots(bound, gain)),
        ("the exact first order", "sum d E[A_pi (A_pi + A_mu)]", y, dots(first_order, gain))])
    numbers = {
        "trees": len(bound), "bound_positive_share": helps.mean(), "c": ratio.min(),
        "median_gain_over_bound": np.median(ratio),
        "gain_negative_where_bound_positive": (gain[helps] < 0).mean(),
        "correlation_gain_bound": np.corrcoef(gain, bound)[0, 1],
        "largest_error_of_the_first_order": np.abs(gain - first_order).max()}

    K, D, Al, gain = np.array(remark()).T
    draw(out / "remark", "Remark 3.1: best-of-K where Q = O(1/K)", [
        ("means over 200 trees", "K", f"{what} over D(pi)", {k: (K, y, None, None) for k, y in lines.items()})
        for what, lines in (("distinguishability", {"D(BoK)": D, "K^2 / 4": K ** 2 / 4}),
                            ("alignment and gain", {"Al(BoK)": Al, "measured gain / gamma": gain, "K": K}))])
    for name, y in (("distinguishability", D), ("alignment", Al), ("gain", gain)):
        numbers[f"remark_exponent_{name}"] = np.polyfit(np.log(K[3:]), np.log(y[3:]), 1)[0]
    numbers["gain_over_bound_by_K"] = dict(zip(K.astype(int).tolist(), (gain / (D + Al)).round(4)))

    panels, numbers["weak_prover"] = [], {}
    for name, rho in (("from any state", UNIFORM), ("from the root", ROOT)):
        eta, apart, holds, with_mu, with_pi, without = weak_prover(rho)
        panels.append((name, "eta^2", "gain / gamma", dots((eta ** 2)[holds], with_mu[holds])))
        numbers["weak_prover"][name] = {
            "eta": eta.mean(), "q_apart_over_eta": [(apart / eta).min(), (apart / eta).max()],
            "more_varied_share": holds.mean(), "c": (with_mu / eta ** 2)[holds].min(),
            "c_without": (without / eta ** 2)[holds].min(), "negative_share": (with_mu < 0)[holds].mean(),
            "helps_share": (with_mu > without).mean(), "beats_pi_share": (with_mu > with_pi).mean()}
    draw(out / "weak_prover", "Prop. F.1: one step of a strong base with a weak prover", panels)
    write_json(out / "theory.json", numbers)
    print(json.dumps(numbers, indent=1))
    print(f"in {out}: theory.json, theorem, remark and weak_prover (PNG and CSV)")


if __name__ == "__main__":
    main_guard(main)

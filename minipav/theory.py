"""Theorem 3.1, Remark 3.1 and Proposition F.1 on small tree MDPs, where every quantity is exact.

    python -m minipav.theory              # seconds; writes theory.json, theorem, remark, weak_prover to runs/didactic

A tree MDP: `depth` levels, `actions` choices at each state, a random chance of success at each leaf; states are numbered level
by level, s -> s * actions + a + 1. Policies are tables pi (states, actions). All functions take a batch of MDPs, M of them.
"""
import argparse
import json
from pathlib import Path

import numpy as np

from minipav.advantage import q_best_of_k
from minipav.utils import main_guard, write_whole


class Trees:
    """M random trees. leaf (M, actions ** depth): the chance of a right answer at each leaf."""

    def __init__(self, M, depth=3, actions=3, rng=None, scale=1.0):
        self.M, self.depth, self.A = M, depth, actions
        self.S = (actions ** depth - 1) // (actions - 1)                        # inner states; the leaves come behind them
        self.leaf = scale * rng.random((M, actions ** depth)) ** 2              # few good leaves

    def random_policy(self, rng, peaked=1.0):
        """A random softmax policy (M, S, A)."""
        return softmax(peaked * rng.standard_normal((self.M, self.S, self.A)))

    def q(self, pi):
        """Exact Q^pi (M, S, A), by one sweep from the leaves to the root (Eq. 1)."""
        value = np.concatenate([np.zeros((self.M, self.S)), self.leaf], 1)
        Q = np.zeros((self.M, self.S, self.A))
        for s in reversed(range(self.S)):
            Q[:, s] = value[:, s * self.A + 1:s * self.A + 1 + self.A]
            value[:, s] = (pi[:, s] * Q[:, s]).sum(-1)
        return Q

    def visits(self, pi, rho):
        """d^pi_rho (M, S): how often each state is visited when the start is drawn from rho (S,); sums to more than 1."""
        d = np.broadcast_to(rho, (self.M, self.S)).copy()
        for s in range((self.S - 1) // self.A):
            d[:, s * self.A + 1:s * self.A + 1 + self.A] += d[:, s, None] * pi[:, s]
        return d


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def value(pi, Q):
    return (pi * Q).sum(-1)


def npg_step(pi, Q, adv_mu, gamma, alpha=1.0):
    """Lemma F.2: natural policy gradient on Eq. 5 is pi(a|s) exp(gamma (Q^pi + alpha A^mu)) / Z(s)."""
    return softmax(np.log(pi) + gamma * (Q + alpha * adv_mu))


def terms(pi, Q_pi, Q_mu, rho):
    """(distinguishability, alignment) of Theorem 3.1, each (M,): E_rho Var_pi A^mu and E_rho E_pi [A^mu A^pi]."""
    a_mu, a_pi = (Q - value(pi, Q)[..., None] for Q in (Q_mu, Q_pi))
    return (rho * value(pi, a_mu ** 2)).sum(-1), (rho * value(pi, a_mu * a_pi)).sum(-1)


def improvement(trees, pi, Q_pi, adv_mu, rho, gamma):
    """E_rho [V^{pi'} - V^pi] (M,) of one exact step, measured."""
    new = npg_step(pi, Q_pi, adv_mu, gamma)
    return (rho * (value(new, trees.q(new)) - value(pi, Q_pi))).sum(-1)


def theorem(M=1000, gamma=0.01, seed=0):
    """Theorem 3.1 on M random trees, a random prover each: the measured improvement over gamma beside the two terms, and the
    exact first order, which has D(pi) where the theorem has D(mu): gamma sum_s d^pi_rho(s) E_pi[A^pi (A^pi + A^mu)]."""
    rng = np.random.default_rng(seed)
    trees = Trees(M, rng=rng)
    pi, mu, rho = trees.random_policy(rng), trees.random_policy(rng, 2.0), np.full(trees.S, 1 / trees.S)
    Q_pi, Q_mu = trees.q(pi), trees.q(mu)
    d_mu, al = terms(pi, Q_pi, Q_mu, rho)
    d_pi, _ = terms(pi, Q_pi, Q_pi, rho)
    adv_mu = Q_mu - value(mu, Q_mu)[..., None]
    gain = improvement(trees, pi, Q_pi, adv_mu, rho, gamma) / gamma
    d = trees.visits(pi, rho)
    per_state = [value(pi, (Q_pi - value(pi, Q_pi)[..., None]) * (Q - value(pi, Q)[..., None])) for Q in (Q_pi, Q_mu)]
    first_order = (d * (per_state[0] + per_state[1])).sum(-1)
    return {"distinguishability": d_mu, "alignment": al, "d_pi": d_pi, "gain": gain, "first_order": first_order}


def remark(M=200, seed=0, gamma=0.001, Ks=(2, 4, 8, 16, 32, 64, 128)):
    """Remark 3.1: where Q^pi = O(1/K), best-of-K has K^2 times the distinguishability of pi. -> rows (K, D(BoK) / D(pi), its
    alignment over D(pi), the measured gain over gamma D(pi)), means over M trees whose leaves are scaled to 1/K."""
    rows = []
    for K in Ks:
        rng = np.random.default_rng(seed)
        trees = Trees(M, rng=rng, scale=1 / K)
        pi, rho = trees.random_policy(rng), np.full(trees.S, 1 / trees.S)
        Q = trees.q(pi)
        (d, al), (d_pi, _) = terms(pi, Q, q_best_of_k(Q, K), rho), terms(pi, Q, Q, rho)
        gain = improvement(trees, pi, Q, q_best_of_k(Q, K), rho, gamma) / gamma     # V^BoK(s) cancels in the softmax
        rows.append((K, *(float((x / d_pi).mean()) for x in (d, al, gain))))
    return rows


def weak_prover(M=1000, gamma=0.1, steps=50, seed=0):
    """Prop. F.1: a strong base (natural gradient on its own Q for a while) and the weak policy that it was at the start as
    its prover. -> success of the base, of the prover, gain of one step with A^mu, with A^pi instead (a longer step: trap of every
    such comparison), and with Q^pi alone, each (M,)."""
    rng = np.random.default_rng(seed)
    trees = Trees(M, rng=rng)
    mu, rho = trees.random_policy(rng), np.eye(trees.S)[0]
    pi = mu
    for _ in range(steps):
        pi = npg_step(pi, trees.q(pi), 0.0, 2 * gamma)
    Q_pi, Q_mu = trees.q(pi), trees.q(mu)
    gains = [improvement(trees, pi, Q_pi, adv, rho, gamma) for adv in (Q_mu, Q_pi, 0.0)]         # V(s) cancels in the softmax
    return value(pi, Q_pi)[:, 0], value(mu, Q_mu)[:, 0], *gains


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/didactic"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    from minipav.figures import draw
    t, rows = theorem(), remark()
    bound, some = t["distinguishability"] + t["alignment"], slice(0, 300)
    draw(args.out / "theorem", "Theorem 3.1 on 1,000 random trees: improvement of one natural gradient step, over gamma", [
        (name, formula, "measured gain / gamma", {"a tree": (x[some], t["gain"][some], None, None)}) for name, formula, x in (
            ("the theorem's two terms", "D(mu) + Al(mu)", bound),
            ("the exact first order", "sum d E[A_pi (A_pi + A_mu)]", t["first_order"]))])
    K, d, al, gain = (list(x) for x in zip(*rows))
    draw(args.out / "remark", "Remark 3.1: best-of-K where Q = O(1/K)", [("means over 200 trees", "K", f"{what} over D(pi)", {
        label: (K, y, None, None) for label, y in lines.items()}) for what, lines in (
            ("distinguishability", {"D(BoK)": d, "K^2 / 4": [k * k / 4 for k in K]}),
            ("alignment and gain", {"Al(BoK)": al, "measured gain / gamma": gain, "K": K}))])
    base, prover, with_mu, with_pi, without = weak_prover()
    draw(args.out / "weak_prover", "Prop. F.1: one step of a strong base with a weak prover", [(
        "300 trees", "success of the base minus of the prover", f"gain with A^mu minus {label}", {
            "a tree": ((base - prover)[some], (with_mu - other)[some], None, None)})
        for label, other in (("without", without), ("with A^pi", with_pi))])
    helps = bound > 0
    out = {"trees": len(bound), "bound_positive_share": float(helps.mean()),
           "c": float((t["gain"] / bound)[helps].min()), "median_gain_over_bound": float(np.median((t["gain"] / bound)[helps])),
           "gain_negative_where_bound_positive": float((t["gain"][helps] < 0).mean()),
           "correlation_gain_bound": float(np.corrcoef(t["gain"], bound)[0, 1]),
           "largest_error_of_the_first_order": float(np.abs(t["gain"] - t["first_order"]).max()),
           **{f"remark_exponent_{what}": float(np.polyfit(np.log(K[3:]), np.log(y[3:]), 1)[0])
              for what, y in (("distinguishability", d), ("alignment", al), ("gain", gain))},
           "gain_over_bound_by_K": {k: round(g / (x + y), 4) for k, g, x, y in zip(K, gain, d, al)},
           "weak_prover_helps_share": float((with_mu > without).mean()),
           "weak_prover_beats_pi_as_prover_share": float((with_mu > with_pi).mean()),
           "base_minus_prover": float((base - prover).mean())}
    write_whole(args.out / "theory.json", lambda p: p.write_text(json.dumps(out, indent=1) + "\n"))
    print(json.dumps(out, indent=1))
    print(f"in {args.out}: theory.json, theorem, remark and weak_prover (PNG and CSV)")


if __name__ == "__main__":
    main_guard(main)

"""The figures of section 5, ours beside the paper's, from the trainings of rl.py: t is an rl_report.Trained."""
import numpy as np

from minipav.figures import PAPER, draw
from minipav.rewards import REWARDS

LABELS = {"sft": "SFT", "rft": "RFT", "outcome": "ORM-RL", "pav": "PAV-RL"}
KEYS = {v: v.replace("-", "_") for v in LABELS.values()}                        # their names in paper.json


def paper(x, of):
    """The paper's lines over x."""
    return {label: (x, of[key], None, None) for label, key in KEYS.items() if key in of}


def spent(t, names):
    """Panels of accuracy against iterations, and against all that was spent, the verifier's data and training included."""
    lines = {n: t.line(f"{n}:curve")[1:] for n in names}

    def panel(title, xlabel, x):
        return title, xlabel, "accuracy", {LABELS.get(n, n): (x(n), *y) for n, y in lines.items()}
    with_data = "with the data for RFT and PAV"
    return [panel("ours", "iteration", lambda n: t.mean(n, "iteration")),
            panel(with_data, "token samples, millions", lambda n: (t.before[n][0] + t.mean(n, "tokens")) / 1e6),
            panel(with_data, "minutes", lambda n: (t.before[n][1] + t.mean(n, "seconds")) / 60)]


def in_the_end(t, names, k=0):
    """(mean, lo, hi), each a list over trainings, of pass@N in the end at its k-th N; NaN where the training is None."""
    return zip(*([x[k] for x in t.line(f"{n}:pass")[1:]] if n else [np.nan] * 3 for n in names))


def against_kl(t):
    """Panels of accuracy and pass@N against the KL in the end, of the trainings that differ from `pav` in reward and KL alone."""
    same = [k for k in t.flags["pav"] if k not in ("reward", "kl", "n_mc")]
    alike = sorted((t.mean(n, "kl")[-1], n) for n in t.trained if all(t.flags[n][k] == t.flags["pav"][k] for k in same))
    by = {r: [(x, n) for x, n in alike if t.flags[n]["reward"] == r] for r in REWARDS}
    return [("in the end", "KL", ylabel, {
        LABELS.get(r, r): ([x for x, _ in some], *in_the_end(t, [n for _, n in some], k)) for r, some in by.items() if some})
        for ylabel, k in (("accuracy", 0), (f"pass@{t.exact['pav:pass'][0][-1]}", -1))]


def varied(t, title, *keys):
    """Panels (one or none) of what trainings that differ from `outcome` or `pav` in one of these flags come to in the end."""
    found = {"default": {r: r for r in ("outcome", "pav")}}
    for n in t.trained:
        r = t.flags[n]["reward"]
        changed = [k for k in t.flags[n] if r in t.trained and t.flags[n][k] != t.flags[r][k]]
        if r in found["default"] and len(changed) == 1 and changed[0] in keys:
            value = t.flags[n][changed[0]]
            found.setdefault(changed[0] if value is True else f"{changed[0]} {value}", {})[r] = n
    found = {k: v for k, v in found.items() if "pav" in v}                      # without the controls of pav-sum and pav-pi
    names = [k.removeprefix(f"{title} ") for k in found]
    return [(title, "change", "accuracy in the end", {
        LABELS[r]: (names, *in_the_end(t, [n.get(r) for n in found.values()])) for r in found["default"]})] if found.keys() - {
            "default"} else []


def figures(t, out):
    """Draw every figure whose trainings are there. -> their names"""
    made = []

    def figure(name, title, panels):
        draw(out / name, title, panels)
        made.append(name)
    main, p = [n for n in ("outcome", "pav") if n in t.trained], PAPER["fig7b_2B"]
    if main:
        figure("fig7", "Fig. 7: RL with outcome reward and with process advantages", [
            *spent(t, main),
            ("the paper, 2B", "iteration", "accuracy", paper([i * p["every"] for i in range(len(p["ORM_RL"]))], p))])
    if set(LABELS) <= set(t.names):
        ends = {label: t.line(f"{n}:pass") for n, label in LABELS.items()}
        unsolved = sum(int(h.sum()) for h in t.hard)
        figure("fig8", "Fig. 7a, 8: the policies in the end", [
            ("7a: one sample", "policy", "accuracy", {
                "ours": (list(ends), *in_the_end(t, LABELS)),
                "the paper, 2B": (list(ends), [PAPER["fig7a"]["2B"][KEYS[k]] for k in ends], None, None)}),
            ("8a: ours", "N", "pass@N", {k: tuple(x[:7] for x in v) for k, v in ends.items()}),
            ("8a: the paper, 2B", "N", "pass@N", paper(PAPER["fig8a_2B"]["N"], PAPER["fig8a_2B"])),
            (f"8b: {unsolved} problems that SFT never solves", "N", "pass@N", {LABELS[n]: t.on_hard(n) for n in main}),
            ("8b: the paper, 9B", "N", "pass@N", paper(PAPER["fig8b"]["N"], PAPER["fig8b"]))])
    if len(t.trained) > 2:
        figure("rewards", "Every reward", spent(t, [n for n in t.trained if n in REWARDS]))
    if len(main) == 2:
        figure("kl", "How far from the initial policy: every reward, with other KL coefficients too", against_kl(t))
        panels = [*varied(t, "policy", "policy"), *varied(t, "alpha", "alpha"), *varied(t, "prover", "prover"),
                  *varied(t, "iterations", "iterations"),
                  *varied(t, "kl", "kl"), *varied(t, "the rest", "no_rft", "baseline", "no_known", "refresh")]
        if panels:
            figure("sweeps", "What the result depends on", panels)
    return made

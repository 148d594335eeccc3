"""Will process advantages help a beam? What a run's validation problems say before any search on test ones.

In a beam, A^mu of a best-of-K prover acts through the penalty on the parent's value alone: behind one parent
it changes no order. It can help as far as (i) relatives share the verifier's errors, and (ii) the beam fills
with relatives. Both are read off the candidates of a beam by Q^pi.
"""
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from minipav.advantage import rollout_from
from minipav.files import read_csv
from minipav.run import keyed
from minipav.search.beam import search_width
from minipav.search.measure import COLUMNS, rights
from minipav.tokenizer import decode_rows, encode_rows
from minipav.traces import label_with_outcome
from minipav.utils import progress
from minipav.verifier import exact_q


def true_values(run, policy, problems, b, n_mc, seed):
    """Q^pi of a Beam's candidates, without a verifier: the task's exact values (of the reference policy,
    which pi is close to), or means of n_mc fresh rollouts of pi."""
    prompt_lengths = encode_rows(run.enc, [run.task.prompt(p) for p in problems])[1][b.owner]
    t = label_with_outcome(run, problems, b.owner, b.tokens, b.lengths, prompt_lengths)
    if run.task.exact:
        return exact_q(run, problems, t).gather(1, t.last[:, None])[:, 0]
    ended = t.tokens[torch.arange(len(t)), t.lengths - 1] == run.enc.eot_token
    rows, q = (~ended).nonzero()[:, 0], t.reward.clone()
    done = rollout_from(policy, run, problems, t, rows, t.last[rows], n_mc, seed)
    q[rows] = done.reward.view(-1, n_mc).mean(1)
    return q


def candidates(bench, cell, n_mc=8):
    """Of a beam by Q^pi: a row for each candidate, with its level (one problem's candidates of one depth),
    its relatives, the verifier's values q and q_before, the true one, and whether it was kept."""
    run, s, parts = bench.run, bench.search(cell), []
    problems, s.log = run.problems(cell.split, cell.problems), []
    with progress("a beam to look at", cell.ns[0] * len(problems)) as bar:
        search_width(s, problems, cell.ns[0], cell.seed, bar)
    with progress("what its steps are worth", len(s.log)) as bar:
        for i, x in enumerate(s.log):
            b, step = x["beam"], x["step"]
            b = type(b)(*(v.cpu() for v in vars(b).values()))
            true = true_values(run, s.policy, problems, b, n_mc, cell.seed + i)
            columns = {"owner": b.owner, "depth": torch.full_like(b.owner, step.depth), "parent": x["parent"],
                       "grandparent": x["grandparent"], "q": step.q_pi, "q_before": step.q_pi_before,
                       "true": true, "kept": x["kept"], "ended": x["ended"]}
            parts.append(pd.DataFrame({k: v.cpu().numpy() for k, v in columns.items()}).assign(batch=i))
            bar.update()
    return pd.concat(parts, ignore_index=True)


def same_states(bench, cell):
    """{same_state: of what a beam by Q^pi keeps, the share whose state another one of its level has, too}"""
    run, s = bench.run, bench.search(cell)
    problems, s.log, twice, kept = run.problems(cell.split, cell.problems), [], 0, 0
    search_width(s, problems, cell.ns[0], cell.seed)
    for level in s.log:
        b, chosen = level["beam"], level["kept"]
        steps = [run.task.steps(t.removesuffix(run.task.delimiter))[-1] for t in decode_rows(
            run.enc, b.tokens[chosen], b.lengths[chosen])]
        states = {(o, run.task.state(x), e) for o, x, e in zip(
            b.owner[chosen].tolist(), steps, level["ended"][chosen].tolist())}
        twice, kept = twice + len(steps) - len(states), kept + len(steps)
    return {"same_state": round(twice / max(1, kept), 4)}


def predict(bench, cell, tables):
    """What describe_beam says of a beam by Q^pi, and by how many points (mean, standard error) the beams of
    its tuning with A^mu, without a quota, were ahead of the one without; all of it on validation problems.
    Done once. -> the facts"""
    def work():
        first = {path: read_csv(path, COLUMNS)[0] for path in tables}
        right = {float(r["alpha"]): rights(path) for path, r in first.items()
                 if (r["method"], r["score"], r["quota"]) == ("beam", "effective", "none")}
        gains = {alpha: 100 * (x - right[0]) for alpha, x in right.items() if alpha and 0 in right}
        return {"prediction": describe_beam(bench, cell) | {"points": {
            f"alpha = {alpha:g}": (round(x.mean(), 2), round(x.std(ddof=1) / len(x) ** 0.5, 2))
            for alpha, x in gains.items()}}}
    spec = {"cell": asdict(cell), "tables": [Path(t).stem for t in tables]}
    return bench.run.stage(keyed("prediction", spec), work, spec)["prediction"]


def spread_within(x, by):
    """Sum of squares of x within groups, its degrees of freedom."""
    groups = x.groupby(by)
    return float(((x - groups.transform("mean")) ** 2).sum()), float((groups.size() - 1).sum())


def intraclass(x, level, parent):
    """The share of the variance of x within levels that children of one parent have in common (intraclass
    correlation, by the method of moments)."""
    (inside, free), (total, all_free) = spread_within(x, parent), spread_within(x, level)
    own, size = inside / max(1.0, free), x.groupby(parent).transform("size")
    between = (total - all_free * own) / (len(x) - size.groupby(level).mean().sum())
    return between / max(1e-12, between + own)


def describe_beam(bench, cell):
    """What may tell whether A^mu helps, of the beam by Q^pi `cell`; values and errors are compared within
    levels, as the search does. -> {shared_error: the share of the errors' variance within a level that
    children of one parent share; error: their standard deviation; ancestors: effective number of
    grandparents of what is kept; parent_weight: of the parent's value over the child's in the best linear
    prediction of the true value; r2: of the child's alone; optimism: error of what is kept over that of
    all}"""
    c = candidates(bench, cell)
    levels, c["error"] = [c.batch, c.owner], c.q - c.true
    values = c[["q", "q_before", "true"]]
    centred = values - values.groupby(levels).transform("mean")
    several = c.groupby(levels).parent.transform("nunique") > 1
    x, y = centred[several][["q", "q_before"]].to_numpy(), centred[several].true.to_numpy()
    child, parent = torch.linalg.lstsq(torch.tensor(x), torch.tensor(y)[:, None]).solution[:, 0].tolist()
    some, kept = c[several], c[c.kept & (c.depth > 2)]
    level, parent_of = [some.batch, some.owner], [some.batch, some.parent]
    squares, free = spread_within(some.error, level)
    share = kept.groupby(["batch", "owner", "grandparent"]).size()
    effective = share.groupby(["batch", "owner"]).apply(lambda n: n.sum() ** 2 / (n ** 2).sum())
    size = share.groupby(["batch", "owner"]).sum()
    return {"shared_error": round(intraclass(some.error, level, parent_of), 4),
            "error": round((squares / max(1.0, free)) ** 0.5, 4),
            "ancestors": round(float((effective[size > 1]).mean()), 4),
            "parent_weight": round(parent / child, 4) if child else 0.0,
            "r2": round(float(centred.q.corr(centred.true) ** 2), 4),
            "optimism": round(float(c[c.kept].error.mean() - c.error.mean()), 4)}

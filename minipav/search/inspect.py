"""What a search looks like from near: a solved problem with each step's values, a beam's candidates."""
import numpy as np
import torch

from minipav.advantage import advantage, effective_reward, monte_carlo, q_best_of_k, standard_error
from minipav.data import corrupted_steps
from minipav.files import read_csv, write_text
from minipav.search.beam import beam
from minipav.search.best_of_n import draw
from minipav.search.measure import COLUMNS, Cell
from minipav.tokenizer import END, encode_rows
from minipav.traces import label_with_outcome, responses
from minipav.verifier import auc, score


def describe(bench, a, seed, tables):
    """What kind of failures the base policy has, and whether a corrupted step fools the verifiers (facts of
    the stage); a problem that the PAV beam solved -> example.txt."""
    run, problems = bench.run, bench.run.problems("test", a.test_problems)
    s, _ = draw(bench.search(Cell("pass", problems=a.test_problems)), problems, a.max_n, seed)
    right = s[(s.reward == 1).nonzero()[:2000, 0]]
    wrong = corrupted_steps(run, problems, right, np.random.default_rng(seed))
    texts = responses(run.enc, s.tokens, s.lengths, s.ends[:, 0] + 1)
    judged = [run.task.judge(problems[i], t) for i, t in zip(s.problem.tolist(), texts)]
    failures = [v for v in judged if v != "right"]
    solved = [r for path in tables for r in read_csv(path, COLUMNS) if r["method"] == "beam"
              and (r["prover"] == f"bo{a.K}" or not a.alpha) and r["n"] == str(a.widths[-1])
              and float(r["right"]) == 1]
    text = "no problem was solved\n"
    if solved:
        text = explain(bench, problems[int(solved[0]["problem"])], solved[0]["text"], a.alpha, a.K, seed)
    write_text(run.out / "example.txt", text)
    print("\n" + text)
    return {"files": [run.out / "example.txt"],
            "planning_failure_share": round(failures.count("planning") / max(1, len(failures)), 4),
            "corrupted_step_auc": {v: tells_apart(bench.model(v), right, wrong) for v in ("orm", "q_pi")}}


def tells_apart(verifier, right, wrong):
    """AUC of right traces against wrong ones by their final score; None if there are none."""
    if len(right) == 0 or len(wrong) == 0:
        return None
    values = [(score(verifier, t.tokens, t.ends), t) for t in (right, wrong)]
    q = torch.cat([q.gather(1, t.last[:, None])[:, 0] for q, t in values])
    label = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))])
    return round(auc(q, label, torch.ones_like(label)), 4)


def explain(bench, problem, response, alpha, K, seed, n_mc=256):
    """A problem as text, each step with Q^pi (verifier's, rollouts'), Q^mu, A^mu, Q + alpha A."""
    run, prompt = bench.run, bench.run.task.prompt(problem)
    tokens, lengths = encode_rows(run.enc, [prompt + response])
    t = label_with_outcome(run, [problem], torch.tensor([0]), tokens, lengths,
                           encode_rows(run.enc, [prompt])[1])
    q = score(bench.model("q_pi"), t.tokens, t.ends)[0]
    q_mu = q_best_of_k(q, K)
    adv_mu = advantage(q_mu)
    mc = monte_carlo(bench.model("base"), run, [problem], t, t.ends >= 0, n_mc, seed)
    se = standard_error(mc.q[0], mc.n[0].clamp(min=1))
    sure = [f"{q:.3f} +- {e:.3f}" if n > 1 else f"{q:.3f} (known)" for q, e, n in zip(mc.q[0], se, mc.n[0])]
    head = f"{'':<36}{'Q^pi':>8}{f'({n_mc} rollouts)':>18}{f'Q^Bo{K}':>9}{'A^mu':>8}{'Q+aA':>8}"
    lines = [prompt.strip(), head]
    ends = t.ends[0, :t.last[0] + 1].tolist()
    steps = [run.enc.decode(t.tokens[0, a + 1:b + 1].tolist()) for a, b in zip(ends, ends[1:])]
    for h, step in enumerate(["(the bare prompt)", *(x.removesuffix(END).strip() for x in steps)]):
        line = f"{step:<36}{q[h]:>8.3f}{sure[h]:>18}{q_mu[h]:>9.3f}"
        lines.append(line + (f"{adv_mu[h - 1]:>8.3f}{effective_reward(q[h], adv_mu[h - 1], alpha):>8.3f}" if h
                             else ""))
    return "\n".join(lines) + "\n"


def show(bench, cell, count):
    """Print `count` problems of a beam search: each level's candidates with values."""
    run, problems, s = bench.run, bench.run.problems(cell.split, cell.problems)[:count], bench.search(cell)
    s.log = []
    r = beam(s, problems, cell.ns, cell.seed)[0]
    lengths = encode_rows(run.enc, [run.task.prompt(p) for p in problems])[1].to(s.policy.device)
    for i, problem in enumerate(problems):
        prompt = run.task.prompt(problem)
        print(f"{prompt.strip()}  (mu = {cell.prover or 'none'}, alpha = {cell.alpha}, width {cell.ns[0]})\n"
              f"{'kept':<6}{'Q^pi':>7}{'Q^mu':>7}{'A^mu':>8}{'score':>8}   steps so far")
        for level in s.log:
            b, step = level["beam"], level["step"]
            rows = (b.owner == i).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            rows = rows[b.score[rows].argsort(descending=True)]
            texts = responses(run.enc, b.tokens[rows], b.lengths[rows], lengths[i].expand(len(rows)))
            for x, text in zip(rows.tolist(), texts):
                q, q_mu, adv, value = (float(v[x]) for v in (step.q_pi, step.q_mu, step.adv_mu, b.score))
                steps = ", ".join(run.task.steps(text.strip()))
                kept = "  *" if level["kept"][x] else ""
                print(f"{kept:<6}{q:>7.3f}{q_mu:>7.3f}{adv:>8.3f}{value:>8.3f}   {steps}")
            print()
        verdict = "right" if r.right[i] else "wrong"
        print(f"answer: {', '.join(run.task.steps(r.text[i])) or 'none'} -> {verdict}\n")

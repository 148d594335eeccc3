"""Every method on the same held-out problems. A method's curve is a list of Points, one a budget; train.py draws a few of
them, search.py all. At the end of the file: one solved problem spelled out step by step."""
import time
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from minipav.advantage import (
    advantage,
    effective_reward,
    label_with_outcome,
    monte_carlo,
    q_best_of_k,
    seed_rollouts,
    standard_error,
    wrong_steps,
)
from minipav.search import beam_search, best_of_n, majority_vote, pass_at_n
from minipav.tokenizer import decode_rows, encode_rows
from minipav.utils import progress, write_whole
from minipav.verifier import auc, score


class Point(NamedTuple):
    """One method at one budget, on P problems."""
    n: int                          # N samples, or the width of the beam
    acc: torch.Tensor               # (P,) expected Rex of the answer
    tokens: torch.Tensor            # (P,) policy tokens generated
    passed: torch.Tensor            # (P,) chance that a right answer is among the candidates: pass@N
    scored: torch.Tensor            # (P,) tokens read by verifiers
    seconds: torch.Tensor           # () wall time, all problems together


def save_curves(path, curves):
    """{method: [Point]} -> one safetensors file with METHOD/n (k,), METHOD/acc (k, P), ..."""
    state = {f"{m}/{field}": torch.stack([torch.as_tensor(getattr(p, field)) for p in points]).contiguous()
             for m, points in curves.items() for field in Point._fields}
    write_whole(path, lambda p: save_file(state, p))


def sampled_curves(run, policy, problems, M, seed, scorers):
    """Everything that needs whole samples only: greedy, one sample, majority vote, best-of-N by each of the scorers
    {method: f(traces) -> (score of each trace, tokens read)}, pass@N, for N = 1, 2, 4, ... M. -> curves, samples, texts."""
    task, P, start = run.task, len(problems), time.time()
    greedy = seed_rollouts(policy, task, run.enc, problems, 1, seed, temperature=0, **run.how)
    greedy_s, start = torch.tensor(time.time() - start), time.time()
    with progress("samples", P * M) as bar:
        s = seed_rollouts(policy, task, run.enc, problems, M, seed, progress=bar.to, **run.how)
    sampling = time.time() - start
    reward, spent = s.reward.view(P, M), new_tokens(s).view(P, M).mean(1)       # (P, M); (P,) tokens of one rollout
    prompts = [task.prompt(p) for p in problems]
    texts = [t.removeprefix(prompts[i]) for i, t in zip(s.problem.tolist(), decode_rows(run.enc, s.tokens, s.lengths))]
    answers = [[task.answer(t) for t in texts[i * M:(i + 1) * M]] for i in range(P)]
    ns, none = [2 ** k for k in range(M.bit_length())], torch.zeros(P)
    passed = {n: pass_at_n(reward, n) for n in ns}

    def points(acc, read=none, scoring=0.0):
        return [Point(n, acc(n), n * spent, passed[n], n * read, torch.tensor((sampling + scoring) * n / M)) for n in ns]
    curves = {"greedy": [Point(1, greedy.reward, new_tokens(greedy), greedy.reward, none, greedy_s)],
              "sample": points(lambda n: passed[1])[:1],
              "majority": points(lambda n: majority_vote(answers, reward, n))}
    ended = s.tokens[torch.arange(P * M), s.lengths - 1] == run.enc.eot_token
    for method, scorer in scorers.items():
        start = time.time()
        value, read = scorer(s)
        value = torch.where(ended, value, -torch.inf).view(P, M)                      # a sample that never ended ranks last
        curves[method] = points(lambda n, value=value: best_of_n(value, reward, n), read.view(P, M).mean(1), time.time() - start)
    return curves | {"pass": points(lambda n: passed[n])}, s, texts


def beam_curve(run, name, policy, q_pi, problems, widths, **how):
    """Beam search at each width. -> [Point], the last of them with its BeamResult as second return value."""
    points = []
    with progress(name, sum(widths)) as bar:
        for width in widths:
            start = time.time()
            r = beam_search(policy, q_pi, run.task, run.enc, problems, width=width, **how, **run.how)
            points.append(Point(width, r.reward, r.tokens.float(), r.solved, r.scored.float(), torch.tensor(time.time() - start)))
            bar.set_postfix_str(f", width {width}: {r.reward.mean():.3f} at {r.tokens.float().mean():.0f} tokens", False)
            bar.update(width)
    return points, r


def final_score(verifier, traces):
    """The verifier's value (N,) at the last place of each trace."""
    return last_place(score(verifier, traces.tokens, traces.ends), traces)


def last_place(x, traces):
    """x (N, S + 1) at the last place of each trace. -> (N,)"""
    return x.gather(1, (traces.ends >= 0).sum(1, keepdim=True) - 1)[:, 0]


def evaluate(run, seed, *, test_problems, max_n, widths, alpha, K):
    """Each method at each budget -> eval.safetensors, for report.py; what kind of policy the base is -> facts.json; a
    solved problem -> example.txt."""
    task, enc = run.task, run.enc
    base, orm, q_pi = run.model("base"), run.model("orm"), run.model("q_pi")
    problems = run.problems("test", test_problems)
    curves, s, texts = sampled_curves(run, base, problems, max_n, seed, {
        "orm": lambda s: (final_score(orm, s), s.lengths.float()), "best_q": lambda s: (final_score(q_pi, s), s.lengths.float())})
    few = [w for w in widths if w <= 4]                                         # for the provers with their own Q^mu
    how = dict(K=K, seed=seed)
    curves["q_beam"], _ = beam_curve(run, "q_beam", base, q_pi, problems, widths, alpha=0.0, **how)
    curves["pav_beam"], pav = beam_curve(run, "pav_beam", base, q_pi, problems, widths, alpha=alpha, **how)
    for name in ("weak", "strong"):
        curves[f"{name}_beam"], _ = beam_curve(run, f"{name}_beam", base, q_pi, problems, few or widths[:1], alpha=alpha,
                                               q_mu_model=run.model(f"q_{name}"), **how)
    save_curves(run.out / "eval.safetensors", curves)

    right = s[(s.reward == 1).nonzero()[:2000, 0]]
    wrong = wrong_steps(task, enc, problems, right, np.random.default_rng(seed)) if len(right) else right
    failures = [v for i, t in zip(s.problem.tolist(), texts) if (v := task.judge(problems[i], t)) != "right"]
    run.write("facts.json", {"base_sampled": round(float(s.reward.mean()), 4),
                             "base_greedy": round(float(curves["greedy"][0].acc.mean()), 4),
                             "planning_failure_share": round(failures.count("planning") / max(1, len(failures)), 4),
                             "wrong_step_auc": {"orm": tells_apart(orm, right, wrong),
                                                "q_pi": tells_apart(q_pi, right, wrong)}})
    text = "no problem was solved\n"
    if pav.reward.any():
        i = int(pav.reward.argmax())
        text = explain(run, base, q_pi, problems[i], pav.responses[i], alpha=alpha, K=K, seed=seed)
    write_whole(run.out / "example.txt", lambda p: p.write_text(text))


def tells_apart(verifier, right, wrong):
    """AUC of right traces against wrong ones by their final score; None if there are none."""
    if len(right) == 0:
        return None
    q = torch.cat([final_score(verifier, right), final_score(verifier, wrong)])
    label = torch.cat([torch.ones(len(right)), torch.zeros(len(wrong))])
    return round(auc(q, label, torch.ones_like(label)), 4)


def new_tokens(traces):
    """Tokens (N,) of each response, END included."""
    return (traces.lengths - traces.ends[:, 0] - 1).float()


def explain(run, base, q_pi, problem, response, *, alpha, K, seed, n_mc=256):
    """A problem as text, each step with Q^pi (the verifier's and from rollouts), Q^mu, A^mu, the effective reward."""
    prompt, task, enc = run.task.prompt(problem), run.task, run.enc
    tokens, lengths = encode_rows(enc, [prompt + response])
    t = label_with_outcome(task, enc, [problem], torch.tensor([0]), tokens, lengths, encode_rows(enc, [prompt])[1])
    q = score(q_pi, t.tokens, t.ends)[0]
    q_mu = q_best_of_k(q, K)
    adv_mu = advantage(q_mu)
    mc = monte_carlo(base, task, enc, [problem], t, t.ends >= 0, n_mc, seed, **run.how)
    se = standard_error(mc.q[0], mc.n[0].clamp(min=1))
    lines = [prompt.strip(), f"{'':<36}{'Q^pi':>8}{f'({n_mc} rollouts)':>18}{f'Q^Bo{K}':>9}{'A^mu':>8}{'Q+aA':>8}"]
    for h, step in enumerate(["(the bare prompt)", *task.steps(response)]):
        line = f"{step:<36}{q[h]:>8.3f}{f'{mc.q[0, h]:.3f} +- {se[h]:.3f}':>18}{q_mu[h]:>9.3f}"
        lines.append(line + (f"{adv_mu[h - 1]:>8.3f}{effective_reward(q[h], adv_mu[h - 1], alpha):>8.3f}" if h else ""))
    return "\n".join(lines) + "\n"

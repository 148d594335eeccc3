"""Every method on the same held-out problems, and one solved problem spelled out step by step."""
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


def evaluate(run, seed, *, test_problems, max_n, widths, alpha, K):
    """Per-problem accuracy and policy tokens of each method at each budget -> eval.safetensors, for report.py; what kind
    of policy the base is -> facts.json; a solved problem -> example.txt."""
    task, enc = run.task, run.enc
    base, orm, q_pi = run.model("base"), run.model("orm"), run.model("q_pi")
    problems = run.problems("test", test_problems)
    P, M = len(problems), max_n

    greedy = seed_rollouts(base, task, enc, problems, 1, seed, temperature=0, **run.how)
    with progress("samples", P * M) as bar:
        s = seed_rollouts(base, task, enc, problems, M, seed, progress=bar.to, **run.how)
    reward, spent = s.reward.view(P, M), new_tokens(s).view(P, M).mean(1)       # (P, M); (P,) tokens of one rollout
    prompts = [task.prompt(p) for p in problems]
    texts = [t.removeprefix(prompts[i]) for i, t in zip(s.problem.tolist(), decode_rows(enc, s.tokens, s.lengths))]
    answers = [[task.answer(t) for t in texts[i * M:(i + 1) * M]] for i in range(P)]

    def ranking(verifier):
        """Score (P, M) of each whole sample; one that never ended ranks last."""
        ended = s.tokens[torch.arange(P * M), s.lengths - 1] == enc.eot_token
        return torch.where(ended, final_score(verifier, s), -1.0).view(P, M)

    ns, by_orm, by_q = [2 ** k for k in range(M.bit_length())], ranking(orm), ranking(q_pi)
    points = {"greedy": [(1, greedy.reward, new_tokens(greedy))],
              "sample": [(1, reward.mean(1), spent)],
              "majority": [(n, majority_vote(answers, reward, n), n * spent) for n in ns],
              "orm": [(n, best_of_n(by_orm, reward, n), n * spent) for n in ns],
              "best_q": [(n, best_of_n(by_q, reward, n), n * spent) for n in ns],
              "pass": [(n, pass_at_n(reward, n), n * spent) for n in ns]}
    solved = None
    few = [w for w in widths if w <= 8]                                         # for the provers with their own Q^mu
    for method, a, mu, each in (("q_beam", 0.0, None, widths), ("pav_beam", alpha, None, widths),
                                ("weak_beam", alpha, run.model("q_weak"), few),
                                ("strong_beam", alpha, run.model("q_strong"), few)):
        bar, points[method] = progress(method, sum(each)), []
        for width in each:
            r = beam_search(base, q_pi, task, enc, problems, width=width, alpha=a, K=K, q_mu_model=mu, seed=seed, **run.how)
            points[method].append((width, r.reward, r.tokens.float()))
            bar.set_postfix_str(f", width {width}: {r.reward.mean():.3f} at {r.tokens.float().mean():.0f} tokens", False)
            bar.update(width)
            if method == "pav_beam" and r.reward.any():
                i = int(r.reward.argmax())
                solved = problems[i], r.responses[i]
        bar.close()

    state = {}
    for m, rows in points.items():
        n, acc, tokens = zip(*rows)
        state |= {f"{m}/n": torch.tensor(n), f"{m}/acc": torch.stack(acc), f"{m}/tokens": torch.stack(tokens)}
    write_whole(run.out / "eval.safetensors", lambda p: save_file(state, p))
    right = s[(s.reward == 1).nonzero()[:2000, 0]]
    wrong = wrong_steps(task, enc, problems, right, np.random.default_rng(seed)) if len(right) else right
    failures = [v for i, t in zip(s.problem.tolist(), texts) if (v := task.judge(problems[i], t)) != "right"]
    run.write("facts.json", {"base_sampled": round(float(reward.mean()), 4),
                             "base_greedy": round(float(greedy.reward.mean()), 4),
                             "planning_failure_share": round(failures.count("planning") / max(1, len(failures)), 4),
                             "wrong_step_auc": {"orm": tells_apart(orm, right, wrong),
                                                "q_pi": tells_apart(q_pi, right, wrong)}})
    text = explain(run, base, q_pi, *solved, alpha=alpha, K=K, seed=seed) if solved else "no problem was solved\n"
    write_whole(run.out / "example.txt", lambda p: p.write_text(text))


def final_score(verifier, traces):
    """Score (N,) of each trace at its last finished step: the verifier as an ORM."""
    return score(verifier, traces.tokens, traces.ends.gather(1, (traces.ends >= 0).sum(1, keepdim=True) - 1))[:, 0]


def tells_apart(verifier, right, wrong):
    """AUC of the final score between right traces and the same ones with a wrong step put in: 1 is a verifier that is
    never fooled. None if there is no right trace."""
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

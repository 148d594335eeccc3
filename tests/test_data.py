"""Traces and the verifiers' data: where steps end, and that every label of a recipe is worth what it says."""
from dataclasses import replace

import numpy as np
import pytest
import tiktoken
import torch
from conftest import Says, WalkPolicy

from minipav import advantage, data
from minipav.data import RECIPES, Collect, corrupted_steps, first_pits
from minipav.tokenizer import END, decode_rows, delimiter_tokens, encode_rows, join, pad_token
from minipav.traces import Env, Traces, label_with_outcome, responses, step_ends
from minipav.verifier import exact_q

# ---- steps

@pytest.fixture(scope="module")
def merging():
    """An encoding of bytes, and of ".\\n" and "\\n\\n", which real encodings have as one token, too."""
    ranks = {bytes([b]): b for b in range(256)} | {b".\n": 256, b"\n\n": 257}
    return tiktoken.Encoding("merging", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={END: 258})


def test_step_ends_and_join():
    nl, end = 1, 2
    tokens = torch.tensor([[9, nl, 5, 5, nl, 6, end, 0], [9, nl, 5, end, 0, 0, 0, 0],
                           [9, 8, nl, 7, 7, 7, 7, 7]])
    ends = step_ends(tokens, torch.tensor([2, 2, 3]), torch.tensor([7, 4, 8]), [nl, end])
    assert ends.tolist() == [[1, 4, 6], [1, 3, -1], [2, -1, -1]]    # a prompt's own newlines are no steps
    out, lengths = join(tokens[:, :2], torch.tensor([2, 1, 2]), tokens[:, 2:5], torch.tensor([3, 2, 0]), 0)
    assert out.tolist() == [[9, nl, 5, 5, nl], [9, 5, end, 0, 0], [9, 8, 0, 0, 0]]
    assert lengths.tolist() == [5, 3, 2]


def test_every_token_with_a_delimiter_in_it_ends_a_step(merging):
    """A step that ends with a merged token would run on into the next one, and be valued with it."""
    assert delimiter_tokens(merging, "\n") == [10, 256, 257, 258]
    assert delimiter_tokens(merging, ".") == [46, 256, 258]
    text = "q?\n" + "one.\ntwo\n\nthree\nfour" + END
    tokens, lengths = encode_rows(merging, [text, "q?\n" + "a\n"])
    ends = step_ends(tokens, torch.tensor([3, 3]), lengths, delimiter_tokens(merging, "\n"))
    cuts = [merging.decode(tokens[0, a + 1:b + 1].tolist()) for a, b in zip(ends[0], ends[0, 1:])]
    assert cuts == ["one.\n", "two\n\n", "three\n", "four" + END]
    assert 256 in tokens[0] and 257 in tokens[0] and pad_token(merging) == merging.eot_token
    assert ends[1].tolist() == [2, 4, -1, -1, -1], "padding, which is end-of-text here, ends no step"


def test_end_of_text_is_a_token_and_not_its_spelling(calculator):
    """A policy that spells <|endoftext|> in ordinary tokens has not ended, whatever its text looks like."""
    env, problems = calculator
    prompt, spelled = env.task.prompt(problems[0]), "+1 = 2" + END
    rows = [env.enc.encode(prompt) + env.enc.encode(spelled, disallowed_special=()),
            env.enc.encode(prompt + spelled, allowed_special={END})]
    lengths, start = torch.tensor([len(r) for r in rows]), torch.tensor([len(env.enc.encode(prompt))] * 2)
    tokens = torch.tensor([r + [0] * (max(lengths) - len(r)) for r in rows])
    assert decode_rows(env.enc, tokens, lengths) == [prompt + spelled] * 2
    ordinary, ended = responses(env.enc, tokens, lengths, start)
    assert ended == spelled and END not in ordinary and env.task.answer(ordinary) is None
    t = label_with_outcome(env, problems, torch.tensor([0, 0]), tokens, lengths, start)
    assert t.exact.any(1).tolist() == [False, True]


def test_traces_of_other_widths_lie_one_behind_the_other(batch):
    """What is filled in is no token, no step end and no label."""
    one = vars(batch[1:2])
    narrow = Traces(**{k: v if v.dim() == 1 else v[:, :5 if k == "tokens" else 2] for k, v in one.items()})
    both = Traces.cat([narrow, batch], pad=7)
    assert len(both) == 4 and both.tokens[0].tolist() == [5, 6, 7, 8, 3, 7, 7, 7]
    assert both.ends[0].tolist() == [1, 4, -1] and both.labelled[0].tolist() == [True, True, False]
    assert all(torch.equal(getattr(both[1:], k), v) for k, v in vars(batch).items())
    assert both.last.tolist() == [1, 2, 1, 1]


# ---- corrupted steps

def test_corrupted_steps_are_labelled_zero_and_nothing_before_them_is(calculator):
    env, problems = calculator
    rng = np.random.default_rng(0)
    demos = env.task.demonstrations(problems, 1.0, rng)
    prompts = [env.task.prompt(p) for p in problems]
    rows, lengths = encode_rows(env.enc, [p + d for p, d in zip(prompts, demos)])
    starts = encode_rows(env.enc, prompts)[1]
    traces = label_with_outcome(env, problems, torch.arange(10), rows, lengths, starts)
    assert (traces.reward == 1).all() and (traces.q[traces.labelled] == 1).all()
    wrong = corrupted_steps(env, problems, traces, rng)
    assert len(wrong) == 10 and not wrong.reward.any() and not wrong.q.any()
    assert not wrong.labelled[:, 0].any()
    assert wrong.exact.gather(1, wrong.last[:, None]).all() and not wrong.cost.any()
    for b, first in enumerate(wrong.labelled.int().argmax(1)):
        before = wrong.ends[b, first - 1] + 1
        assert torch.equal(wrong.tokens[b, :before], traces.tokens[b, :before])
        assert not torch.equal(wrong.tokens[b, before:wrong.ends[b, first]],
                               traces.tokens[b, before:wrong.ends[b, first]])


def test_a_task_that_cannot_corrupt_has_no_corrupted_steps(calculator):
    env, problems = calculator
    walk = WalkPolicy(env, problems)
    seeds = advantage.seed_rollouts(walk, env, problems, 1, seed=0)
    cannot = Env(type("Task", (), {"corrupt": None})(), env.enc)
    assert len(corrupted_steps(cannot, problems, seeds, None)) == 0
    assert len(corrupted_steps(env, problems, seeds[:0], None)) == 0


# ---- recipes

@pytest.fixture(scope="module")
def walked(calculator):
    """(Env, five problems that the uniform walk solves at times, the walk, seeds for pi and a prover)"""
    env, some = calculator[0], calculator[0].task.problems("test", 60, 0)
    value = env.task.exact(some)
    problems = [some[i] for i in sorted(range(60), key=lambda i: -value(i, ""))[:5]]
    walk = WalkPolicy(env, problems)
    return env, problems, walk, {name: advantage.seed_rollouts(walk, env, problems, 16, seed=k)
                                 for k, name in enumerate(("base", "weak"))}


@pytest.fixture
def collect(walked):
    """(Collect, policies, their seeds): pi and the prover are the uniform walk, whose values are known."""
    env, problems, walk, seeds = walked
    c = Collect(env, problems, n_mc=4, branches=160, prover_branches=60, corrupted_fraction=0.5,
                q_from="base", pit_traces=20, pit_threshold=0.2, seed=5, rng=np.random.default_rng(0))
    return c, dict.fromkeys(seeds, walk), seeds


def deviations(c, t):
    """How far the mean label at each step end 0, 1, ... is from the exact one, in standard errors; what is
    exact has to be so to the bit. (Labels at one step end are independent of each other; those of one trace
    are not.)"""
    q = exact_q(c.env, c.problems, t)
    assert (t.q[t.exact & t.labelled] == q[t.exact & t.labelled]).all()
    some = t.labelled & ~t.exact & (q > 0)                      # where Q is 0 so must the label be:
    assert not t.q[t.labelled & (q == 0)].any()
    n, gap, spread = t.n * some, (t.q - q).nan_to_num() * some, (q * (1 - q)).nan_to_num() * some
    there = some.any(0)
    return ((n * gap).sum(0) / (n * spread).sum(0).sqrt())[there], there.sum()


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_labels_of_a_recipe_are_unbiased(collect, recipe):
    """Of seeds, branches, completions of a prover, corrupted copies, and re-estimates up to first pits (the
    probe that found a pit says 0 of it, and must not be its label)."""
    c, policies, seeds = collect
    made = RECIPES[recipe](c, policies, seeds)
    assert made.keys() == policies.keys()
    for name, t in made.items():
        z, places = deviations(c, t)
        assert places >= c.env.task.H - 1 and z.abs().max() < 4, (name, z)
        assert len(t) > len(seeds[name]) and (t.ends.gather(1, t.last[:, None])[:, 0] + 1 <= t.lengths).all()
    if recipe == "paper":                                       # place by place: n_mc completions, or 4 n_mc
        t = made["base"]
        q, places = exact_q(c.env, c.problems, t), t.labelled & ~t.exact
        assert set(t.n[places].tolist()) == {4, 16} and (t.n[places] == 4).sum() > 50
        assert ((t.q - q)[places].abs() <= 4 * advantage.standard_error(q, t.n)[places]).all()


@pytest.mark.parametrize("pits", [True, False])
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_counts_the_tokens_it_samples(collect, recipe, pits, monkeypatch):
    """The costs of a training are compared by these numbers: of every rollout, those for probing included,
    also if no pit is found."""
    c, policies, seeds = collect
    spent, sample = [], advantage.sample
    if not pits:
        monkeypatch.setattr(data, "first_pit", lambda q, *_: torch.full((len(q),), -1))

    def counting(*args, **kw):
        s = sample(*args, **kw)
        spent.append(int(s.lengths.sum()))
        return s
    monkeypatch.setattr(advantage, "sample", counting)
    made = RECIPES[recipe](c, policies, seeds)
    counted, before = (sum(int(t.cost.sum()) for t in x.values()) for x in (made, seeds))
    assert len(spent) >= 2 and counted - before == sum(spent)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_count_of_0_means_none(collect, recipe):
    """Then the seeds are all there is: as they are (dense), or with completions of all prefixes (paper)."""
    c, policies, seeds = collect
    c = replace(c, branches=0, prover_branches=0, corrupted_fraction=0.0, pit_traces=0)
    made = RECIPES[recipe](c, policies, seeds)
    for name, t in made.items():
        assert len(t) == len(seeds[name]) and torch.equal(t.tokens, seeds[name].tokens)
        assert (t.n[t.labelled & ~t.exact] == (1 if recipe == "dense" else c.n_mc)).all()
        assert torch.equal(t.labelled, t.ends >= 0)


@pytest.mark.parametrize("zero, gone", [("branches", 160), ("corrupted_fraction", 40), ("pit_traces", 1)])
def test_each_count_of_the_dense_recipe_is_its_own(collect, zero, gone):
    """Without branches there are neither pits, nor corrupted copies of right branches; without the others the
    rest stays as it was."""
    c, policies, seeds = collect
    whole = RECIPES["dense"](c, policies, seeds)["base"]
    c = replace(c, rng=np.random.default_rng(0), **{zero: type(getattr(c, zero))(0)})
    less = RECIPES["dense"](c, policies, seeds)["base"]
    own = len(seeds["base"])
    assert len(whole) - len(less) >= gone and torch.equal(less.tokens[:own], seeds["base"].tokens)
    if zero == "branches":
        assert len(less) == own + 40                            # half of the seeds, corrupted
    else:
        assert torch.equal(less.tokens[:own + 160], whole.tokens[:own + 160])


def test_first_pits_are_estimated_anew_up_to_the_pit(walked):
    """App. D: labelled up to the pit, where the new estimate is 0 or not, and nowhere behind it. No state is
    worth more than 1."""
    env, problems, walk, seeds = *walked[:3], walked[3]["base"]
    wrong = seeds[seeds.reward == 0]
    probed = advantage.monte_carlo(walk, env, problems, wrong, wrong.ends >= 0, 2, seed=1)
    pits = first_pits(walk, env, problems, probed, 30, 0.2, seed=2)
    q = exact_q(env, problems, pits)
    assert 3 < len(pits) < len(wrong) and (pits.reward == 0).all()
    for t, exact in zip((pits[[i]] for i in range(len(pits))), q):
        pit = int(t.labelled[0].nonzero().max())
        assert t.labelled[0, :pit + 1].all() and 1 <= pit <= int(t.last)
        estimated = t.labelled[0] & ~t.exact[0]
        assert (t.n[0][estimated] == 30).all()
        error = advantage.standard_error(t.q[0], t.n[0])
        assert ((t.q[0] - exact)[estimated].abs() <= 4 * error[estimated]).all()
    assert len(first_pits(walk, env, problems, probed, 30, 1.0, seed=2)) == 0


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_prover_completes_for_itself(collect, recipe):
    """One that always ends at once: each of its completions is one token."""
    c, policies, seeds = collect
    policies = policies | {"weak": Says(c.env, c.problems, END)}
    t, own = RECIPES[recipe](c, policies, seeds)["weak"], seeds["weak"]
    if recipe == "dense":
        assert (t.cost[len(own):len(own) + 60] == 1).all()
    else:
        assert torch.equal(t.cost[:len(own)] - own.cost, c.n_mc * ((own.ends >= 0).sum(1) - 1))


@pytest.mark.parametrize("q_from", ["base", "weak"])
def test_branches_are_off_right_seeds(collect, q_from):
    """Of pi and of q_from; there pi has none."""
    c, policies, seeds = collect
    if q_from == "weak":
        seeds = seeds | {"base": replace(seeds["base"], reward=torch.zeros(80))}
    c = replace(c, q_from=q_from)
    own, branches = seeds[q_from], RECIPES["dense"](c, policies, seeds)["base"][80:240]
    right = [row for row, reward in zip(own.tokens.tolist(), own.reward) if reward]
    ends = branches.ends.gather(1, branches.labelled.int().argmax(1, keepdim=True))[:, 0]
    assert len(own) == 80 and 0 < len(right) < 80
    for row, end in zip(branches.tokens.tolist(), ends.tolist()):
        assert any(x[:end + 1] == row[:end + 1] for x in right)


def test_seeds_and_right_branches_are_copied_with_a_corrupted_step(collect):
    """Half of the seeds and every branch that is right; a prover has as large a share of them."""
    c, policies, seeds = collect
    made = RECIPES["dense"](c, policies, seeds)
    copies = int((made["base"].cost == 0).sum())                # nobody sampled them
    assert copies == 40 + made["base"].reward[80:240].sum() > 40
    assert int((made["weak"].cost == 0).sum()) == min(60, copies)

"""The verifier trainer: where the loss is, and what the metrics mean."""
from dataclasses import replace

import pytest
import torch
from conftest import make_traces, tiny

from minipav import cache, sampler, verifier
from minipav.sft import sft_loss
from minipav.targets import smoothed
from minipav.tokenizer import join
from minipav.traces import step_ends
from minipav.utils import Fail
from minipav.verifier import (
    Values,
    auc,
    evaluate,
    label_weights,
    outcome_only,
    score,
    train_verifier,
    verifier_loss,
)


def traces(N=6, T=14, nl=1):
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 4, (N, T), generator=g)
    lengths, prompts = torch.randint(8, T + 1, (N,), generator=g), torch.full((N,), 3)
    ends = step_ends(tokens, prompts, lengths, [nl])
    return make_traces(tokens, lengths, ends, q=torch.rand(ends.shape, generator=g), reward=torch.ones(N))


def test_loss_touches_step_ends_only():
    """Gradient reaches the hidden states at labelled step ends and no other position."""
    model, t = tiny(head="scalar"), traces()
    seen = {}
    trunk = model.trunk

    def spy(tokens, at):
        seen["at"] = torch.zeros_like(tokens, dtype=torch.bool).index_put(at, torch.tensor(True))
        return trunk(tokens, at=at)
    model.trunk = spy
    verifier_loss(model, t.tokens, t.ends, t.q, t.n, t.labelled.float()).backward()
    want = torch.zeros_like(seen["at"])
    rows, places = (t.ends >= 0).nonzero(as_tuple=True)
    want[rows, t.ends[rows, places]] = True
    assert torch.equal(seen["at"], want) and 0 < want.sum() < want.numel()


def test_loss_is_cross_entropy_on_soft_labels():
    model, t = tiny(head="scalar"), traces()
    w = torch.rand(t.q.shape) * t.labelled
    p, total = model(t.tokens)[..., 0].sigmoid(), 0.0
    for i, h in w.nonzero().tolist():
        v = p[i, t.ends[i, h]]
        total -= w[i, h] * (t.q[i, h] * v.log() + (1 - t.q[i, h]) * (1 - v).log())
    assert torch.allclose(verifier_loss(model, t.tokens, t.ends, t.q, t.n, w), total, atol=1e-5)


def test_batched_scores_equal_single_rows(monkeypatch):
    model, t = tiny(head="scalar"), traces()
    monkeypatch.setattr(verifier, "tokens_per_forward", lambda model: 30)
    got = score(model, t.tokens, t.ends)
    for i in range(len(t)):
        row = model(t.tokens[i:i + 1, :t.lengths[i]]).sigmoid()[0, :, 0]
        for h, e in enumerate(t.ends[i].tolist()):
            assert torch.isnan(got[i, h]) if e < 0 else abs(got[i, h] - row[e]) < 1e-5


def test_policy_loss_is_on_the_response_with_its_end_token_and_nowhere_else():
    model, (rows, lengths) = tiny(), (torch.randint(29, (3, 9)), torch.tensor([9, 7, 6]))
    prompts = torch.tensor([3, 2, 5])
    logp = model(rows)[:, :-1].log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    parts = [logp[b, p - 1:n - 1] for b, (p, n) in enumerate(zip(prompts, lengths))]
    assert torch.allclose(sft_loss(model, rows, lengths, prompts), -torch.cat(parts).sum(), atol=1e-4)


def test_the_orm_sees_the_last_place_alone():
    t = traces()
    o = outcome_only(replace(t, n=9 * t.n, exact=t.labelled))
    assert (o.labelled.sum(1) == 1).all() and (label_weights(o)[o.labelled] == 1).all()
    assert (o.ends.gather(1, o.labelled.int().argmax(1, keepdim=True))[:, 0] == t.ends.max(1).values).all()


def test_balance_gives_both_buckets_the_same_weight():
    t = traces()
    t.q = t.q ** 4
    w = label_weights(t, balance=True)
    assert torch.allclose(w[(t.q < 0.5) & t.labelled].sum(), w[(t.q >= 0.5) & t.labelled].sum())
    assert torch.equal(w > 0, t.labelled)
    known = make_traces(t.tokens, t.lengths, t.ends, exact=t.labelled)
    assert torch.equal(label_weights(known), t.labelled * 4.0)                   # what is known weighs as 4
    t.n *= 16
    assert torch.equal(label_weights(t), t.labelled * 4.0)                       # so do 16 completions
    t.labelled[:, 0] = False
    assert not label_weights(t)[:, 0].any(), "a count is no label"


@pytest.mark.parametrize("groups", [1, 7])
def test_auc_counts_pairs(groups):
    g = torch.Generator().manual_seed(0)
    of = torch.randint(groups, (60,), generator=g)
    s, y, w = torch.rand(3, 60, generator=g)
    s, y = (s * 8).round(), y.round()
    pairs = [(w[i] * w[j], float(s[i] > s[j]) + 0.5 * float(s[i] == s[j]))
             for i in range(60) for j in range(60) if y[i] > y[j] and of[i] == of[j]]
    assert abs(auc(s, y, w, of) - sum(a * b for a, b in pairs) / sum(a for a, _ in pairs)) < 1e-6
    assert auc(s, y, w, torch.arange(60)) == auc(s, 0 * y, w) == 0.5, "no pairs"
    q, twice = torch.rand(60, generator=g), torch.cat
    both = auc(twice([s, s]), twice([q.ceil(), 0 * q]), twice([w * q, w * (1 - q)]), twice([of, of]))
    assert auc(s, q, w, of) == pytest.approx(both), "a soft label is both"


def test_the_report_is_that_of_the_weighted_labels():
    model, t = tiny(head="scalar"), traces()
    t.q, t.n = t.q.round(), t.n * torch.arange(1, 7)[:, None] ** 2
    r, q, has, w = evaluate(model, t), score(model, t.tokens, t.ends), t.labelled, label_weights(t)

    def mean(x, m):
        return float((w * x)[m].sum() / w[m].sum())
    error, bce, of = (q - t.q) ** 2, -(t.q * q.log() + (1 - t.q) * (1 - q).log()), has.nonzero()[:, 0]
    assert [r.brier, r.loss] == pytest.approx([mean(error, has), mean(bce, has)], abs=1e-5)
    aucs = [auc(q[has], t.q[has], w[has], group) for group in (None, of)]
    assert [r.auc, r.auc_within] == pytest.approx(aucs, abs=1e-6) and len(w[has].unique()) > 2
    for h, n, *found in r.steps:
        m = has & (torch.arange(has.shape[1]) == h)
        assert n == m.sum() and found == pytest.approx([mean(x, m) for x in (q, t.q, error)], abs=1e-5)
    assert sum(n for _, n, *_ in r.steps) == int(has.sum()) and r.steps[0][0] == 0


def test_the_best_checkpoint_on_held_out_traces_is_kept(monkeypatch):
    """Their labels are the opposite ones, so that training makes it worse."""
    seen, t = [], traces(24)
    monkeypatch.setattr(verifier, "evaluate", lambda *args: seen.append(evaluate(*args)) or seen[-1])
    held_out = replace(t, q=1 - t.q)
    model, report = train_verifier(tiny(head="scalar"), t, held_out, steps=12, batch_size=8, lr_muon=0.0,
                                   lr_adamw=0.01, seed=0, log=lambda *x: None)
    losses = [r.loss for r in seen]
    assert report.loss == min(losses) < losses[-1] and evaluate(model, held_out).loss == report.loss


@pytest.mark.parametrize("fused", [False, True])
def test_values_of_growing_rows_equal_full_scoring(monkeypatch, fused):
    """The cached values that the beam uses, over three ragged steps; rows are copied and dropped. Also by the
    products of a GPU."""
    monkeypatch.setattr(cache, "fused", lambda device: fused)
    model, g = tiny(head="scalar"), torch.Generator().manual_seed(0)
    rows, lengths = torch.randint(29, (3, 5), generator=g), torch.tensor([2, 5, 3])
    values = Values(model, rows, lengths)
    for _ in range(3):
        parent = torch.randint(len(lengths), (4,), generator=g).sort().values
        new, count = torch.randint(29, (4, 4), generator=g), torch.randint(1, 5, (4,), generator=g)
        values = values.children(parent, new, count)
        rows, lengths = join(rows[parent], lengths[parent], new, count, 0)
        assert torch.allclose(values.q, score(model, rows, lengths[:, None] - 1)[:, 0], atol=1e-4)
        keep = torch.tensor([3, 0])
        values, rows, lengths = values[keep], rows[keep], lengths[keep]


def test_a_policy_is_no_verifier():
    t = traces()
    for model in (tiny(), tiny(head="scalar", target="mine")):
        with pytest.raises(Fail, match="no verifier"):
            score(model, t.tokens, t.ends)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_value_at_the_end_is_that_of_the_whole_row(monkeypatch, bf16):
    model, tokens = tiny(head="scalar"), torch.randint(4, 29, (7, 12))
    model.bf16 = bf16
    lengths = torch.tensor([1, 12, 5, 5, 9, 2, 12])
    want = score(model, tokens, lengths[:, None] - 1)[:, 0]
    for size in (1 << 13, 30):
        monkeypatch.setattr(sampler, "tokens_per_forward", lambda model, size=size: size)
        got = Values(model, tokens, lengths).q
        assert got.dtype == torch.float32 and torch.allclose(got, want, atol=0.02 if bf16 else 1e-6)


def test_a_target_brings_its_labels_and_balance_its_weights():
    def fit(t, **how):
        quick = dict(steps=2, batch_size=4, lr_muon=0.0, lr_adamw=0.01, seed=0, log=lambda *x: None)
        return torch.cat([p.flatten() for p in train_verifier(tiny(), t, t, **quick, **how)[0].parameters()])
    t = traces()
    t.q, t.cost = t.q ** 4, t.cost + 1
    plain = fit(t)
    assert torch.equal(fit(t, target="seer"), fit(smoothed(t))) and not torch.equal(fit(smoothed(t)), plain)
    assert not torch.equal(fit(t, balance=True), plain)

"""The sampler: exact, reproducible, and the same whatever the batch."""
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

from minipav import cache, graphs, kernels, sampler
from minipav.sampler import LENGTH, choose, sample, uniform

STOP = 3


def prompts(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([1, 5, 3, 5])
    rows = torch.randint(4, model.config.vocab_size, (4, 5), generator=g)
    return rows.masked_fill(torch.arange(5) >= lengths[:, None], 0), lengths


def run(model, n=8, seed=1, max_new_tokens=12, stop=(STOP,), **kw):
    return sample(model, *prompts(model), n, max_new_tokens=max_new_tokens, stop=list(stop), seed=seed,
                  logprobs=True, **kw)


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "lengths", "finish_reason"))


def test_greedy_is_exact():
    model = tiny(std=0.2)
    got = run(model, n=1, temperature=0, stop=(STOP, 17))
    for b, (row, length) in enumerate(zip(*prompts(model))):
        row, new = row[:length].tolist(), []
        while len(new) < 12 and (not new or new[-1] not in (STOP, 17)):
            new.append(int(model(torch.tensor([row + new]))[0, -1].argmax()))
        assert got.tokens[b, :got.lengths[b]].tolist() == new
        assert got.finish_reason[b] == (new[-1] if new[-1] in (STOP, 17) else LENGTH)


def test_same_seed_same_samples_other_seed_other_samples():
    model = tiny()
    assert same(run(model), run(model)) and not same(run(model), run(model, seed=2))


def test_the_stop_token_is_kept_and_nothing_follows_it():
    model = tiny(std=0.05)
    s = run(model, n=100, pad=0)
    stopped = s.finish_reason == STOP
    assert 0 < stopped.sum() < len(stopped)
    assert (s.tokens[stopped].gather(1, s.lengths[stopped, None] - 1) == STOP).all()
    after = torch.arange(12) >= s.lengths[:, None]
    assert (s.tokens[after] == 0).all() and (s.logprobs[after] == 0).all() and (s.logprobs[~after] < 0).all()
    assert (s.lengths[~stopped] == 12).all() and (s.finish_reason[~stopped] == LENGTH).all()
    assert (s.tokens[~after] == STOP).sum() == stopped.sum()


def test_it_stops_at_any_of_several_tokens_and_says_which():
    s = run(tiny(std=0.05), n=200, stop=(STOP, 5))
    assert {STOP, 5, LENGTH} >= set(s.finish_reason.tolist()) >= {STOP, 5}
    stopped = s.finish_reason >= 0
    assert torch.equal(s.tokens.gather(1, s.lengths[:, None] - 1)[:, 0][stopped], s.finish_reason[stopped])


def test_compaction_and_chunks_change_no_sample():
    """The uniform number of a token belongs to its sample, not to its place in the batch."""
    model = tiny(std=0.05)
    one = run(model, n=20)
    for kw in (dict(max_tokens_in_flight=17), dict(max_tokens_in_flight=200)):
        assert same(one, run(model, n=20, **kw))


def test_the_kv_buffers_keep_to_their_bound(monkeypatch):
    """However many samples there are, prefixes and new tokens of a chunk fit; one row always goes."""
    seen, widen = [], sampler.KVCache.widen

    def spy(cache, *room):
        widen(cache, *room)
        seen.append((len(cache.lengths), sum(x[0][0][:, 0, :, 0].numel() for x in (cache.prefix, cache.new))))
    monkeypatch.setattr(sampler.KVCache, "widen", spy)
    for bound in (1, 40, 200):
        seen.clear()
        run(tiny(), n=8, max_tokens_in_flight=bound)
        assert sum(rows for rows, _ in seen) == 32 and all(n <= bound or rows == 1 for rows, n in seen)
    assert max(n for _, n in seen) > 140


def test_logprobs_are_the_models():
    model = tiny()
    s, (rows, lengths) = run(model, n=3), prompts(model)
    for i in range(12):
        p, k = lengths[i // 3], s.lengths[i]
        row = torch.cat([rows[i // 3, :p], s.tokens[i, :k]])[None]
        want = model(row)[0, p - 1:-1].log_softmax(-1).gather(1, s.tokens[i, :k, None])[:, 0]
        assert torch.allclose(s.logprobs[i, :k], want, atol=1e-4)


def test_the_distribution_of_whole_samples_is_exact():
    """All 3-token continuations of a 4-token toy model, stopping and compaction: their probabilities."""
    model, n = tiny(vocab_size=4, std=0.35), 40_000
    s = sample(model, torch.tensor([[1, 2]]), torch.tensor([2]), n, max_new_tokens=3, stop=[STOP], seed=0)
    expected = {}
    for seq in itertools.product(range(4), repeat=3):
        cut = seq[:seq.index(STOP) + 1] if STOP in seq else seq
        logp = model(torch.tensor([[1, 2, *cut]]))[0].log_softmax(-1)
        expected[cut] = sum(logp[1 + i, t] for i, t in enumerate(cut)).exp().item()
    assert abs(sum(expected.values()) - 1) < 1e-4
    got = [tuple(r[:k]) for r, k in zip(s.tokens.tolist(), s.lengths.tolist())]
    assert set(got) <= set(expected)
    chi2 = sum((got.count(c) - n * p) ** 2 / (n * p) for c, p in expected.items() if n * p > 5)
    cells = sum(n * p > 5 for p in expected.values())
    assert chi2 < cells + 4 * (2 * cells) ** 0.5                                # mean + 4 standard deviations


def test_top_p_keeps_exactly_the_right_tokens():
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(4000, 4)
    u = torch.arange(4000) / 4000
    share = lambda **kw: torch.bincount(choose(logits, u, **kw), minlength=4) / 4000  # noqa: E731
    assert torch.allclose(share(), torch.tensor([0.1, 0.4, 0.3, 0.2]), atol=1e-3)
    assert torch.allclose(share(top_p=0.69), torch.tensor([0, 4 / 7, 3 / 7, 0]), atol=1e-3)
    assert torch.allclose(share(top_p=0.71), torch.tensor([0, 4 / 9, 3 / 9, 2 / 9]), atol=1e-3)
    cold = torch.tensor([0.1, 0.4, 0.3, 0.2]) ** 2
    assert torch.allclose(share(temperature=0.5), cold / cold.sum(), atol=1e-3)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_the_nucleus_is_that_of_the_definition(top_p):
    """Flat and peaked rows of 200 tokens at a fine grid of uniform numbers: each token has its share."""
    torch.manual_seed(0)
    n, sizes = 20_000, []
    for scale in torch.linspace(0.1, 6, 12):
        logits = torch.randn(200) * scale
        p, order = logits.softmax(-1).sort(descending=True)
        p = p[:int((p.cumsum(0) < top_p).sum()) + 1]
        want = torch.zeros(200).index_copy(0, order[:len(p)], p / p.sum())
        got = choose(logits.expand(n, 200), (torch.arange(n) + 0.5) / n, top_p=top_p)
        got = torch.bincount(got, minlength=200)
        assert ((got > 0) <= (want > 0)).all() and (got / n - want).abs().max() < 2e-3
        sizes.append(len(p))
    assert min(sizes) < 10 and max(sizes) > 30


def test_uniform_numbers_are_uniform_and_belong_to_seed_row_and_token():
    row = torch.arange(1 << 16)
    u = torch.stack([uniform(seed, row, t) for seed in (0, 1, 2**32 - 1) for t in (0, 1, 500)])
    assert u.min() >= 0 and u.max() < 1 and torch.equal(u[4, 7:9], uniform(1, torch.tensor([7, 8]), 1))
    for x in u:
        counts = torch.bincount((x * 64).long(), minlength=64)
        assert ((counts - 1024) ** 2 / 1024).sum() < 63 + 4 * 126 ** 0.5        # chi2: mean + 4 standard dev.
    both = torch.cat([u, u.roll(1, 1)])                         # and their neighbours' in the batch
    assert (torch.corrcoef(both) - torch.eye(18)).abs().max() < 0.02            # 5 standard deviations
    calls = [uniform(seed, row[:2000, None], torch.arange(40)).double() for seed in range(100)]
    spread = sum(((u - 0.5).mean() ** 2) * 12 * u.numel() for u in calls) / 100     # 1 if all are independent
    assert abs(spread - 1) < 4 * (2 / 100) ** 0.5


def test_a_token_of_probability_zero_is_never_chosen():
    """An inverse CDF that looks up u * total <= cdf picks index 0 at u = 0; a clamp picks the last at 1."""
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 1.0, float("-inf")]]).expand(3, 5)
    for kw in (dict(), dict(top_p=1.0), dict(top_p=0.9999)):
        assert choose(logits, torch.tensor([0.0, 0.5, 1 - 2 ** -23]), **kw).tolist() == [1, 3, 3]


def test_rows_that_do_not_fit_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match="block_size"):
        run(model, max_new_tokens=40)


def record(monkeypatch):
    """As on a GPU, with a recording that runs the step, and the kernel's work done by KVCache.step."""
    def attend(cache, *args):
        count, cache.count = cache.count, int(cache.count)
        cache.widen(cache.room)
        try:
            return cache.step(*args)
        finally:
            cache.count = count
    monkeypatch.setattr(graphs, "wanted", lambda device: True)
    monkeypatch.setattr(graphs, "record", lambda step: SimpleNamespace(replay=step))
    monkeypatch.setattr(kernels, "attend", attend)


def test_a_recorded_step_samples_the_same(monkeypatch):
    """As on a GPU, whose steps all have one shape."""
    model = tiny(std=0.2, block_size=96)
    kw = dict(n=20, top_p=0.9, max_new_tokens=80, max_tokens_in_flight=2000)
    want, widths = run(model, **kw), []
    widen = sampler.KVCache.widen
    monkeypatch.setattr(sampler.KVCache, "widen", lambda self, *a: widths.append(a) or widen(self, *a))
    record(monkeypatch)
    got = run(model, **kw)
    assert same(got, want) and torch.allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert [w for w in set(widths) if w[1:]] == [(79, True)]


@pytest.mark.parametrize("recorded", [False, True])
def test_a_cache_holds_what_its_rows_sampled_although_they_left_the_batch(monkeypatch, recorded):
    if recorded:
        record(monkeypatch)
    model, sizes = tiny(std=0.2, block_size=96), []
    keep = sampler.KVCache.keep
    monkeypatch.setattr(sampler.KVCache, "keep", lambda *a: sizes.append(len(a[1])) or keep(*a))
    tokens, lengths = prompts(model)
    which = torch.arange(4).repeat_interleave(20)
    kv, hidden = sampler.prefill(model, tokens, which, lengths[which])
    stops = torch.zeros(29, dtype=torch.bool).index_fill_(0, torch.tensor([STOP]), True)
    new, count, *_ = sampler.decode(model, kv, hidden, torch.arange(80), 1, 80, stops, whole=True)
    assert len(sizes) > 1 - recorded and sizes[-1] < 40
    got = model.trunk(new.gather(1, count[:, None] - 1), kv.fold(torch.arange(80), count - 1))[:, 0]
    for row in range(80):
        text = torch.cat([tokens[which[row], :lengths[which[row]]], new[row, :count[row]]])
        assert torch.allclose(got[row], model.trunk(text[None])[0, -1], atol=1e-4)


def test_slots_beyond_the_prompts_change_no_sample(monkeypatch):
    """As on a GPU, where they are a multiple of 16."""
    want = run(tiny(std=0.2))
    monkeypatch.setattr(cache, "aligned", lambda slots, device: slots + 3)
    assert same(run(tiny(std=0.2)), want)

"""The GPT: what is cached equals what is recomputed; what is saved equals what is loaded."""
import json

import pytest
import torch
from conftest import tiny

from minipav import sampler
from minipav.model import GPT, GPTConfig, causal_attention
from minipav.sampler import prefill
from minipav.utils import Fail


def read(model, idx, lengths, which=None):
    """The cache behind the first lengths[r] tokens of idx[which[r]], and the logits of the last of them."""
    which = torch.arange(len(idx)) if which is None else which
    cache, hidden = prefill(model, idx, which, lengths)
    return cache, model.head(hidden)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("prompt", [1, 3, 7])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(batch, prompt):
    """A cache slot or rotary position that is off by one shows at the second decode step, not the first."""
    model, steps = tiny(qkv_bias=True), 5
    idx = torch.randint(29, (batch, prompt + steps))
    full = model(idx)
    cache, last = read(model, idx, torch.full((batch,), prompt))
    assert torch.allclose(last, full[:, prompt - 1], atol=1e-4)
    for t in range(prompt, prompt + steps):
        assert torch.allclose(model(idx[:, t:t + 1], cache)[:, 0], full[:, t], atol=1e-4)


@pytest.mark.parametrize("length", [5, 130])
def test_short_and_long_rows_attend_alike(length):
    """Plain products and torch's kernel, against the definition, head by head."""
    q, k, v = (torch.randn(2, heads, length, 8) for heads in (4, 2, 2))
    for h in range(4):
        scores = q[:, h] @ k[:, h // 2].transpose(1, 2) / 8 ** 0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        assert torch.allclose(causal_attention(q, k, v)[:, h], scores.softmax(-1) @ v[:, h // 2], atol=1e-5)


def test_hidden_states_at_some_positions_equal_those_of_all():
    model, idx, at = tiny(), torch.randint(29, (3, 7)), (torch.tensor([0, 2, 2]), torch.tensor([6, 0, 3]))
    grads = []
    for hidden in (model.trunk(idx)[at], model.trunk(idx, at=at)):
        model.zero_grad()
        (hidden * torch.arange(32)).sum().backward()
        grads.append([hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(*grads))


@torch.no_grad()
def test_ragged_rows_behind_shared_prefixes_equal_single_rows(monkeypatch):
    """Several rows behind different lengths of the same prompt, in groups of 1 to 3, read in batches of two
    prompts; then some are dropped, and of one prompt all."""
    monkeypatch.setattr(sampler, "tokens_per_forward", lambda model: 12)
    model, idx, new = tiny(), torch.randint(29, (4, 6)), torch.randint(29, (7, 6))
    which, lengths = torch.tensor([0, 0, 0, 1, 3, 3, 2]), torch.tensor([1, 6, 4, 2, 5, 5, 6])
    cache, last = read(model, idx, lengths, which)
    rows = [torch.cat([idx[w, :n], x]) for w, n, x in zip(which, lengths, new)]
    alive = torch.arange(7)
    for t in range(7):
        for r, got in zip(alive.tolist(), last):
            assert torch.allclose(got, model(rows[r][None, :lengths[r] + t])[0, -1], atol=1e-4)
        if t in (2, 4):
            keep = torch.tensor([0, 2, 4, 5, 6] if t == 2 else [1, 3])
            cache.keep(keep)
            alive = alive[keep]
            assert len(cache.prefix[0][0]) == (3 if t == 2 else 2)
        if t < 6:
            last = model(new[alive, t:t + 1], cache)[:, 0]


@torch.no_grad()
def test_many_rows_behind_one_prefix_and_few_behind_others():
    """Not padded to prefixes x the most rows behind one: each row has its own copy."""
    model, idx = tiny(), torch.randint(29, (20, 4))
    which = torch.cat([torch.zeros(20, dtype=torch.long), torch.arange(1, 20)])
    cache, _ = read(model, idx, torch.full((39,), 4), which)
    assert len(cache.prefix[0][0]) == 39 and cache.M == 1
    new = torch.randint(29, (39, 1))
    assert torch.allclose(model(new, cache)[:, 0], model(torch.cat([idx[which], new], 1))[:, -1], atol=1e-4)


@torch.no_grad()
def test_branches_and_what_is_folded_in_equal_the_full_forward():
    """A beam's use: several tokens at once, right-padded, behind copied rows; some rows are kept, each with
    its own length, in another order; twice."""
    model, rows = tiny(), list(torch.randint(29, (3, 5)))
    cache, _ = read(model, torch.stack(rows), torch.tensor([5, 5, 5]))
    for parent, keep in (([0, 0, 2], [2, 0, 1]), ([0, 1, 1, 2], [3, 1])):
        parent, keep = torch.tensor(parent), torch.tensor(keep)
        new, count = torch.randint(29, (len(parent), 4)), torch.tensor([4, 1, 3, 2])[:len(parent)]
        child = cache.branch(parent)
        out = model(new[:, :3], child), model(new[:, 3:], child)                # in two pieces
        for r, p in enumerate(parent.tolist()):
            full = model(torch.cat([rows[p], new[r]])[None])[0, len(rows[p]):]
            assert torch.allclose(torch.cat(out, 1)[r], full, atol=1e-4)
        cache = child.fold(keep, count[keep])
        rows = [torch.cat([rows[parent[r]], new[r, :count[r]]]) for r in keep.tolist()]


@pytest.mark.parametrize("kv", [1, 2])
def test_grouped_query_attention_equals_repeated_heads(kv):
    """n_kv_head < n_head is multi-head attention whose key and value heads are copies."""
    small = tiny(n_kv_head=kv)
    big = tiny(n_kv_head=4)
    state = small.state_dict()
    for name, w in state.items():
        if ".wk." in name or ".wv." in name:
            state[name] = w.view(kv, 8, 32).repeat_interleave(4 // kv, 0).reshape(32, 32)
    big.load_state_dict(state)
    idx = torch.randint(29, (2, 9))
    assert torch.allclose(small(idx), big(idx), atol=1e-5)


@pytest.mark.parametrize("kw", [dict(), dict(tied=False, qkv_bias=True), dict(head="scalar", n_out=3)])
def test_safetensors_round_trip(tmp_path, kw):
    model, idx = tiny(**kw), torch.randint(29, (2, 9))
    model.save(tmp_path / "m")
    loaded = GPT.load(tmp_path / "m")
    assert loaded.config == model.config and torch.equal(loaded(idx), model(idx))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_a_verifier_starts_from_the_policys_trunk():
    policy = tiny()
    for verifier, n_out in ((policy.as_verifier(), 1), (policy.as_verifier("mine", 3), 3)):
        idx = torch.randint(29, (2, 9))
        assert torch.equal(verifier.trunk(idx), policy.trunk(idx)) and verifier(idx).shape == (2, 9, n_out)
    assert verifier.config.target == "mine" and policy.as_verifier().config.target == "bce"
    assert verifier(idx).any() and not tiny(n_embd=512, n_ffn=8).as_verifier()(idx).any(), "large: from 0"


def test_damaged_foreign_and_missing_weights_are_one_line_errors(tmp_path):
    tiny().save(tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(Fail, match="model.safetensors.*damaged"):
        GPT.load(tmp_path / "m")
    tiny(n_embd=64).save(tmp_path / "other")
    weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(Fail, match="weights of another model") as e:
        GPT.load(tmp_path / "m")
    assert "\n" not in str(e.value)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"vocab_size": 3, "colour": "red"}))
    with pytest.raises(Fail, match="config.json"):
        GPT.load(tmp_path / "m")
    with pytest.raises(Fail, match="does not exist"):
        GPT.load(tmp_path / "nowhere")


@pytest.mark.parametrize("kw", [dict(n_embd=30), dict(n_kv_head=3), dict(n_layer=0), dict(n_embd=12)])
def test_an_impossible_size_is_a_one_line_error(kw):
    with pytest.raises(Fail, match="impossible size"):
        GPTConfig(**{**dict(vocab_size=29, n_embd=32), **kw})

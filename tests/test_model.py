"""The GPT: what is cached equals what is recomputed; what is saved equals what is loaded."""
import json

import pytest
import torch
from conftest import tiny

from minipav.model import GPT, GPTConfig, KVCache
from minipav.utils import Fail


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("prompt", [1, 3, 7])
def test_cached_decoding_equals_the_full_forward(batch, prompt):
    """A cache slot or rotary position that is off by one shows at the second decode step, not the first."""
    model, steps = tiny(qkv_bias=True), 5
    idx = torch.randint(29, (batch, prompt + steps))
    full = model(idx)
    cache = KVCache(model.config, batch, prompt + steps, "cpu")
    assert torch.allclose(model(idx[:, :prompt], cache), full[:, :prompt], atol=1e-4)
    for t in range(prompt, prompt + steps):
        step = model(idx[:, t:t + 1], cache, torch.full((batch, 1), t))
        assert torch.allclose(step[:, 0], full[:, t], atol=1e-4)


def test_ragged_batch_equals_single_rows():
    """Right-padding is overwritten before it can be read, for every row at its own length."""
    model, lengths = tiny(), torch.tensor([1, 6, 3, 4])
    idx = torch.randint(29, (4, 12))
    cache = KVCache(model.config, 4, 12, "cpu")
    model(idx[:, :6].masked_fill(torch.arange(6) >= lengths[:, None], 7), cache)
    for t in range(4):
        pos = lengths[:, None] + t
        step = model(idx.gather(1, pos), cache, pos)
        for b in range(4):
            alone = model(idx[b:b + 1, :int(pos[b]) + 1])
            assert torch.allclose(step[b, 0], alone[0, -1], atol=1e-4)


def test_a_reused_cache_remembers_nothing():
    """A second prompt in the same buffers sees nothing of the first one."""
    model, cache = tiny(), KVCache(tiny().config, 2, 10, "cpu")
    for idx in (torch.randint(29, (2, 10)), torch.randint(29, (2, 6))):
        model(idx[:, :4], cache)
        out = [model(idx[:, t:t + 1], cache, torch.full((2, 1), t))[:, 0] for t in range(4, idx.shape[1])]
        assert torch.allclose(torch.stack(out, 1), model(idx)[:, 4:], atol=1e-4)


def test_several_tokens_at_once_and_selected_rows():
    """Appending a chunk at ragged positions, after rows were copied and dropped, equals the full forward."""
    model, idx = tiny(), torch.randint(29, (3, 11))
    cache = KVCache(model.config, 3, 11, "cpu")
    model(idx[:2, :5], cache[:2])                                               # a slice is a view
    model(idx[2:, :5], cache[2:])
    keep = torch.tensor([2, 0, 0])
    cache, idx = cache[keep], idx[keep]
    out = model(idx[:, 5:9], cache, torch.arange(5, 9).expand(3, 4))
    assert torch.allclose(out, model(idx)[:, 5:9], atol=1e-4)


@pytest.mark.parametrize("kv", [1, 2, 4])
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

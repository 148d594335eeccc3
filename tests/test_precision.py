"""bf16, losses in pieces, Muon: what is faster or smaller computes the same."""
import copy
import functools

import pytest
import torch
from conftest import tiny

from minipav import parallel, precision, utils
from minipav.precision import pick_dtype
from minipav.reinforce import policy_loss
from minipav.sampler import sample
from minipav.sft import sft_loss
from minipav.utils import Fail, Muon, backward, main_guard, micro_batches
from minipav.verifier import Values, score, verifier_loss

TOKENS = torch.randint(1, 29, (6, 20), generator=torch.Generator().manual_seed(0))
LENGTHS, ENDS = torch.arange(15, 21), torch.arange(2, 15, 3).expand(6, -1)


def losses(model):
    """{name: (model, gradient of its loss)} of SFT, verifier and policy, in micro-batches of 4."""
    torch.manual_seed(3)
    step = (torch.arange(20) // 3 - 1).expand(6, -1)
    verifier, policy, ones = model.as_verifier(), copy.deepcopy(model), torch.ones(ENDS.shape)
    out = {}
    for name, m, f in (
            ("sft", model, lambda m: backward(sft_loss, m, (TOKENS, LENGTHS, LENGTHS - 9), LENGTHS, 54, 4)),
            ("verifier", verifier, lambda m: backward(
                verifier_loss, m, (TOKENS, ENDS, 0.3 * ones, ones, ones), LENGTHS, 30, 4)),
            ("policy", policy, lambda m: policy_loss(
                m, tiny(seed=1), TOKENS, step, step * 0.1, 0.5)[0].backward())):
        m.zero_grad()
        f(m)
        out[name] = torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
    return out


def close(a, b, tolerance):
    return all(b[k].norm() > 1e-3 and (a[k] - b[k]).norm() < tolerance * b[k].norm() for k in b)


def test_checkpointing_and_losses_in_chunks_have_the_same_gradient(monkeypatch):
    whole, model = losses(tiny()), tiny()
    model.checkpointing = True
    monkeypatch.setattr(precision, "CHUNK", 29 * 5)             # five tokens at once
    assert close(losses(model), whole, 1e-5)


def test_micro_batches_have_the_same_gradient():
    """Rows of other lengths: what is summed, not the mean of means."""
    grads = []
    for size in (0, 1, 4):
        model = tiny()
        backward(sft_loss, model, (TOKENS, LENGTHS, LENGTHS.flip(0) - 12), LENGTHS, 72, size)
        grads.append({"sft": torch.cat([p.grad.flatten() for p in model.parameters()])})
    assert close(grads[1], grads[0], 1e-5) and close(grads[2], grads[0], 1e-5)


def test_micro_batches_hold_as_many_tokens_as_so_many_rows_of_mean_length():
    lengths = torch.randint(1, 400, (97,), generator=torch.Generator().manual_seed(0))
    assert all([len(rows) for rows in micro_batches(lengths, size)] == [97] for size in (0, 97, 200))
    assert not list(micro_batches(lengths[:0])) and len(list(micro_batches(lengths, 96))) > 1
    for size in (1, 2, 8, 40):
        pieces = list(micro_batches(lengths, size))
        assert sorted(torch.cat(pieces).tolist()) == list(range(97))
        tokens = [len(rows) * int(lengths[rows].max()) for rows in pieces if len(rows) > 1]
        assert max(tokens) <= size * lengths.float().mean() and len(pieces) < 97 / size ** 0.5 + 1


def test_each_process_has_its_share_of_the_micro_batches(monkeypatch):
    lengths = torch.randint(1, 400, (97,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(parallel, "world", lambda: 3)
    for size in (0, 4):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            shares.append(torch.cat(list(micro_batches(lengths, size))))
        assert sorted(torch.cat(shares).tolist()) == list(range(97))
    tokens = [int(lengths[rows].sum()) for rows in shares]
    assert max(tokens) < 1.1 * min(tokens)


@pytest.mark.parametrize("width, std", [(32, 0.1), (512, 0.03)])      # 512: attention is in bf16 too
def test_bf16_agrees_with_fp32(width, std):
    """Gradients within 3%, log-probabilities of the same tokens and a verifier's values within .03; what is
    cached is what is recomputed."""
    model, fp32 = (tiny(std=std, n_embd=width) for _ in range(2))
    model.bf16 = True
    assert close(losses(model), losses(fp32), 0.03)
    s = sample(model, TOKENS, LENGTHS - 10, 5, max_new_tokens=8, stop=[3], logprobs=True)
    for i in range(len(s.tokens)):
        prompt = TOKENS[i // 5, :LENGTHS[i // 5] - 10]
        row, new = torch.cat([prompt, s.tokens[i, :s.lengths[i]]])[None], s.lengths[i]
        with torch.no_grad():
            want = fp32(row)[0, len(prompt) - 1:-1].log_softmax(-1).gather(1, s.tokens[i, :new, None])[:, 0]
        assert (s.logprobs[i, :new] - want).abs().max() < 0.03
    verifier, exact = model.as_verifier(), fp32.as_verifier()
    exact.load_state_dict(verifier.state_dict())
    q, parent = score(verifier, TOKENS, ENDS), torch.arange(6)
    assert verifier.bf16 and (q - score(exact, TOKENS, ENDS)).abs().max() < 0.03
    three = torch.full((6,), 3)
    child = Values(verifier, TOKENS[:, :3], three).children(parent, TOKENS[:, 3:6], three)
    assert child.cache.new[0][0].dtype == torch.bfloat16 and (child.q - q[:, 1]).abs().max() < 0.03


def test_the_precision_is_chosen_by_the_device(monkeypatch):
    assert pick_dtype("fp32", "cpu") == "fp32" and pick_dtype("bf16", "cpu") == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for has, want in ((False, "fp32"), (True, "bf16")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert pick_dtype("auto", "cpu") == want and pick_dtype("auto", "mps") == "fp32"
    with pytest.raises(Fail, match="--dtype"):
        pick_dtype("bf16", "mps")


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_torchs(monkeypatch, bf16):
    """Up to the bf16 in which torch's orthogonalises; two shapes, wide and tall."""
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=g) for shape in ((16, 24), (40, 16), (16, 24))]
    runs, dtypes, ours = [], {}, utils.orthogonal
    monkeypatch.setattr(utils, "orthogonal", lambda x: dtypes.update({x.shape[1:]: x.dtype}) or ours(x))
    theirs = functools.partial(torch.optim.Muon, weight_decay=0.0, momentum=0.95)
    for make in (functools.partial(Muon, bf16=bf16), theirs):
        ps = [torch.nn.Parameter(x.clone()) for x in start]
        opt, g = make(ps, lr=0.02), torch.Generator().manual_seed(1)
        for _ in range(4):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=g)
            opt.step()
        runs.append(ps)
    for x, a, b in zip(start, *runs):
        moved = (b - x).norm()
        assert moved > 0.1 and (a - b).norm() < 0.02 * moved
    assert len(dtypes) == 2 and set(dtypes.values()) == {torch.bfloat16 if bf16 else torch.float32}


def test_a_full_gpu_is_told_in_a_line(capsys, monkeypatch):
    monkeypatch.setattr("minipav.utils.on_stop", lambda handler: None)

    def main():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
    with pytest.raises(SystemExit) as e:
        main_guard(main)
    told = capsys.readouterr().err.splitlines()
    assert e.value.code == len(told) == 1 and told[0].startswith("error: ") and "Out of memory" in told[0]

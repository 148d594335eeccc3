"""The kernels of decoding against what they replace: on a GPU, or by Triton's interpreter, if it is installed
(pip install triton), for a few rows: a minute."""
import pytest
import torch

from minipav import cache, kernels
from minipav.sampler import choose


@pytest.fixture
def device():
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("choice", [dict(), dict(temperature=0.7), dict(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("vocab", [29, 50_000])
def test_a_token_is_chosen_as_without_kernels(device, vocab, choice):
    """But for a few on the other side of a boundary."""
    torch.manual_seed(0)
    R = 500 if device == "cuda" else 20
    logits, u = 3 * torch.randn(R, vocab), torch.rand(R)
    u[:2] = torch.tensor([0, 1 - 2 ** -23])
    want = choose(logits, u, **choice)
    got, logp = (x.cpu() for x in kernels.choose(logits.to(device), u.to(device), logprobs=True, **choice))
    assert (got == want).float().mean() >= 0.98
    assert torch.allclose(logp, logits.log_softmax(-1).gather(1, got[:, None])[:, 0], atol=1e-4)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("vocab", [200, 10_000])
def test_the_nucleus_is_that_of_the_definition(device, vocab, top_p):
    """Flat and peaked rows of one block of tokens, and of three, at a grid of uniform numbers: the tokens of
    the nucleus alone, each with its share."""
    torch.manual_seed(0)
    n, tolerance = (20_000, 2e-3) if device == "cuda" else (40, 0.2)
    for scale in (0.1, 3.0):
        logits = torch.randn(vocab) * scale
        p, order = logits.softmax(-1).sort(descending=True)
        p = p[:int((p.cumsum(0) < top_p).sum()) + 1]
        want = torch.zeros(vocab).index_copy(0, order[:len(p)], p / p.sum())
        u = (torch.arange(n, device=device) + 0.5) / n
        got = kernels.choose(logits.to(device).repeat(n, 1), u, top_p=top_p)[0]
        got = torch.bincount(got, minlength=vocab).cpu()
        assert got[want == 0].sum() <= n / 1000 and (got / n - want).abs().max() < tolerance


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("H, G, D", [(4, 2, 32), (9, 3, 64), (6, 1, 24), (3, 3, 16)])
def test_a_step_attends_as_without_kernels(device, H, G, D, low):
    """Behind shared prefixes of several lengths, over the steps at which the slots become more than are read
    at once."""
    torch.manual_seed(0)
    dtype = torch.float32 if not low else torch.bfloat16 if device == "cuda" else torch.float16
    tolerance, group = 0.03 if low else 1e-4, torch.tensor([0, 0, 0, 1, 2, 2], device=device)
    lengths = torch.tensor([3, 48, 1, 20, 8, 12], device=device)
    prefix = [tuple(torch.randn(3, G, 48, D, device=device).to(dtype) for _ in range(2))]
    plain, fast = (cache.KVCache(prefix, group, lengths) for _ in range(2))
    plain.widen(80)
    plain.new = [tuple(torch.randn_like(x) for x in pair) for pair in plain.new]
    plain.count = kernels.BLOCK - 2
    plain.widen(80)
    fast.new, fast.count = [tuple(x.clone() for x in pair) for pair in plain.new], plain.count
    fast.widen(80, True)
    for _ in range(4):
        q, k, v = (torch.randn(6, 1, n, D, device=device).to(dtype) for n in (H, G, G))
        angle = torch.randn(6, 1, 1, D // 2, device=device)
        rope = angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)
        want, got = (c.step(0, q, k, v, rope) for c in (plain, fast))
        plain.count += 1
        fast.count += 1
        assert torch.allclose(got.float(), want.float(), atol=tolerance)

"""On a GPU (-m cuda): what the CPU does, to rounding; bf16 within bounds; the three scripts."""
import pytest
import torch
from conftest import SMALL, SMOKE, call, tiny
from test_sampler import shares

from minipav import kernels
from minipav.cache import KVCache
from minipav.sampler import choose, sample
from minipav.sft import sft_loss
from minipav.utils import apply_step, backward, make_optimizers
from minipav.verifier import Values, score

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
TOKENS = torch.randint(4, 29, (6, 12), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([1, 5, 3, 12, 12, 7])


def on(device, bf16=False, **kw):
    torch.set_float32_matmul_precision("highest")
    model = tiny(**kw).to(device)
    model.bf16 = bf16
    return model


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
def test_the_kernel_draws_from_the_nucleus(top_p):
    shares(lambda *args, **kw: kernels.choose(*args, **kw)[0], top_p, "cuda")


@pytest.mark.parametrize("choice", [dict(), dict(temperature=0.7), dict(temperature=0.5, top_p=0.9)])
@pytest.mark.parametrize("vocab", [29, 50_000])
def test_the_kernel_chooses_as_the_cpu_does(vocab, choice):
    """A few fall on the other side of a boundary; of the tail of the nucleus more do, by rounding."""
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(500, vocab), torch.rand(500)
    u[:2] = torch.tensor([0, 1 - 2 ** -23])
    want = choose(logits, u, **choice)
    got, logp = (x.cpu() for x in kernels.choose(logits.cuda(), u.cuda(), logprobs=True, **choice))
    assert (got == want).float().mean() > (0.9 if "top_p" in choice else 0.99)
    assert torch.allclose(logp, logits.log_softmax(-1).gather(1, got[:, None])[:, 0], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H, G, D", [(4, 2, 32), (9, 3, 64), (6, 1, 24), (3, 3, 16)])
def test_the_kernel_attends_as_the_cache_does(H, G, D, dtype):
    """Behind shared prefixes of several lengths, over 70 steps."""
    torch.manual_seed(0)
    tolerance, group = 1e-4 if dtype == torch.float32 else 0.03, torch.tensor([0, 0, 0, 1, 2, 2]).cuda()
    lengths = torch.tensor([3, 48, 1, 20, 8, 12]).cuda()
    prefix = [tuple(torch.randn(3, G, 48, D, device="cuda").to(dtype) for _ in range(2))]
    plain, fast = KVCache(prefix, group, lengths), KVCache(prefix, group, lengths)
    fast.widen(80, True)
    for _ in range(70):
        qkv = [torch.randn(6, 1, n, D, device="cuda").to(dtype) for n in (H, G, G)]
        angle = torch.randn(6, 1, 1, D // 2, device="cuda")
        rope = angle.cos().repeat(1, 1, 1, 2), torch.cat((-angle.sin(), angle.sin()), -1)
        want, got = plain.step(0, *qkv, rope), fast.step(0, *qkv, rope)
        plain.count += 1
        fast.count += 1
        assert torch.allclose(got.float(), want.float(), atol=tolerance)


@pytest.mark.parametrize("choice", [dict(temperature=0), dict(), dict(top_p=0.9)])
@pytest.mark.parametrize("new", [12, 90])
def test_samples_are_those_of_the_cpu(choice, new):
    """Token for token, with compaction, chunks, several recordings; near ties may fall the other way."""
    kw = dict(max_new_tokens=new, stop=[3], seed=1, max_tokens_in_flight=100 * new, **choice)
    cpu, gpu = (sample(on(d, std=0.1, block_size=128), TOKENS, LENGTHS, 20, **kw) for d in ("cpu", "cuda"))
    same = (cpu.tokens == gpu.tokens).all(1)
    assert same.float().mean() > 0.98 and torch.equal(cpu.lengths[same], gpu.lengths[same])


def test_bf16_keeps_to_the_log_probabilities_of_fp32():
    s = sample(on("cuda", True, std=0.1), TOKENS, LENGTHS, 20, max_new_tokens=8, stop=[3], logprobs=True)
    model = on("cpu", std=0.1)
    for i in range(0, 120, 7):
        n, new = LENGTHS[i // 20], s.lengths[i]
        row = torch.cat([TOKENS[i // 20, :n], s.tokens[i, :new]])[None]
        with torch.no_grad():
            want = model(row)[0, n - 1:-1].log_softmax(-1).gather(1, s.tokens[i, :new, None])[:, 0]
        assert (s.logprobs[i, :new] - want).abs().max() < 0.05


@pytest.mark.parametrize("bf16", [False, True])
def test_scores_and_values_are_those_of_the_cpu(bf16):
    cpu, gpu = on("cpu", head="scalar", std=0.1), on("cuda", bf16, head="scalar", std=0.1)
    ends = LENGTHS[:, None] - 1
    want, tolerance = score(cpu, TOKENS, ends)[:, 0], 0.03 if bf16 else 1e-4
    assert torch.allclose(score(gpu, TOKENS, ends)[:, 0], want, atol=tolerance)
    first = torch.ones(6, dtype=torch.long, device="cuda")
    values = Values(gpu, TOKENS[:, :1].cuda(), first)
    for t in range(1, 12):
        values = values.children(torch.arange(6).cuda(), TOKENS[:, t:t + 1].cuda(), first)
        assert torch.allclose(values.q.cpu()[LENGTHS == t + 1], want[LENGTHS == t + 1], atol=tolerance)
        values = values[torch.arange(6).cuda()]


@pytest.mark.parametrize("bf16", [False, True])
def test_a_training_step_is_that_of_the_cpu(bf16):
    losses = []
    for model in (on("cpu", std=0.1), on("cuda", bf16, std=0.1)):
        optimizers = make_optimizers(model, 0.02, 1e-3)
        for _ in range(5):
            loss = backward(sft_loss, model, (TOKENS, LENGTHS, LENGTHS // 2), LENGTHS, 20)
            apply_step(model, optimizers, 1.0)
        losses.append(loss)
    assert losses[0] == pytest.approx(losses[1], rel=0.05 if bf16 else 2e-2)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_three_scripts(tmp_path, dtype):
    smoke, small = ([x for x in flags if x not in ("--device", "cpu")] for flags in (SMOKE, SMALL))
    search = "--alpha 0.5 --problems 5 --n 4 --widths 2".split()
    for args in (("train.py", *smoke, "--dtype", dtype, "--out", tmp_path),
                 ("search.py", "--run", tmp_path, *search),
                 ("rl.py", "--run", tmp_path, *small, "--no_rft")):
        done = call(*args)
        assert done.returncode == 0, done.stderr

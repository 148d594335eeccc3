"""On a GPU (-m cuda): what the CPU does, to rounding; bf16 within bounds; the three scripts."""
import pytest
import torch
from conftest import SMALL, SMOKE, call, tiny

from minipav.sampler import sample
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

"""The relatives of PAV (docs/relatives.md): each against the formula that it is named after."""
import pytest
import torch
from conftest import make_traces, tiny

from minipav import rewards
from minipav.attention import attention_share, last_attention, uniform_share
from minipav.prover import Prover
from minipav.rewards import REWARDS, VALUES, check_prover
from minipav.utils import Fail


@pytest.fixture
def some():
    """Three traces of a prompt of 2 tokens and steps of 3, 2 and 4; the third has one step only; right, wrong,
    right."""
    tokens = torch.randint(4, 29, (3, 11), generator=torch.Generator().manual_seed(1))
    ends = torch.tensor([[1, 4, 6, 10], [1, 4, 6, 10], [1, 5, -1, -1]])
    return make_traces(tokens, torch.tensor([11, 11, 6]), ends, reward=torch.tensor([1.0, 0.0, 1.0]))


# ---- rewards

def test_the_attention_is_what_the_last_block_reads():
    """Times the values it is the block's own output, head by head: here there is one."""
    model = tiny(head="scalar", n_head=1, n_kv_head=1, n_layer=3).requires_grad_(False)
    tokens, lengths, seen = torch.randint(4, 29, (4, 9)), torch.tensor([9, 4, 1, 7]), {}
    at = model.blocks[-1].attn
    hooks = [at.wv.register_forward_hook(lambda *a: seen.update(v=a[2])),
             at.register_forward_hook(lambda *a: seen.update(out=a[2]))]
    model.trunk(tokens)
    [h.remove() for h in hooks]
    w = last_attention(model, tokens, lengths)
    assert torch.allclose(at.wo((w[:, :, None] * seen["v"]).sum(1)), seen["out"][torch.arange(4), lengths - 1], atol=1e-5)
    assert torch.allclose(w.sum(1), torch.ones(4)) and (w[torch.arange(9) >= lengths[:, None]] == 0).all()


@pytest.mark.parametrize("shares", [lambda t: attention_share(tiny(head="scalar"), t), uniform_share])
def test_what_is_redistributed_is_the_outcome(some, shares):
    """The per-token rewards of ABC's formula: weights sum to 1 on the response, the total is the outcome, and the return
    of a step is all of it from its first token on."""
    share = shares(some)
    steps = rewards.step_returns(REWARDS["abc"], some.reward, share.masked_fill(some.ends < 0, float("nan")), 1.0)
    for row, (n, length) in enumerate(((3, 11), (3, 11), (1, 6))):
        assert share[row, 0] == 0 and share[row, n] == pytest.approx(1) and (share[row, :n + 1].diff() > 0).all()
        r = 0.5 * share[row, :n + 1].diff() * some.reward[row]                  # beta a_t R, of a step's tokens
        r[-1] += 0.5 * some.reward[row]                                         # (1 - beta) R at the end
        assert r.sum() == pytest.approx(float(some.reward[row]))
        assert torch.allclose(steps[row, :n], r.flip(0).cumsum(0).flip(0)) and (steps[row, n:] == 0).all()
    if shares is uniform_share:
        assert share[0].tolist() == pytest.approx([0, 3 / 9, 5 / 9, 1])


def test_grpo_is_the_groups_standard_score(some):
    class loop:
        class a:
            group = 3
    z, tokens = VALUES["group"](loop, None, some, 0)
    mean, std = 2 / 3, (2 * (1 / 3) ** 2 / 2 + (2 / 3) ** 2 / 2) ** 0.5         # of 1, 0, 1, n - 1 in the denominator
    want = [(1 - mean) / (std + 1e-4), -mean / (std + 1e-4), (1 - mean) / (std + 1e-4)]
    assert z[:, 0].tolist() == pytest.approx(want) and z.shape == some.ends.shape and tokens == 0
    got = rewards.step_returns(REWARDS["grpo"], some.reward, z.masked_fill(some.ends < 0, float("nan")), 1.0)
    assert got[2].tolist() == pytest.approx([want[2], 0, 0]) and not REWARDS["grpo"].baseline
    loop.a.group = 1
    with pytest.raises(Fail, match="--group 1"):
        check_prover("grpo", Prover.parse("bo4", "base"), type("a", (), dict(group=1, policy="base", prover="bo4")))

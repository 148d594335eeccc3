"""The outcome redistributed over a response by the ORM's attention, as in ABC ("Dense Reward for Free", arXiv
2402.00782): r_t = beta a_t R + (1 - beta) [t is the last token] R, where a_t is what the reward model's last
token attends to in its last layer, the mean over heads, on the response alone.

Ours: the tokens of a step share what comes from the step's first token on (a return, gamma = 1); the paper
gives each token its own r_t to PPO. The whole of it is R.
"""
import torch

from minipav.model import rotate
from minipav.utils import tokens_per_forward

BETA = 0.5


@torch.no_grad()
def last_attention(model, tokens, lengths):
    """(N, T): how much of the last block's attention at the last token of each row, the mean over heads, goes
    to each token; 0 behind it."""
    seen, block, at = [], model.blocks[-1], model.blocks[-1].attn
    hook = block.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    try:
        model.trunk(tokens)
    finally:
        hook.remove()
    (x, (cos, sin)), row, last = seen[0], torch.arange(len(tokens), device=tokens.device), lengths - 1
    x = block.norm1(x)                                                          # (N, T, C)
    q = rotate(at.wq(x[row, last]).view(-1, 1, at.H, at.D), cos[0, last, None], sin[0, last, None])
    k = rotate(at.wk(x).view(*x.shape[:2], at.G, at.D), cos, sin).repeat_interleave(at.H // at.G, 2)
    scores = (q * k).sum(-1).float() * at.D ** -0.5                             # (N, T, H)
    behind = torch.arange(x.shape[1], device=tokens.device) >= lengths[:, None]
    return scores.masked_fill(behind[:, :, None], float("-inf")).softmax(1).mean(-1)


def attention_share(orm, traces):
    """(N, S + 1): the share of the attention to the response that is on tokens up to each step end."""
    weights = torch.zeros(traces.tokens.shape)
    for rows in torch.arange(len(traces)).split(max(1, tokens_per_forward(orm) // weights.shape[1])):
        batch = (x[rows].to(orm.device) for x in (traces.tokens, traces.lengths))
        weights[rows] = last_attention(orm, *batch).cpu()
    weights[torch.arange(weights.shape[1]) <= traces.ends[:, :1]] = 0.0         # of the prompt
    return share(weights, traces)


def uniform_share(traces):
    """The same for equal weights of all tokens of the response: ABC's control."""
    t = torch.arange(traces.tokens.shape[1])
    return share(((t > traces.ends[:, :1]) & (t < traces.lengths[:, None])).float(), traces)


def share(weights, traces):
    so_far = weights.cumsum(1).gather(1, traces.ends.clamp(min=0))
    return so_far / weights.sum(1, keepdim=True)

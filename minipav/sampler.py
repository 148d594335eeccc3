"""KV-cached, batched sampling: many prompts of different lengths, n samples of each, in one batch.

What makes it fast, in the order of the code: requests are sorted by prompt length and cut into chunks that
fit `max_tokens_in_flight`; each distinct prompt of a chunk is prefilled once and its cache copied to its
samples; the KV buffers are static; every row stops by itself at any of several stop tokens; stopped rows are
compacted away.

What makes it exact: the randomness of the sample j of prompt b at its t-th token is one uniform number u[b,
j, t], drawn from the call's own generator before anything else. So a sample does not depend on the batch it
is computed in, on the chunks or on compaction; the same seed gives the same samples on every device up to
rounding in the logits.
"""
from dataclasses import dataclass

import torch

from minipav.model import KVCache
from minipav.utils import tokens_per_forward

LENGTH = -1                         # Samples.finish_reason of a row that met no stop token


@dataclass
class Samples:
    """Rows are prompt-major: row b * n + j is sample j of prompt b."""
    tokens: torch.Tensor            # (B * n, T) new tokens, the stop token included, right-padded
    lengths: torch.Tensor           # (B * n,) number of new tokens
    logprobs: torch.Tensor  # (B * n, T) log-probability of each under the model (temperature 1, no filter)
    finish_reason: torch.Tensor     # (B * n,) the stop token that ended the row, or LENGTH


def _inverse_cdf(p, u):
    """Index (R,) of the outcome in which u (R,) of the total of p (R, k) falls."""
    cdf = p.cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]


def _nucleus(p, order, u, top_p, total):
    """A token by u from p (R, k), the likeliest in falling order, cut at top_p of `total` probability."""
    if top_p is not None:
        p = p.masked_fill(p.cumsum(-1) - p >= top_p * total, 0.0)  # the likelier ones reach top_p already
    index = torch.minimum(_inverse_cdf(p, u), (p > 0).sum(-1) - 1)
    return order.gather(1, index[:, None])[:, 0]


def choose(logits, u, temperature=1.0, top_k=None, top_p=None):
    """Token (R,) by inverse CDF at the uniform numbers u (R,) from logits (R, V). Temperature 0: argmax.

    top_k keeps the k likeliest tokens, then top_p the smallest set of likeliest tokens whose probability
    reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)                          # (R, V)
    if top_k is None and top_p is None:
        return _inverse_cdf(probs, u).clamp(max=probs.shape[1] - 1)
    p, order = probs.topk(min(top_k or 32, probs.shape[1]), dim=-1)  # a nucleus is seldom wider than 32
    token = _nucleus(p, order, u, top_p, 1.0 if top_k is None else p.sum(-1, keepdim=True))
    wide = (p.sum(-1) < top_p).nonzero()[:, 0] if top_k is None else []
    if len(wide):
        token[wide] = _nucleus(*probs[wide].sort(dim=-1, descending=True, stable=True), u[wide], top_p, 1.0)
    return token


@torch.no_grad()
def sample(model, prompts, prompt_lengths, n=1, *, max_new_tokens, stop, seed=0, temperature=1.0, top_k=None,
           top_p=None, max_tokens_in_flight=1 << 18, pad=0, compact=True, progress=None):
    """n samples of each prompt. -> Samples on the CPU

    prompts (B, P) right-padded tokens, prompt_lengths (B,); stop: token ids that end a row and are kept in
    it; max_tokens_in_flight bounds rows x slots of the KV buffers (not the outputs, which grow with n);
    progress(rows_done) is called after each chunk.
    Raises ValueError if a prompt is empty or a row would not fit the model's block_size.
    """
    B, device, longest = len(prompts), model.device, int(prompt_lengths.max()) + max_new_tokens
    if int(prompt_lengths.min()) < 1 or longest - 1 > model.config.block_size:
        raise ValueError(f"prompts must hold 1 token or more, and {longest - 1} positions fit into "
                         f"block_size {model.config.block_size}")
    # One uniform number for each token that may come (temperature 0 uses none).
    u = torch.rand(B * n, max_new_tokens if temperature else 1, generator=torch.Generator().manual_seed(seed))
    out = Samples(torch.full((B * n, max_new_tokens), pad), torch.zeros(B * n, dtype=torch.long),
                  torch.zeros(B * n, max_new_tokens), torch.full((B * n,), LENGTH))
    done, order = 0, prompt_lengths.repeat_interleave(n).argsort(stable=True)   # short prompts first
    for rows in order.split(max(1, max_tokens_in_flight // longest)):
        which, copies = torch.unique_consecutive(rows // n, return_inverse=True)
        lengths = prompt_lengths[which].to(device)
        chunk = prompts[which, :int(lengths.max())].to(device)
        slots = chunk.shape[1] + max_new_tokens - 1
        cache = KVCache(model.config, len(chunk), slots, device, model.embed.weight.dtype)
        hidden, copies = prefill(model, cache, chunk, lengths), copies.to(device)
        result = decode(model, cache[copies], hidden[copies], lengths[copies], u[rows].to(device),
                        max_new_tokens, torch.tensor(stop, device=device), pad, compact,
                        temperature=temperature, top_k=top_k, top_p=top_p)
        for name, value in zip(("tokens", "lengths", "logprobs", "finish_reason"), result):
            getattr(out, name)[rows] = value.cpu()
        done += len(rows)
        if progress:
            progress(done)
    return out


@torch.no_grad()
def prefill(model, cache, prompts, lengths):
    """Write prompts (P, T), right-padded, into the cache. -> hidden state (P, C) of each one's last token."""
    last = []
    for i in range(0, len(prompts), step := max(1, tokens_per_forward(prompts.device) // prompts.shape[1])):
        hidden = model.trunk(prompts[i:i + step], cache[i:i + step])            # (prompts, T, C)
        last.append(hidden[torch.arange(len(hidden), device=prompts.device), lengths[i:i + step] - 1])
    return torch.cat(last)


@torch.no_grad()
def decode(model, cache, hidden, pos, u, max_new, stop, pad=0, compact=False, **sampling):
    """Sample up to max_new tokens behind rows whose last token has the hidden state `hidden` (R, C) and whose
    next one stands at `pos` (R,); u (R, max_new). -> tokens (R, max_new), lengths (R,), log-probabilities (R,
    max_new), finish reasons (R,). Without compaction the cache then holds every new token but the last one of
    each row."""
    R, device, longest = len(pos), pos.device, int(pos.max())
    tokens, logprobs = torch.full((R, max_new), pad, device=device), torch.zeros(R, max_new, device=device)
    count, reason = torch.zeros(R, dtype=torch.long, device=device), torch.full((R,), LENGTH, device=device)
    row, alive = torch.arange(R, device=device), torch.ones(R, dtype=torch.bool, device=device)
    every = 1 if device.type == "cpu" else 4  # asking who is alive waits for the GPU

    for t in range(max_new):
        logits = model.head(hidden)                                             # (rows, V)
        token = choose(logits, u[row, min(t, u.shape[1] - 1)], **sampling)      # (rows,)
        chosen = logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        tokens[row, t], logprobs[row, t] = torch.where(alive, token, pad), torch.where(alive, chosen, 0.0)
        count[row] += alive
        stopped = alive & torch.isin(token, stop)
        reason[row] = torch.where(stopped, token, reason[row])
        alive = alive & ~stopped
        if t + 1 == max_new:
            break
        if t % every == 0:
            living = int(alive.sum())
            if living == 0:
                break
            if compact and living < 0.8 * len(row):                             # dead rows leave the batch
                keep = alive.nonzero()[:, 0]
                cache, token, pos, row, alive = cache[keep], token[keep], pos[keep], row[keep], alive[keep]
        hidden = model.trunk(token[:, None], cache, pos[:, None], kv_len=longest + t + 1)[:, 0]
        pos = pos + 1
    return tokens, count, logprobs, reason

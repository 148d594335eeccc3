"""Step-level beam search (section 4.1): sample steps, score them, keep the best, all problems at once."""
import time
from dataclasses import dataclass, replace
from zlib import crc32

import torch
from torch.nn.functional import pad as pad_right

from minipav import graphs, parallel
from minipav.advantage import q_best_of_k
from minipav.checkpoint import Partial
from minipav.sampler import WHOLE, decode, prefill
from minipav.search.score import Result, Step, places, ranks, top
from minipav.tokenizer import delimiter_tokens, encode_rows, pad_token, stop_mask
from minipav.traces import responses
from minipav.utils import progress
from minipav.verifier import Values


@dataclass
class Beam:
    """Prefixes or finished traces of all problems, one row each, ordered by owner."""
    owner: torch.Tensor             # (N,) problem
    tokens: torch.Tensor            # (N, T)
    lengths: torch.Tensor           # (N,)
    q_pi: torch.Tensor              # (N, H + 1) Q^pi at the step ends so far, the last of them repeated
    score: torch.Tensor             # (N,)

    def __getitem__(self, rows):
        return Beam(*(x[rows] for x in vars(self).values()))

    def __add__(self, other):
        return Beam(*map(torch.cat, zip(vars(self).values(), vars(other).values())))


def beam(s, problems, widths, seed):
    """Beam search at each width. -> [Result]

    Each level samples width * C next steps (at most s.spread at the first one), spread evenly over a
    problem's live prefixes (s.spread 0: C behind each, width * C at the first level), drops duplicates, steps
    and responses without an end, scores, and keeps the best `width` of each problem, of every group of
    relatives (s.quota) the best before any second. A finished trace stays in the beam with its score frozen.
    The answer is the finished trace with the highest Q^pi.
    """
    mine = parallel.share(len(problems))
    with progress(f"beam, {s.score.label}", sum(widths) * (mine.stop - mine.start)) as bar:
        return [search_width(s, problems, width, seed, bar) for width in widths]


@torch.no_grad()
def search_width(s, problems, width, seed, bar=None):
    """A beam of one width, whose progress the bar tells. -> Result

    The problems go in batches whose KV buffers have at most max_tokens_in_flight slots (on a GPU: would have
    if rows were a quarter as long as they can be; a batch that does not fit its memory is halved).
    """
    task, enc, device, start, P = s.env.task, s.env.enc, s.policy.device, time.time(), len(problems)
    prompts, lengths = encode_rows(enc, [task.prompt(p) for p in problems])
    slots = prompts.shape[1] + task.longest
    # the live caches of policy and verifiers, each twice while a level's survivors are copied
    per_row = 2 * (1 + s.readers) * (slots + s.C * task.max_step_tokens)
    per_row //= 4 if device.type == "cuda" else 1       # rows are seldom so long; if they are, it is told
    batch = max(1, s.env.sampling.get("max_tokens_in_flight", 1 << 18) // (width * per_row))
    r, mine, logged, spent = Result.empty(P), parallel.share(P), len(s.log or ()), torch.zeros(1)
    saved = saver(s, r, spent, prompts, lengths, width, seed)
    end, start = saved.at or mine.start, start - spent.item()
    tell(bar, r, width, slice(mine.start, end), end - mine.start)
    while end < mine.stop:
        at = slice(end, min(end + batch, mine.stop))
        try:
            finished, r.tokens[at], r.verifier_tokens[at] = search_batch(
                s, problems[at], prompts[at].to(device), lengths[at].to(device), slots, width, seed, end)
        except torch.OutOfMemoryError:
            if at.stop - at.start == 1:
                raise
            batch = (at.stop - at.start) // 2
            del (s.log or [])[logged:]
            graphs.forget()
            continue
        i, end, logged = end, at.stop, len(s.log or ())
        texts = responses(enc, finished.tokens, finished.lengths, lengths[at][finished.owner])
        r.enter(task, problems, finished.owner + i, finished.q_pi[:, -1], texts)
        spent[0] = time.time() - start
        saved.save(end, end == P)
        tell(bar, r, width, slice(mine.start, end), end - i)
    r.exchange(mine)
    return replace(r, seconds=time.time() - start)


def tell(bar, r, width, done, more):
    """On the bar, if there is one: `more` problems, and what all that are done have come to."""
    if bar is not None and more:
        right, tokens = r.right[done].mean(), r.tokens[done].mean()
        bar.set_postfix_str(f", width {width}: {right:.3f} at {tokens:.0f} tokens", False)
        bar.update(width * more)


def saver(s, r, spent, *call):
    """What saves the result r, and the seconds spent, of a long call; one that is logged is not saved."""
    how = (s.C, s.alpha, s.spread, s.quota, s.K, s.score.label, s.exact, s.policy.bf16,
           temperature_and_top_p(s.env))
    models = [m for m in (s.policy, s.verifier, s.mu_verifier) if m]
    return Partial(None if s.log is not None else s.env.sampling.get("partial_folder"),
                   [r.right, r.solved, r.tokens, r.verifier_tokens, r.q, spent], models, *call,
                   crc32(repr(how).encode()), texts=r.text)


def q_pi_and_q_mu(s, pi, mu):
    """Q^pi, and Q^mu: of a verifier of its own, or in closed form (Eq. 30)."""
    return pi.q, q_best_of_k(pi.q, s.K) if mu is None else mu.q


def search_batch(s, problems, prompts, lengths, slots, width, seed, offset=0):
    """-> the finished traces of the last beams (a Beam), policy tokens (P,), verifier tokens (P,)"""
    P, H, device, eot = len(prompts), s.env.task.max_steps, prompts.device, s.env.enc.eot_token
    room = lengths + s.env.task.longest
    cache, hidden = prefill(s.policy, prompts, torch.arange(P), lengths)     # (P, n_embd)
    pi = Values(s.verifier, prompts, lengths) if s.verifier else s.exact(s.env, problems, device)
    mu = s.mu_verifier and Values(s.mu_verifier, prompts, lengths)
    tokens = pad_right(prompts, (0, slots - prompts.shape[1]), value=pad_token(s.env.enc))
    live = Beam(torch.arange(P, device=device), tokens, lengths, pi.q[:, None].expand(P, H + 1), pi.q)
    parents = live.owner                                                        # of the live prefixes
    finished, spent = live[:0], torch.zeros(P, dtype=torch.long, device=device)
    read = s.readers * lengths
    for level in range(H):
        first = ((live.owner + offset) * H + level) * width * s.C
        steps, grown = expand(s, live.owner, cache, hidden, first, allot(s, live.owner, width, level), seed)
        spent.index_add_(0, live.owner[steps[0]], steps[2])
        kept = distinct(*steps[:2], steps[3])
        kept = kept[(steps[3][kept] == eot) | (level + 1 < H)]  # a last step without END leads nowhere
        parent = steps[0][kept]                                 # nor does a response that is too long
        kept = kept[live.lengths[parent] + steps[2][kept] <= room[live.owner[parent]]]
        if len(kept) == 0:
            break
        parent, new, count, stop, logprob = (x[kept] for x in steps)
        read = read.index_add(0, live.owner[parent], s.readers * count)
        before = [q[parent] for q in q_pi_and_q_mu(s, pi, mu)]
        pi, mu = (x and x.children(parent, new, count) for x in (pi, mu))
        step = Step(*q_pi_and_q_mu(s, pi, mu), *before, live.q_pi[parent], level + 1, logprob.sum(1),
                    s.alpha)
        child = grow(live[parent], new, count, step, s.score.of(step))
        relatives = kin(s, child.owner, parent, parents, new, count)
        best, on = prune(finished, child, stop == eot, width, relatives)
        if s.log is not None:
            chosen = torch.isin(torch.arange(len(parent), device=device) + len(finished.owner), best)
            s.log.append({"beam": replace(child, owner=child.owner + offset), "step": step, "kept": chosen,
                          "parent": parent, "grandparent": parents[parent], "ended": stop == eot})
        rows, finished = best[on] - len(finished.owner), (finished + child)[best[~on]]
        if len(rows) == 0:
            break
        live, cache = child[rows], grown.fold(kept[rows], count[rows] - 1)
        pi, mu = (x and x[rows] for x in (pi, mu))
        parents = parent[rows]
        delimiter = live.tokens.gather(1, live.lengths[:, None] - 1)            # which it has not read yet
        hidden = s.policy.trunk(delimiter, cache)[:, 0]
        cache = cache.fold(torch.arange(len(rows), device=device), torch.ones_like(rows))
    return Beam(*(x.cpu() for x in vars(finished).values())), spent.cpu(), read.cpu()


def allot(s, owner, width, level):
    """How many next steps are sampled behind each live prefix (N,) of these owners, ascending, the best first
    within each."""
    live = owner.bincount()[owner]
    if s.spread == 0:
        return torch.full_like(owner, s.C * (width if level == 0 else 1))
    samples = min(s.spread, width * s.C) if level == 0 else width * s.C
    return samples // live + (places(owner) < samples % live)


def expand(s, owner, cache, hidden, first, times, seed, whole=True):
    """times (N,) next steps of every prefix of these owners, ascending. first (N,): of each prefix the id of
    its problem's first sample; ids count on from there, and each fixes its sample's randomness.
    -> (parent, tokens, lengths, stop token, log-probabilities) of each, the cache behind"""
    task, enc, device = s.env.task, s.env.enc, hidden.device
    parent = torch.arange(len(owner), device=device).repeat_interleave(times)
    ids = first[parent] + places(owner[parent])
    stops = stop_mask(delimiter_tokens(enc, task.delimiter), enc.n_vocab, device)
    grown = cache.branch(parent)
    new = decode(s.policy, grown, hidden[parent], ids, seed, task.max_step_tokens, stops, pad_token(enc),
                 logprobs=True, whole=whole, **temperature_and_top_p(s.env))
    return (parent, *new), grown


def temperature_and_top_p(env):
    return {k: env.sampling[k] for k in WHOLE if k in env.sampling}


def distinct(parent, new, reason):
    """Indices of the children without duplicates (same parent, same step) and steps that never ended."""
    generator = torch.Generator().manual_seed(0)
    salt = torch.randint(-2**62, 2**62, (new.shape[1] + 1,), generator=generator).to(new.device)
    key = (torch.cat([parent[:, None], new + 1], 1) * salt).sum(1)              # a 64-bit hash of the row
    order = key.argsort(stable=True)
    first = torch.ones(len(key), dtype=torch.bool, device=new.device)
    first[order[1:]] = key[order].diff() != 0
    return (first & (reason >= 0)).nonzero()[:, 0]


def grow(rows, new, count, step, score):
    """These prefixes (copies) with the first count (N,) of new (N, T) behind them."""
    row, t = (torch.arange(new.shape[1], device=new.device) < count[:, None]).nonzero(as_tuple=True)
    rows.tokens[row, rows.lengths[row] + t] = new[row, t]
    rows.q_pi[:, step.depth:] = step.q_pi[:, None]
    return replace(rows, lengths=rows.lengths + count, score=score)


def kin(s, owner, parent, parents, new, count):
    """(N,) a number for each child that its relatives share, by s.quota; its own without one."""
    if s.quota != "state":
        return {"none": torch.arange(len(parent), device=parent.device), "parent": parent,
                "grandparent": parents[parent]}[s.quota]
    ids, steps = {}, responses(s.env.enc, new, count, torch.zeros_like(count))
    states = [ids.setdefault((p, s.env.task.state(x)), len(ids)) for p, x in zip(owner.tolist(), steps)]
    return torch.tensor(states, device=owner.device)


def prune(finished, child, ended, width, relatives):
    """The best `width` of each problem, of its finished traces and its children: every group of `relatives`
    (N,) has its best child, like each finished trace, before any second one. -> their rows of finished +
    child, and which live on"""
    value, owner = torch.cat([finished.score, child.score]), torch.cat([finished.owner, child.owner])
    tier = torch.cat([torch.zeros_like(finished.owner), ranks(child.score, relatives)])
    best = top(value, owner, width, tier)
    return best, torch.cat([torch.zeros_like(finished.owner, dtype=torch.bool), ~ended])[best]

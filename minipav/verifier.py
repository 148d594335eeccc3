"""The verifier trainer: the ORM, Q^pi and Q^mu are a policy's trunk with a scalar head, fitted to soft labels.

The network predicts Q, never A (App. D): A is a difference of two of its predictions, best-of-K a function of one. Every
labelled place of a trace (the ends of its prompt and steps) is supervised in one forward pass, by binary cross-entropy
against its Monte-Carlo estimate, and no other position is. The ORM is the same network with the last place of each trace
as its only label (section 2).
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minipav.advantage import Traces
from minipav.model import KVCache
from minipav.sampler import prefill
from minipav.tokenizer import decode_rows
from minipav.utils import Fail, apply_step, make_optimizers, pass_tokens, schedule


def verifier_loss(model, tokens, ends, q, weight):
    """Weighted binary cross-entropy at the places whose weight is positive. tokens (B, T); the rest (B, S + 1)."""
    hidden = model.trunk(tokens)                                                # (B, T, C)
    rows, places = (weight > 0).nonzero(as_tuple=True)
    logits = model.head(hidden[rows, ends[rows, places]])[:, 0]
    w = weight[rows, places]
    return (w * F.binary_cross_entropy_with_logits(logits, q[rows, places], reduction="none")).sum() / w.sum()


@torch.no_grad()
def score(model, tokens, ends, batch_tokens=None):
    """Q at every place: tokens (N, T), ends (N, S + 1) -> (N, S + 1) on the CPU, NaN where ends is -1.

    Rows are scored longest first, in batches of at most batch_tokens tokens, each cut at its own longest row.
    """
    batch_tokens = batch_tokens or pass_tokens(model.device)
    out = torch.full(ends.shape, float("nan"))
    last = ends.max(1).values + 1
    order, at = last.argsort(descending=True, stable=True), 0
    while at < len(order):
        T = int(last[order[at]])
        rows = order[at:at + max(1, batch_tokens // T)]
        place_rows, places = (ends[rows] >= 0).nonzero(as_tuple=True)
        hidden = model.trunk(tokens[rows, :T].to(model.device))
        value = model.head(hidden[place_rows, ends[rows][place_rows, places]]).sigmoid()
        out[rows[place_rows], places] = value[:, 0].cpu()
        at += len(rows)
    return out


class Values:
    """Q of rows that grow: the verifier's KV cache is kept, so a step costs its new tokens only.

    self.q (N,) is the value at the last token of each row. Equal to `score` of the whole rows up to rounding.
    """

    def __init__(self, model, tokens, lengths, slots):
        self.model, self.lengths = model, lengths
        self.cache = KVCache(model.config, len(tokens), slots, tokens.device, model.embed.weight.dtype)
        self.q = self._value(prefill(model, self.cache, tokens, lengths))

    def _value(self, hidden):
        return self.model.head(hidden)[:, 0].sigmoid()

    @torch.no_grad()
    def children(self, parent, new, new_lengths):
        """Values of the rows `parent` (N,) with new (N, T), right-padded, behind them."""
        child, new = self[parent], new[:, :int(new_lengths.max())]              # no time for columns of padding
        pos = child.lengths[:, None] + torch.arange(new.shape[1], device=new.device)
        hidden = self.model.trunk(new, child.cache, pos, span=int(pos.max()) + 1)
        child.q = self._value(hidden[torch.arange(len(new), device=new.device), new_lengths - 1])
        child.lengths = child.lengths + new_lengths
        return child

    def __getitem__(self, rows):
        """The values of the rows with these indices (a copy)."""
        some = copy.copy(self)
        some.cache, some.q, some.lengths = self.cache[rows], self.q[rows], self.lengths[rows]
        return some


class Oracle:
    """In the place of a verifier: exact Q of the task's tabular reference policy (calculator: the uniform legal walk, which a
    base policy that does not plan is close to). The ceiling for a learned Q^pi, though not the best possible value."""

    def __init__(self, task, enc):
        if not hasattr(task, "exact"):
            raise Fail(f"task {task.name} has no exact values: the oracle beam is for calculator")
        self.task, self.enc = task, enc


class ExactValues:
    """An Oracle's values of rows that grow, behind the interface of Values."""

    def __init__(self, oracle, problems, device):
        self.enc, self.value = oracle.enc, oracle.task.exact(problems)
        self.owner, self.texts, self.device = list(range(len(problems))), [""] * len(problems), device
        self._read()

    def _read(self):
        q = [self.value(i, text) for i, text in zip(self.owner, self.texts)]
        self.q = torch.tensor(q, dtype=torch.float32, device=self.device)

    def children(self, parent, new, new_lengths):
        child = copy.copy(self)
        child.owner = [self.owner[r] for r in parent.tolist()]
        child.texts = [self.texts[r] + t for r, t in zip(parent.tolist(), decode_rows(self.enc, new, new_lengths))]
        child._read()
        return child

    def __getitem__(self, rows):
        some = copy.copy(self)
        some.owner, some.texts = ([x[r] for r in rows.tolist()] for x in (self.owner, self.texts))
        some.q = self.q[rows]
        return some


def start_values(verifier, problems, prompts, lengths, slots):
    """Values of the bare prompts, by a trained verifier or an Oracle."""
    if isinstance(verifier, Oracle):
        return ExactValues(verifier, problems, prompts.device)
    return Values(verifier, prompts, lengths, slots)


def outcome_only(traces):
    """The ORM's data: of each trace the last place alone, labelled with Rex."""
    final = (traces.ends >= 0).sum(1, keepdim=True) - 1
    n = torch.zeros_like(traces.n).scatter(1, final, 1) * (traces.n > 0)
    return Traces(traces.problem, traces.tokens, traces.lengths, traces.ends, traces.q, n, traces.reward)


def label_weights(traces, balance=False):
    """Weight (N, S + 1) of each label in the loss. An estimate from many completions counts more than one outcome, but
    not in proportion: labels of one trace are few views of one problem. balance: the two buckets Q < .5 and Q >= .5
    weigh the same (section 4.2)."""
    w = traces.n.float().sqrt()
    if balance:
        for bucket in (traces.q < 0.5, traces.q >= 0.5):
            total = (w * bucket).sum()
            w = torch.where(bucket & (total > 0), w / total * traces.n.count_nonzero() / 2, w)
    return w


@dataclass
class Report:
    """How well a verifier predicts on held-out problems."""
    brier: float                    # mean squared error against the label
    auc: float                      # chance that a place with the better outcome gets the higher score
    loss: float                     # binary cross-entropy
    steps: list                     # a (place, labels, mean predicted, mean label, Brier) row for each step index


def auc(score_, label, weight):
    """Weighted area under the ROC curve of 1-d tensors; each soft label counts as `label` positives and 1 - label
    negatives, ties as one half."""
    values, index = score_.unique(return_inverse=True)
    pos = torch.zeros(len(values), dtype=torch.double).index_add(0, index, (weight * label).double())
    neg = torch.zeros(len(values), dtype=torch.double).index_add(0, index, (weight * (1 - label)).double())
    below = neg.cumsum(0) - neg
    return float((pos * (below + neg / 2)).sum() / (pos.sum() * neg.sum()).clamp(min=1e-12))


def evaluate(model, traces):
    """Report of `model` on labelled traces of held-out problems."""
    q_hat = score(model, traces.tokens, traces.ends).clamp(1e-6, 1 - 1e-6)
    has, w = traces.n > 0, traces.n.float().sqrt()

    def mean(x, m):
        return float((x * w)[m].sum() / w[m].sum())
    bce = F.binary_cross_entropy(q_hat.nan_to_num(0.5), traces.q, reduction="none")
    error = (q_hat - traces.q) ** 2
    steps = [(h, int(m.sum()), mean(q_hat, m), mean(traces.q, m), mean(error, m)) for h in range(has.shape[1])
             if (m := has & (torch.arange(has.shape[1]) == h)).any()]
    return Report(mean(error, has), auc(q_hat[has], traces.q[has], w[has]), mean(bce, has), steps)


def train_verifier(init, train, held_out, *, steps, batch_size, lr_muon, lr_adamw, seed, log, balance=False, checks=6):
    """Fit a verifier that starts from `init` (a policy, or another verifier) to `train`; the checkpoint with the lowest
    cross-entropy on `held_out` (traces of other problems) is kept. Returns (model, its Report on those same traces).

    log(step, steps, loss, held-out loss) is called at every step.
    """
    torch.manual_seed(seed)
    model = init.as_verifier() if init.config.head == "lm" else copy.deepcopy(init)
    optimizers, generator = make_optimizers(model, lr_muon, lr_adamw), torch.Generator().manual_seed(seed)
    weights = label_weights(train, balance)
    order, best, best_state = torch.empty(0, dtype=torch.long), None, None
    for step in range(steps):
        if len(order) < batch_size:                                             # a new pass over the data
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        T = int(train.lengths[rows].max())
        batch = train.tokens[rows, :T], train.ends[rows], train.q[rows], weights[rows]
        loss = verifier_loss(model, *(x.to(model.device) for x in batch))
        loss.backward()
        apply_step(model, optimizers, schedule(step, steps))
        if step + 1 == steps or (step + 1) % max(1, steps // checks) == 0 and step >= steps // 2:
            report = evaluate(model, held_out)
            if best is None or report.loss < best.loss:
                best, best_state = report, copy.deepcopy(model.state_dict())
        log(step + 1, steps, loss.item(), best.loss if best else float("nan"))
    model.load_state_dict(best_state)
    return model, best

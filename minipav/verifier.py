"""The verifier trainer: the ORM, Q^pi and Q^mu are a policy's trunk with a scalar head.

The network predicts Q, never A (App. D): A is a difference of two of its predictions, best-of-K a function of
one. Every labelled step end of a trace is supervised in one forward pass, and no other position is. The ORM
is the same network with the end of each trace as its only label (section 2).
"""
import copy
from dataclasses import astuple, dataclass, replace

import torch
import torch.nn.functional as F

from minipav import parallel
from minipav.checkpoint import NOT_KEPT, Partial
from minipav.sampler import prefill
from minipav.targets import TARGETS
from minipav.traces import responses
from minipav.utils import Fail, apply_step, backward, make_optimizers, schedule, tokens_per_forward

EXACT_COUNT = 16                    # a label that is exact weighs as one from so many outcomes


def target_of(model):
    if model.config.head != "scalar" or model.config.target not in TARGETS:
        raise Fail(f"a model with the head {model.config.head} ({model.config.target}) is no verifier: is it "
                   "the right folder?")
    return TARGETS[model.config.target]


# ---- reading

@torch.no_grad()
def score(model, tokens, ends, progress=None, partial_folder=None):
    """Q at every step end: tokens (N, T), ends (N, S + 1) -> (N, S + 1) on the CPU, NaN where ends is -1.

    Rows are scored longest first, in batches that are cut at their own longest row; progress(rows done) is
    called after each; partial_folder: where a long call saves what it has, to go on from there.
    """
    value, out, last = target_of(model).value, torch.zeros(ends.shape), ends.max(1).values + 1
    order = last.argsort(descending=True, stable=True)[parallel.rank()::parallel.world()]
    saved = Partial(partial_folder, [out], [model], tokens, ends, int(model.bf16))
    at = saved.at
    while at < len(order):
        T = int(last[order[at]])
        rows = order[at:at + max(1, tokens_per_forward(model) // T)]
        end_rows, index = (ends[rows] >= 0).nonzero(as_tuple=True)
        where = end_rows.to(model.device), ends[rows][end_rows, index].to(model.device)
        hidden = model.trunk(tokens[rows, :T].to(model.device), at=where)       # (ends, C)
        out[rows[end_rows], index] = value(model.head(hidden)).cpu()
        at += len(rows)
        saved.save(at, at >= len(order))
        if progress:
            progress(min(at * parallel.world(), len(tokens)))
    parallel.exchange(order, out)
    return out.masked_fill_(ends < 0, float("nan"))


class Values:
    """Q of rows that grow: the verifier's KV cache is kept, so a step costs its new tokens only.

    self.q (N,) is the value at the last token of each row, equal to `score` of the whole rows up to rounding.
    """

    def __init__(self, model, tokens, lengths):
        self.model, self.value = model, target_of(model).value
        self.cache, hidden = prefill(model, tokens, torch.arange(len(tokens)), lengths)
        self.q = self.value(model.head(hidden))

    @torch.no_grad()
    def children(self, parent, new, new_lengths):
        """Values of the rows `parent` (N,), ascending, with new (N, T), right-padded, behind them."""
        child, new = copy.copy(self), new[:, :int(new_lengths.max())]           # cut the padding off
        child.cache, child.count = self.cache.branch(parent), new_lengths
        at = torch.arange(len(new), device=new.device), new_lengths - 1
        child.q = self.value(self.model.head(self.model.trunk(new, child.cache, at=at)))
        return child

    def __getitem__(self, rows):
        """The values of the rows with these indices (a copy), after `children`."""
        chosen = copy.copy(self)
        chosen.cache, chosen.q, chosen.count = self.cache.fold(rows, self.count[rows]), self.q[rows], None
        return chosen


class ExactValues:
    """Behind the interface of Values: exact Q of the task's tabular reference policy (calculator: the uniform
    legal walk, which a base policy that does not plan is close to). Not the best possible value."""

    def __init__(self, env, problems, device):
        self.enc, self.value, self.device = env.enc, env.task.exact_values(problems), device
        self.rows = [(i, "") for i in range(len(problems))]                     # (problem, response so far)
        self._read()

    def _read(self):
        self.q = torch.tensor([self.value(*row) for row in self.rows], dtype=torch.float32,
                              device=self.device)

    def children(self, parent, new, new_lengths):
        child, texts = copy.copy(self), responses(self.enc, new, new_lengths, torch.zeros_like(new_lengths))
        child.rows = [(self.rows[r][0], self.rows[r][1] + t) for r, t in zip(parent.tolist(), texts)]
        child._read()
        return child

    def __getitem__(self, rows):
        chosen = copy.copy(self)
        chosen.rows, chosen.q = [self.rows[r] for r in rows.tolist()], self.q[rows]
        return chosen


def exact_q(env, problems, traces):
    """Exact Q (N, S + 1) of the task's reference policy at every step end; NaN where there is none."""
    value, q = env.task.exact_values(problems), torch.full(traces.ends.shape, float("nan"))
    rows, index = (traces.ends >= 0).nonzero(as_tuple=True)
    prompt_lengths, lengths = traces.ends[rows, 0] + 1, traces.ends[rows, index] + 1
    texts = responses(env.enc, traces.tokens[rows], lengths, prompt_lengths)
    q[rows, index] = torch.tensor([value(i, text) for i, text in zip(traces.problem[rows].tolist(), texts)])
    return q


# ---- training

def outcome_only(traces):
    """The ORM's data: of each trace the end alone, labelled with Rex; none counts as exact."""
    end = torch.arange(traces.ends.shape[1]) == traces.last[:, None]
    return replace(traces, n=torch.ones_like(traces.n), exact=torch.zeros_like(end),
                   labelled=traces.labelled & end)


def label_weights(traces, balance=False):
    """Weight (N, S + 1) of each label in the loss: the root of the number of outcomes behind it (of an exact
    one: of 16). More outcomes count more, but not in proportion: labels of one trace are
    correlated. balance: the buckets Q < .5 and Q >= .5 weigh the same (section 4.2)."""
    w = torch.where(traces.exact, EXACT_COUNT, traces.n).float().sqrt() * traces.labelled
    if balance:
        for bucket in (traces.q < 0.5, traces.q >= 0.5):
            total = (w * bucket).sum()
            w = torch.where(bucket & (total > 0), w / total * traces.labelled.sum() / 2, w)
    return w


def verifier_loss(model, tokens, ends, q, n, weight):
    """The target's loss at the step ends of positive weight, weighted and summed. tokens (B, T), else (B, S +
    1)."""
    at = (weight > 0).nonzero(as_tuple=True)
    out = model.head(model.trunk(tokens, at=(at[0], ends[at])))                 # (labels, n_out)
    loss = target_of(model).loss(out, q[at], n[at])
    return (weight[at] * loss).sum()


@dataclass
class Report:
    """How well a verifier predicts on held-out problems."""
    brier: float                    # mean squared error against the label
    auc: float                      # chance that a step end with the better outcome gets the higher score
    auc_within: float               # the same of two step ends of one problem, at any depth
    loss: float                     # binary cross-entropy
    steps: list  # a (step, labels, mean predicted, mean label, Brier) row for each step index


def auc(value, label, weight, group=None):
    """Weighted area under the ROC curve of 1-d tensors; each soft label counts as `label` positives and 1 -
    label negatives, also to itself, ties as one half; .5 without pairs. group (integers): over pairs of one
    group alone."""
    def sums(index, x):
        return torch.zeros(int(index.max()) + 1, dtype=torch.double).index_add(0, index, x.double())
    group = torch.zeros_like(value) if group is None else group
    (of, _), index = torch.stack((group, value)).double().unique(dim=1, return_inverse=True)    # both ascend
    of, pos, neg = of.long(), sums(index, weight * label), sums(index, weight * (1 - label))
    every_pos, every_neg = sums(of, pos), sums(of, neg)
    below = neg.cumsum(0) - neg - (every_neg.cumsum(0) - every_neg)[of]
    pairs = float((every_pos * every_neg).sum())
    return float((pos * (below + neg / 2)).sum()) / pairs if pairs else 0.5


def evaluate(model, traces):
    """Report of `model` on labelled traces of held-out problems."""
    q_hat = score(model, traces.tokens, traces.ends).clamp(1e-6, 1 - 1e-6)
    has, w = traces.labelled, label_weights(traces)

    def mean(x, m):
        return float((x * w)[m].sum() / w[m].sum())
    bce = F.binary_cross_entropy(q_hat.nan_to_num(0.5), traces.q, reduction="none")
    error, index = (q_hat - traces.q) ** 2, torch.arange(has.shape[1])
    steps = [(h, int(m.sum()), mean(q_hat, m), mean(traces.q, m), mean(error, m)) for h in index.tolist()
             if (m := has & (index == h)).any()]
    of = traces.problem[:, None].expand_as(has)[has]
    aucs = [auc(q_hat[has], traces.q[has], w[has], group) for group in (None, of)]
    return Report(mean(error, has), *aucs, mean(bce, has), steps)


def train_verifier(init, train, held_out, *, steps, batch_size, lr_muon, lr_adamw, seed, log, balance=False,
                   target="bce", micro_batch=0, keeper=NOT_KEPT):
    """Fit a verifier that starts from `init` (a policy, or another verifier) to `train`. Of a few checkpoints
    in the second half the one with the lowest cross-entropy on `held_out` (traces of other problems) is kept.
    -> (model, Report)

    log(step, steps, loss, lowest held-out loss so far) is called at every step. micro_batch: rows of mean
    length in one backward pass (0: all); keeper: saves a long training (run.keeper).
    """
    torch.manual_seed(seed)
    same = init.config.head == "scalar" and init.config.target == target
    model = copy.deepcopy(init) if same else init.as_verifier(target, TARGETS[target].n_out)
    del init                        # its memory, if nobody else holds it
    train = TARGETS[target].labels(train) if TARGETS[target].labels else train
    optimizers, generator = make_optimizers(model, lr_muon, lr_adamw), torch.Generator().manual_seed(seed)
    weights, order = label_weights(train, balance), torch.empty(0, dtype=torch.long)
    best_model = copy.deepcopy(model)
    done, facts = keeper.resume({"model": model, "best": best_model}, {"model": optimizers, "best": []})
    best = Report(*facts["best"]) if facts.get("best") else None
    for step in range(steps):
        if len(order) < batch_size:                                             # a new pass over the data
            order = torch.cat([order, torch.randperm(len(train), generator=generator)])
        rows, order = order[:batch_size], order[batch_size:]
        if step < done:
            continue
        batch = train.tokens[rows], train.ends[rows], train.q[rows], train.n[rows], weights[rows]
        loss = backward(verifier_loss, model, batch, train.lengths[rows], batch[-1].sum(), micro_batch)
        apply_step(model, optimizers, schedule(step, steps))
        if step + 1 == steps or (step + 1) % max(1, steps // 6) == 0 and step >= steps // 2:
            report = evaluate(model, held_out)
            if best is None or report.loss < best.loss:
                best = report
                best_model.load_state_dict(model.state_dict())
        log(step + 1, steps, loss, best.loss if best else float("nan"))
        keeper.save(step + 1, step + 1 == steps, best=best and astuple(best))
    return best_model, best

"""Labelled traces: reasoning steps as token rows, with a value at every step end.

A trace has S + 1 step ends, h = 0..S: step end 0 is the bare prompt, where Q is V(x), and step end h the last
token of step h, where Q is Q(s_h, a_h). A step is what lies between two delimiters (a line).
"""
from dataclasses import dataclass, field, fields

import torch
from torch.nn.functional import pad as pad_right

from minipav.tokenizer import END, decode_rows, delimiter_tokens


@dataclass
class Env:
    """What a sampling function is given as env. The scripts pass a Run, which has the same three."""
    task: object
    enc: object
    sampling: dict = field(default_factory=dict)  # of every call of the sampler: temperature, top_p, ...


@dataclass
class Traces:
    """N rows of prompt and response together, T positions, at most S steps."""
    problem: torch.Tensor           # (N,) index into the list of problems
    tokens: torch.Tensor            # (N, T) right-padded
    lengths: torch.Tensor           # (N,)
    ends: torch.Tensor              # (N, S + 1) position of each step end; -1: no such step
    q: torch.Tensor                 # (N, S + 1) label: Monte-Carlo estimate of Q at each step end
    n: torch.Tensor                 # (N, S + 1) number of outcomes it is the mean of
    labelled: torch.Tensor          # (N, S + 1) whether there is a label
    exact: torch.Tensor  # (N, S + 1) whether it is known, not estimated: a finished trace's outcome
    reward: torch.Tensor            # (N,) Rex of the whole trace
    cost: torch.Tensor              # (N,) tokens that were sampled for this row

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, rows):
        return Traces(*(x[rows] for x in vars(self).values()))

    @property
    def last(self):
        """(N,) index of each trace's last step end."""
        return (self.ends >= 0).sum(1) - 1

    @staticmethod
    def cat(parts, pad):
        """All parts one after the other, padded to a common width."""
        fill = dict(tokens=pad, ends=-1, q=0.0, n=0, labelled=False, exact=False)

        def one(name):
            ts = [getattr(p, name) for p in parts]
            if name in fill:
                width = max(t.shape[1] for t in ts)
                ts = [pad_right(t, (0, width - t.shape[1]), value=fill[name]) for t in ts]
            return torch.cat(ts)
        return Traces(*(one(f.name) for f in fields(Traces)))


def step_ends(tokens, prompt_lengths, lengths, delimiters):
    """Positions (N, S + 1) of the last token of the prompt and of every finished step; -1 beyond the last
    one. A step ends with one of the tokens `delimiters`. tokens (N, T)."""
    N, t = len(tokens), torch.arange(tokens.shape[1])
    response = (t >= prompt_lengths[:, None]) & (t < lengths[:, None])          # (N, T)
    end = torch.isin(tokens, torch.tensor(delimiters)) & response
    end[torch.arange(N), prompt_lengths - 1] = True
    index = end.cumsum(1) - 1  # (N, T) which step end a position is
    out = torch.full((N, int(index.max()) + 1), -1)
    row, pos = end.nonzero(as_tuple=True)
    out[row, index[row, pos]] = pos
    return out


def responses(enc, tokens, lengths, prompt_lengths):
    """The texts of the responses alone. A text ends with END if its last token is end-of-text, and not if
    ordinary tokens merely spell it."""
    ended = tokens.gather(1, lengths[:, None] - 1)[:, 0] == enc.eot_token
    new = lengths - prompt_lengths
    most = torch.arange(int(new.max()) if len(new) else 0, device=new.device)
    at = (prompt_lengths[:, None] + most).clamp(max=tokens.shape[1] - 1)
    texts = decode_rows(enc, tokens.gather(1, at), new - ended.long())
    return [t.replace(END, "\ufffd") + END * e for t, e in zip(texts, ended.tolist())]


def label_with_outcome(env, problems, which, tokens, lengths, prompt_lengths, since=None, sampled=True):
    """Traces of finished rollouts: a rollout's outcome is an unbiased label for each prefix.

    which (N,) indexes `problems`; since (N,): the first step end whose continuation was sampled from the
    policy that is being valued (default 0: the whole trace was); sampled: whether that cost tokens.
    """
    texts = responses(env.enc, tokens, lengths, prompt_lengths)
    reward = torch.tensor([env.task.outcome(problems[i], t) for i, t in zip(which.tolist(), texts)]).float()
    ends = step_ends(tokens, prompt_lengths, lengths, delimiter_tokens(env.enc, env.task.delimiter))
    since, index = torch.zeros_like(which) if since is None else since, torch.arange(ends.shape[1])
    labelled = (ends >= 0) & (index >= since[:, None])
    ended = tokens.gather(1, lengths[:, None] - 1) == env.enc.eot_token
    exact = ended & (index == (ends >= 0).sum(1, keepdim=True) - 1)
    cost = (lengths - 1 - ends.gather(1, since[:, None])[:, 0]) * sampled
    q = reward[:, None] * labelled
    return Traces(which, tokens, lengths, ends, q, labelled.long(), labelled, exact, reward, cost)

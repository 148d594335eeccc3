"""The KV cache: rows that share a prefix keep it once, and products read it once. Shapes as in model.py, and

    P prefixes, S slots of each, R rows behind them, M rows behind one prefix at most
"""
import torch
import torch.nn.functional as F

from minipav import kernels
from minipav.model import rotate
from minipav.utils import give_back


def tokens_in_flight(config, device, dtype):
    """How many slots of KV buffers there may be: on a GPU a quarter of its memory; elsewhere three times the
    memory of the blocks' weights, and at least .4 GB (small models': counted as fp32)."""
    numbers = 2 * config.n_layer * config.n_kv_head * config.n_embd // config.n_head
    if device == "cuda":
        return torch.cuda.get_device_properties().total_memory // (8 if dtype == "bf16" else 16) // numbers
    weights = 4 * config.n_layer * config.n_embd * (4 * config.n_embd + 3 * config.n_ffn)
    return max(400 << 20, 3 * weights) // (numbers * (2 if config.large and dtype == "bf16" else 4))


def aligned(slots, device):
    """A GPU's products of bf16 matrices are faster in rows of whole 16 bytes, and Triton compiles a kernel
    again for sizes that are no multiple of 16."""
    return slots if device.type == "cpu" else -(-slots // 16) * 16


def fused(device):                  # a function, so that a test can say yes
    return device.type == "cuda"


class KVCache:
    """Keys and values (rows, G, slots, D) of every layer, in two parts: `prefix`, P rows that were read once,
    and `new`, what R rows have added since, each behind the first lengths[r] slots of the prefix group[r]. So
    the samples of a prompt, the completions of a trace, the candidates behind a beam's prefix share what they
    have in common: it is kept once (and by products read once)."""

    def __init__(self, prefix, group, lengths):
        """prefix: (keys, values) of each layer; group (R,) ascending."""
        self.prefix, self.lengths, self.count, k = prefix, lengths, 0, prefix[0][0]
        shape = (len(group), k.shape[1], 0, k.shape[3])
        self.new = [(k.new_empty(shape), k.new_empty(shape)) for _ in prefix]
        self._lay_out(group)

    @staticmethod
    def buffers(config, rows, slots, device, dtype):
        shape = (rows, config.n_kv_head, aligned(slots, device), config.n_embd // config.n_head)
        return [tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
                for _ in range(config.n_layer)]

    def _lay_out(self, group):
        """Rows behind one prefix stand side by side: row r at place[r] of P x M. If that were mostly empty
        (many rows behind one prefix, few behind the others), every row gets a copy of its own."""
        R = len(group)
        rank = torch.arange(R, device=group.device) - torch.searchsorted(group, group)
        self.group, self.M = group, int(rank.max()) + 1
        if len(self.prefix[0][0]) * self.M > 4 * R:
            self.prefix = [(k[group], v[group]) for k, v in self.prefix]
            self.group, self.M = torch.arange(R, device=group.device), 1
        k, group = self.prefix[0][0], self.group
        self.place = None if R == len(k) * self.M else group * self.M + rank    # None: they fill it
        hidden = torch.arange(k.shape[2], device=group.device) >= self.lengths[:, None]         # (R, S)
        self.mask = k.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]

    @property
    def room(self):
        """Slots for new tokens, filled or not."""
        return self.new[0][0].shape[2]

    def widen(self, room, recorded=False):
        """Make room for so many new tokens. Products read all slots, filled or not: they would first copy a
        part of them. recorded: kernels read the filled ones, whose number is on the device from now on, so
        that one step's launches are the next one's (graphs.py)."""
        give_back()
        more, device = aligned(room, self.lengths.device) - self.room, self.lengths.device
        if more > 0:
            self.new = [tuple(F.pad(x, (0, 0, 0, more)) for x in pair) for pair in self.new]
        if recorded:
            if not torch.is_tensor(self.count):
                self.count = torch.full((1,), self.count, device=device)
            return
        empty = torch.arange(self.room, device=device) >= self.count
        self.ahead = self.mask.new_zeros(self.room).masked_fill_(empty, float("-inf"))

    def step(self, layer, q, k, v, rope):
        """The next T tokens of every row: append their keys and values k, v (R, T, G, D). -> what their
        queries q (R, T, H, D) read, (R, T, H * D). q and k come without their rotary embedding."""
        if torch.is_tensor(self.count):                                         # recorded
            return kernels.attend(self, layer, q, k, v, rope)
        self.append(layer, rotate(k, *rope), v)
        several = q.shape[1] > 1 and fused(q.device)
        return (self.attend_fused if several else self.attend)(layer, rotate(q, *rope))

    def append(self, layer, k, v):
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        at = slice(self.count, self.count + k.shape[2])
        if at.stop > self.room:
            self.widen(at.stop)
        self.ahead[at] = 0.0
        for buffer, x in zip(self.new[layer], (k, v)):
            buffer[:, :, at] = x

    def attend(self, layer, q):
        (R, T, H, D), (k, v), (new_k, new_v) = q.shape, self.prefix[layer], self.new[layer]
        G, S = k.shape[1], k.shape[2]
        # the H / G query heads of a group stand as (H / G) * T queries of one head
        q = (q.to(k.dtype) * D ** -0.5).view(R, T, G, H // G, D).permute(0, 2, 3, 1, 4).reshape(R, G, -1, D)
        old = self._apart(self._together(q) @ k.transpose(2, 3), H // G * T) + self.mask        # (R, G, N, S)
        new = q @ new_k.transpose(2, 3)                                         # (R, G, N, room)
        if T == 1:
            new = new + self.ahead
        else:
            later = torch.ones(T, self.room, dtype=torch.bool, device=q.device).triu(self.count + 1)
            new = new.masked_fill(later.repeat(H // G, 1), float("-inf"))
        w = torch.cat((old, new), -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        y = self._apart(self._together(w[..., :S]) @ v, H // G * T) + w[..., S:] @ new_v
        return y.view(R, G, H // G, T, D).permute(0, 3, 1, 2, 4).reshape(R, T, H * D)

    def attend_fused(self, layer, q):
        """The same by PyTorch's kernels, which keep no weights (R, G, N, slots); every row's slots are copied
        for them."""
        (R, T, H, D), prefix, new = q.shape, self.prefix[layer], self.new[layer]
        N = H // new[0].shape[1]
        if layer == 0:
            later = torch.ones(T, self.room, dtype=torch.bool, device=q.device).triu(self.count + 1)
            new_mask = self.mask.new_zeros(T, self.room).masked_fill_(later, float("-inf"))
            both = self.mask.expand(R, 1, T, -1), new_mask.expand(R, 1, T, self.room)
            self.bias = torch.cat(both, -1).repeat(1, 1, N, 1)                  # (R, 1, N * T, S + room)
        k, v = (torch.cat((x[self.group], y), 2) for x, y in zip(prefix, new))
        q = q.to(k.dtype).view(R, T, -1, N, D).permute(0, 2, 3, 1, 4).reshape(R, -1, N * T, D)
        y = F.scaled_dot_product_attention(q, k, v, self.bias)
        if layer + 1 == len(self.prefix):
            del self.bias
        return y.view(R, -1, N, T, D).permute(0, 3, 1, 2, 4).reshape(R, T, H * D)

    def _together(self, x):
        """(R, G, N, E) -> (P, G, M * N, E)"""
        P, (_, G, N, E) = len(self.prefix[0][0]), x.shape
        if self.place is not None:
            x = x.new_zeros(P * self.M, G, N, E).index_copy_(0, self.place, x)
        return x.view(P, self.M, G, N, E).transpose(1, 2).reshape(P, G, -1, E)

    def _apart(self, x, N):
        """(P, G, M * N, E) -> (R, G, N, E)"""
        P, G, _, E = x.shape
        x = x.view(P, G, self.M, N, E).transpose(1, 2).reshape(-1, G, N, E)
        return x if self.place is None else x[self.place]

    def keep(self, rows):
        """Only these rows (R',) stay, in this order, which is the old one."""
        group = self.group[rows]
        used, self.lengths = torch.unique_consecutive(group), self.lengths[rows]
        if len(used) < 0.8 * len(self.prefix[0][0]):
            self.prefix = [(k[used], v[used]) for k, v in self.prefix]
            group = torch.searchsorted(used, group)
        self.new = [(k[rows], v[rows]) for k, v in self.new]
        self._lay_out(group)

    def put(self, rows, other, which):
        """These rows get the new tokens of those rows of a cache that went on with some of them."""
        self.widen(other.room)
        for pair, others in zip(self.new, other.new):
            for x, y in zip(pair, others):
                x[rows] = y[which]

    def branch(self, parent):
        """A cache of rows behind the rows `parent` (ascending), which have added nothing."""
        return KVCache(self.prefix, self.group[parent], self.lengths[parent])

    def fold(self, rows, count):
        """A cache where each of these rows, with its first count (R',) new tokens, is a prefix of its own."""
        at, t = self.lengths[rows], torch.arange(int(count.max()), device=count.device)
        row, col = (t < count[:, None]).nonzero(as_tuple=True)
        slots = aligned(int((at + count).max()), at.device)
        prefix = []
        for old, new in zip(self.prefix, self.new):
            pair = []
            for o, x in zip(old, new):
                o = o[self.group[rows], :, :slots]
                o = F.pad(o, (0, 0, 0, slots - o.shape[2]))
                o[row, :, at[row] + col] = x[rows[row], :, col]
                pair.append(o)
            prefix.append(tuple(pair))
        return KVCache(prefix, torch.arange(len(rows), device=rows.device), at + count)

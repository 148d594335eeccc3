"""The planted sub-sequence (section 3.3, App. B): the task, its provers with exact values, and the policy network.

A response is 10 tokens of 0..14, 14 ends it; it is right if y* = [3 6 0 3 5] stands in it before the end. A step is a token. The
prover mu_gamma takes the next token of y* with probability gamma / (gamma + 14), so its values are exact by dynamic programming
over (position, how much of y* is matched). The policy is a small MADE, E of them at once: weights have a leading dimension E.
"""
import torch

V, EOS = 15, 14


class Planted:
    """The task: y* as an automaton. State k < m: the last k tokens match the first k of y* (with gaps: k tokens of it have
    come, in order); m: y* was there, for good; m + 1: ended without it."""

    def __init__(self, target=(3, 6, 0, 3, 5), length=10, gaps=False):
        self.target, self.L, self.m = tuple(target), length, len(target)
        self.next = torch.full((self.m + 2, V), self.m)                         # (states, V)
        self.next[self.m + 1] = self.m + 1
        for k in range(self.m):
            for a in range(V):
                seen = self.target[:k] + (a,)
                if gaps:
                    self.next[k, a] = k + (a == self.target[k])
                else:                                                           # the longest suffix that starts y*
                    self.next[k, a] = max(j for j in range(k + 2) if seen[k + 1 - j:] == self.target[:j])
            self.next[k, EOS] = self.m + 1

    def prover(self, gamma):
        """mu_gamma (states, V)."""
        mu = torch.full((self.m + 2, V), 1 / (gamma + V - 1), dtype=torch.double)
        mu[range(self.m), self.target] = gamma / (gamma + V - 1)
        mu[self.m:] = 1 / V
        return mu

    def values(self, mu):
        """Exact Q (L, states, V) and V (L + 1, states) of a policy that sees the state only (Eq. 1)."""
        value, Q = torch.zeros(self.L + 1, self.m + 2, dtype=torch.double), []
        value[self.L, self.m] = 1
        for t in reversed(range(self.L)):
            Q.insert(0, value[t + 1][self.next])
            value[t] = (mu * Q[0]).sum(-1)
        return torch.stack(Q), value

    def states(self, tokens):
        """The state before each token and behind the last one: tokens (..., L) -> (..., L + 1)."""
        k = [torch.zeros(tokens.shape[:-1], dtype=torch.long)]
        for t in range(tokens.shape[-1]):
            k.append(self.next[k[-1], tokens[..., t]])
        return torch.stack(k, -1)

    def demos(self, n, gamma, generator):
        """n samples (n, L) of mu_gamma."""
        mu, k, out = self.prover(gamma).float(), torch.zeros(n, dtype=torch.long), []
        for _ in range(self.L):
            out.append(torch.multinomial(mu[k], 1, generator=generator)[:, 0])
            k = self.next[k, out[-1]]
        return torch.stack(out, -1)


class Made(torch.nn.Module):
    """E masked autoregressive networks, three hidden layers of 128: the logits of token t see the tokens before t only."""

    def __init__(self, seeds, L, width=128):
        super().__init__()
        self.L, degree = L, torch.arange(width) % (L - 1) + 1                   # a unit of degree d sees d tokens
        token, sizes = torch.arange(L).repeat_interleave(V), (L * V, width, width, width, L * V)
        hidden = (degree[None] >= degree[:, None]).float()
        masks = ((degree[None] > token[:, None]).float(), hidden, hidden, (token[None] >= degree[:, None]).float())
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", mask)
        gens = [torch.Generator().manual_seed(s) for s in seeds]
        w = [[torch.randn(a, b, generator=g) * (2 / a) ** 0.5 * (0.1 if b == L * V else 1) for g in gens]
             for a, b in zip(sizes, sizes[1:])]
        self.w = torch.nn.ParameterList([torch.nn.Parameter(torch.stack(x)) for x in w])
        self.b = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(len(gens), 1, b)) for b in sizes[1:]])

    def weight(self, i):
        return self.w[i] * getattr(self, f"mask{i}")

    def forward(self, tokens):
        """Log-probabilities (E, B, L, V) of every token, tokens (E, B, L)."""
        h = torch.nn.functional.one_hot(tokens, V).flatten(2).float()
        for i in range(3):
            h = torch.baddbmm(self.b[i], h, self.weight(i)).relu()
        return torch.baddbmm(self.b[3], h, self.weight(3)).unflatten(2, (self.L, V)).log_softmax(-1)

    @torch.no_grad()
    def sample(self, u, prefix=None):
        """Tokens (E, B, L) by inverse CDF at u (E, B, L), behind prefix (E, B, p)."""
        E, B, _ = u.shape
        w, b = [self.weight(i) for i in range(4)], list(self.b)
        out = torch.zeros(E, B, self.L, dtype=torch.long)
        z, row = b[0].expand(E, B, -1).clone(), torch.arange(E)[:, None]        # the first layer is summed token by token
        start = 0 if prefix is None else prefix.shape[2]
        for t in range(self.L):
            if t < start:
                out[:, :, t] = prefix[:, :, t]
            else:
                h = torch.baddbmm(b[2], torch.baddbmm(b[1], z.relu(), w[1]).relu(), w[2]).relu()
                at = slice(t * V, (t + 1) * V)
                cdf = torch.baddbmm(b[3][:, :, at], h, w[3][:, :, at]).softmax(-1).cumsum(-1)
                out[:, :, t] = (u[:, :, t, None] * cdf[..., -1:] >= cdf).sum(-1).clamp(max=V - 1)
            z += w[0][row, t * V + out[:, :, t]]
        return out

    def expand(self, members):
        """A new ensemble: copies of these members."""
        new = Made([0] * len(members), self.L, self.w[0].shape[2])
        for a, b in zip(new.parameters(), self.parameters()):
            a.data = b.data[members].clone()
        return new

"""The planted sub-sequence (section 3.3, App. B): the task, its provers with exact values, the policy.

A response is 10 tokens of 0..14, 14 ends it; it is right if y* = [3 6 0 3 5] stands in it before the end. A
step is a token. The prover mu_gamma takes the next token of y* with probability gamma / (gamma + 14).
"""
import torch
from torch.nn.functional import one_hot

V, EOS = 15, 14


class Planted:
    """The task: y* as an automaton. State k < m: the last k tokens match the first k of y* (with gaps: k
    tokens of it have come, in order); m: y* was there, for good; m + 1: ended without it."""

    def __init__(self, target=(3, 6, 0, 3, 5), length=10, gaps=False):
        self.target, self.L, self.m = target, length, len(target)
        self.next = torch.full((self.m + 2, V), self.m)                 # (states, V)
        self.next[self.m + 1] = self.next[:self.m, EOS] = self.m + 1
        for k in range(self.m):
            for a in range(EOS):
                seen = target[:k] + (a,)
                overlap = max(j for j in range(k + 2) if seen[k + 1 - j:] == target[:j])
                self.next[k, a] = k + (a == target[k]) if gaps else overlap

    def states(self, tokens):
        """The state before each token and behind the last one: tokens (..., L) -> (..., L + 1)."""
        k = [torch.zeros_like(tokens[..., 0])]
        for a in tokens.unbind(-1):
            k.append(self.next[k[-1], a])
        return torch.stack(k, -1)

    def reward(self, tokens):
        """Rex (...,) of responses: tokens (..., L)."""
        return (self.states(tokens)[..., -1] == self.m).float()

    def prover(self, gamma):
        """mu_gamma (states, V): uniform but for the next token of y*, gamma times as likely as any other."""
        mu = torch.ones(self.m + 2, V, dtype=torch.double)
        mu[range(self.m), self.target] = gamma
        return mu / mu.sum(-1, keepdim=True)

    def demos(self, n, gamma, generator):
        """n samples (n, L) of mu_gamma."""
        mu, k, tokens = self.prover(gamma).float(), torch.zeros(n, dtype=torch.long), []
        for _ in range(self.L):
            tokens.append(torch.multinomial(mu[k], 1, generator=generator)[:, 0])
            k = self.next[k, tokens[-1]]
        return torch.stack(tokens, -1)

    def values(self, mu):
        """Exact Q^mu (L, states, V) and V^mu (L + 1, states) of mu (states, V) (Eq. 1)."""
        value = torch.zeros(self.L + 1, self.m + 2, dtype=torch.double)
        value[self.L, self.m] = 1
        for t in reversed(range(self.L)):
            value[t] = (mu * value[t + 1][self.next]).sum(-1)
        return value[1:, self.next], value

    def advantage(self, gamma):
        """Exact A^mu (L, states, V) of every action, mu = mu_gamma (Eq. 2)."""
        Q, value = self.values(self.prover(gamma))
        return (Q - value[:-1, :, None]).float()


class Made(torch.nn.Module):
    """E masked autoregressive networks at once, one a seed, three hidden layers of 128: weights (E, in, out).
    A unit of degree d sees the first d tokens; the logits of token t have degree t."""

    def __init__(self, seeds, L, width=128):
        super().__init__()
        self.L, token, hidden = L, torch.arange(L).repeat_interleave(V), torch.arange(width) % (L - 1) + 1
        degrees = [token + 1, hidden, hidden, hidden, token]
        self.masks = [(b >= a[:, None]).float() for a, b in zip(degrees, degrees[1:])]
        gens = [torch.Generator().manual_seed(s) for s in seeds]
        w = [torch.stack([torch.randn(mask.shape, generator=g) * (2 / len(mask)) ** 0.5 for g in gens])
             for mask in self.masks]
        w[-1] *= 0.1                                                    # it starts near the uniform policy
        self.w = torch.nn.ParameterList(w)
        self.b = torch.nn.ParameterList([torch.zeros(len(gens), 1, mask.shape[1]) for mask in self.masks])

    def forward(self, tokens):
        """Log-probabilities (E, B, L, V) of every token, tokens (E, B, L)."""
        h = one_hot(tokens, V).flatten(2).float()
        for b, w, mask in zip(self.b, self.w, self.masks):
            h = torch.baddbmm(b, h.relu(), w * mask)
        return h.unflatten(2, (self.L, V)).log_softmax(-1)

    @torch.no_grad()
    def sample(self, u, prefix=()):
        """Tokens (E, B, L) by inverse CDF at u (E, B, L), behind the tokens `prefix`, each (E, B)."""
        w, b = [w * mask for w, mask in zip(self.w, self.masks)], self.b
        tokens, member = list(prefix), torch.arange(len(u))[:, None]
        z = b[0].expand(-1, u.shape[1], -1).clone()             # the first layer, summed token by token
        for t in range(self.L):
            if t == len(tokens):
                h = torch.baddbmm(b[2], torch.baddbmm(b[1], z.relu(), w[1]).relu(), w[2]).relu()
                at = slice(t * V, (t + 1) * V)
                cdf = torch.baddbmm(b[3][:, :, at], h, w[3][:, :, at]).softmax(-1).cumsum(-1)
                tokens.append((u[:, :, t, None] * cdf[..., -1:] >= cdf).sum(-1).clamp(max=V - 1))
            z += w[0][member, t * V + tokens[t]]
        return torch.stack(tokens, -1)

"""The compact GPT: one class for the policies and, with a scalar head, for the verifiers.

Decoder-only: RMSNorm, rotary positions, grouped-query attention with optional q/k/v bias, SwiGLU, tied or
untied head. One trunk serves training (no cache) and cached decoding; who calls it applies the head where it
is wanted. Shapes beside the code are of

    B rows, T positions, C = n_embd, H = n_head, G = n_kv_head, D = C / H, V = vocab_size
"""
import dataclasses
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from minipav.files import damaged, read_json, read_tensors, reading, write_json, write_tensors
from minipav.precision import lowered, mixed
from minipav.utils import Fail


@dataclasses.dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 128          # longest row, prompt and response together
    n_layer: int = 3
    n_head: int = 4
    n_kv_head: int = 2             # keys and values are shared by n_head / n_kv_head query heads
    n_embd: int = 128
    n_ffn: int = 256               # width of the SwiGLU
    rope_theta: float = 10000.0
    rope_factor: float = 1.0       # Llama 3: slow angles are slower by this; 1: plain rotary positions
    rope_low: float = 1.0          # ... those that turn less often than this within rope_original positions,
    rope_high: float = 4.0         # none that turns more often than this, and in between in part
    rope_original: int = 8192
    norm_eps: float = 1e-6
    qkv_bias: bool = False         # Qwen2 has it, Llama does not
    tied: bool = True              # the language-model head is the embedding
    head: str = "lm"  # "lm": logits over the vocabulary; "scalar": n_out numbers a position (a verifier)
    n_out: int = 1
    target: str = "bce"            # what a verifier was trained for: one of targets.TARGETS

    def __post_init__(self):
        wrong = [f.name for f in dataclasses.fields(self) if not isinstance(getattr(self, f.name), f.type)]
        sizes = None if wrong else (*dataclasses.astuple(self)[:7], self.n_out)
        if wrong or min(sizes) < 1 or max(sizes) > 1 << 24 or self.head not in ("lm", "scalar"):
            why = wrong[0] if wrong else "a size below 1 or above 2^24, or an unknown head"
            raise Fail(f"impossible size: {why} in {self}")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head or (self.n_embd // self.n_head) % 2:
            raise Fail(f"impossible size: n_embd={self.n_embd} must be an even multiple of "
                       f"n_head={self.n_head}, and n_head a multiple of n_kv_head={self.n_kv_head}")
        self.large = self.n_embd >= 512         # a language model: fused AdamW, on a CPU more of it in bf16


SIZES = {"nano": dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=64, n_ffn=128),       # 0.1M parameters: tests
         "mini": dict(),                                                             # 0.5M: the default
         "midi": dict(n_layer=6, n_head=8, n_kv_head=2, n_embd=256, n_ffn=640),      # 4M
         "maxi": dict(n_layer=12, n_head=12, n_kv_head=4, n_embd=768, n_ffn=2048)}   # 76M: a GPU


def rope_tables(config):
    """cos and sin (block_size, D) of the angles pos theta^(-2i/D), halves paired as in Llama; -sin first."""
    D = config.n_embd // config.n_head
    freq = config.rope_theta ** (-torch.arange(0, D, 2).float() / D)
    turns = config.rope_original * freq / (2 * torch.pi)
    fast = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    freq = freq * (fast + (1 - fast) / config.rope_factor)
    angle = torch.arange(config.block_size).float()[:, None] * freq
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), 1)


def rotate(x, cos, sin):
    """Rotary embedding: x (B, T, H, D), cos and sin (B or 1, T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def causal_attention(q, k, v, short=128):
    """q (B, H, T, D), k and v (B, G, T, D) -> (B, H, T, D). Short rows: faster by plain products on a CPU."""
    (B, H, T, D), G = q.shape, k.shape[1]
    if T > short or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G < H)
    later = q.new_full((T, T), float("-inf")).triu(1)
    scores = (q * D ** -0.5).reshape(B, G, -1, D) @ k.transpose(2, 3)           # (B, G, H / G * T, T)
    w = (scores.view(B, G, -1, T, T) + later).softmax(-1).view(B, G, -1, T)
    return (w @ v).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.H, self.G, self.D, self.large = config.n_head, config.n_kv_head, D, config.large
        self.wq = nn.Linear(C, self.H * D, bias=config.qkv_bias)
        self.wk = nn.Linear(C, self.G * D, bias=config.qkv_bias)
        self.wv = nn.Linear(C, self.G * D, bias=config.qkv_bias)
        self.wo = nn.Linear(self.H * D, C, bias=False)

    def forward(self, x, rope, layer, cache, kv_out, at):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.H, self.D)
        k, v = self.wk(x).view(B, T, self.G, self.D), self.wv(x).view(B, T, self.G, self.D)
        if cache is not None:
            y = cache.step(layer, q, k, v, rope)
        else:
            q, k, v = (z.transpose(1, 2) for z in (rotate(q, *rope), rotate(k, *rope), v))  # (B, heads, T, D)
            if kv_out is not None:
                kv_out[layer][0][:, :, :T], kv_out[layer][1][:, :, :T] = k, v
            low = self.large and T <= 256 and torch.is_autocast_enabled("cpu")
            with torch.autocast("cpu", enabled=low):    # else fp32 there: the fused backward is slow in bf16
                kind = v.dtype if x.is_cuda else q.dtype        # rotated q and k are in fp32
                y = causal_attention(*(z.to(kind) for z in (q, k, v)), 256 if low else 128)
            y = y.transpose(1, 2).reshape(B, T, self.H * self.D)
        return self.wo(y if at is None else y[at])


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.up = nn.Linear(config.n_embd, config.n_ffn, bias=False)
        self.down = nn.Linear(config.n_ffn, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, rope, layer, cache, kv_out, at):
        y = self.attn(lowered(self.norm1(x)), rope, layer, cache, kv_out, at)
        x = y + (x if at is None else x[at])
        return x + self.mlp(lowered(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bf16 = False               # whether matrix products are in bf16 (precision.py)
        self.checkpointing = False      # whether a block is computed again for the backward pass
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        if config.head == "scalar":
            self.head = nn.Linear(config.n_embd, config.n_out)
        else:
            self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tied:
                self.head.weight = self.embed.weight
        for name, table in zip(("cos", "sin"), rope_tables(config)):
            self.register_buffer(name, table, persistent=False)
        self.apply(self._init)
        for name, p in self.named_parameters():
            if name.endswith(("wo.weight", "down.weight")):  # the two writes to the residual stream
                nn.init.normal_(p, std=0.02 / (2 * config.n_layer) ** 0.5)

    @staticmethod
    def _init(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def dtype(self):
        return torch.bfloat16 if self.bf16 else self.embed.weight.dtype         # of keys and values

    @mixed
    def trunk(self, idx, cache=None, kv_out=None, at=None):
        """Hidden states (B, T, C) of the tokens idx (B, T); with at = (rows (K,), columns (K,)) those of the
        positions named, (K, C), which saves most of the last block. Without a cache idx has rows from their
        start, right-padded, and their keys and values are written to kv_out, a pair (B, G, at least T, D) a
        layer, if it is given. With a cache idx has the next T tokens of its rows, which are added to it."""
        T = idx.shape[1]
        if cache is not None:
            pos = cache.lengths[:, None] + cache.count + torch.arange(T, device=idx.device)     # (B, T)
            rope = self.cos[pos][:, :, None], self.sin[pos][:, :, None]         # (B, T, 1, D)
        elif T > self.config.block_size:
            raise ValueError(f"{T} tokens in a row, but block_size is {self.config.block_size}")
        else:
            rope = self.cos[None, :T, None], self.sin[None, :T, None]
        x = self.embed(idx)                                                     # (B, T, C)
        for layer, block in enumerate(self.blocks):
            args = x, rope, layer, cache, kv_out, at if layer + 1 == len(self.blocks) else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(*args)
        if cache is not None:
            cache.count += T
        return self.norm(x)

    def forward(self, idx, cache=None):
        """Logits (B, T, V), or (B, T, n_out) with the scalar head."""
        return self.head(self.trunk(idx, cache))

    def as_verifier(self, target="bce", n_out=1):
        """A new model with this trunk's weights and a fresh scalar head (section 4.2)."""
        config = dataclasses.replace(self.config, head="scalar", target=target, n_out=n_out)
        model = GPT(config).to(self.device)
        model.bf16, model.checkpointing = self.bf16, self.checkpointing
        model.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("head.")},
                              strict=False)
        if config.large:                # the small steps of its training would not undo a random one
            nn.init.zeros_(model.head.weight)
        return model

    def save(self, folder):
        """Write config.json and model.safetensors into `folder`, each whole or not at all. -> the paths"""
        state = self.state_dict()
        if self.config.tied and self.config.head == "lm":
            del state["head.weight"]
        files = [Path(folder) / "config.json", Path(folder) / "model.safetensors"]
        write_json(files[0], dataclasses.asdict(self.config))
        write_tensors(files[1], state)
        return files

    @classmethod
    def load(cls, folder, device="cpu"):
        """The model saved in `folder`. Raises Fail, naming the file, if it is missing, truncated, not finite
        or another model's."""
        path, weights = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        fields = read_json(path, vocab_size=int)
        if unknown := fields.keys() - {f.name for f in dataclasses.fields(GPTConfig)}:
            raise damaged(path, f"unknown: {', '.join(sorted(unknown))}")
        with reading(path, Fail):
            config = GPTConfig(**fields)
        state, _ = read_tensors(weights)
        if config.tied and config.head == "lm" and "embed.weight" in state:
            state["head.weight"] = state["embed.weight"]
        with torch.device("meta"):  # before memory is taken for it
            want = {k: v.shape for k, v in cls(config).state_dict().items()}
        have = {k: v.shape for k, v in state.items()}
        if wrong := sorted(k for k in want.keys() | have.keys() if want.get(k) != have.get(k)):
            raise Fail(f"{weights} holds the weights of another model: {', '.join(wrong)[:160]}")
        model = cls(config)
        model.load_state_dict(state)
        return model.to(device)

"""What is timed at one size, and what it is compared with."""
import copy
import importlib
import inspect
import sys

import torch

from minipav.model import GPT, GPTConfig
from minipav.precision import pick_dtype
from minipav.reinforce import policy_loss, value_loss
from minipav.sampler import decode, prefill, sample
from minipav.sft import sft_loss
from minipav.utils import Fail, apply_step, backward, make_optimizers
from minipav.verifier import Values, score, verifier_loss

# shape; prompts, samples of each, tokens of a prompt, new tokens; rows and tokens of a training step
SIZES = {"0.5M": (dict(vocab_size=402), 256, 8, 24, 32, 256, 48),
         "4M": (dict(vocab_size=402, n_layer=6, n_head=8, n_embd=256, n_ffn=640), 64, 8, 48, 64, 128, 48),
         "30M": (dict(vocab_size=16384, n_layer=8, n_head=8, n_embd=512, n_ffn=1408), 32, 8, 64, 64, 16, 128),
         "135M": (dict(vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, n_ffn=1536),
                  32, 4, 100, 32, 8, 200),
         "0.5B": (dict(vocab_size=151936, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, n_ffn=4864),
                  32, 8, 100, 64, 8, 200)}
STEP = 10                           # tokens of a reasoning step


def generators(c, x, n, T, device, caches):
    """transformers' generate, for a model of the same shape: {name: function}."""
    try:
        import transformers
    except ImportError:
        return {}
    transformers.logging.set_verbosity_error()
    out, config = {}, transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_ffn, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=True, pad_token_id=0)
    fast = pick_dtype("auto", device) == "bf16"
    for dtype in (torch.float32, torch.bfloat16)[fast and device == "cuda":1 + fast]:
        hf = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
        for cache in caches:
            kw = dict(do_sample=True, num_return_sequences=n, max_new_tokens=T, min_new_tokens=T, top_k=0,
                      attention_mask=torch.ones_like(x),
                      cache_implementation=None if cache == "dynamic" else cache)
            out[f"generate {cache} {str(dtype)[6:]}"] = (
                lambda hf=hf, kw=kw: torch.no_grad()(hf.generate)(x, **kw))
    return out


def checkout(folder):
    """(sft_loss, verifier_loss, make_optimizers, apply_step, GPT, GPTConfig) of another checkout."""
    def ours():
        return {k: sys.modules.pop(k) for k in list(sys.modules) if k.split(".")[0] == "minipav"}
    if not (folder / "minipav" / "sft.py").exists():
        raise Fail(f"--against {folder}: no checkout of minipav is there")
    kept = ours()
    sys.path.insert(0, str(folder))
    try:
        sft, verifier, utils, model = (importlib.import_module(f"minipav.{m}")
                                       for m in ("sft", "verifier", "utils", "model"))
    finally:
        sys.path.pop(0)
        ours()
        sys.modules.update(kept)
    return (sft.sft_loss, verifier.verifier_loss, utils.make_optimizers, utils.apply_step, model.GPT,
            model.GPTConfig)


class Case:
    """What is timed at one size: functions by name."""

    def __init__(self, size, a, samples=None):
        shape, self.B, self.n, self.P, self.T, self.rows, self.length = SIZES[size]
        self.c, self.a = GPTConfig(block_size=512, **shape), a
        torch.manual_seed(0)
        self.model = GPT(self.c).to(a.device)
        self.model.bf16 = a.dtype == "bf16"
        self.lr_muon = 0.0 if size in ("135M", "0.5B") else 0.02        # language models: AdamW alone
        self.verifier = self.model.as_verifier()
        self.B = max(1, samples // self.n) if samples else self.B // (4 if a.quick else 1)
        self.prompts = torch.randint(1, 400, (self.B, self.P))
        self.tokens = torch.randint(1, 400, (self.rows, self.length))
        self.lengths = torch.full((self.rows,), self.length)
        self.ends = torch.arange(STEP, self.length, STEP).expand(self.rows, -1)
        self.functions = {
            "rollouts": self.rollouts, "labelling": self.labelling,
            "labelling, nothing shared": lambda: self.labelling(False), "beam level": self.beam_level,
            "scoring": lambda: score(self.verifier, self.tokens, self.ends)}
        if samples:
            self.functions = {"rollouts": self.rollouts}
        elif not a.only or any("step" in x for x in a.only):
            self.steps()
        if not a.only or any("generate" in x for x in a.only):
            self.functions |= generators(self.c, self.prompts.to(a.device), self.n, self.T, a.device,
                                         a.generate)
        if unknown := set(a.only) - self.functions.keys():
            raise Fail(f"--only {min(unknown)}: choose of {', '.join(self.functions)}")
        self.functions = {k: f for k, f in self.functions.items() if k in a.only or not a.only}

    def steps(self):
        """Add the training steps."""
        ours = sft_loss, verifier_loss, make_optimizers, apply_step, GPT, GPTConfig
        self.functions["rl step"] = self.rl()
        self.functions |= {f"{k} step": f for k, f in self.training(*ours, True).items()}
        if self.a.against:
            old = self.training(*checkout(self.a.against), False)
            self.functions |= {f"{k} step, against": f for k, f in old.items()}

    def count(self, name):
        """Tokens that a call works on."""
        if "labelling" in name:
            return 2 * 19 * 16 * STEP
        sampled = self.B * self.n * {"beam level": 3 * STEP}.get(name, self.T)
        return self.rows * self.length if "step" in name or name == "scoring" else sampled

    def rollouts(self):
        sample(self.model, self.prompts, torch.full((self.B,), self.P), self.n, max_new_tokens=self.T,
               stop=[0], max_tokens_in_flight=1 << 21)

    def labelling(self, shared=True, n_mc=16, length=200, traces=2):
        """n_mc completions of a step's length behind every step of a trace: read once, or each time."""
        ends = torch.arange(STEP, length, STEP)
        which, lengths = torch.arange(traces).repeat_interleave(len(ends)), ends.repeat(traces)
        rows = torch.arange(1, traces * length + 1).view(traces, length) % 400
        if not shared:
            rows, lengths = rows[which].repeat_interleave(n_mc, 0), lengths.repeat_interleave(n_mc)
        sample(self.model, rows, lengths, n_mc if shared else 1, which=which if shared else None,
               max_new_tokens=STEP, stop=[0], max_tokens_in_flight=1 << 21)

    @torch.no_grad()
    def beam_level(self, C=3):
        """C steps behind every prefix, and their values; one of each is kept."""
        device, R = self.a.device, self.B * self.n
        which = torch.arange(self.B).repeat_interleave(self.n)
        if not hasattr(self, "level"):
            lengths = torch.full((R,), self.P, device=device)
            self.level = (*prefill(self.model, self.prompts[which], torch.arange(R), lengths),
                          Values(self.verifier, self.prompts[which].to(device), lengths))
        cache, hidden, values = self.level
        parent, ids = torch.arange(R, device=device).repeat_interleave(C), torch.arange(R * C, device=device)
        grown, stops = cache.branch(parent), torch.zeros(self.c.vocab_size, dtype=torch.bool).to(device)
        new, count, *_ = decode(self.model, grown, hidden[parent], ids, 0, STEP, stops, whole=True)
        best = torch.arange(0, R * C, C, device=device)
        grown.fold(best, count[best] - 1), values.children(parent, new, count)[best]

    def training(self, sft, verifier, make, apply, Model, Config, ours):
        """An SFT and a verifier step, ours or another checkout's."""
        fields = {k: v for k, v in vars(self.c).items() if k in Config.__dataclass_fields__}
        models = [Model(Config(**fields | {"head": head})).to(self.a.device) for head in ("lm", "scalar")]
        for m in models:
            m.bf16 = self.model.bf16                    # another checkout may know no bf16
        opts, ones = [make(m, self.lr_muon, 1e-3) for m in models], torch.ones(self.ends.shape)
        has_n = "n" in inspect.signature(verifier).parameters
        batches = ((self.tokens, self.lengths, torch.full((self.rows,), STEP)),
                   (self.tokens, self.ends, 0.3 * ones, *[ones.long()] * has_n, ones))

        def step(i, loss):
            if ours:
                backward(loss, models[i], batches[i], self.lengths, self.rows)
            else:
                loss(models[i], *(x.to(self.a.device) for x in batches[i])).backward()
            apply(models[i], opts[i], 1.0)
        return {"sft": lambda: step(0, sft), "verifier": lambda: step(1, verifier)}

    def rl(self):
        """A step of policy and value network."""
        policy, value = copy.deepcopy(self.model), copy.deepcopy(self.verifier)
        opts = make_optimizers(policy, 0.0, 1e-4), make_optimizers(value, self.lr_muon / 2, 1e-3)
        step = (torch.arange(self.length) // STEP - 1).expand(self.rows, -1)
        batch = [x.to(self.a.device) for x in (self.tokens, step, torch.ones(step.shape))]

        def one():
            policy_loss(policy, self.model, *batch, 0.1)[0].backward()
            value_loss(value, *batch)[0].backward()
            apply_step(policy, opts[0], 1.0)
            apply_step(value, opts[1], 1.0)
        return one

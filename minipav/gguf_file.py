"""GGUF files of the Llama architecture: weights, which are dequantised, and the tokenizer. Rotary positions
pair neighbours there in q and k; here halves, as in transformers.
"""
import json
from pathlib import Path

import gguf
import torch

from minipav.files import reading, write_text
from minipav.model import GPTConfig
from minipav.pretrained import Folder
from minipav.utils import Fail

GGUF = {"embed": "token_embd", "norm": "output_norm", "head": "output", "blocks": "blk", "norm1": "attn_norm",
        "norm2": "ffn_norm", "attn": None, "mlp": None, "wq": "attn_q", "wk": "attn_k", "wv": "attn_v",
        "wo": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}


class Gguf(Folder):
    names = GGUF

    def __init__(self, path):
        self.path = Path(path)
        with reading(path, ValueError, KeyError, IndexError):
            self.reader = gguf.GGUFReader(path)
            f = {k: v.contents() for k, v in self.reader.fields.items()}
            kind = f["general.architecture"], f["tokenizer.ggml.model"], f["tokenizer.ggml.pre"]
            if kind != ("llama", "gpt2", "smollm"):
                raise Fail(f"{path}: architecture, tokenizer and pre-tokenizer {', '.join(kind)}; known: "
                           "llama, gpt2, smollm")
            self.fields, self.end = f, f["tokenizer.ggml.eos_token_id"]
            self.config = GPTConfig(
                vocab_size=len(f["tokenizer.ggml.tokens"]), n_layer=f["llama.block_count"],
                block_size=min(f["llama.context_length"], 4096), n_head=f["llama.attention.head_count"],
                n_kv_head=f["llama.attention.head_count_kv"], n_embd=f["llama.embedding_length"],
                n_ffn=f["llama.feed_forward_length"], rope_theta=float(f["llama.rope.freq_base"]),
                norm_eps=round(f["llama.attention.layer_norm_rms_epsilon"], 9),
                tied=all(t.name != "output.weight" for t in self.reader.tensors))

    def tensors(self):
        heads = {"attn_q.weight": self.config.n_head, "attn_k.weight": self.config.n_kv_head}
        for t in self.reader.tensors:
            x = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
            if n := heads.get(t.name.split(".", 2)[-1]):
                x = x.view(n, -1, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
            yield self.path, t.name, x

    def tokenizer(self, path):
        """A tokenizer.json from the file's fields."""
        tokens, kinds = (self.fields[f"tokenizer.ggml.{k}"] for k in ("tokens", "token_type"))
        added = [dict(id=i, content=t, special=True, single_word=False, lstrip=False, rstrip=False,
                      normalized=False) for i, (t, k) in enumerate(zip(tokens, kinds)) if k == 3]
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
        digits = dict(type="Digits", individual_digits=True)
        write_text(path, json.dumps({
            "version": "1.0", "added_tokens": added, "normalizer": None, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]},
            "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)},
                      "merges": [m.split(" ") for m in self.fields["tokenizer.ggml.merges"]]}}))

"""A byte-level-BPE tokenizer.json (Hugging Face's format) as a tiktoken.Encoding.

Its merges become ranks: tiktoken merges the pair whose text has the lowest id, which is the same where ids
are in the order of the merges. Its pre-tokenizers become one pattern, which splits the text into pieces that
no merge crosses. The end-of-text token of the model is called END here, whatever it is called there.
"""
import re
import unicodedata

import regex
import tiktoken

from minipav.files import damaged, read_json
from minipav.tokenizer import END

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
PATTERNS = {                            # of a pre-tokenizer, by its name here
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # digits are cut out first, and each stretch between them is split by itself: its last space is one, too
    "digits": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama3": ENGLISH + WORDS % r"\p{N}{1,3}", "qwen2": ENGLISH + WORDS % r"\p{N}"}


# {character: byte} of byte-level BPE: printable bytes stand for themselves, the others follow at 256
PLAIN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
ALPHABET = dict(zip(map(chr, [*PLAIN, *range(256, 512)]), [*PLAIN, *sorted({*range(256)} - {*PLAIN})]))


class TextEncoding(tiktoken.Encoding):
    """With what tiktoken has not: a normal form, and bytes that no token stands for, which it panics on. They
    are left out, as `tokenizers` does. end: what END is called in the model's own texts, such as those of a
    chat; bos: what its texts begin with, if anything."""

    def __init__(self, *args, normal=None, end=END, bos="", **kw):
        super().__init__(*args, **kw)
        self.normal, self.end, self.bos = normal, end, bos
        self.lacks = bytes(b for b in range(256) if bytes([b]) not in self._mergeable_ranks)

    def encode(self, text, **kw):
        text = unicodedata.normalize(self.normal, text) if self.normal else text
        if END in kw.get("allowed_special", ()):
            text = text.replace(self.end, END)
        data = text.encode("utf-8", "replace")
        if len(data.translate(None, self.lacks)) == len(data):
            return super().encode(text, **kw)
        special, out = sorted(kw.get("allowed_special", ()), key=len, reverse=True), []
        for part in re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]:
            if part in special:
                out.append(self._special_tokens[part])
                continue
            for piece in regex.findall(self._pat_str, part):
                kept = piece.encode("utf-8", "replace").translate(None, self.lacks)
                out += self._encode_single_piece(kept) if kept else []
        return out


def pattern_of(pre):
    """The name in PATTERNS of a pre-tokenizer of tokenizer.json, or None."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre or {"type": "none"}]
    kinds, last = [p["type"] for p in parts], parts[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    own = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and own:
        return "gpt2"
    if kinds == ["Digits", "ByteLevel"] and own and parts[0].get("individual_digits"):
        return "digits"
    if kinds == ["Split", "ByteLevel"] and not own and parts[0]["behavior"] == "Isolated":
        split = parts[0]["pattern"].get("Regex")
        return next((k for k in ("llama3", "qwen2") if PATTERNS[k] == split and not parts[0]["invert"]), None)
    return None


def encoding(path, end, n_vocab):
    """The encoding of tokenizer.json at `path`, for a model with `n_vocab` tokens that ends a text with the
    token `end`. Raises Fail, naming the file and what is not supported."""
    t = read_json(path, signed=False, model=dict, added_tokens=list)
    model, pre = t["model"], t.get("pre_tokenizer")
    try:
        name, normal = pattern_of(pre), (t.get("normalizer") or {"type": None})["type"]
        if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token"):
            raise ValueError("a model that is not byte-level BPE")
        if name is None:
            raise ValueError(f"the pre-tokenizer {str(pre)[:120]} (known: {', '.join(PATTERNS)})")
        if normal not in (None, "NFC"):
            raise ValueError(f"the normalizer {normal}")
        added = {x["content"]: x["id"] for x in t["added_tokens"]}
        plain = {text: i for text, i in model["vocab"].items() if text not in added}
        ranks = {bytes(ALPHABET[c] for c in text): i for text, i in plain.items()}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        ids = [model["vocab"][a + b] for a, b in merges]
        if ids != sorted(ids):
            raise ValueError("merges that are not in the order of their ids")
        names, used = {i: text for text, i in added.items()}, {*ranks.values(), *added.values()}
        names |= {i: f"<|unused {i}|>" for i in range(n_vocab) if i not in used}
        names = {i: text if text != END else "<|another end|>" for i, text in names.items()} | {end: END}
        post = t.get("post_processor") or {}
        parts = [p for x in post.get("processors", [post]) for p in x.get("single") or []]
        bos = parts[0]["SpecialToken"]["id"] if parts and "SpecialToken" in parts[0] else ""
        if end in ranks.values() or max(used) >= n_vocab:
            raise ValueError(f"{max(used) + 1} tokens, the end being {end}, of a model with {n_vocab}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
        raise damaged(path, f"cannot use {e}") from None
    own = next((text for text, i in added.items() if i == end), END)
    return TextEncoding(path.parent.name, pat_str=PATTERNS[name], mergeable_ranks=ranks, normal=normal,
                        end=own, bos=bos, special_tokens={text: i for i, text in names.items()})

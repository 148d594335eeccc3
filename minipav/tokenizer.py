"""Encodings with tiktoken's interface: ours for the synthetic tasks, and what works on any of them.

The synthetic vocabulary is: all 256 bytes (so that no input is untokenizable), the integers 10-99, every
operation such as *2, and the phrases of the task (" reach ", " = "), each one token. <|endoftext|> and
<|pad|> are special: ordinary text can never encode to them.
"""
import functools
import re

import tiktoken
import torch

END, PAD = "<|endoftext|>", "<|pad|>"
CHAT = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>")


def synthetic_encoding(phrases):
    """The tiktoken.Encoding of a task whose prompts and lines are made of numbers, operations, `phrases`."""
    words = [*phrases, *(f"{op}{d}" for op in "+-*/" for d in range(1, 10)),
             *(str(i) for i in range(10, 100))]
    ranks = {bytes([b]): b for b in range(256)}
    for word in words:
        ranks.setdefault(word.encode(), len(ranks))             # each once: END's id is behind the last
    longest_first = sorted(map(re.escape, phrases), key=len, reverse=True)
    # tiktoken splits the text by this pattern first; a piece that is itself in the ranks is one token.
    pattern = "|".join([*longest_first, r"[+\-*/][1-9](?!\d)", r"[1-9]\d", r"\n", r"[\s\S]"])
    n = len(ranks)
    return tiktoken.Encoding("minipav", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END: n, PAD: n + 1})


def pad_token(enc):
    """The padding token; an encoding without one pads with end-of-text (lengths are known)."""
    return enc._special_tokens.get(PAD, enc.eot_token)


@functools.lru_cache
def delimiter_tokens(enc, delimiter):
    """The tokens that end a step: all whose text contains the delimiter (real encodings merge ".\\n" and
    "\\n\\n"), and end-of-text. A delimiter of one byte cannot hide between two tokens. -> ids"""
    return sorted([*(i for piece, i in enc._mergeable_ranks.items() if delimiter.encode() in piece),
                   enc.eot_token])


def stop_mask(stop, n_vocab, device):
    """(n_vocab,) which tokens end a row."""
    mask = torch.zeros(n_vocab, dtype=torch.bool)
    mask[list(stop)] = True
    return mask.to(device)


def encode_rows(enc, texts):
    """Token rows (B, T) right-padded and their lengths (B,); END in a text becomes the end-of-text token, and
    the marks of a chat and of a text's beginning, where the encoding has them, their tokens."""
    special = {END, getattr(enc, "bos", END), *CHAT} & enc.special_tokens_set
    # the threads of encode_batch cost more than they save
    rows = [enc.encode(t, allowed_special=special, disallowed_special=()) for t in texts]
    lengths = torch.tensor([len(r) for r in rows])
    out = torch.full((len(rows), int(lengths.max())), pad_token(enc))
    out[torch.arange(out.shape[1]) < lengths[:, None]] = torch.tensor([t for r in rows for t in r])
    return out, lengths


def decode_rows(enc, tokens, lengths):
    """The texts of token rows (B, T), each cut at its length; END stays in the text."""
    return [enc.decode(r[:n]) for r, n in zip(tokens.tolist(), lengths.tolist())]


def join(prefix, prefix_lengths, new, new_lengths, pad):
    """Rows of prefix (N, P) with new (N, M) behind each one's end. -> tokens, lengths (N,)"""
    lengths = prefix_lengths + new_lengths
    out = torch.full((len(prefix), int(max(prefix.shape[1], lengths.max()))), pad)
    out[:, :prefix.shape[1]] = prefix
    rows, cols = (torch.arange(new.shape[1]) < new_lengths[:, None]).nonzero(as_tuple=True)
    out[rows, prefix_lengths[rows] + cols] = new[rows, cols]
    t = torch.arange(out.shape[1])
    return out.masked_fill_(t >= lengths[:, None], pad)[:, :int(lengths.max())], lengths

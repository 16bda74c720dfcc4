"""Promise: a text becomes the tokens of transformers' tokenizer, whatever files hold it.

test_words.py compares what is printed, for every kind of tokenizer; this compares the ids.
"""
import random
import re
import shutil

import checkpoints
import pytest
import tiktoken
from checkpoints import EOT, change_json, save_tokenizer, save_vocab_json, train_bpe
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GPT2Config, GPT2Tokenizer

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


def assert_same_tokens(folder, n=300):
    GPT2Config().save_pretrained(folder)  # AutoTokenizer asks what kind of model it is for
    ours, theirs = load_tokenizer(folder), checkpoints.read_tokenizer(folder)
    for text in ["a <mask> b", "a  <|endoftext|>  b", "Hello  WORLD", *strings(n)]:
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
    return ours


@pytest.mark.parametrize("tokenizer", checkpoints.TOKENIZERS)
def test_every_kind(tmp_path, tokenizer):
    size = checkpoints.TOKENIZERS[tokenizer](tmp_path)
    assert assert_same_tokens(tmp_path).get_vocab_size() == size


def test_gpt2s_own(real_tokenizer, tmp_path, monkeypatch):
    """From all its forms, the ids are those of transformers, and of tiktoken, which shares no code
    with either: the lecture's ids can be given to the model."""
    cache, new, old, files = (tmp_path / name for name in ("cache", "new", "old", "files"))
    for folder in (cache, old, files):
        folder.mkdir()
    shutil.copy(real_tokenizer / "vocab.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    shutil.copy(real_tokenizer / "merges.txt", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    gpt2 = tiktoken.get_encoding("gpt2")
    shutil.copy(real_tokenizer / "tokenizer.json", old)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(real_tokenizer / name, files)
    GPT2Tokenizer.from_pretrained(files).save_pretrained(new)
    for folder in (new, old, files):
        ours = assert_same_tokens(folder)
        assert ours.encode("Hello, I'm a language model,").ids == [
            15496, 11, 314, 1101, 257, 3303, 2746, 11]
        for text in strings(1000):
            assert ours.encode(text).ids == gpt2.encode(text, allowed_special="all"), repr(text)


def test_tokenizer_json_goes_before_vocab_json(tmp_path):
    save_vocab_json(tmp_path, 300)
    save_tokenizer(tmp_path, train_bpe(vocab_size=350))
    assert assert_same_tokens(tmp_path, 100).get_vocab_size() == 350


def test_added_tokens_json_beside_tokenizer_json(tmp_path):
    """Its tokens count, as in transformers, also if tokenizer.json doesn't have them."""
    size = save_tokenizer(tmp_path)
    for added in ({EOT: 0}, {EOT: 0, "newword": size}):
        change_json(tmp_path / "added_tokens.json", **added)
        assert_same_tokens(tmp_path, 100)


@pytest.mark.parametrize("name", ["pad_token", "mask_token"])
def test_a_plain_token_that_is_named_becomes_special(tmp_path, name):
    """And keeps its other options."""
    save_tokenizer(tmp_path, words=[AddedToken("[PAD]", lstrip=True)])
    change_json(tmp_path / "tokenizer_config.json", **{name: "[PAD]"})
    tokenizer = assert_same_tokens(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a  [PAD]b").ids) == "ab"


@pytest.mark.parametrize("setting", [
    "add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"])
@pytest.mark.parametrize("tokenizer", ["vocab.json", "on the Hub", "today"])
def test_settings_that_change_a_tokenizer(tmp_path, tokenizer, setting):
    """As in transformers, which heeds them for some classes and not for others."""
    checkpoints.TOKENIZERS[tokenizer](tmp_path)
    for value in (False, True):
        change_json(tmp_path / "tokenizer_config.json", **{setting: value})
        assert_same_tokens(tmp_path, 50)


def test_clean_up_is_ignored_for_bpe_and_refused_for_others(tmp_path):
    """transformers 5 ignores this setting for BPE and follows it otherwise."""
    bert = {"model": models.WordPiece(unk_token=EOT), "trainer": trainers.WordPieceTrainer,
            "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
            "decoder": decoders.WordPiece(cleanup=False)}
    for parts in ({}, bert):
        save_tokenizer(tmp_path, train_bpe(**parts))
        change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=not parts)
        assert_same_tokens(tmp_path, 50)
    change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    with pytest.raises(InputError, match="clean_up_tokenization_spaces"):
        load_tokenizer(tmp_path)


UNUSUAL = {  # rules in tokenizer.json that aren't gpt2's
    "normalizer": {"normalizer": normalizers.Lowercase()},
    "prefix space": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "no regex": {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                           use_regex=False)},
    "metaspace": {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()},
    "ignore_merges": {"model": models.BPE(ignore_merges=True)},
    "WordLevel": {"model": models.WordLevel(unk_token=EOT), "trainer": trainers.WordLevelTrainer},
}


@pytest.mark.parametrize("class_name", [None, "GPT2Tokenizer", "GPT2TokenizerFast",
                                        "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_an_unusual_tokenizer_json(tmp_path, name, class_name):
    """It gives what the installed transformers makes of it. 5 replaces the rules by gpt2's for its
    GPT2Tokenizer, and so where no class is named."""
    if name == "prefix space" and checkpoints.TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 drops the prefix space, whatever class is named")
    train_bpe(**UNUSUAL[name]).save(str(tmp_path / "tokenizer.json"))
    if class_name:
        change_json(tmp_path / "tokenizer_config.json", tokenizer_class=class_name)
    assert_same_tokens(tmp_path, 50)


@pytest.mark.parametrize("class_name", ["RobertaTokenizer", "LlamaTokenizer"])
def test_another_class_beside_tokenizer_json(tmp_path, class_name):
    save_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class=class_name)
    assert_same_tokens(tmp_path, 50)


@pytest.mark.parametrize("class_name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_token_with_other_options(tmp_path, class_name):
    """In tokenizer_config.json than in tokenizer.json."""
    save_tokenizer(tmp_path)
    options = {"content": EOT, "lstrip": True, "rstrip": True, "single_word": False,
               "normalized": False, "special": True}
    for fields in ({"added_tokens_decoder": {"0": options}},
                   {"eos_token": {"__type": "AddedToken", **options}}):
        change_json(tmp_path / "tokenizer_config.json", tokenizer_class=class_name, **fields)
        assert_same_tokens(tmp_path, 50)


@pytest.mark.parametrize("files", [[], ["vocab.json"], ["merges.txt"], ["tokenizer_config.json"]],
                         ids=str)
def test_no_tokenizer_is_refused(tmp_path, files):
    """Half of one too. gpt2's would not be the model's. The line says how to save one."""
    save_vocab_json(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    for path in tmp_path.iterdir():
        if path.name not in files:
            path.unlink()
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=re.escape(str(tmp_path))) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    half = "vocab.json" in files or "merges.txt" in files
    if not half and checkpoints.TRANSFORMERS >= (5, 0):  # before, transformers itself refuses it
        assert "save_pretrained(folder, tokenizer)" in str(caught.value)

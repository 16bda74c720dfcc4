"""Promise: a text becomes the tokens of transformers' tokenizer, whatever files hold it.

test_words.py compares what is printed, for every kind of tokenizer; this compares the ids.
"""
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import tiktoken
from checkpoints import (
    EOT,
    ROOT,
    TOKENIZERS,
    change_json,
    read_tokenizer,
    save_tokenizer,
    save_vocab_json,
    train_bpe,
)
from hub import StandInHub
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import GPT2Config, GPT2Tokenizer, PreTrainedTokenizerFast

from train_gpt2 import InputError, load_tokenizer

PIECES = [" ", "  ", "\n", "\t", "\u00a0", "'s", "'ll", "'LL", "a", "Hello", " world", "12", "3",
          "é", "e\u0301", "ß", "ﬁ", "中文", "العربية", "🙂", "🏳️‍🌈", "<|", "|>", "...", "_",
          "x=1;", "\r\n", "\u200b", "\ufeff", "\U0010ffff", "\x00", "Ġquick", EOT, "<s>", "</s>",
          "[PAD]", "<|user|>", "<mask>", "new", "newword", "cat", "cats", "of", "<|pad|>",
          "<|start|>", "plain"]


def strings(n):
    """Random strings of what tokenizers treat differently."""
    rng = random.Random(0)
    for _ in range(n):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        codes = [rng.choice([rng.randrange(32, 127), rng.randrange(0xd800)])
                 for _ in range(rng.randrange(6))]
        yield text + "".join(map(chr, codes))


def assert_same_tokens(folder, n=300, theirs=None):
    GPT2Config().save_pretrained(folder)  # AutoTokenizer asks what kind of model it is for
    ours, theirs = load_tokenizer(folder), theirs or read_tokenizer(folder)
    assert isinstance(ours, Tokenizer)
    for text in strings(n):
        ids = ours.encode(text).ids
        assert ids == theirs(text)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_kind(tmp_path, tokenizer):
    size = TOKENIZERS[tokenizer](tmp_path)
    assert load_tokenizer(tmp_path).get_vocab_size() == size
    assert_same_tokens(tmp_path)


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
        ours = load_tokenizer(folder)
        assert ours.encode("Hello, I'm a language model,").ids == [
            15496, 11, 314, 1101, 257, 3303, 2746, 11]
        for text in strings(3000):
            assert ours.encode(text).ids == gpt2.encode(text, allowed_special="all"), repr(text)
    assert_same_tokens(old)


def test_tokenizer_json_goes_before_vocab_json(tmp_path):
    save_vocab_json(tmp_path, 300)
    save_tokenizer(tmp_path, train_bpe(vocab_size=350))
    assert_same_tokens(tmp_path, 100)
    assert load_tokenizer(tmp_path).get_vocab_size() == 350


def test_tokenizer_json_is_taken_as_it_is(tmp_path):
    """transformers 5 does so only if tokenizer_config.json says PreTrainedTokenizerFast; without
    one, it puts gpt2's rules in the place of the tokenizer's. The README says so."""
    tokenizer = train_bpe(normalizer=normalizers.Lowercase(),
                          pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace())
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert_same_tokens(tmp_path, theirs=theirs)


@pytest.mark.parametrize("name", ["pad_token", "mask_token"])
def test_a_plain_token_that_is_named_becomes_special(tmp_path, name):
    """And keeps its other options."""
    save_tokenizer(tmp_path, words=[AddedToken("[PAD]", lstrip=True)])
    change_json(tmp_path / "tokenizer_config.json", **{name: "[PAD]"})
    assert_same_tokens(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a  [PAD]b").ids) == "ab"


@pytest.mark.parametrize("setting", [
    "add_prefix_space", "add_bos_token", "add_eos_token", "split_special_tokens"])
@pytest.mark.parametrize("tokenizer", ["vocab.json", "today"])
def test_settings_that_are_not_supported(tmp_path, tokenizer, setting):
    """For some of these, transformers builds another tokenizer than the files hold."""
    TOKENIZERS[tokenizer](tmp_path)
    change_json(tmp_path / "tokenizer_config.json", **{setting: False})
    assert_same_tokens(tmp_path, 50)
    change_json(tmp_path / "tokenizer_config.json", **{setting: True})
    with pytest.raises(InputError, match=setting):
        load_tokenizer(tmp_path)


def test_clean_up_is_followed_for_bpe_and_refused_for_others(tmp_path):
    """transformers 5 ignores this setting for BPE and follows it otherwise."""
    save_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    assert_same_tokens(tmp_path, 50)
    wordpiece = train_bpe(model=models.WordPiece(unk_token=EOT), trainer=trainers.WordPieceTrainer,
                          pre_tokenizer=pre_tokenizers.BertPreTokenizer())
    save_tokenizer(tmp_path, wordpiece)
    change_json(tmp_path / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    with pytest.raises(InputError, match="clean_up_tokenization_spaces"):
        load_tokenizer(tmp_path)


# No tokenizer: the Hub's gpt2's if config.json is gpt2's, else none

@pytest.mark.parametrize("config", [{}, {"vocab_size": 50304, "eos_token_id": [50256, 198]}],
                         ids=["gpt2's", "more ids"])
def test_no_tokenizer_but_gpt2s_config(tmp_path, tiny, config):
    mine = tmp_path / "gpt2"  # a local folder of that name must not stand for the Hub's
    GPT2Config(**config).save_pretrained(mine)
    code = "from train_gpt2 import *; print(load_tokenizer('gpt2').get_vocab_size())"
    with StandInHub({"gpt2": tiny}) as hub:
        env = os.environ | hub.env(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=False,
                                 capture_output=True, text=True)
    assert process.stdout.strip() == "400", process.stderr
    assert "has no tokenizer: using gpt2's" in process.stderr
    assert not any("safetensors" in path for _, path in hub.requests)


@pytest.mark.parametrize("config", [{"vocab_size": 50256}, {"eos_token_id": 0},
                                    {"eos_token_id": None}, "tokenizer_config.json"], ids=str)
def test_no_tokenizer_and_another_config(tmp_path, offline, config):
    """gpt2's would not be the model's. A tokenizer_config.json shows that there was another kind."""
    if config == "tokenizer_config.json":
        (tmp_path / config).write_text("{}")
        config = {}
    GPT2Config(**config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has no tokenizer.*save_pretrained\(folder, tokenizer\)"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_in_the_cached_gpt2_either(tmp_path, tiny):
    """As after GPT2LMHeadModel.from_pretrained("gpt2"), when the network is gone."""
    served = tmp_path / "served"
    shutil.copytree(tiny, served)
    for name in ("vocab.json", "merges.txt"):
        (served / name).unlink()
    GPT2Config().save_pretrained(tmp_path / "mine")
    code = "from train_gpt2 import *; load_tokenizer('mine')"
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, check=False,
                                 capture_output=True, text=True)
    assert process.stderr.splitlines()[-1].startswith("train_gpt2.InputError: mine has no tokenizer")


def test_added_tokens_json_beside_tokenizer_json_changes_nothing(tmp_path):
    save_tokenizer(tmp_path, train_bpe())
    size = load_tokenizer(tmp_path).get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({EOT: 0}))
    assert_same_tokens(tmp_path, 50)
    assert load_tokenizer(tmp_path).get_vocab_size() == size

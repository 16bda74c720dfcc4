"""Promise: a text becomes the tokens of transformers' tokenizer, whatever files the vocabulary is
in, and a vocabulary of another kind than GPT-2's is refused by the name of what differs."""
import json
import random
import shutil

import pytest
import tiktoken
from checkpoints import (
    EOT,
    as_on_the_hub,
    change_json,
    read_tokenizer,
    save_tokenizer,
    save_vocabulary,
    train_bpe,
)
from tokenizers import (
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import GPT2Config, GPT2Tokenizer

from train_gpt2 import load_tokenizer

WORDS = ["newword", "<user>", "[sep]", "Ġquick"]  # the last holds a character that files write for a space


def strings(n, specials=(EOT,)):
    """Random strings of what tokenizers differ on: spaces, digits, contractions, scripts, emoji."""
    rng = random.Random(0)
    pieces = [" ", "  ", "\n", "\t", "\u00a0", "'s", "'ll", "'LL", "a", "Hello", " world", "12", "3", "é", "e\u0301",
              "ß", "中文", "العربية", "🙂", "🏳️‍🌈", "<|", "|>", "...", "_", "x=1;", "\r\n", "\u200b", "\ufeff",
              "\U0010ffff", "\x00", *specials]
    for _ in range(n):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        more = [rng.choice([rng.randrange(32, 127), rng.randrange(0xd800)]) for _ in range(rng.randrange(6))]
        yield text + "".join(map(chr, more))


def assert_same_tokens(folder, n=1000, specials=(EOT,), other=None):
    GPT2Config().save_pretrained(folder)  # AutoTokenizer asks what kind of model it is for
    ours, theirs = load_tokenizer(folder), read_tokenizer(folder)
    assert isinstance(ours, tiktoken.Encoding)
    for text in strings(n, specials):
        tokens = ours.encode(text, allowed_special="all")
        assert tokens == theirs(text)["input_ids"], repr(text)
        assert ours.decode(tokens) == text
        if other:
            assert tokens == other.encode(text, allowed_special="all")


# The files that there are

@pytest.mark.parametrize("size", [300, 1000])
@pytest.mark.parametrize("specials", [[EOT], ["<s>", "</s>", "<pad>"]], ids=" ".join)
def test_as_transformers_saves_today(tmp_path, size, specials):
    names = dict(zip(["bos_token", "eos_token", "pad_token"], specials))
    assert save_tokenizer(tmp_path, train_bpe(specials, size), **names) == size
    assert_same_tokens(tmp_path, 500, specials)


def test_as_tokenizers_saves(tmp_path):
    train_bpe().save(str(tmp_path / "tokenizer.json"))
    assert_same_tokens(tmp_path)


def test_added_tokens(tmp_path):
    """Special ones, and words that are only added: both are found before the text is cut."""
    save_tokenizer(tmp_path, train_bpe(), add_special=["[PAD]", "<|user|>"], add_words=WORDS)
    assert_same_tokens(tmp_path, specials=[EOT, "[PAD]", "<|user|>", *WORDS])


def test_as_on_the_hub(tmp_path):
    """The older form of tokenizer.json, that of `gpt2` itself."""
    save_tokenizer(tmp_path, train_bpe())
    new = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(as_on_the_hub(new), encoding="utf-8")
    assert_same_tokens(tmp_path)


def test_vocab_json(tmp_path):
    save_vocabulary(tmp_path)
    assert_same_tokens(tmp_path)
    with_merges = load_tokenizer(tmp_path).encode("Hello, merges")
    (tmp_path / "merges.txt").unlink()  # transformers needs it; a rank is an id, so here it is not read
    assert load_tokenizer(tmp_path).encode("Hello, merges") == with_merges


def test_tokenizer_json_goes_before_vocab_json(tmp_path):
    """As in transformers, where both are there."""
    save_vocabulary(tmp_path, 300)
    save_tokenizer(tmp_path, train_bpe(vocab_size=350))
    assert load_tokenizer(tmp_path).n_vocab == 350
    assert_same_tokens(tmp_path, 100)


def test_gpt2s_own(real_vocabulary, tmp_path, monkeypatch):
    """The same tokens from today's tokenizer.json, that of the Hub, vocab.json, OpenAI's own files by
    tiktoken, and Hugging Face's tokenizer."""
    cache, new, old, files, none = (tmp_path / name for name in ("cache", "new", "old", "files", "none"))
    for folder in (cache, old, files, none):
        folder.mkdir()
    shutil.copy(real_vocabulary / "vocab.json", cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")
    shutil.copy(real_vocabulary / "merges.txt", cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    gpt2 = tiktoken.get_encoding("gpt2")
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(real_vocabulary / name, files)
    GPT2Tokenizer.from_pretrained(files).save_pretrained(new)
    shutil.copy(real_vocabulary / "tokenizer.json", old)
    for folder in (new, old, files):
        ours = load_tokenizer(folder)
        assert ours.token_byte_values() == gpt2.token_byte_values()
        assert ours.n_vocab == gpt2.n_vocab == 50257
        assert ours.eot_token == gpt2.eot_token
        assert_same_tokens(folder, 500, other=gpt2)


def test_files_are_read_as_they_are_now(tmp_path, monkeypatch):
    """tiktoken's cache keeps copies by path. It is not asked."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for size in (300, 350, 310):
        save_vocabulary(tmp_path, size)
        assert load_tokenizer(tmp_path).n_vocab == size
    assert not list(cache.iterdir())


# No vocabulary: GPT-2's own if config.json is GPT-2's, else none

@pytest.fixture
def openai(monkeypatch, tmp_path):
    """Something in the place of OpenAI's, which is a download."""
    encoding = tiktoken.Encoding("stand-in", pat_str="a", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.get)
    return encoding


@pytest.mark.parametrize(("config", "taken"), [
    ({}, True), ({"vocab_size": 50304}, True), ({"eos_token_id": [50256, 198]}, True),
    ({"vocab_size": 50256}, False), ({"eos_token_id": 0}, False), ({"eos_token_id": None}, False),
], ids=str)
def test_no_vocabulary(tmp_path, openai, capsys, config, taken):
    GPT2Config(**config).save_pretrained(tmp_path)
    if taken:
        assert load_tokenizer(tmp_path) is openai
        assert "no vocabulary" in capsys.readouterr().err
    else:
        with pytest.raises(ValueError, match="no vocabulary.*tokenizer.json"):
            load_tokenizer(tmp_path)
        assert capsys.readouterr().err == ""


# Other kinds

def tokenizer(model=None, trainer=None, **parts):
    """A tokenizer like GPT-2's, but for its parts; returns its tokenizer.json."""
    made = Tokenizer(model or models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(made, name, part)
    trainer = trainer or trainers.BpeTrainer
    made.train_from_iterator(["Some text to train on"] * 3, trainer(
        vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return json.loads(made.to_str())


def changed(**fields):
    raw = tokenizer()
    for path, value in fields.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place[parent]
        place[last] = value
    return raw


OTHERS = {
    "WordPiece": lambda: tokenizer(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer),
    "Unigram": lambda: changed(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}),
    "NFC": lambda: tokenizer(normalizer=normalizers.NFC()),
    "Lowercase": lambda: tokenizer(normalizer=normalizers.Lowercase()),
    "add_prefix_space": lambda: tokenizer(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "use_regex": lambda: changed(pre_tokenizer__use_regex=False),
    "pre_tokenizer.type": lambda: changed(pre_tokenizer=None),
    "Whitespace": lambda: tokenizer(pre_tokenizer=pre_tokenizers.Whitespace()),
    "Sequence": lambda: tokenizer(pre_tokenizer=pre_tokenizers.Sequence([
        pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])),
    "end_of_word_suffix": lambda: changed(model__end_of_word_suffix="</w>"),
    "continuing_subword_prefix": lambda: changed(model__continuing_subword_prefix="##"),
    "dropout": lambda: changed(model__dropout=0.1),
    "post_processor.single": lambda: tokenizer(post_processor=processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])),
    "RobertaProcessing": lambda: tokenizer(post_processor=processors.RobertaProcessing(("</s>", 1), ("<s>", 0))),
    "lstrip": lambda: changed(added_tokens=[{"id": 280, "content": "<mask>", "special": True, "lstrip": True}]),
    "rstrip": lambda: changed(added_tokens=[{"id": 280, "content": "<mask>", "special": True, "rstrip": True}]),
    "single_word": lambda: changed(added_tokens=[{"id": 280, "content": "cat", "special": False, "single_word": True}]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_kinds(tmp_path, name):
    (tmp_path / "tokenizer.json").write_text(json.dumps(OTHERS[name]()))
    with pytest.raises(ValueError, match=name) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_the_plain_one_is_not_refused(tmp_path):
    """What the cases above have in common is no reason."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer()))
    assert load_tokenizer(tmp_path).n_vocab == len(tokenizer()["model"]["vocab"])


@pytest.mark.parametrize("setting", ["add_prefix_space", "add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("file", ["vocab.json", "tokenizer.json"])
def test_what_only_the_settings_ask_for(tmp_path, file, setting):
    """transformers follows tokenizer_config.json in this."""
    if file == "vocab.json":
        save_vocabulary(tmp_path)
    else:
        save_tokenizer(tmp_path, train_bpe())
    if not (tmp_path / "tokenizer_config.json").exists():
        (tmp_path / "tokenizer_config.json").write_text("{}")
    change_json(tmp_path / "tokenizer_config.json", **{setting: False})
    load_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", **{setting: True})
    with pytest.raises(ValueError, match=setting):
        load_tokenizer(tmp_path)


def test_added_tokens_in_a_file_of_their_own(tmp_path):
    """As transformers 4 wrote them beside vocab.json. The way out that the message names works."""
    size = save_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|user|>": size}))
    with pytest.raises(ValueError, match="added_tokens.json.*AutoTokenizer.*tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    read_tokenizer(tmp_path).save_pretrained(tmp_path)
    tokens = load_tokenizer(tmp_path).encode("One<|user|> two", allowed_special="all")
    assert size in tokens
    assert tokens == read_tokenizer(tmp_path)("One<|user|> two")["input_ids"]


def test_ids_in_another_order_than_the_merges(tmp_path):
    """By frequency, say, as RoBERTa's. A rank is then no id, and every text would be cut wrongly."""
    raw = json.loads(train_bpe().to_str())
    ids = list(raw["model"]["vocab"].values())
    raw["model"]["vocab"] = dict(zip(raw["model"]["vocab"], [0, *ids[:0:-1]]))
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="order"):
        load_tokenizer(tmp_path)


def test_a_byte_that_is_missing(tmp_path):
    """As after a training on English alone, without the alphabet: tiktoken would end the process."""
    raw = json.loads(train_bpe().to_str())
    raw["model"]["vocab"]["Ā!"] = raw["model"]["vocab"].pop("Ā")
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="byte"):
        load_tokenizer(tmp_path)


def test_an_added_token_that_another_one_begins(tmp_path):
    """transformers finds the longest, tiktoken either one, by chance: all or nothing."""
    refused = 0
    for words in (["new", "newword"], ["newword", "new"], ["ab", "abc", "abcd"], ["x1", "x12"], ["<a", "<a>"]):
        save_tokenizer(tmp_path, train_bpe(vocab_size=300), add_words=words)
        try:
            assert_same_tokens(tmp_path, 300, words)
        except ValueError as error:
            assert "begin" in str(error)
            refused += 1
    assert refused, "by luck, none of them was in the wrong order: this shows nothing"


def test_a_name_instead_of_a_folder(tmp_path, monkeypatch):
    save_vocabulary(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert load_tokenizer(tmp_path.name).n_vocab == 400

"""The command line prints what transformers' pipeline says; the tokenizer is GPT-2's."""
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch
from checkpoints import ROOT, random_gpt2, save, save_vocabulary
from hub import StandInHub
from transformers import GPT2Tokenizer, pipeline, set_seed

from train_gpt2 import find_folder, load_tokenizer, main

PROMPTS = ["Hello, I'm a language model,", "", " ", "  two spaces, and a tab\t", "new\nlines\n\n", "emoji 🙂🏳️‍🌈", "日本語 and العربية",
           "<|endoftext|>", "one<|endoftext|> two<|endoftext|>", "naïve Ünïcödé\u00a0\u2028", "it's 12345678 x=y+z;", "\u0000\u007f"]


@pytest.fixture(scope="module")
def theirs(tiny):
    # The Hub's tokenizer_config.json says no more than this; without it, the length of a prompt is not limited.
    return pipeline("text-generation", model=str(tiny), tokenizer=GPT2Tokenizer.from_pretrained(tiny), device="cpu")


def expected(theirs, prompt, seed=42, **how):
    set_seed(seed)
    how = {"max_length": 30, "num_return_sequences": 5, "temperature": 1.0} | how
    return "".join(f"> {said['generated_text']}\n" for said in theirs(prompt, **how))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts(tiny, theirs, capsys, prompt):
    main(["--model", str(tiny), "--device", "cpu", "--max-length", "50", "--prompt", prompt])
    assert capsys.readouterr().out == expected(theirs, prompt, max_length=50)


@pytest.mark.parametrize(("flags", "how"), [
    ([], {}),
    (["--seed", "7"], {"seed": 7}),
    (["--num-return-sequences", "1"], {"num_return_sequences": 1}),
    (["--max-length", "64"], {"max_length": 64}),
    (["--temperature", "0.7"], {"temperature": 0.7}),
    (["--temperature", "1.8", "--top-k", "0"], {"temperature": 1.8, "top_k": 0}),
    (["--top-k", "3"], {"top_k": 3}),
    (["--temperature", "0", "--num-return-sequences", "1"], {"do_sample": False, "num_return_sequences": 1}),
], ids=str)
def test_flags(tiny, theirs, capsys, flags, how):
    main(["--model", str(tiny), "--device", "cpu", "--prompt", "def main(", *flags])
    assert capsys.readouterr().out == expected(theirs, "def main(", **how)


def test_texts_that_end_are_cut_there(tmp_path, tiny, capsys):
    """A model that is made to say <|endoftext|> next: only the prompt is left, here as in the pipeline."""
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(tiny / file, tmp_path)
    size = load_tokenizer(tiny, 10**6).n_vocab
    model = random_gpt2(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=size, bos_token_id=size - 1, eos_token_id=size - 1)
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(8 * model.transformer.wte.weight[size - 1])
    save(model, tmp_path)
    theirs = pipeline("text-generation", model=model, tokenizer=GPT2Tokenizer.from_pretrained(tmp_path), device="cpu")
    for prompt in ("def", "<|endoftext|>", "", "a<|endoftext|>b"):
        main(["--model", str(tmp_path), "--device", "cpu", "--prompt", prompt])
        out = capsys.readouterr().out
        assert f"> {prompt}\n" in out
        assert out == expected(theirs, prompt)


def test_real_words(full, real_vocabulary, tmp_path, capsys):
    """The very command, by its defaults, on a model of gpt2's size with gpt2's vocabulary."""
    for file in (real_vocabulary / "vocab.json", real_vocabulary / "merges.txt", *full.iterdir()):
        (tmp_path / file.name).symlink_to(file)
    main(["--model", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    theirs = pipeline("text-generation", model=str(full), tokenizer=GPT2Tokenizer.from_pretrained(real_vocabulary), device="cpu")
    assert out == expected(theirs, "Hello, I'm a language model,")
    assert out.count("> Hello, I'm a language model,") == 5


def test_no_flags_downloads_gpt2_once_and_then_needs_no_network(tiny, theirs, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(tiny, served)
    for unused in ("pytorch_model.bin", "tf_model.h5", "tokenizer.json", "onnx.json", "README.md"):
        (served / unused).write_text("nobody should ask for this")
    with StandInHub({"gpt2": served}) as hub:
        run = [subprocess.run([sys.executable, ROOT / "train_gpt2.py"], env=os.environ | hub.env(tmp_path / "cache"),
                              cwd=tmp_path, capture_output=True, check=False, timeout=100)]
        got = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
    assert got == {"config.json", "model.safetensors", "vocab.json", "merges.txt"}
    assert "gpt2/resolve" in str(hub.requests), "it asks for gpt2, under which name transformers cached it"
    run.append(subprocess.run(run[0].args, env=os.environ | hub.env(tmp_path / "cache"),
                              cwd=tmp_path, capture_output=True, check=False, timeout=100))
    for process in run:
        assert process.returncode == 0, process.stderr.decode()
        assert process.stdout.decode().replace(os.linesep, "\n") == expected(theirs, PROMPTS[0])
        assert b"using device: " in process.stderr
        assert b"Traceback" not in process.stderr


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("gpt2", "Hello, I'm a language model,", "5", "30", "1.0", "50", "42", "auto", "float32"):
        assert f"(default: {default})" in text


# The tokenizer

def strings(n):
    """Random strings of the kinds that tokenizers differ on: spaces, digits, contractions, scripts, emoji, specials."""
    rng = random.Random(0)
    pieces = [" ", "  ", "\n", "\t", "\u00a0", "'s", "'ll", "'LL", "a", "Hello", " world", "12", "3", "é", "e\u0301", "ß", "中文", "العربية",
              "🙂", "🏳️‍🌈", "<|endoftext|>", "<|", "|>", "...", "_", "x=1;", "\r\n", "\u200b", "\ufeff", "\U0010ffff", "\x00"]
    for _ in range(n):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(12)))
        yield text + "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xd800)])) for _ in range(rng.randrange(6)))


def assert_same_tokens(folder, other=None):
    ours, theirs = load_tokenizer(folder, 10**6), GPT2Tokenizer.from_pretrained(folder)
    for text in strings(3000):
        tokens = ours.encode(text, allowed_special="all")
        assert tokens == theirs(text)["input_ids"], repr(text)
        assert ours.decode(tokens) == text
        if other:
            assert tokens == other.encode(text, allowed_special="all")


def test_tokens_of_a_trained_vocabulary(tiny):
    assert_same_tokens(tiny)


def test_tokens_of_the_real_vocabulary(real_vocabulary, tmp_path, monkeypatch):
    """Three ways to the same tokens: the folder's files, tiktoken's own gpt2, Hugging Face's tokenizer."""
    for name, file in [("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "vocab.json"), ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "merges.txt")]:
        shutil.copy(real_vocabulary / file, tmp_path / name)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    gpt2 = tiktoken.get_encoding("gpt2")
    assert gpt2.encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert load_tokenizer(real_vocabulary, 50257).n_vocab == gpt2.n_vocab
    assert_same_tokens(real_vocabulary, gpt2)
    assert load_tokenizer(tmp_path, 50257).n_vocab == 50257, "a folder without the two files gets OpenAI's"


def test_tokenizer_reads_the_files_that_are_there_now(tiny, tmp_path, monkeypatch):
    """tiktoken keeps copies by path, and would serve the vocabulary that lay there before."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    sizes = [save_vocabulary("model", size) for size in (300, 350)]
    assert load_tokenizer(Path("model"), 10**6).n_vocab == sizes[1] == 350
    save_vocabulary("model", 310)
    assert load_tokenizer(Path("model"), 10**6).n_vocab == 310
    assert not list(cache.iterdir())
    assert os.environ["TIKTOKEN_CACHE_DIR"] == str(cache)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR")
    load_tokenizer(Path("model"), 10**6)
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def test_a_folder_goes_before_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert find_folder("gpt2") == Path("gpt2")

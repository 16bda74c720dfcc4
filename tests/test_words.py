"""Promise: the command prints what transformers' pipeline says, for every kind of checkpoint that
people have; and it downloads what it reads and nothing more."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    DECODED_TOGETHER,
    DECODED_TOGETHER_WHY,
    EOT,
    LAYOUTS,
    RELATIVES,
    ROOT,
    TOKENIZERS,
    expected,
    ignores_scale,
    pair,
    peer,
    random_gpt2,
    random_idx,
    read_tokenizer,
    save,
    words,
    write_checkpoint,
)
from hub import StandInHub
from transformers import pipeline

from train_gpt2 import GPT, load_tokenizer, main

PROMPTS = ["Hello, I'm a language model,", "", " ", "  two spaces, and a tab\t", "new\nlines\n\n",
           "emoji 🙂🏳️‍🌈 日本語 العربية", EOT, f"one{EOT} two{EOT}", "naïve Ünïcödé ﬁ\u00a0\u2028",
           "it's 12345678 x=y+z;", "\u0000\u007f", "[PAD]<|user|> newword of new <s></s><|pad|>",
           "a cat, cats <mask> plain<|start|>"]

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_words(capsys, folder, prompts):
    """Sampled and greedy, then logits and generate()'s tokens."""
    theirs = peer(folder)
    for prompt in prompts:
        length = len(theirs.tokenizer(prompt)["input_ids"]) + 10
        flags = ["--max-length", length, "--num-return-sequences"]
        how = {"max_length": length}
        assert words(capsys, folder, prompt, *flags, 3) == \
            expected(theirs, prompt, num_return_sequences=3, **how)
        assert words(capsys, folder, prompt, "--temperature", 0, *flags, 1) == \
            expected(theirs, prompt, num_return_sequences=1, do_sample=False, **how)
    ours, theirs = pair(folder)
    assert ours.lm_head.weight.dtype == theirs.dtype
    idx = random_idx(ours, 3, 9)
    assert torch.equal(ours(idx), theirs(idx).logits)
    torch.manual_seed(0)
    tokens = ours.generate(idx, 40)
    torch.manual_seed(0)
    mask = torch.ones_like(idx)
    assert torch.equal(tokens, theirs.generate(idx, attention_mask=mask, do_sample=True,
                                               max_length=40))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_every_kind_of_tokenizer(tmp_path, capsys, tokenizer):
    if tokenizer in DECODED_TOGETHER:
        pytest.skip(DECODED_TOGETHER_WHY)
    assert_same_words(capsys, write_checkpoint(tmp_path, tokenizer), PROMPTS)


KINDS = {
    **{layout: {"layout": layout} for layout in LAYOUTS if layout != "saved"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 in shards": {"dtype": torch.float16, "layout": "shards"},
    "more ids than the tokenizer": {"vocab_size": 50304},
    **RELATIVES,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(tmp_path, capsys, kind):
    if ignores_scale(KINDS[kind]):
        pytest.skip("transformers 4 ignores the scale settings under sdpa")
    assert_same_words(capsys, write_checkpoint(tmp_path, **KINDS[kind]), PROMPTS[:4])


def test_fewer_ids_than_the_tokenizer(tmp_path, capsys):
    """Tokens that were added to the tokenizer alone: prompts without them work."""
    folder = write_checkpoint(tmp_path, "named", vocab_size=400)
    assert_same_words(capsys, folder, PROMPTS[:5])


@pytest.mark.parametrize("ends", [[20, 0, 30], 0], ids=str)
def test_texts_that_end(tmp_path, capsys, ends):
    """20 and 30 are not special tokens: the pipeline prints them, and fills up with 20."""
    folder = write_checkpoint(tmp_path, eos_token_id=ends)
    model = random_gpt2(**GPT.from_pretrained(folder).config.__dict__ | {"n_positions": 96})
    likely = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():  # these are about as likely as all others together
        model.transformer.ln_f.weight.mul_(0.3)
        model.transformer.ln_f.bias.copy_(0.5 * model.transformer.wte.weight[likely].sum(0))
    save(model, folder)
    assert_same_words(capsys, folder, PROMPTS)


def test_an_empty_prompt_starts_from_bos(tmp_path, capsys):
    """Where that is an ordinary token, it is printed, as in the pipeline."""
    folder = write_checkpoint(tmp_path, bos_token_id=20)
    assert words(capsys, folder, "").startswith(f"> {load_tokenizer(folder).decode([20])}")
    assert_same_words(capsys, folder, [""])


def test_a_text_that_ends_at_once_is_only_the_prompt(tmp_path, capsys):
    folder = write_checkpoint(tmp_path)
    model = random_gpt2(**GPT.from_pretrained(folder).config.__dict__ | {"n_positions": 96})
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(8 * model.transformer.wte.weight[0])
    save(model, folder)
    for prompt in ("def", EOT, "", f"a{EOT}b"):
        assert words(capsys, folder, prompt) == 5 * f"> {prompt}\n"


# Flags

@pytest.fixture(scope="module")
def theirs(tiny):
    return peer(tiny)


@pytest.mark.parametrize(("flags", "how"), [
    ([], {}),
    (["--seed", "7"], {"seed": 7}),
    (["--num-return-sequences", "1"], {"num_return_sequences": 1}),
    (["--max-length", "64"], {"max_length": 64}),
    (["--temperature", "0.7"], {"temperature": 0.7}),
    (["--temperature", "1.8", "--top-k", "0"], {"temperature": 1.8, "top_k": 0}),
    (["--top-k", "3"], {"top_k": 3}),
], ids=str)
def test_flags(tiny, theirs, capsys, flags, how):
    assert words(capsys, tiny, "def main(", *flags) == expected(theirs, "def main(", **how)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(tiny, capsys, dtype):
    theirs = pipeline("text-generation", model=str(tiny), device="cpu", dtype=dtype,
                      tokenizer=read_tokenizer(tiny))
    assert words(capsys, tiny, "def main(", "--dtype", dtype) == expected(theirs, "def main(")


# The very command

def test_real_words(full, real_tokenizer, tmp_path, capsys):
    """By its defaults, with a model of gpt2's size and gpt2's tokenizer, in the Hub's files."""
    for file in (real_tokenizer / "tokenizer.json", *full.iterdir()):
        shutil.copy(file, tmp_path)
    main(["--model", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    assert out == expected(peer(tmp_path), PROMPTS[0])
    assert out.count(f"> {PROMPTS[0]}") == 5


CONFIGS = {"config.json", "generation_config.json", "tokenizer_config.json"}
UNUSED = {"tf_model.h5", "onnx.json", "README.md", "64.tflite", "model.fp16.safetensors",
          "pytorch_model.bin", "vocab.json", "merges.txt", "added_tokens.json"}


@pytest.mark.parametrize(("tokenizer", "layout", "read"), [
    ("on the Hub", "hub", {"model.safetensors", "tokenizer.json"}),
    ("today", "shards", {"model.safetensors.index.json", "model-*", "tokenizer.json"}),
    ("slow", "old", {"model.safetensors", "vocab.json", "merges.txt", "added_tokens.json",
                     "special_tokens_map.json"}),
    ("today", "bin", {"pytorch_model.bin", "tokenizer.json"}),
    ("today", "bin shards", {"pytorch_model.bin.index.json", "pytorch_model-*", "tokenizer.json"}),
], ids=["Hub", "shards", "old", "bin", "bin shards"])
def test_no_flags_download_gpt2_once(tmp_path, tokenizer, layout, read):
    """Exactly the files that are read; then it runs without a network."""
    if layout not in LAYOUTS:
        pytest.skip("a .bin file is read only with torch 2.6 or later")
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    write_checkpoint(served, tokenizer, layout)
    theirs = peer(served)
    for name in UNUSED - read - ({"pytorch_model.bin"} if "bin" in layout else set()):
        (served / name).write_text("nobody should ask for this")
    command = [sys.executable, ROOT / "train_gpt2.py", "--device", "cpu"]
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(cache) | {"OMP_NUM_THREADS": "1"}
        runs = [subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False)]
        got = {path.rsplit("/", 1)[1] for method, path in hub.requests
               if method == "GET" and path.startswith("/gpt2/resolve/")}
    if (served / "special_tokens_map.json").exists():  # transformers 4 writes one
        read = read | {"special_tokens_map.json"}
    there = {path.name for path in served.iterdir()}
    assert {re.sub("-0.*", "-*", name) for name in got} == read | CONFIGS & there
    if layout == "hub":
        runs.append(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True,
                                   check=False))
    for process in runs:
        assert process.returncode == 0, process.stderr.decode()
        out = process.stdout.decode(errors="replace").replace(os.linesep, "\n")
        assert out == expected(theirs, PROMPTS[0])
        assert b"using device: cpu" in process.stderr
        assert b"Traceback" not in process.stderr


def test_all_files_are_of_one_revision(tmp_path):
    """Also if a new one is published between the first request and the second."""
    served = tmp_path / "served"
    served.mkdir()
    write_checkpoint(served, "vocab.json")
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(tmp_path / "cache") | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, ROOT / "train_gpt2.py"], env=env, check=True,
                       capture_output=True, cwd=tmp_path)
        asked = [path.rsplit("/", 1)[1] for _, path in hub.requests if "/revision/" in path]
        assert asked.count("main") == 1, "all later requests name the revision that it stands for"
        assert any(path.endswith("/vocab.json") for _, path in hub.requests)


def test_the_tokenizer_is_downloaded_without_the_weights(tiny, tmp_path):
    code = "import train_gpt2; print(train_gpt2.load_tokenizer('someone/tiny').get_vocab_size())"
    with StandInHub({"someone/tiny": tiny}) as hub:
        env = os.environ | hub.env(tmp_path) | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True,
                                 check=True, text=True)
        assert int(process.stdout) == 400
        assert not any("safetensors" in path for _, path in hub.requests)


def test_a_folder_goes_before_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("gpt2").config.vocab_size == 400

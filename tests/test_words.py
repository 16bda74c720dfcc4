"""Promise: the command prints what transformers' pipeline says, for every kind of checkpoint that
people have; and it downloads what it reads and no more."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    EOT,
    ROOT,
    TRANSFORMERS,
    as_on_the_hub,
    change_json,
    pair,
    random_gpt2,
    random_idx,
    read_tokenizer,
    save,
    save_tokenizer,
    save_vocabulary,
    train_bpe,
)
from hub import StandInHub
from safetensors.torch import load_file, save_file
from transformers import GPT2Tokenizer, pipeline, set_seed

from train_gpt2 import GPT, main

PROMPTS = ["Hello, I'm a language model,", "", " ", "  two spaces, and a tab\t", "new\nlines\n\n", "emoji 🙂🏳️‍🌈",
           "日本語 and العربية", EOT, f"one{EOT} two{EOT}", "naïve Ünïcödé\u00a0\u2028", "it's 12345678 x=y+z;",
           "\u0000\u007f", "[PAD]<|user|> a newword<s></s>"]
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}

pytestmark = pytest.mark.usefixtures("one_thread")


def peer(folder):
    """transformers' pipeline, with the dtype and the tokenizer that it finds by itself."""
    return pipeline("text-generation", model=str(folder), device="cpu", dtype="auto",
                    tokenizer=read_tokenizer(folder))


def expected(theirs, prompt, seed=42, **how):
    """What the pipeline says. An older transformers is told what today's does by default: to leave the
    spaces as they are, and that a max_length is one, even with its own max_new_tokens beside it."""
    set_seed(seed)
    how = {"max_length": 30, "num_return_sequences": 5, "temperature": 1.0, "do_sample": True,
           "clean_up_tokenization_spaces": False} | how
    if TRANSFORMERS < (5, 0):
        how["max_new_tokens"] = how.pop("max_length") - max(1, len(theirs.tokenizer(prompt)["input_ids"]))
    return "".join(f"> {said['generated_text']}\n" for said in theirs(prompt, **how))


def words(capsys, folder, prompt, *flags):
    main(["--model", str(folder), "--device", "cpu", "--prompt", prompt, *flags])
    return capsys.readouterr().out


# Every kind of checkpoint. Each function writes one into an empty folder.

def ids(size, first=0, **more):
    return {"vocab_size": size, "bos_token_id": first, "eos_token_id": first, **SIZES, **more}


def today(folder):
    size = save_tokenizer(folder, train_bpe())
    save(random_gpt2(**ids(size)), folder)


def on_the_hub(folder):
    size = save_tokenizer(folder, train_bpe())
    file = folder / "tokenizer.json"
    file.write_text(as_on_the_hub(file.read_text(encoding="utf-8")), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    save(random_gpt2(**ids(size)), folder, "hub")


def vocab_and_merges(folder):
    size = save_vocabulary(folder)
    save(random_gpt2(**ids(size, first=size - 1)), folder, "old")


def added_tokens_and_a_resized_model(folder):
    bpe = train_bpe()
    size = save_tokenizer(folder, bpe, add_special=["[PAD]", "<|user|>"], add_words=["newword", "a"])
    model = random_gpt2(**ids(bpe.get_vocab_size()))
    model.resize_token_embeddings(size)
    save(random_gpt2(**ids(size, pad_token_id=size - 4)), folder)


def a_padding_token_without_resizing(folder):
    """The prompt that holds [PAD] cannot be, and is left out."""
    size = save_tokenizer(folder, train_bpe(), add_special=["[PAD]"])
    save(random_gpt2(**ids(size - 1)), folder)


def its_own_vocabulary(folder, vocab_size=None, specials=("<s>", "</s>", "<pad>")):
    names = dict(zip(["bos_token", "eos_token", "pad_token"], specials))
    size = save_tokenizer(folder, train_bpe(specials), **names)
    save(random_gpt2(**ids(vocab_size or size), ), folder)


def its_own_vocabulary_in_50257(folder):
    its_own_vocabulary(folder, 50257)


def its_own_vocabulary_in_50304(folder):
    its_own_vocabulary(folder, 50304, [EOT])


def bfloat16(folder):
    size = save_tokenizer(folder, train_bpe())
    save(random_gpt2(**ids(size)).to(torch.bfloat16), folder)


def float16_in_shards(folder):
    size = save_tokenizer(folder, train_bpe())
    random_gpt2(**ids(size)).half().save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


def shards(folder):
    size = save_tokenizer(folder, train_bpe())
    model = random_gpt2(**ids(size, n_embd=256, n_layer=3))
    model.save_pretrained(folder, max_shard_size="3MB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


def n_inner(folder):
    size = save_tokenizer(folder, train_bpe())
    save(random_gpt2(**ids(size, n_inner=4 * 32)), folder)


def two_ends(folder):
    """One is no special token: the pipeline shows it, and fills up with it."""
    size = save_tokenizer(folder, train_bpe())
    model = random_gpt2(**ids(size))
    with torch.no_grad():  # 20 and 30 are about as likely as all the others
        model.transformer.ln_f.weight.mul_(0.3)
        model.transformer.ln_f.bias.copy_(0.3 * model.transformer.wte.weight[[20, 30]].sum(0))
    save(model, folder)
    change_json(folder / "generation_config.json", eos_token_id=[20, 0, 30])


def an_end_that_comes_soon(folder):
    size = save_tokenizer(folder, train_bpe())
    model = random_gpt2(**ids(size))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(0.3)
        model.transformer.ln_f.bias.copy_(0.7 * model.transformer.wte.weight[0])
    save(model, folder)


KINDS = [today, on_the_hub, vocab_and_merges, added_tokens_and_a_resized_model, a_padding_token_without_resizing,
         its_own_vocabulary, its_own_vocabulary_in_50257, its_own_vocabulary_in_50304, bfloat16, float16_in_shards,
         shards, n_inner, two_ends, an_end_that_comes_soon]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_checkpoint(tmp_path, capsys, kind):
    """Words, sampled and greedy, for all prompts; then logits and generate()'s tokens."""
    kind(tmp_path)
    theirs = peer(tmp_path)
    prompts = [prompt for prompt in PROMPTS if "[PAD]" not in prompt or "without_resizing" not in kind.__name__]
    for prompt in prompts:
        length = len(theirs.tokenizer(prompt)["input_ids"]) + 10
        ours = words(capsys, tmp_path, prompt, "--max-length", str(length), "--num-return-sequences", "3")
        assert ours == expected(theirs, prompt, max_length=length, num_return_sequences=3)
        greedy = ["--temperature", "0", "--num-return-sequences", "1"]
        ours = words(capsys, tmp_path, prompt, "--max-length", str(length), *greedy)
        assert ours == expected(theirs, prompt, max_length=length, num_return_sequences=1, do_sample=False)
    ours, theirs = pair(tmp_path)
    assert ours.lm_head.weight.dtype == theirs.dtype
    idx = random_idx(ours, 3, 9)
    assert torch.equal(ours(idx), theirs(idx).logits)
    torch.manual_seed(0)
    tokens = ours.generate(idx, 40)
    torch.manual_seed(0)
    assert torch.equal(tokens, theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, max_length=40))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_dtype_is_the_one_that_transformers_takes(tmp_path, field, dtype):
    """What config.json says, under its old name or its new one; else that of the first tensor."""
    save(random_gpt2(**ids(100)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype", None)
    if field:
        config[field] = dtype
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    stored = getattr(torch, dtype)
    if field:  # the file has another
        stored = torch.float32 if dtype == "bfloat16" else torch.bfloat16
    tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.float64)  # not the first
    save_file(tensors, tmp_path / "new")
    (tmp_path / "new").replace(tmp_path / "model.safetensors")
    ours, theirs = pair(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype} == {getattr(torch, dtype)}
    idx = random_idx(ours, 2, 9)
    assert torch.equal(ours(idx), theirs(idx).logits)


# The flags

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
    (["--temperature", "0", "--num-return-sequences", "1"], {"do_sample": False, "num_return_sequences": 1}),
], ids=str)
def test_flags(tiny, theirs, capsys, flags, how):
    assert words(capsys, tiny, "def main(", *flags) == expected(theirs, "def main(", **how)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(tiny, capsys, dtype):
    theirs = pipeline("text-generation", model=str(tiny), device="cpu", dtype=dtype, tokenizer=read_tokenizer(tiny))
    assert words(capsys, tiny, "def main(", "--dtype", dtype) == expected(theirs, "def main(")


def test_only_the_prompt_is_left_of_a_text_that_ends_at_once(tmp_path, capsys):
    size = save_tokenizer(tmp_path, train_bpe())
    model = random_gpt2(**ids(size))
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(8 * model.transformer.wte.weight[0])
    save(model, tmp_path)
    for prompt in ("def", EOT, "", f"a{EOT}b"):
        assert words(capsys, tmp_path, prompt) == 5 * f"> {prompt}\n"


def test_help_says_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for default in ("gpt2", "Hello, I'm a language model,", "5", "30", "1.0", "50", "42", "auto"):
        assert f"(default: {default})" in text


# The very command

def test_real_words(full, real_vocabulary, tmp_path, capsys):
    """By its defaults, on a model of gpt2's size with gpt2's vocabulary, in the Hub's files."""
    for file in (real_vocabulary / "tokenizer.json", *full.iterdir()):
        (tmp_path / file.name).symlink_to(file)
    main(["--model", str(tmp_path), "--device", "cpu"])
    out = capsys.readouterr().out
    theirs = pipeline("text-generation", model=str(full), device="cpu",
                      tokenizer=GPT2Tokenizer.from_pretrained(real_vocabulary))
    assert out == expected(theirs, "Hello, I'm a language model,")
    assert out.count("> Hello, I'm a language model,") == 5


CONFIGS = {"config.json", "generation_config.json"}


@pytest.mark.parametrize(("kind", "read"), [
    (on_the_hub, {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}),
    (vocab_and_merges, {"model.safetensors", "vocab.json", "merges.txt"}),
    (shards, {"model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "model-*"}),
], ids=["today", "old", "shards"])
def test_no_flags_downloads_gpt2_once_and_then_needs_no_network(tmp_path, kind, read):
    served, cache = tmp_path / "served", tmp_path / "cache"
    served.mkdir()
    kind(served)
    theirs = peer(served)
    unused = {"pytorch_model.bin", "tf_model.h5", "onnx.json", "README.md", "64.tflite", "model.fp16.safetensors"}
    if "tokenizer.json" in read:
        unused |= {"vocab.json", "merges.txt"}
    for name in unused:
        (served / name).write_text("nobody should ask for this")
    command = [sys.executable, ROOT / "train_gpt2.py", "--device", "cpu"]
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(cache) | {"OMP_NUM_THREADS": "1"}
        runs = [subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False, timeout=100)]
        got = {path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/resolve/" in path}
        assert "gpt2/resolve" in str(hub.requests), "gpt2 is the name under which transformers caches it"
    read = CONFIGS | read
    if (served / "special_tokens_map.json").exists():  # of transformers 4: kept, to be saved again
        read |= {"special_tokens_map.json"}
    assert {name if "-of-" not in name else "model-*" for name in got} == read
    if kind is on_the_hub:
        runs.append(subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=False, timeout=100))
    for process in runs:
        assert process.returncode == 0, process.stderr.decode()
        out = process.stdout.decode(errors="replace").replace(os.linesep, "\n")
        assert out == expected(theirs, PROMPTS[0])
        assert b"using device: cpu" in process.stderr
        assert b"Traceback" not in process.stderr


def test_the_tokenizer_alone_is_downloaded_without_the_weights(tiny, tmp_path):
    code = "import sys, train_gpt2; print(train_gpt2.load_tokenizer('someone/tiny').n_vocab)"
    with StandInHub({"someone/tiny": tiny}) as hub:
        env = os.environ | hub.env(tmp_path) | {"PYTHONPATH": str(ROOT)}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, text=True).stdout
        assert int(out) == 400
        assert not any("safetensors" in path for _, path in hub.requests)


def test_a_folder_goes_before_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("gpt2").config.vocab_size == 400

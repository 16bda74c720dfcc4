"""Promise: a mistake in the flags gets one clear line, before anything is downloaded or read."""
import re

import pytest
import torch
from mistakes import refused

import train_gpt2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("args, words", [
    (["--nonsense"], ["--nonsense"]),
    (["Hello"], ["Hello"]),  # --prompt forgotten
    (["--prompt", "Hello", "there"], ["there"]),  # the quotes forgotten
    (["--seed"], ["--seed"]),  # the value forgotten
    (["--max-length", "ten"], ["--max-length", "ten"]),
    (["--max-length", "1e2"], ["--max-length", "1e2"]),
    (["--num-return-sequences", "2.5"], ["--num-return-sequences", "2.5"]),
    (["--temperature", "hot"], ["--temperature", "hot"]),
    (["--temperature", "0,7"], ["--temperature", "0,7"]),  # a decimal comma
    (["--top-k", "all"], ["--top-k", "all"]),
    (["--seed", ""], ["--seed"]),
    (["--max-length", "-1"], ["max-length", "-1"]),
    (["--max-length", "0"], ["max-length", "0"]),
    (["--max-length", "3"], ["max-length", "3"]),  # fewer than the prompt's tokens
    (["--max-length", "65"], ["max-length", "65", "64"]),  # the model's context is 64
    (["--max-length", 10**30], ["max-length"]),
    (["--prompt", "one two three " * 50], ["prompt", "64"]),
    (["--prompt", "one two three " * 50, "--max-length", 1000], ["prompt", "64"]),
    (["--num-return-sequences", "0"], ["num-return-sequences"]),
    (["--num-return-sequences", "-1"], ["num-return-sequences"]),
    (["--temperature", "-0.1"], ["temperature", "-0.1"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temperature", "inf"], ["temperature", "inf"]),
    (["--temperature=-inf"], ["temperature", "-inf"]),
    (["--top-k", "-1"], ["top-k", "-1"]),
    (["--seed", 2**64], ["seed"]),
    (["--seed", -2**63 - 1], ["seed"]),
    (["--seed", 10**30], ["seed"]),
    (["--dtype", "float8"], ["dtype", "float8", "bfloat16"]),
    (["--dtype", "Float32"], ["dtype", "Float32"]),
    (["--dtype", ""], ["dtype"]),
    (["--device", "gpu"], ["device", "gpu"]),
    (["--device", ""], ["device"]),
    (["--device", "cpu:x"], ["device", "cpu:x"]),
    (["--device", "cuda:99"], ["device", "cuda:99"]),
    (["--device", "meta"], ["device", "meta"]),  # exists, but computes nothing
    (["--device", "vulkan"], ["device", "vulkan"]),
    (["--device", "hpu"], ["device", "hpu"]),  # torch looks for a module that is not installed
    (["--device", "two\nlines"], ["device"]),
], ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else None)
def test_arguments(model, capsys, args, words):
    (model / "model.safetensors").write_bytes(b"garbage")
    assert "safetensors" not in refused(capsys, ["--model", model, *args], *words)


@pytest.mark.parametrize("number", [10**15, 10**30])
def test_more_sequences_than_any_memory_holds(tiny, capsys, number):
    refused(capsys, ["--model", tiny, "--num-return-sequences", number])


def test_max_length_must_exceed_the_prompts_tokens(tiny, capsys):
    tokens = len(train_gpt2.load_tokenizer(tiny).encode("The model, the weights"))
    args = ["--model", tiny, "--prompt", "The model, the weights", "--max-length"]
    refused(capsys, [*args, tokens], "max-length", str(tokens))
    train_gpt2.main([str(arg) for arg in [*args, tokens + 1]])
    assert capsys.readouterr().out.count("> The model") == 5


@pytest.mark.parametrize("seed", [-2**63, 2**64 - 1])
def test_every_seed_that_torch_takes(tiny, capsys, seed):
    train_gpt2.main(["--model", str(tiny), f"--seed={seed}"])
    assert capsys.readouterr().out.count("> Hello") == 5


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_on_a_torch_without_it(tiny, capsys, device):
    if torch.version.cuda:
        pytest.skip("this torch is built with CUDA")
    assert re.search("README|pytorch.org|pip install", refused(capsys, ["--model", tiny, "--device", device], "CUDA"))


def test_arguments_are_checked_before_the_model_is_fetched(offline, capsys):
    assert "Hub" not in refused(capsys, ["--model", "gpt2", "--top-k", "-1"], "top-k")

"""Promise: a start imports what it needs and no more, takes next to no memory for the weights, and
shows its progress on terminals only."""
import os
import subprocess
import sys

import pytest
import torch
import tqdm
from checkpoints import DTYPES, ROOT, TORCH, random_gpt2, save

import train_gpt2

ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # models this tiny are slower with more threads
HEAVY = {"transformers", "huggingface_hub", "tiktoken", "regex", "requests", "httpx",
         "torch._dynamo", "torch._inductor"}
if TORCH >= (2, 6):
    HEAVY.add("sympy")  # which an older torch imports for the shapes of tensors without memory


def python(code, *args):
    """The lines that the code prints."""
    process = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, env=ENV,
                             check=True, stdout=subprocess.PIPE, text=True, timeout=100)
    return process.stdout.splitlines()


def test_imports_are_light_and_silent(tiny):
    """Up to the end of a completion; then Python doesn't look for garbage in all of them."""
    code = """
import gc, safetensors.torch, sys, tokenizers, torch, tqdm
before = set(sys.modules)  # older versions import some heavy ones themselves
import train_gpt2
train_gpt2.main(["--model", sys.argv[1]])
print(gc.get_freeze_count(), *sys.modules.keys() - before)
"""
    first, *_, last = python(code, tiny)
    assert first.startswith("> Hello")
    frozen, *imported = last.split()
    assert int(frozen) > 0
    assert "train_gpt2" in imported
    assert not HEAVY & set(imported)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has /proc")
def test_loading_reads_nothing_and_copies_nothing(tmp_path):
    """The weights stay a map of their file."""
    code = """
import re, sys, train_gpt2
def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
for folder in sys.argv[1:]:
    before = memory()
    model = train_gpt2.GPT.from_pretrained(folder)
    print(memory() - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""
    model = random_gpt2(n_layer=4, n_embd=768, n_head=12, vocab_size=9999)
    folders = [save(model.to(dtype), tmp_path / str(dtype)) for dtype in DTYPES[::2]]
    for line in python(code, *folders):
        taken, size = map(float, line.split())
        assert size > 50
        assert taken < 0.05 * size


@pytest.mark.parametrize("seconds", [0.9, 1.5])
def test_progress_is_for_terminals_and_for_long_generations(
        tiny, monkeypatch, capsys, terminal, one_thread, seconds):
    """Which take more than a second, by a clock that goes on with each token."""
    stderr, shown = terminal()
    tokens, sample = [], train_gpt2.sample
    monkeypatch.setattr(train_gpt2, "sample", lambda *how: (tokens.append(1), sample(*how))[1])
    monkeypatch.setattr(tqdm.std, "time", lambda: len(tokens) * seconds / 63)
    gpt = train_gpt2.GPT.from_pretrained(tiny)
    gpt.config.eos_token_id = None
    gpt.generate(torch.tensor([[1]]), 64)
    assert "token/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", stderr)
    gpt.generate(torch.tensor([[1]]), 64)
    assert (b"token/s" in shown()) == (seconds > 1)

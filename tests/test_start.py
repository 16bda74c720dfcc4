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

HEAVY = {"transformers", "huggingface_hub", "tiktoken", "regex", "requests", "httpx",
         "torch._dynamo", "torch._inductor"}
if TORCH >= (2, 6):
    HEAVY.add("sympy")  # which an older torch imports for the shapes of tensors without memory


def python(code, *args):
    """The lines that the code prints."""
    return subprocess.check_output([sys.executable, "-c", code, *args], cwd=ROOT, text=True,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"}).splitlines()


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
    frozen, *imported = last.split()
    assert first.startswith("> Hello")
    assert int(frozen) > 0
    assert not HEAVY & set(imported)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_loading_reads_nothing_and_copies_nothing(tmp_path):
    """The weights stay a map of their file."""
    code = """
import re, sys, train_gpt2
def memory():
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
for folder in sys.argv[1:]:
    before = memory()
    model = train_gpt2.GPT.from_pretrained(folder)
    print((memory() - before) / sum(p.nbytes for p in model.parameters()))
"""
    model = random_gpt2(n_layer=4, n_embd=768, n_head=12, vocab_size=9999)
    folders = [save(model.to(dtype), tmp_path / str(dtype)) for dtype in DTYPES[::2]]
    for share in python(code, *folders):
        assert float(share) < 0.05


@pytest.mark.parametrize("seconds", [0.9, 1.5])
def test_progress_on_terminals(tiny, monkeypatch, capsys, terminal, one_thread, seconds):
    """If it takes more than a second, by a clock that goes on with each token."""
    tokens, (stderr, shown) = [], terminal()
    monkeypatch.setattr(tqdm.std, "time", lambda: len(tokens) * seconds / 63)
    gpt = train_gpt2.GPT.from_pretrained(tiny)
    gpt.lm_head.register_forward_hook(lambda *_: tokens.append(1))
    gpt.config.eos_token_id = None
    gpt.generate(torch.tensor([[1]]), 64)
    assert "token/s" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", stderr)
    gpt.generate(torch.tensor([[1]]), 64)
    assert (b"token/s" in shown()) == (seconds > 1)

"""Promise: a start imports what it needs and no more, takes next to no memory for the weights, and
shows its progress on terminals only."""
import os
import struct
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT, TORCH, random_gpt2, save, write_checkpoint

from train_gpt2 import main

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_reads_nothing_and_copies_nothing(tmp_path, dtype):
    """The weights stay a map of their file."""
    folder = save(random_gpt2(n_layer=4, n_embd=768, n_head=12).to(dtype), tmp_path)
    code = """
import re, sys, train_gpt2
def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
before = memory()
model = train_gpt2.GPT.from_pretrained(sys.argv[1])
print(memory() - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""
    taken, size = map(float, python(code, folder)[-1].split())
    assert size > 100
    assert taken < 0.05 * size


def test_progress_is_for_terminals_and_for_long_generations(tmp_path, tiny, capsys, one_thread):
    fcntl, pty, termios = (pytest.importorskip(name, reason="Windows has no such terminals")
                           for name in ("fcntl", "pty", "termios"))
    folder = write_checkpoint(tmp_path, n_layer=12, n_embd=96, n_positions=1024)
    long = ["--model", str(folder), "--device", "cpu", "--num-return-sequences", "1",
            "--max-length", "1024"]
    for args, is_long in [(long, True), (["--model", str(tiny)], False)]:
        terminal, stderr = pty.openpty()
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen([sys.executable, "train_gpt2.py", *args], cwd=ROOT, env=ENV,
                                   stdout=subprocess.DEVNULL, stderr=stderr)
        os.close(stderr)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:
            pass  # so Linux says that the other side has closed
        assert process.wait(100) == 0
        assert (b"token/s" in shown) == is_long
    main(long)
    assert "token/s" not in capsys.readouterr().err

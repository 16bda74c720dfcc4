"""Promise: a start costs what it must: the modules that are imported, the memory that is taken."""
import os
import struct
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT, TORCH, random_gpt2, save, save_vocabulary

HEAVY = {"transformers", "huggingface_hub", "regex", "requests", "torch._dynamo", "torch._inductor"}
if TORCH >= (2, 6):
    HEAVY.add("sympy")  # which an older torch imports for the shapes of tensors without memory


def python(code, *args):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    process = subprocess.run([sys.executable, "-c", code, *map(str, args)],
                             capture_output=True, check=False, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_import_is_light_and_silent():
    code = """
import safetensors.torch, tiktoken_ext.openai_public, torch, tqdm
before = set(sys.modules)  # older versions import some heavy ones themselves
import train_gpt2
print(sorted(set(sys.modules) - before))
"""
    assert not HEAVY & set(eval(python(code)))


def test_a_folder_needs_no_hub(tiny):
    """Nor what torch and tiktoken do not need; what they saw on import is not gone through again at
    the exit, where it takes a third of a second."""
    code = """
import gc, train_gpt2
before = set(sys.modules)
train_gpt2.main(['--model', sys.argv[1]])
print(sorted(set(sys.modules) - before))
print(gc.get_freeze_count(), len(gc.get_objects()))
"""
    *_, imported, counts = python(code, tiny).splitlines()
    assert not HEAVY & set(eval(imported))
    frozen, looked_at = map(int, counts.split())
    assert frozen > 3 * looked_at


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_reads_nothing_and_copies_nothing(tmp_path, dtype):
    """The checkpoint stays a map of its file: loading it takes next to no memory."""
    folder = save(random_gpt2(n_layer=4, n_embd=768, n_head=12).to(dtype), tmp_path)
    code = """
import re, torch, train_gpt2
def memory():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
train_gpt2.GPT(train_gpt2.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=8))
before = memory()
model = train_gpt2.GPT.from_pretrained(sys.argv[1])
print(memory() - before, sum(p.nbytes for p in model.parameters()) / 2**20)
"""
    taken, size = map(float, python(code, folder).split())
    assert size > 100
    assert taken < 0.05 * size


def test_progress_is_for_terminals_and_for_long_generations(tmp_path):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))  # which Windows has not
    save_vocabulary(tmp_path)
    save(random_gpt2(n_layer=12, n_head=2, n_embd=96, n_positions=1024, vocab_size=400), tmp_path)
    shown = {}
    for length in (1024, 30):
        terminal, stderr = pty.openpty()
        fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        command = [sys.executable, ROOT / "train_gpt2.py", "--model", tmp_path, "--max-length", str(length),
                   "--num-return-sequences", "1"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        os.close(stderr)
        shown[length] = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown[length] += chunk
        except OSError:
            pass  # so Linux says that the other side has closed
        assert process.wait(100) == 0
    assert b"token/s" in shown[1024]
    assert b"token/s" not in shown[30]

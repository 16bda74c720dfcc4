"""Promise: the command imports what it needs and no more, takes next to no memory for the weights,
and prints the text and nothing else, wherever stdout leads."""
import contextlib
import gc
import io
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT, write_checkpoint

import train_gpt2

HEAVY = {"transformers", "huggingface_hub", "tiktoken", "regex", "requests", "torch._dynamo"}
PROGRAM = """
import gc, runpy, safetensors.torch, sys, tokenizers, torch
before = set(sys.modules)  # older versions import some heavy ones themselves
for folder in sys.argv[1:]:
    sys.argv = ["train_gpt2.py", "--model", folder, "--device", "cpu"]
    runpy.run_path("train_gpt2.py", run_name="__main__")
print(gc.get_freeze_count(), *sys.modules.keys() - before)
"""


def test_a_fresh_process(tiny, tmp_path):
    """Up to the end of two completions, from folders that today's transformers and version 4 saved.
    Python doesn't look for garbage at the end."""
    old = write_checkpoint(tmp_path, "4")
    out = subprocess.check_output([sys.executable, "-c", PROGRAM, tiny, old], cwd=ROOT, text=True)
    frozen, *imported = out.splitlines()[-1].split()
    assert out.count("> Hello, I'm a language model,") == 10
    assert int(frozen) > 0 and not HEAVY & set(imported)


@pytest.mark.parametrize("platform", sorted({sys.platform, "win32"}))
def test_the_weights_stay_a_map_of_their_file(model, monkeypatch, platform):
    """Except on Windows, where a mapped file can't be replaced."""
    monkeypatch.setattr(sys, "platform", platform)
    gpt = train_gpt2.GPT.from_pretrained(model)
    with (model / "model.safetensors").open("rb+") as file:
        file.write(bytes(os.path.getsize(file.name)))  # in place, which a map shows
    assert {p.any().item() for p in gpt.parameters()} == {platform == "win32"}


def test_in_a_notebook(tiny, capsys):
    """Each call of main() would keep all garbage of the notebook for ever, if it froze it. Drawing
    random weights would take longer than loading, and change the numbers that come after it."""
    frozen, state = gc.get_freeze_count(), torch.get_rng_state()
    train_gpt2.GPT.from_pretrained(tiny)
    assert torch.equal(torch.get_rng_state(), state)
    train_gpt2.main(["--model", str(tiny), "--device", "cpu"])
    assert gc.get_freeze_count() == frozen


def test_stdout_gets_utf_8(tiny, monkeypatch):
    """Whatever Windows thinks of a file, and half a character too. A notebook's stdout, which can't
    be reconfigured, gets the text as it is."""
    pipe, notebook = io.TextIOWrapper(io.BytesIO(), encoding="cp1252"), io.StringIO()
    for stdout in (pipe, notebook):
        monkeypatch.setattr(sys, "stdout", stdout)
        train_gpt2.main(["--model", str(tiny), "--prompt", "Grüße, €: Ω"])
    print("caf\udce9", file=pipe, flush=True)
    assert pipe.buffer.getvalue().count("> Grüße, €: Ω".encode()) == 5
    assert notebook.getvalue().count("> Grüße, €: Ω") == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout(tiny, monkeypatch, refused):
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))  # noqa: SIM115
    refused("--model", tiny, says=["No space left"])
    with contextlib.suppress(OSError):  # closing fails too
        sys.stdout.close()

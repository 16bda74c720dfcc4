"""How a mistake is looked at: from the command line, from Python, and as a process of its own."""
import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT
from safetensors.torch import load_file, save_file

import train_gpt2
from train_gpt2 import GPT

IDX = torch.tensor([[1, 2, 3]])
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


def the_line(code, out, err, *words):
    """The one line in which a run refused, after checking that there is nothing else, and that it
    says the words."""
    *before, line = err.splitlines()
    assert code == 2
    assert out == ""
    assert line.startswith("train_gpt2.py: error: ")
    for text in before:
        assert text == "" or text.startswith(("using device", "Fetching", "Download", "Reconstruct")), text
    for word in words:
        assert word.lower().replace("_", "-") in line.lower().replace("_", "-")
    return line.removeprefix("train_gpt2.py: error: ")


def refused(capsys, args, *words):
    """The command line refuses in one line that says the words."""
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main([str(arg) for arg in args])
    return the_line(exit.value.code, *capsys.readouterr(), *words)


def refused_everywhere(capsys, folder, *words):
    """The command line and from_pretrained() refuse the model, in the same words."""
    line = refused(capsys, ["--model", folder], *words)
    with pytest.raises((ValueError, OSError)) as caught:
        GPT.from_pretrained(folder)
    assert line == " ".join(str(caught.value).split())
    return line


def start(*args, stdout=subprocess.PIPE, **env):
    """The script as a process of its own. What it writes is read as bytes: encodings are tested too."""
    return subprocess.Popen([sys.executable, ROOT / "train_gpt2.py", *map(str, args)],
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
                            stdout=stdout, stderr=subprocess.PIPE)


def finish(process):
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # one that hangs must not outlive the tests; to one that has ended it does nothing
    return process.returncode, (out or b"").decode(errors="replace"), err.decode(errors="replace")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    (folder / "generation_config.json").unlink(missing_ok=True)  # which would say other ids


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")

"""How tests look at a mistake, from the command line and from Python."""
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_gpt2
from train_gpt2 import GPT, InputError

IDX = torch.tensor([[1, 2, 3]])
NOTES = "using device|Fetching|Download|Reconstruct|$"


def the_line(code, out, err, *words):
    """The one line of a run that refused. It says the words, and nothing but notes comes before."""
    *before, line = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("train_gpt2.py: error: ")
    for text in before:
        assert re.match(NOTES, text), text
    for word in words:
        assert str(word).lower().replace("_", "-") in line.lower().replace("_", "-"), line
    return line.removeprefix("train_gpt2.py: error: ")


def refused(capsys, args, *words):
    """The command line refuses in one line that says the words."""
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main([str(arg) for arg in args])
    return the_line(exit.value.code, *capsys.readouterr(), *words)


def refused_everywhere(capsys, folder, *words, read=GPT.from_pretrained):
    """The command line and `read` refuse the folder, in the same words."""
    line = refused(capsys, ["--model", folder], *words)
    with pytest.raises((InputError, OSError)) as caught:
        read(folder)
    assert line == " ".join(str(caught.value).split())
    return line


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "new")
    (folder / "new").replace(folder / "model.safetensors")

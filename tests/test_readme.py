"""Promise: what the README says is so: its Python runs as it stands, and its flags, files, versions
and sample text are those of what lies beside it."""
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from checkpoints import ROOT, write_checkpoint
from hub import StandInHub
from tokenizers import Tokenizer

from train_gpt2 import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
PROOF, FROM_PYTHON, PROGRAM = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(block, folder):
    """The stdout of a block of this page, with a stand-in Hub that has a gpt2."""
    served = folder / "served"
    served.mkdir()
    write_checkpoint(served, "on the Hub", "hub")
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(folder / "cache") | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", block], env=env, cwd=folder, check=False,
                                 capture_output=True, encoding="utf-8", errors="replace")
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_proof(tmp_path):
    assert run(PROOF, tmp_path) == "True\nTrue\n"
    assert len(PROOF.splitlines()) < 12


def test_from_python(tmp_path):
    assert "Hello, I'm a language model," in run(FROM_PYTHON, tmp_path)


def test_the_sample_text(real_tokenizer):
    """It is what transformers' tests expect of the real gpt2, as test_logits.py has it."""
    pinned = (ROOT / "tests" / "test_logits.py").read_text(encoding="utf-8")
    ids = re.search(r"tolist\(\) == \[\[(.*?)\]\]", pinned, re.DOTALL)[1]
    text = Tokenizer.from_file(str(real_tokenizer / "tokenizer.json")).decode(
        [int(id) for id in ids.split(",")])
    assert f"> {text}".replace("\n", "\n    ").replace("\n    \n", "\n\n") in README


def test_flags(capsys):
    """As --help shows them: the same ones, in the same order, with the same defaults."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    text = text.split("show this help message", 1)[1]
    shown = re.findall(r"(--[a-z-]+) \S+ .*?\(default: (.*?)\)", text)
    written = re.findall(r"^\| `(--[a-z-]+)` \| `?(.*?)`? \|", README, re.MULTILINE)
    assert shown == written


def test_the_map_of_the_file():
    """Each name that the README's map has is in the file, and in that order."""
    rows = README.split("## Map of the file")[1].split("##")[0]
    first_column = re.findall(r"^\| (.*?) \|", rows, re.MULTILINE)
    names = re.findall(r"`(\w+)(?:\(\))?`", " ".join(first_column))
    places = [re.search(rf"^(?:def|class) {name}\b", SCRIPT, re.MULTILINE) for name in names]
    assert None not in places, dict(zip(names, places))
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    public = re.findall(r"^class (\w+)", SCRIPT, re.MULTILINE)
    assert set(public) <= set(names)


def test_requirements_are_bounds_that_hold_here():
    """Lower ones only, so that nobody's torch is taken away."""
    for line in REQUIREMENTS:
        if not line.startswith("#"):
            name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
            installed = [int(part) for part in re.findall(r"\d+", version(name))[:3]]
            assert installed >= [int(part) for part in bound.split(".")], line


def test_what_is_imported_is_required():
    required = {re.match(r"[\w-]+", line)[0] for line in REQUIREMENTS if not line.startswith("#")}
    imported = set()
    for path in [ROOT / "train_gpt2.py", *(ROOT / "tests").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    own = {path.stem for path in [ROOT / "train_gpt2.py", *(ROOT / "tests").glob("*.py")]}
    others = imported - own - sys.stdlib_module_names
    assert others - {"tiktoken_ext"} <= required  # a part of tiktoken


def test_the_versions_of_the_table():
    """One row has the lower bounds of requirements.txt, and so the oldest Python."""
    bounds = dict(line.split(">=") for line in REQUIREMENTS if not line.startswith("#"))
    rows = re.findall(r"^\| (3\.\d+\.\d+) \| ([\d.]+)\S* \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 3
    assert any(torch.startswith(bounds["torch"]) and transformers.startswith(bounds["transformers"])
               for _, torch, transformers in rows)
    oldest = min(tuple(map(int, python.split(".")[:2])) for python, _, _ in rows)
    assert f"Python {'.'.join(map(str, oldest))} or later" in README


def test_the_top_level():
    tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, check=False,
                             capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a git checkout")
    names = {"train_gpt2.py", "requirements.txt", "README.md", "tests", ".gitignore", ".ci"}
    assert set(tracked.stdout.split()) == names

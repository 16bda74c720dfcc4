"""Promise: what the README says is so: its Python runs as it stands, its flags, its files and its
versions are those of what lies beside it."""
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from checkpoints import ROOT, random_gpt2, save, save_tokenizer, train_bpe
from hub import StandInHub

from train_gpt2 import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROGRAM = [block for block in BLOCKS if "backward" in block]  # which tests/test_distributed.py runs


@pytest.mark.parametrize("block", [block for block in BLOCKS if block not in PROGRAM])
def test_python_block(tmp_path, block):
    served = tmp_path / "gpt2"
    served.mkdir()
    size = save_tokenizer(served, train_bpe())
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}
    save(random_gpt2(vocab_size=size, bos_token_id=0, eos_token_id=0, **sizes), served, "hub")
    with StandInHub({"gpt2": served}) as hub:
        env = os.environ | hub.env(tmp_path / "cache") | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run([sys.executable, "-c", block], env=env, cwd=tmp_path, capture_output=True,
                                 check=False, text=True, encoding="utf-8", errors="replace", timeout=100)
    assert process.returncode == 0, process.stderr
    assert "Hello, I'm a language model," in process.stdout


def test_there_are_blocks():
    assert len(BLOCKS) == 2
    assert len(PROGRAM) == 1


def test_flags(capsys):
    """As --help shows them: the same ones, in the same order, with the same defaults."""
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = re.findall(r"(--[a-z-]+) \S+ .*?\(default: (.*?)\)", text.split("show this help message", 1)[1])
    written = re.findall(r"^\| `(--[a-z-]+)` \| `?(.*?)`? \|", README, re.MULTILINE)
    assert shown == written


def test_the_map_of_the_file():
    """Each name that the README's map has is in the file, and in that order."""
    rows = README.split("## The file, from top to bottom")[1].split("##")[0]
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
    assert {name.replace("tiktoken_ext", "tiktoken") for name in others} <= required


def test_the_versions_of_the_table():
    """The oldest row is the one that requirements.txt names."""
    bounds = dict(line.split(">=") for line in REQUIREMENTS if not line.startswith("#"))
    rows = re.findall(r"^\| (3\.\d+\.\d+) \| ([\d.]+)\S* \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 4
    assert any(torch.startswith(bounds["torch"]) and transformers.startswith(bounds["transformers"])
               for _, torch, transformers in rows)
    oldest = min(tuple(map(int, python.split(".")[:2])) for python, _, _ in rows)
    assert f"Python {'.'.join(map(str, oldest))} or later" in README


def test_the_top_level():
    tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, capture_output=True,
                             check=False, text=True)
    if tracked.returncode:
        pytest.skip("this is no git checkout")
    names = {"train_gpt2.py", "requirements.txt", "README.md", "tests", ".gitignore", ".ci"}
    assert set(tracked.stdout.split()) == names

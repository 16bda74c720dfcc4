"""The README's Python blocks run as they stand, its commands and numbers are those of the files beside it."""
import os
import re
import subprocess
import sys
from importlib.metadata import metadata

import pytest
from checkpoints import ROOT, random_gpt2, save, save_vocabulary
from hub import StandInHub

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1].strip())
def test_python_block(tmp_path, block):
    served = tmp_path / "gpt2"
    served.mkdir()
    size = save_vocabulary(served)
    save(random_gpt2(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=size), served, "hub")
    with StandInHub({"gpt2": served}) as hub:
        process = subprocess.run([sys.executable, "-c", block], env=os.environ | hub.env(tmp_path / "cache"), cwd=ROOT,
                                 capture_output=True, check=False, text=True, encoding="utf-8", errors="replace", timeout=100)
    assert process.returncode == 0, process.stderr
    assert process.stdout
    if "loss" in block:
        losses = [float(line) for line in process.stdout.split()]
        assert losses == sorted(losses, reverse=True)


def test_there_are_blocks():
    assert len(BLOCKS) == 2


def test_flags_are_those_of_the_script():
    script = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    flags = re.findall(r'add_argument\("(--[a-z-]+)"', script)
    assert flags == re.findall(r"^\| `(--[a-z-]+)` \|", README, re.MULTILINE)


def test_length_and_requirements():
    script = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    assert script.count("\n") < 330
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in requirements)
    minor = int(re.search(r"Python 3\.(\d+) or later", README)[1])
    for name in re.findall(r"^[\w.-]+(?===)", "\n".join(requirements), re.MULTILINE):
        assert minor >= int(re.search(r">= ?3\.(\d+)", metadata(name)["Requires-Python"])[1]), name

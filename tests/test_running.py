"""Promise: a full disk ends the command in one line; a console that can't show the text doesn't
matter, and files and pipes get UTF-8."""
import io
import os
import subprocess
import sys

import pytest
from checkpoints import ROOT
from mistakes import the_line

import train_gpt2

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout(tiny):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "train_gpt2.py", "--model", tiny]
        process = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE,
                                 text=True)
    the_line(process.returncode, "", process.stderr, "No space left")


CONSOLES = {"ascii": b"> Gr??e, ?: ? caf?", "cp1252": b"> Gr\xfc\xdfe, \x80: ? caf?"}


@pytest.mark.parametrize("encoding", CONSOLES)
def test_consoles_files_and_pipes(tiny, monkeypatch, terminal, encoding):
    """A console shows ? for what it lacks. A prompt that isn't UTF-8 has a lone surrogate."""
    console, shown = terminal(encoding)
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    for stdout in (console, pipe):
        monkeypatch.setattr(sys, "stdout", stdout)
        train_gpt2.main(["--model", str(tiny), "--prompt", "Grüße, €: Ω caf\udce9"])
    assert shown().count(CONSOLES[encoding]) == 5
    assert pipe.buffer.getvalue().count("> Grüße, €: Ω caf?".encode()) == 5


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["closed", "notebook"])
def test_a_stdout_that_cannot_be_reconfigured(tiny, monkeypatch, capsys, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    train_gpt2.main(["--model", str(tiny), "--device", "cpu"])
    assert capsys.readouterr().err == "using device: cpu\n"
    assert stdout is None or stdout.getvalue().count("> Hello") == 5


def test_help_is_ascii(capsys):
    """It is printed before stdout is told to replace anything."""
    with pytest.raises(SystemExit):
        train_gpt2.main(["--help"])
    assert capsys.readouterr().out.isascii()

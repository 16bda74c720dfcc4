"""Promise: Ctrl-C, a reader that leaves and a full disk end the command cleanly; a console that
can't show the text doesn't matter, and files and pipes get UTF-8."""
import io
import os
import sys

import pytest
from mistakes import run, the_line

import train_gpt2

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_full_disk_behind_stdout(tiny):
    """One line says so."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, Linux's disk that is always full")
    with open("/dev/full", "w") as full:
        the_line(*run("--model", tiny, stdout=full), "No space left")


CONSOLES = {"ascii": b"> Gr??e, ?: ? ", "cp1252": b"> Gr\xfc\xdfe, \x80: ? "}


@pytest.mark.parametrize("encoding", CONSOLES)
def test_consoles_that_cannot_show_the_text(tiny, monkeypatch, terminal, encoding):
    """What their encoding lacks becomes ?. A file or a pipe gets UTF-8, whatever Python chose."""
    console, shown = terminal(encoding)
    pipe = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    prompt = "Grüße, €: Ω "
    for stdout in (console, pipe):
        monkeypatch.setattr(sys, "stdout", stdout)
        train_gpt2.main(["--model", str(tiny), "--device", "cpu", "--prompt", prompt])
    assert shown().count(CONSOLES[encoding]) == 5
    assert pipe.buffer.getvalue().count(f"> {prompt}".encode()) == 5


def test_help_on_a_console_of_ascii(monkeypatch):
    """--help is printed before stdout is told to replace anything."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main(["--help"])
    sys.stdout.flush()
    assert exit.value.code == 0
    assert b"--num-return-sequences" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("stdout", [None, io.StringIO()], ids=["closed", "StringIO"])
def test_a_stdout_that_cannot_be_reconfigured(tiny, monkeypatch, capsys, stdout):
    """It is None if it was closed by `>&-`, and a notebook's is of a class of its own."""
    monkeypatch.setattr(sys, "stdout", stdout)
    train_gpt2.main(["--model", str(tiny), "--device", "cpu"])
    assert capsys.readouterr().err == "using device: cpu\n"
    assert stdout is None or stdout.getvalue().count("> Hello") == 5


def test_a_prompt_that_is_not_utf8(tiny, capsys):
    """Such bytes reach argv as lone surrogates, which nothing can write; they become ?."""
    train_gpt2.main(["--model", str(tiny), "--prompt", "caf\udce9"])
    assert capsys.readouterr().out.count("> caf?") == 5

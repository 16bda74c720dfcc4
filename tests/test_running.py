"""Promise: Ctrl-C, a reader that leaves and a full disk end the command cleanly; a console that
can't show the text doesn't matter, and files and pipes get UTF-8."""
import io
import os
import signal
import sys
import time

import pytest
from checkpoints import write_checkpoint
from mistakes import finish, run, start, the_line

import train_gpt2

pytestmark = pytest.mark.usefixtures("one_thread")


def test_control_c(tmp_path):
    """It ends at once, with code 130 and without a traceback."""
    if os.name == "nt":
        pytest.skip("Windows has no signal that a parent could send as Ctrl-C does")
    write_checkpoint(tmp_path, n_layer=12, n_positions=5000, eos_token_id=None)
    # A shell that runs the tests in the background ignores SIGINT, and so would what they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("--model", tmp_path, "--max-length", 5000, "--num-return-sequences", 1)
    signal.signal(signal.SIGINT, before)
    assert process.stderr.readline().startswith(b"using device")  # the imports are done
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    code, out, err = finish(process)
    assert time.perf_counter() - began < 5  # on a busy machine too
    assert (code, out, err.strip()) == (130, "", "")


def test_a_reader_that_leaves(tiny):
    """| head -1, with more to say than the pipe holds."""
    process = start("--model", tiny, "--num-return-sequences", 2000)
    assert process.stdout.readline().startswith(b"> Hello")
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0
    assert [line for line in err.splitlines() if not line.startswith("using device")] == []


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

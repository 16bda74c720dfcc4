"""Promise: what happens while it runs, Ctrl-C, a closed pipe, a full disk, a console that cannot show
the text, ends it cleanly or does not matter."""
import io
import json
import os
import shutil
import signal
import sys
import time

import pytest
from checkpoints import random_gpt2, save
from mistakes import SIZES, change_config, finish, refused, start, the_line

import train_gpt2


def test_control_c(tiny, tmp_path):
    if os.name == "nt":
        pytest.skip("Windows has no signal that a parent could send here as Ctrl-C does")
    endless = {"n_layer": 12, "n_head": 2, "n_embd": 32, "n_positions": 5000}
    vocab_size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    save(random_gpt2(vocab_size=vocab_size, **endless), tmp_path)  # no end-of-text token, and a long context
    change_config(tmp_path, eos_token_id=None)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(tiny / name, tmp_path)
    # A shell that runs the tests in the background has SIGINT ignored, in what they start too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("--model", tmp_path, "--max-length", 5000, "--num-return-sequences", 1)
    signal.signal(signal.SIGINT, before)
    assert process.stderr.readline().startswith(b"using device")  # the imports are done
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    code, out, err = finish(process)
    assert time.perf_counter() - began < 5  # at once, on a machine that does other things too
    assert code == 130 and out == "" and err.strip() == ""


def test_reader_that_leaves(tiny):
    """| head -1, with more to say than the pipe holds; and a reader that never reads at all."""
    head = start("--model", tiny, "--num-return-sequences", 2000)
    never = start("--model", tiny)
    never.stdout.close()
    assert head.stdout.readline().startswith(b"> Hello")
    head.stdout.close()
    for process in (head, never):
        assert [line for line in process.stderr.read().splitlines() if not line.startswith(b"using device")] == []
        assert process.wait(timeout=60) == 0


def test_full_disk_behind_stdout(tiny):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, the disk of Linux that is always full")
    with open("/dev/full", "w") as full:
        process = start("--model", tiny, stdout=full)
        the_line(*finish(process), "No space left")


def test_encodings_that_cannot_show_the_text(tiny):
    prompts = {"ascii": (b"> Gr??e, ?: ? ", "Grüße, €: Ω "), "cp1252": (b"> Gr\xfc\xdfe, \x80: ? ", "Grüße, €: Ω ")}
    running = {encoding: start("--model", tiny, "--prompt", prompt, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
               for encoding, (_, prompt) in prompts.items()}
    for encoding, process in running.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.count(prompts[encoding][0]) == 5 and b"Error" not in err


def test_help_on_a_terminal_that_knows_ascii_only(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main(["--help"])
    sys.stdout.flush()
    assert exit.value.code == 0 and b"--num-return-sequences" in sys.stdout.buffer.getvalue()


def test_closed_stdout(tiny, monkeypatch, capsys):
    """`>&-`: Python then has None for it."""
    monkeypatch.setattr(sys, "stdout", None)
    train_gpt2.main(["--model", str(tiny)])
    assert "Error" not in capsys.readouterr().err


def test_prompt_that_is_no_unicode(tiny, capsys):
    """Bytes that are no UTF-8 reach Python's argv as lone surrogates, which neither UTF-8 nor a tokenizer can write."""
    train_gpt2.main(["--model", str(tiny), "--prompt", "caf\udce9"])
    assert capsys.readouterr().out.count("> caf?") == 5


def test_vocabulary_larger_than_the_tokenizers(tmp_path, tiny, capsys):
    """Some models pad their vocabulary to a multiple of 64. What is in the padding has no text."""
    save(random_gpt2(vocab_size=2000, **SIZES), tmp_path)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(tiny / name, tmp_path)
    train_gpt2.main(["--model", str(tmp_path), "--temperature", "100", "--top-k", "0"])
    assert capsys.readouterr().out.count("> Hello, I'm a language model,") == 5


@pytest.mark.parametrize("temperature", ["1e-45", "5e-324"])
def test_temperature_so_small_that_the_logits_overflow(tiny, capsys, temperature):
    refused(capsys, ["--model", tiny, "--temperature", temperature], "temperature", temperature)

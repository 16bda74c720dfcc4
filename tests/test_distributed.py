"""Promise: the README's training program runs as it stands, alone and on two machines, goes on
exactly where it was interrupted, and saves nothing bad; its program for fully_shard trains the same
model, split over two processes."""
import io
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout

import pytest
import torch
from checkpoints import ROOT, TORCH, block, expected, peer, words, write_checkpoint
from safetensors.torch import load_file

PROGRAM, SHARDED = block("python", "DistributedDataParallel"), block("python", "fully_shard")
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROMPT = "Hello, I'm a language model,"
# Else a thread of gloo, which frees a tensor while Python is shutting down, can abort a script of
# two processes: in 1 of 20 runs on a busy machine.
LEAVE = "\nsys.stdout.flush(); os._exit(0)\n"

pytestmark = pytest.mark.usefixtures("one_thread")
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, which connects processes without a GPU")


def train(folder, *changes, arguments=(), program=PROGRAM):
    """Run a program in the folder, with changes: what it prints, or why it stops."""
    for old, new in changes:
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    (folder / "program.py").write_text(program, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["program.py", *arguments])
        try:
            runpy.run_path("program.py", run_name="__main__")
        except SystemExit as exit:
            return str(exit)
    return stdout.getvalue()


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """In float16, as some are, in a folder with the text that the programs name."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "gpt2").mkdir()
    return write_checkpoint(folder / "gpt2", dtype=torch.float16, n_embd=64, n_positions=256)


@pytest.fixture
def place(tmp_path, gpt2):
    return shutil.copytree(gpt2.parent, tmp_path / "place")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, gpt2):
    """What the program prints if nothing interrupts it, and the folder of its model."""
    torch.set_num_threads(1)
    folder = shutil.copytree(gpt2.parent, tmp_path_factory.mktemp("alone") / "place")
    return train(folder), folder / "mine"


def tensors(folder):
    return load_file(folder / "model.safetensors")


def apart(one, two):
    """How far the weights of two models are apart, as a whole."""
    one, two = tensors(one), tensors(two)
    return sum((one[name] - two[name]).square().sum() for name in one).sqrt()


def test_it_trains_and_saves_the_best_step(alone, gpt2, capsys):
    """In float32, since float16 would train to NaN. The held-out loss is that of what is saved."""
    out, mine = alone
    losses = [float(loss) for loss in re.findall(r"loss (\S+)\n", out)]
    held = re.findall(r"held out: (\S+) nats a token, (\S+) bits", out)
    assert len(losses) == 50 and losses[-1] < losses[0]
    assert out.count(f"> {PROMPT}") == len(held) == 2
    before, after = tensors(gpt2), tensors(mine)
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name].float()), name
    theirs = peer(mine)
    assert words(capsys, mine, PROMPT) == expected(theirs, PROMPT)
    text = README[round(len(README) * 0.9):]
    ids = torch.tensor(theirs.tokenizer(text)["input_ids"])
    rows = [ids[None, i:i + 129] for i in range(0, len(ids) - 1, 128)]
    with torch.no_grad():
        nats = sum(theirs.model(row, labels=row).loss * (row.shape[1] - 1) for row in rows).item()
    nats /= len(ids) - 1
    best = min(held, key=lambda pair: float(pair[0]))
    bits = nats * len(ids) / len(text) / math.log(2)
    assert best == (f"{nats:.4f}", f"{bits:.4f}")


def test_interrupted_and_resumed(alone, place):
    """The losses and weights are exactly those of the run that nothing interrupted. With other
    settings, it goes on with those; after the last step, it says so. It overwrites nothing."""
    assert train(place, arguments=["resume"]).startswith("there is no mine.pt to resume from")
    step = "        optimizer.step()\n"
    with pytest.raises(ZeroDivisionError):
        train(place, (step, f"{step}        1 / (step - 31)\n"))
    assert train(place).startswith("mine or mine.pt exists: go on with `resume`")
    whole, mine = alone
    assert train(place, arguments=["resume"]) == whole[whole.index("step 26:"):]
    assert apart(mine, place / "mine") == 0
    assert "had 50 steps already: to train on, raise `steps`" in train(place, arguments=["resume"])
    before = torch.load(place / "mine.pt", weights_only=True)
    train(place, ("128, 50", "128, 51"), ("3e-5, 10, 0.1", "0.0, 10, 0.1"), arguments=["resume"])
    after = torch.load(place / "mine.pt", weights_only=True)
    assert after["step"] == 51
    assert all(torch.equal(after["model"][name], p) for name, p in before["model"].items())


@pytest.mark.parametrize(("old", "new", "message"), [
    ('int(os.environ.get("WORLD_SIZE", 1))', "3", "3 processes can't share B = 8 rows"),
    ("3e-5", "3e30", "stopped at step 2: the loss is nan"),
    ('"README.md"', '"none.txt"', "none.txt can't be read, or isn't UTF-8"),
    ('"README.md"', '"latin.txt"', "latin.txt can't be read, or isn't UTF-8"),
    ('"README.md"', '"short.txt"', "short.txt is too short")])
def test_it_stops_and_saves_nothing(place, old, new, message):
    (place / "latin.txt").write_bytes("é".encode("latin-1") * 999)
    (place / "short.txt").write_text("To be, or not")
    assert train(place, (old, new)).startswith(message)
    assert not (place / "mine").exists() and not (place / "mine.pt").exists()


@needs_gloo
def test_two_machines_make_the_same_model(alone, place, gpt2):
    """To within rounding: they sum the gradients in another order. Where a gradient is next to
    nothing, AdamW, which divides by its size, blows that up. So models are compared as a whole."""
    (place / "program.py").write_text(PROGRAM + LEAVE, encoding="utf-8")
    nodes = [start(place, "-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", rank,
                   "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", port,
                   "program.py") for port in [free_port()] for rank in (0, 1)]
    first, second = map(finish, nodes)
    assert first.count("step 50: loss") == 1 and second == ""
    assert apart(alone[1], place / "mine") < 0.001 * apart(alone[1], gpt2)


@needs_gloo
@pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard came with torch 2.6")
def test_fully_shard(place, gpt2, monkeypatch, capsys):
    """Two processes save all of the model that one makes without it, to within rounding."""
    (place / "fsdp.py").write_text("import sys\n" + SHARDED + LEAVE, encoding="utf-8")
    env = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    first, second = map(finish, [
        start(place, "fsdp.py", RANK=rank, LOCAL_RANK=rank, **env) for rank in (0, 1)])
    assert first.count("step 20: loss") == first.count(f"> {PROMPT}") == 1 and second == ""
    assert words(capsys, place / "mine", PROMPT) == expected(peer(place / "mine"), PROMPT)
    (place / "mine").rename(place / "sharded")
    for name, value in {"init_process_group": None, "get_rank": 0, "get_world_size": 1,
                        "fsdp.fully_shard": None, "barrier": None,
                        "destroy_process_group": None}.items():
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *args, value=value: value)
    monkeypatch.setenv("LOCAL_RANK", "0")
    train(place, program=SHARDED)
    assert apart(place / "mine", place / "sharded") < 0.01 * apart(place / "mine", gpt2)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder, *arguments, **env):
    env |= {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=folder, encoding="utf-8",
                            env=os.environ | {name: str(value) for name, value in env.items()},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-5000:]
    return out

"""Promise: the README's training program runs as it stands, alone and on several processes; and the
model goes into DistributedDataParallel and fully_shard as it is."""
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    ROOT,
    TORCH,
    pair,
    random_gpt2,
    random_idx,
    save,
    save_tokenizer,
    train_bpe,
)
from hub import StandInHub
from safetensors.torch import load_file
from test_words import expected, peer, words

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "backward" in block)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 256}
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="this torch has no gloo, by which processes without a GPU talk")


def run(arguments, folder, **env):
    """Python in the folder, with train_gpt2.py at hand, each process on one thread."""
    with socket.socket() as free:  # a port of our own: the usual one may be somebody's
        free.bind(("127.0.0.1", 0))
        env["PET_MASTER_PORT"] = str(free.getsockname()[1])  # as torchrun's --master-port
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | env
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=env, check=False,
                             capture_output=True, encoding="utf-8", errors="replace", timeout=200)
    assert process.returncode == 0, process.stderr[-5000:]
    return process


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders: gpt2 as the program found it, and what it made of it, alone and as two processes."""
    folder = tmp_path_factory.mktemp("trained")
    gpt2 = folder / "gpt2"
    gpt2.mkdir()
    size = save_tokenizer(gpt2, train_bpe())
    save(random_gpt2(vocab_size=size, bos_token_id=0, eos_token_id=0, **SIZES), gpt2, "hub")
    with StandInHub({"gpt2": gpt2}) as hub:
        for name, start in [("one", []), ("two", TWO)]:
            (folder / name).mkdir()
            (folder / name / "finetune.py").write_text(PROGRAM, encoding="utf-8")
            (folder / name / "README.md").write_text(README, encoding="utf-8")
            process = run([*start, "finetune.py"], folder / name, **hub.env(folder / "cache"))
            losses = re.findall(r"loss=(\S+?)[,\]]", process.stderr)
            assert float(losses[-1]) < float(losses[0])
            assert "warn" not in process.stderr.lower().replace("warnings.warn", "")
    return folder


def tensors(folder):
    return {name.removeprefix("transformer."): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()}


def test_the_program_is_short():
    assert len(PROGRAM.splitlines()) < 40


def test_the_program_trains_and_saves(trained, capsys):
    folder = trained / "one" / "mine"
    before, after = tensors(trained / "gpt2"), tensors(folder)
    assert not any(torch.equal(after[name], before[name]) for name in after)
    said = words(capsys, folder, "Hello, I'm a language model,")
    assert said.count("> Hello, I'm a language model,") == 5
    assert said == expected(peer(folder), "Hello, I'm a language model,")


@needs_gloo
def test_two_processes_make_the_same_model(trained, capsys):
    """The sums of their gradients are rounded otherwise than those of one. AdamW divides by their
    size, so that where a gradient is next to nothing even that shows: as a whole, it must not."""
    before, one, two = (tensors(trained / path) for path in ("gpt2", "one/mine", "two/mine"))
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert moved > 0.1
    assert apart < 0.01 * moved
    assert words(capsys, trained / "two" / "mine", "Hello").count("> Hello") == 5


# What the steps of two processes do: one script for all, since to start torch takes the time

STEPS = """
import sys, torch, warnings
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from train_gpt2 import GPT

def train(model, rows_of):
    # eps: where a gradient is next to nothing, as of a key's bias, AdamW would blow its rounding up
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for step in range(3):
        idx = torch.randint(400, (4, 33), generator=torch.Generator().manual_seed(step))[rows_of]
        loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

dist.init_process_group("gloo")
mine = slice(dist.get_rank(), None, 2)
whole = GPT.from_pretrained(sys.argv[1]).train()
train(whole, slice(None))
expected = dict(whole.named_parameters())

gpt = GPT.from_pretrained(sys.argv[1]).train()
with warnings.catch_warnings():
    warnings.simplefilter("error")
    train(DistributedDataParallel(gpt), mine)
for name, p in gpt.named_parameters():
    both = [torch.empty_like(p) for _ in range(2)]
    dist.all_gather(both, p.detach())
    assert torch.equal(*both), name
    assert (p - expected[name]).abs().max() < 1e-5, name
if dist.get_rank() == 0:
    gpt.save_pretrained("mine")
    print("data parallel", flush=True)

try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    sys.exit(dist.destroy_process_group())
gpt = GPT.from_pretrained(sys.argv[1]).train()
mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
for block in gpt.transformer.h:
    fully_shard(block, mesh=mesh)
fully_shard(gpt, mesh=mesh)
held = sum(p.to_local().numel() for p in gpt.parameters())
assert held < 0.6 * sum(p.numel() for p in whole.parameters()), "each process holds about half"
train(gpt, mine)
for name, p in gpt.named_parameters():
    assert (p.full_tensor() - expected[name]).abs().max() < 1e-5, name
# The README's way to save it.
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
weights = get_model_state_dict(gpt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    new = GPT.from_pretrained(sys.argv[1])
    new.load_state_dict(weights)
    new.save_pretrained("sharded")
    for name, p in new.named_parameters():
        assert (p - expected[name]).abs().max() < 1e-5, name
    print("fully sharded", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    size = save_tokenizer(folder, train_bpe())
    save(random_gpt2(vocab_size=size, bos_token_id=0, eos_token_id=0, **SIZES), folder)
    (folder / "steps.py").write_text(STEPS)
    return folder, run([*TWO, "steps.py", folder], folder)


@needs_gloo
def test_data_parallel(steps):
    """Both processes hold the same, that of one process to within rounding; and nothing warns, as it
    would of strides if a gradient lay otherwise than its weight."""
    folder, process = steps
    assert "data parallel" in process.stdout
    assert "stride" not in process.stderr.lower()
    ours, theirs = pair(folder / "mine")
    idx = random_idx(ours, 2, 9)
    assert torch.equal(ours(idx), theirs(idx).logits)


@needs_gloo
def test_fully_sharded(steps):
    if TORCH < (2, 6):
        pytest.skip("fully_shard came with torch 2.6")
    assert "fully sharded" in steps[1].stdout

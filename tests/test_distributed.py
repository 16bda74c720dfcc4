"""Promise: the README's training program runs as it stands, alone and in two processes, and the
model works with DistributedDataParallel and fully_shard as it is."""
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT, TORCH, expected, peer, words, write_checkpoint
from hub import StandInHub
from safetensors.torch import load_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
               if "backward" in block)
SIZES = {"n_embd": 64, "n_positions": 256}
TWO = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo, which connects processes without a GPU")


def run(arguments, folder, **env):
    """Python in the folder, with train_gpt2.py on its path, each process on one thread."""
    with socket.socket() as free:  # a free port: the default one may be in use
        free.bind(("127.0.0.1", 0))
        env["PET_MASTER_PORT"] = str(free.getsockname()[1])  # like torchrun's --master-port
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=os.environ | env, check=False,
        capture_output=True, encoding="utf-8", errors="replace", timeout=200)
    assert process.returncode == 0, process.stderr[-5000:]
    return process


def tensors(folder):
    return {name.removeprefix("transformer."): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with gpt2 as the program found it, and mine as it left it in one/ and in two/."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("gpt2", "one", "two"):
        (folder / name).mkdir()
    gpt2 = write_checkpoint(folder / "gpt2", layout="hub", **SIZES)
    for name, start in [("one", []), ("two", TWO)]:
        (folder / name / "finetune.py").write_text(PROGRAM, encoding="utf-8")
        (folder / name / "README.md").write_text(README, encoding="utf-8")
        with StandInHub({"gpt2": gpt2}) as hub:
            process = run([*start, "finetune.py"], folder / name, **hub.env(folder / name / "hub"))
        losses = [float(loss) for loss in re.findall(r"loss=(\S+?)[,\]]", process.stderr)]
        assert losses[-1] < losses[0]
        assert "warn" not in process.stderr.lower().replace("warnings.warn", "")
    return folder


def test_the_program_trains_and_saves(trained, capsys):
    folder = trained / "one" / "mine"
    before, after = tensors(trained / "gpt2"), tensors(folder)
    assert after.keys() == {name for name in before if not name.endswith(".attn.bias")}  # masks
    assert not any(torch.equal(after[name], before[name]) for name in after)
    said = words(capsys, folder, "Hello, I'm a language model,")
    assert said.count("> Hello, I'm a language model,") == 5
    assert said == expected(peer(folder), "Hello, I'm a language model,")


def test_two_processes_make_the_same_model(trained, capsys):
    """To within rounding: they sum the gradients in another order. Where a gradient is next to
    nothing, AdamW, which divides by its size, blows that up. So models are compared as a whole."""
    before, one, two = (tensors(trained / path) for path in ("gpt2", "one/mine", "two/mine"))
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert moved > 0.1
    assert apart < 0.01 * moved
    assert words(capsys, trained / "two" / "mine", "Hello").count("> Hello") == 5


# All that two processes do in one script, since starting torch takes the time

STEPS = """
import sys, torch, warnings
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from train_gpt2 import GPT

def train(model, rows_of):
    # eps: where a gradient is next to nothing, AdamW would blow its rounding up
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
# The README's way to save it
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights = get_model_state_dict(gpt, options=options)
if dist.get_rank() == 0:
    new = GPT.from_pretrained(sys.argv[1])
    new.load_state_dict(weights)
    new.save_pretrained("sharded")
    for name, p in GPT.from_pretrained("sharded").named_parameters():
        assert (p - expected[name]).abs().max() < 1e-5, name
    print("fully sharded", flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("steps"), **SIZES)
    (folder / "steps.py").write_text(STEPS)
    return run([*TWO, "steps.py", folder], folder)


def test_data_parallel(steps):
    """Both processes hold the same model, that of one process to within rounding. Nothing warns, as
    it would if the strides of a gradient and its weight differed."""
    assert steps.stdout.count("data parallel") == 2
    assert "stride" not in steps.stderr.lower()


@pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard came with torch 2.6")
def test_fully_sharded(steps):
    assert "fully sharded" in steps.stdout

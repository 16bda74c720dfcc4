"""Promise: the README's training program runs as it stands, alone and in two processes, resumes
exactly, and saves nothing bad. The model works with DistributedDataParallel and fully_shard."""
import os
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import ROOT, TORCH, expected, peer, words, write_checkpoint
from safetensors.torch import load_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAM = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
               if "backward" in block)
SIZES = {"n_embd": 64, "n_positions": 256}
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# A log that can't hold every character, as on Windows
NARROW = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo, which connects processes without a GPU")


def run(arguments, folder, status=0, kill=None, **env):
    """What Python prints to stdout and stderr in the folder, until it prints the text `kill`."""
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
            [sys.executable, "-u", *map(str, arguments)], cwd=folder, env=os.environ | env,
            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if kill:
            next(line for line in process.stdout if kill in line)
            process.kill()
        out, err = process.communicate(timeout=200)
    assert kill or process.returncode == status, err[-5000:]
    return out, err


def tensors(folder):
    return {name.removeprefix("transformer."): tensor.float()
            for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The program, its text, and gpt2 in float16; printed.txt and one/ are from a run alone."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "finetune.py").write_text(PROGRAM, encoding="utf-8")
    (folder / "README.md").write_text(README, encoding="utf-8")
    (folder / "gpt2").mkdir()
    write_checkpoint(folder / "gpt2", layout="hub", dtype=torch.float16, **SIZES)
    out, _ = run(["finetune.py"], folder)
    (folder / "printed.txt").write_text(out, encoding="utf-8")
    (folder / "mine").rename(folder / "one")
    return folder


def test_it_trains_and_saves(folder, capsys):
    """In float32, since float16 would train to NaN."""
    out = (folder / "printed.txt").read_text(encoding="utf-8")
    first, *_, last = re.findall(r"loss (\S+)\n", out)
    assert float(last) < float(first)
    assert out.count("> Hello, I'm a language model,") == 2
    before, after = tensors(folder / "gpt2"), tensors(folder / "one")
    assert after.keys() == {name for name in before if not name.endswith(".attn.bias")}  # masks
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(torch.equal(after[name], before[name]) for name in after)
    said = words(capsys, folder / "one", "Hello, I'm a language model,")
    assert said == expected(peer(folder / "one"), "Hello, I'm a language model,")


def test_two_processes_make_the_same_model(folder):
    """To within rounding: they sum the gradients in another order. Where a gradient is next to
    nothing, AdamW, which divides by its size, blows that up. So models are compared as a whole."""
    (folder / "two.py").write_text(PROGRAM + LEAVE, encoding="utf-8")
    out, err = run([*TWO, "two.py"], folder)
    assert out.count("step 50: loss") == 1
    assert "warn" not in err.lower().replace("warnings.warn", "")
    one, two = tensors(folder / "one"), tensors(folder / "mine")
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert apart < 0.001  # training moves the weights by 0.37, measured in the same way


def test_killed_and_resumed(folder):
    """The losses and weights are exactly those of the run that nothing interrupted. The killed one
    also prints a sample that its log can't hold."""
    sample = "Hello, I'm a language model,"
    assert PROGRAM.count(sample) == 1
    run(["-c", PROGRAM.replace(sample, "é")], folder, kill="step 26:", **NARROW)
    out, _ = run(["finetune.py", "resume"], folder)
    whole = (folder / "printed.txt").read_text(encoding="utf-8")
    assert out == whole[whole.index("step 26:"):]
    one, again = tensors(folder / "one"), tensors(folder / "mine")
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.parametrize(("lr", "env", "message"), [
    ("3e-5", {"RANK": "1", "WORLD_SIZE": "3"}, "3 processes can't share B = 8 rows equally"),
    ("3e30", {}, "stopped at step 2: the loss is nan"),
], ids=["rows", "NaN"])
def test_it_stops_and_saves_nothing(folder, lr, env, message):
    (folder / "mine.pt").unlink(missing_ok=True)
    _, err = run(["-c", PROGRAM.replace("3e-5", lr)], folder, 1, **env)
    assert re.fullmatch(message + ".*\n", err)
    assert not (folder / "mine.pt").exists()


# How a script of two processes ends. Otherwise, a thread of gloo can abort it: the thread
# frees a tensor while Python is shutting down. That happened in 1 of 20 runs on a busy machine.
LEAVE = "sys.stdout.flush(); os._exit(0)\n"

# All in one script, since starting torch takes the time
STEPS = """
import os, sys, torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from train_gpt2 import GPT

def train(wrap, rows):
    gpt = GPT.from_pretrained(sys.argv[1]).train()
    model = wrap(gpt)
    # eps: where a gradient is next to nothing, AdamW would blow its rounding up
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for step in range(3):
        idx = torch.randint(400, (4, 33), generator=torch.Generator().manual_seed(step))[rows]
        loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return gpt
def flat(gpt):
    return torch.cat([p.detach().flatten() for p in gpt.parameters()])

def leave():
    LEAVE
dist.init_process_group("gloo")
mine = slice(dist.get_rank(), None, 2)
expected = flat(train(lambda gpt: gpt, slice(None)))
weights = flat(train(DistributedDataParallel, mine))
both = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(both, weights)
assert torch.equal(*both)
assert (weights - expected).abs().max() < 1e-5
print("data parallel", flush=True)
try:
    from torch.distributed.fsdp import fully_shard
except ImportError:
    leave()
def shard(gpt):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in gpt.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(gpt, mesh=mesh)
    held = sum(p.to_local().numel() for p in gpt.parameters())
    assert held < 0.6 * len(expected), "each process holds about half"
    return gpt

gpt = train(shard, mine)
# The README's way to save it
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights = get_model_state_dict(gpt, options=options)
if dist.get_rank() == 0:
    new = GPT.from_pretrained(sys.argv[1])
    new.load_state_dict(weights)
    new.save_pretrained("sharded")
    assert (flat(GPT.from_pretrained("sharded")) - expected).abs().max() < 1e-5
    print("fully sharded", flush=True)
leave()
""".replace("LEAVE\n", LEAVE)


def test_data_parallel_and_fully_sharded(tmp_path):
    """Both processes hold the same model, that of one process to within rounding."""
    (tmp_path / "steps.py").write_text(STEPS)
    out, err = run([*TWO, "steps.py", write_checkpoint(tmp_path, **SIZES)], tmp_path)
    assert out.count("data parallel") == 2
    assert "stride" not in err.lower()  # torch warns if those of a gradient and its weight differ
    assert "fully sharded" in out or TORCH < (2, 6)  # which has no fully_shard

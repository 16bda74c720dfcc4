"""Promise: a model starts and trains as transformers' does: the loss, every gradient and every
weight after each step are the same to the last bit. And it works with what people train with:
torch.compile, autocast, hooks, copies."""
import copy
import shutil
import sys

import checkpoints
import pytest
import torch
from checkpoints import TORCH, loss_of, pair, random_gpt2, random_idx, save
from transformers import GPT2Config, GPT2LMHeadModel

from train_gpt2 import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 50, "vocab_size": 211}


@pytest.mark.parametrize("tied", [True, False])
def test_the_starting_weights(tied):
    """Random numbers of the same spread as transformers', for each parameter."""
    size = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 999}
    size["tie_word_embeddings"] = tied
    model, theirs = GPT(GPTConfig(**size)), GPT2LMHeadModel(GPT2Config(**size))
    expected = dict(theirs.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, expected[name]), name
        else:  # to within a few standard errors
            std, n = expected[name].std(), p.numel()
            assert abs(p.mean()) < 6 * std / n**0.5, name
            assert abs(p.std() / std - 1) < 9 / (2 * n)**0.5, name
            assert not torch.equal(p[0], p[1]), name
    same = torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    assert same == (model.lm_head.weight is model.transformer.wte.weight) == tied


# The steps

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hs", [16, 9])
def test_loss_and_every_gradient(tmp_path, hs, dtype, device):
    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 4 * hs}), tmp_path), dtype, device)
    for B, T in [(1, 2), (4, 33), (3, 50)]:
        checkpoints.assert_equal_gradients(ours, theirs, random_idx(ours, B, T))


@pytest.mark.parametrize(("dtype", "how"), [
    (torch.float32, {}), (torch.float32, {"fused": True}), (torch.bfloat16, {"foreach": True})],
    ids=str)
def test_every_weight_after_each_step(tmp_path, dtype, how, device):
    """The weights stay tied, and the file that was mapped stays as it is."""
    if "fused" in how and device == "cpu" and TORCH < (2, 4):
        pytest.skip("the fused AdamW came to the CPU with torch 2.4")
    file = save(random_gpt2(**SIZES).to(dtype), tmp_path) / "model.safetensors"
    before = file.read_bytes()
    ours, theirs = pair(tmp_path, device=device)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3, **how) for model in (ours, theirs)]
    parameters, idx = dict(ours.named_parameters()), random_idx(ours, 4, 33)
    for step in range(5):
        for model, optimizer in zip((ours.train(), theirs), optimizers):
            optimizer.zero_grad()
            loss_of(model, idx).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for name, p in theirs.named_parameters():
            assert torch.equal(parameters[name], p), f"{name}, step {step}"
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert file.read_bytes() == before


# What people train with

@pytest.fixture
def model(tmp_path, device):
    return GPT.from_pretrained(save(random_gpt2(**SIZES), tmp_path)).to(device)


def assert_near(ours, expected):
    """A compiler fuses operations, which then round at other points: within a few roundings."""
    error = (ours - expected).abs().max() / expected.abs().max()
    assert error < 50 * torch.finfo(torch.float32).eps, error


needs_dynamo = pytest.mark.skipif(
    TORCH < (2, 4) and sys.version_info >= (3, 12),
    reason="this torch's compile runs on Python 3.11 at most")


@needs_dynamo
def test_compile_in_one_graph(model):
    if not any(map(shutil.which, ["c++", "g++", "clang++", "cl"])):
        pytest.skip("there is no C++ compiler here, which torch.compile needs on a CPU")
    del model.transformer.h[1:]  # one block is compiled in a third of the time of three
    idx = random_idx(model, 2, 16)
    with torch.no_grad():
        assert_near(torch.compile(model, fullgraph=True)(idx), model(idx))


@needs_dynamo
def test_compile_for_training(model):
    """All of the compiler but its last part, machine code, which takes the time. From the second
    length on, it compiles for any length: T is a symbol then."""
    torch._dynamo.reset()
    del model.transformer.h[1:]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = list(model.parameters())
    for T in [16, 16, 9, 50, 1, 2]:
        idx = random_idx(model, 2, T + 1)
        gradients = [torch.autograd.grad(loss_of(each, idx), parameters)
                     for each in (compiled, model)]
        for ours, expected in zip(*gradients):
            assert_near(ours, expected)


def test_autocast(tmp_path, device):
    """As transformers under the same autocast, to the last bit; the weights stay float32."""
    ours, theirs = pair(save(random_gpt2(**SIZES), tmp_path), device=device)
    idx = random_idx(ours, 4, 33)
    assert ours(idx).dtype == torch.float32
    with torch.autocast(idx.device.type, dtype=torch.bfloat16):
        checkpoints.assert_equal_gradients(ours, theirs, idx)
        assert ours(idx).dtype == torch.bfloat16
        assert torch.equal(ours(idx), theirs(idx).logits)
        assert ours.generate(idx, 40).shape == (4, 40)


def test_copies_and_hooks(model):
    seen, idx = [], random_idx(model, 2, 9)
    twin = copy.deepcopy(model)
    for block in twin.transformer.h:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert torch.equal(twin(idx), model(idx))
    assert seen == [(2, 9, 64)] * 3
    assert twin.lm_head.weight is twin.transformer.wte.weight is not model.transformer.wte.weight


@pytest.mark.filterwarnings("error")
def test_no_warnings(tmp_path):
    model = GPT.from_pretrained(save(random_gpt2(**SIZES), tmp_path)).train()
    loss_of(model, random_idx(model, 2, 9)).backward()
    model.generate(random_idx(model, 2, 9), 20)
    model.save_pretrained(tmp_path / "mine")

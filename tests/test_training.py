"""Training a loaded model: loss and gradients are those of transformers, and the file on disk stays as it is."""
import hashlib

import pytest
import torch
from checkpoints import random_gpt2, save
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from train_gpt2 import GPT, GPTConfig

SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 50, "vocab_size": 211}


def loss_of(model, idx):
    return F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())


def as_theirs(name, tensor):
    """nn.Linear has (out, in), Hugging Face's Conv1D (in, out)."""
    conv1d = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
    return tensor.t() if conv1d else tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hs", [16, 7])
def test_loss_and_every_gradient(tmp_path, layout, hs, dtype, device):
    folder = save(random_gpt2(**SIZES | {"n_embd": 4 * hs}), tmp_path, layout)
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device, dtype)
    ours = GPT.from_pretrained(folder).to(device, dtype)
    for B, T in [(1, 2), (4, 33), (3, 50)]:
        idx = torch.randint(211, (B, T), device=device)
        ours.zero_grad()
        theirs.zero_grad()
        loss = loss_of(ours, idx)
        loss.backward()
        expected = F.cross_entropy(theirs(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())
        expected.backward()
        assert torch.equal(loss, expected)
        parameters = dict(ours.named_parameters())
        assert parameters.keys() == dict(theirs.named_parameters()).keys()
        for name, p in theirs.named_parameters():
            assert torch.equal(as_theirs(name, parameters[name].grad), p.grad), name


def test_transformers_own_loss(tmp_path):
    folder = save(random_gpt2(**SIZES), tmp_path)
    idx = torch.randint(211, (4, 50))
    expected = GPT2LMHeadModel.from_pretrained(folder)(idx, labels=idx).loss
    targets = F.pad(idx[:, 1:], (0, 1), value=-100)  # transformers keeps the last position, without a target
    assert torch.equal(F.cross_entropy(GPT.from_pretrained(folder)(idx).flatten(0, 1), targets.flatten()), expected)


def test_training_learns_and_leaves_the_file_alone(tmp_path):
    file = save(random_gpt2(**SIZES), tmp_path) / "model.safetensors"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    model = GPT.from_pretrained(tmp_path).train()
    idx = torch.randint(211, (4, 33))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model, idx)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert model.lm_head.weight is model.transformer.wte.weight
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before


def test_a_fresh_model_learns_too():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(50, (2, 20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first = loss_of(model, idx).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = loss_of(model, idx)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2


def test_one_tensor_through_every_conversion(tmp_path, layout, device):
    model = GPT.from_pretrained(save(random_gpt2(**SIZES), tmp_path, layout))
    for converted in (model, model.to(torch.bfloat16), model.to(device), model.float()):
        assert converted.lm_head.weight is converted.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())

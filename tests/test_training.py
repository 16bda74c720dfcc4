"""Promise: a model starts and trains as transformers' does: the loss, every gradient and every
weight after each step are the same to the last bit. And it works with what people train with:
torch.compile, autocast, hooks, copies. It keeps less than two thirds as much memory."""
import copy
import io

import checkpoints
import pytest
import torch
from checkpoints import TORCH, loss_of, pair, random_gpt2, random_idx, save
from transformers import GPT2Config, GPT2LMHeadModel

from train_gpt2 import GPT, GPTConfig, LeanGELU, gelu_new

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 50, "vocab_size": 211}


@pytest.mark.parametrize("tied", [True, False])
def test_the_starting_weights(tied):
    """Random numbers of the same spread as transformers', for each parameter."""
    size = {"n_layer": 4, "n_head": 4, "n_embd": 96, "vocab_size": 999, "tie_word_embeddings": tied}
    model, theirs = GPT(GPTConfig(**size)), GPT2LMHeadModel(GPT2Config(**size))
    expected = dict(theirs.named_parameters())
    assert [name for name, _ in model.named_parameters()] == [*expected]
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, expected[name]), name
        else:  # to within a few standard errors
            std, n = expected[name].std(), p.numel()
            assert abs(p.mean()) < 6 * std / n**0.5, name
            assert abs(p.std() / std - 1) < 9 / (2 * n)**0.5, name
            assert not torch.equal(p[0], p[1]), name
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight) == tied


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


# Memory

def floats_kept(model, idx):
    """How many floats the forward pass keeps for the backward pass, besides the parameters."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes() / 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(idx)  # while it's there, nobody else gets the memory of these tensors
    for p in model.parameters():
        sizes.pop(p.data_ptr(), None)
    del out
    return sum(sizes.values())


def test_what_a_block_keeps_for_the_backward_pass():
    """At most 18 floats for each of B T C, and a little for statistics of each token."""
    idx, kept = torch.zeros(2, 32, dtype=torch.int64), []
    for make in (lambda **sizes: GPT(GPTConfig(**sizes)), random_gpt2):
        one, two = (floats_kept(make(n_layer=n, n_head=4, n_embd=128, vocab_size=9), idx)
                    for n in (1, 2))
        kept.append((two - one) / (2 * 32 * 128))
    assert kept[0] <= min(18.2, 0.65 * kept[1]), kept


@pytest.mark.parametrize("dtype", checkpoints.DTYPES, ids=str)
def test_the_gradient_of_gelu(monkeypatch, dtype):
    """It is what autograd computes; also where pow returns float32, as in CUDA's autocast; and for
    each row alone, by torch.func."""
    def wide_power(x, n, power=torch.pow):
        return power(x.to(torch.promote_types(x.dtype, torch.float32)), n)

    x = torch.cat((torch.linspace(-12, 12, 2000), torch.randn(3000))).to(dtype).requires_grad_()
    for power in (wide_power, torch.pow):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "pow", power)
            sums = [gelu(x).square().sum() for gelu in (gelu_new, LeanGELU.apply)]
        expected, ours = (torch.autograd.grad(each, x)[0] for each in sums)
        assert torch.equal(ours, expected) and expected.dtype == dtype
    of_a_row = torch.func.grad(lambda row: LeanGELU.apply(row).square().sum())
    rows = torch.func.vmap(of_a_row)(x.detach().view(-1, 5))
    assert torch.equal(rows, expected.view(-1, 5))


def test_the_second_derivative_of_gelu():
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(LeanGELU.apply, x)


# What people train with

@pytest.fixture
def model(tmp_path, device):
    return GPT.from_pretrained(save(random_gpt2(**SIZES), tmp_path)).to(device)


def test_compile_for_training(model, dynamo):
    """All of the compiler but its last part, machine code, which takes the time. From the second
    length on, it compiles for any length: T is a symbol then. Fused operations round at other
    points, so gradients are equal within a few roundings."""
    del model.transformer.h[1:]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T in [16, 9, 50, 1]:
        idx = random_idx(model, 2, T + 1)
        gradients = [torch.autograd.grad(loss_of(each, idx), [*model.parameters()])
                     for each in (compiled, model)]
        for ours, expected in zip(*gradients):
            few = 50 * torch.finfo(torch.float32).eps * expected.abs().max()
            assert (ours - expected).abs().max() < few


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


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_copies_traces_and_hooks(model):
    seen, idx, file = [], random_idx(model, 2, 9), io.BytesIO()
    twin = copy.deepcopy(model)
    for block in twin.transformer.h:
        block.attn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.jit.save(torch.jit.trace(model, idx), file)
    file.seek(0)
    assert torch.equal(twin(idx), model(idx)) and torch.equal(torch.jit.load(file)(idx), model(idx))
    assert seen == [(2, 9, 64)] * 3
    assert twin.lm_head.weight is twin.transformer.wte.weight is not model.transformer.wte.weight


@pytest.mark.filterwarnings("error")
def test_no_warnings(model, tmp_path):
    idx = random_idx(model, 2, 9)
    loss_of(model.train(), idx).backward()
    model.generate(idx, 20)
    model.save_pretrained(tmp_path / "mine")

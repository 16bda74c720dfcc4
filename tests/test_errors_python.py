"""Promise: from Python, a mistake is a ValueError that names it, and leaves the model as it was."""
import copy
import math

import pytest
import torch
from mistakes import IDX

from train_gpt2 import GPT, GPTConfig

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def gpt(tiny):
    return GPT.from_pretrained(tiny)


@pytest.mark.parametrize("idx", [
    None, 1, [[1, 2, 3]], "Hello", torch.tensor(1), torch.tensor([1, 2, 3]), torch.zeros(1, 1, 3, dtype=torch.int64),
    torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.bool), IDX.numpy(),
    torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(1, 65, dtype=torch.int64),
], ids=lambda idx: str(getattr(idx, "dtype", type(idx))) + str(list(getattr(idx, "shape", ""))))
def test_idx(gpt, idx):
    for call in (gpt, lambda idx: gpt.generate(idx, 64)):
        with pytest.raises(ValueError, match="idx"):
            call(idx)


def test_idx_too_long_names_both_lengths(gpt):
    with pytest.raises(ValueError, match="(?=.*65)(?=.*64)"):
        gpt(torch.zeros(2, 65, dtype=torch.int64))


@pytest.mark.parametrize("fields", [{"n_head": 0}, {"n_head": 5}, {"n_layer": 0}, {"n_embd": -8}, {"block_size": 1.5},
                                    {"block_size": None}, {"vocab_size": "50257"}], ids=str)
def test_impossible_config(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        GPT(GPTConfig(**fields))


MISTAKES = [
    {"idx": torch.tensor([[1, -1]])}, {"idx": torch.tensor([[10**6]])}, {"idx": torch.zeros(1, 65, dtype=torch.int64)},
    {"max_length": 3}, {"max_length": 0}, {"max_length": 65}, {"temperature": -1.0}, {"temperature": math.nan},
    {"temperature": math.inf}, {"temperature": 1e-45}, {"top_k": -1},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: str(mistake).replace("\n", ""))
def test_generate_refuses_and_leaves_the_model_as_it_was(gpt, mistake):
    logits = gpt(IDX)
    with pytest.raises(ValueError, match=next(iter(mistake)).replace("_", ".")):
        gpt.generate(**{"idx": IDX, "max_length": 10, **mistake})
    assert torch.equal(gpt(IDX), logits)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(gpt, number, temperature):
    """As float16 may give. The likeliest token of those would be as wrong as a drawn one."""
    broken = copy.deepcopy(gpt)
    with torch.no_grad():
        broken.transformer.ln_f.bias.fill_(number)
    with pytest.raises(ValueError, match="overflow.*float32"):
        broken.generate(IDX, 10, temperature)


def throw(error):
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_interrupted_generate_leaves_the_model_as_it_was(gpt, error):
    torch.manual_seed(0)
    logits, tokens = gpt(IDX), gpt.generate(IDX, 40)
    parameters = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    for steps in (0, 1, 9):  # in the prompt, in the first new token, later
        left = [None] * steps
        hook = gpt.transformer.h[1].register_forward_hook(lambda *_, left=left: left.pop() if left else throw(error))
        with pytest.raises(error):
            gpt.generate(IDX, 40)
        hook.remove()
        assert torch.equal(gpt(IDX), logits) and gpt(IDX).requires_grad  # it can be trained on, as before
        torch.manual_seed(0)
        assert torch.equal(gpt.generate(IDX, 40), tokens)
    assert all(torch.equal(p, parameters[name]) for name, p in gpt.named_parameters())

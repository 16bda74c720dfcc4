"""generate() takes the steps and draws the tokens of transformers' generate(), to the last bit."""
import pytest
import torch
from checkpoints import random_gpt2, save
from transformers import GPT2LMHeadModel

import train_gpt2
from train_gpt2 import GPT

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 48, "vocab_size": 301}


def pair(folder, dtype=torch.float32, device="cpu"):
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).to(device, dtype)
    theirs.generation_config.pad_token_id = theirs.config.eos_token_id or 0
    return GPT.from_pretrained(folder).to(device, dtype), theirs


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model whose texts never end."""
    return save(random_gpt2(**SIZES), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A model of ten tokens, one of which ends a text: rows end at every step, and whole batches early."""
    model = random_gpt2(**SIZES | {"vocab_size": 10}, bos_token_id=3, eos_token_id=3)
    with torch.no_grad():  # all ten about as likely, and the end a little more
        model.transformer.ln_f.weight.mul_(0.1)
        model.transformer.ln_f.bias.copy_(0.1 * model.transformer.wte.weight[3])
    return save(model, tmp_path_factory.mktemp("ending"))


def prompt(model, B, T, seed=0):
    idx = torch.randint(model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))
    return idx.to(model.lm_head.weight.device)


def generate_theirs(model, idx, seed, **kwargs):
    torch.manual_seed(seed)
    return model.generate(idx, attention_mask=torch.ones_like(idx), **kwargs)


def assert_same_tokens(ours, theirs, idx, max_length, seed, temperature, top_k):
    torch.manual_seed(seed)
    tokens = ours.generate(idx, max_length, temperature, top_k)
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "temperature": temperature, "top_k": top_k}
    assert torch.equal(tokens, generate_theirs(theirs, idx, seed, max_length=max_length, **how))
    return tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hs", [64, 8, 7, 1])
def test_every_steps_logits(tmp_path, monkeypatch, hs, dtype, device):
    """Odd sizes of heads too: how a product is summed can depend on the strides and alignment of the cache."""
    steps, sample = [], train_gpt2.sample
    monkeypatch.setattr(train_gpt2, "sample", lambda logits, *how: (steps.append(logits), sample(logits, *how))[1])
    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 2 * hs}), tmp_path), dtype, device)
    for B, T in [(1, 1), (2, 5), (5, 13)]:
        steps.clear()
        tokens = ours.generate(prompt(ours, B, T), 48, temperature=0)
        out = generate_theirs(theirs, prompt(ours, B, T), 0, max_length=48, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)
        assert len(steps) == len(out.logits) == 48 - T
        for step, logits in enumerate(out.logits):
            assert torch.equal(steps[step], logits.float()), f"step {step} of {B} rows"
        assert torch.equal(tokens, out.sequences)


@pytest.mark.parametrize("top_k", [1, 50, 0, 999])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_tokens(plain, device, temperature, top_k):
    ours, theirs = pair(plain, device=device)
    for seed in range(6):
        B, T = [(1, 1), (1, 9), (3, 2), (5, 8), (16, 4), (2, 30)][seed]
        assert_same_tokens(ours, theirs, prompt(ours, B, T, seed), 40, seed, temperature, top_k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_sampled_tokens_of_other_dtypes(plain, device, dtype):
    ours, theirs = pair(plain, dtype, device)
    for seed in range(3):
        assert_same_tokens(ours, theirs, prompt(ours, 5, 8), 48, seed, 1.0, 50)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 50), (0.8, 3), (0, 50)])
def test_texts_that_end(ending, device, temperature, top_k):
    ours, theirs = pair(ending, device=device)
    lengths = set()
    for seed in range(15):
        idx = prompt(ours, 1 + seed % 5, 1 + seed % 3, seed)
        lengths.add(assert_same_tokens(ours, theirs, idx, 48, seed, temperature, top_k).shape[1])
    assert len(lengths) > 1 or temperature == 0, "all batches ended at the same step: this test would show little"


def test_gpt2s_size(full):
    ours, theirs = pair(full)
    for B, seed in [(1, 0), (5, 42)]:
        assert_same_tokens(ours, theirs, prompt(ours, B, 8), 30, seed, 1.0, 50)


def test_the_prompt_is_left_alone_and_the_tokens_can_be_trained_on(plain):
    ours, _ = pair(plain)
    idx = prompt(ours, 2, 5)
    before = idx.clone()
    tokens = ours.generate(idx, 12)
    assert torch.equal(idx, before)
    assert torch.equal(tokens[:, :5], idx)
    assert tokens.shape == (2, 12)
    assert tokens.dtype == torch.int64
    ours(tokens).sum().backward()  # a tensor of inference mode would raise here


def test_defaults(plain):
    ours, _ = pair(plain)
    idx = prompt(ours, 2, 5)
    torch.manual_seed(1)
    tokens = ours.generate(idx, 20)
    torch.manual_seed(1)
    assert torch.equal(tokens, ours.generate(idx, 20, temperature=1.0, top_k=50))

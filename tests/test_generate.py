"""Promise: generate() takes the steps, samples the tokens and ends the rows of transformers'
generate(), to the last bit, and makes the device wait no more often."""
import json
from collections import Counter

import pytest
import torch
from checkpoints import (
    DTYPES,
    OTHER_SCALE,
    pair,
    random_gpt2,
    random_idx,
    same_scale,
    save,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 48, "vocab_size": 301}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model whose texts never end."""
    return save(random_gpt2(**SIZES), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A model of ten tokens, one of which ends a text: rows end at every step, batches early."""
    model = random_gpt2(**SIZES | {"vocab_size": 10}, bos_token_id=3, eos_token_id=3)
    with torch.no_grad():  # all ten about as likely, and the end a little more
        model.transformer.ln_f.weight.mul_(0.1)
        model.transformer.ln_f.bias.copy_(0.1 * model.transformer.wte.weight[3])
    return save(model, tmp_path_factory.mktemp("ending"))


def generate_theirs(model, idx, seed, **kwargs):
    torch.manual_seed(seed)
    return model.generate(idx, attention_mask=torch.ones_like(idx), **kwargs)


def assert_same_tokens(ours, theirs, idx, max_length, seed, temperature, top_k):
    torch.manual_seed(seed)
    tokens = ours.generate(idx, max_length, temperature, top_k)
    how = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    if temperature == 0:
        how = {"do_sample": False}
    assert torch.equal(tokens, generate_theirs(theirs, idx, seed, max_length=max_length, **how))
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hs", [64, 8, 7, 1])
def test_every_steps_logits(tmp_path, monkeypatch, hs, dtype, device):
    """For odd head sizes too: how rows lie in the cache can change the rounding of a product."""
    if not same_scale(hs, dtype):
        pytest.skip(OTHER_SCALE)
    steps, sample = [], train_gpt2.sample

    def spy(logits, temperature, top_k):
        steps.append(logits)
        return sample(logits, temperature, top_k)

    monkeypatch.setattr(train_gpt2, "sample", spy)
    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 2 * hs}), tmp_path), dtype, device)
    for B, T in [(1, 1), (2, 5), (5, 13)]:
        steps.clear()
        tokens = ours.generate(random_idx(ours, B, T), 48, temperature=0)
        out = generate_theirs(theirs, random_idx(ours, B, T), 0, max_length=48, do_sample=False,
                              output_logits=True, return_dict_in_generate=True)
        assert len(steps) == len(out.logits) == 48 - T
        for step, logits in enumerate(out.logits):
            assert torch.equal(steps[step], logits.float()), f"step {step} of {B} rows"
        assert torch.equal(tokens, out.sequences)


@pytest.mark.parametrize("hs", [64, 7])
def test_keys_and_values_lie_in_memory_as_in_transformers(tmp_path, monkeypatch, hs):
    """How they lie can change the rounding, but only on some machines and for some sizes. So this
    looks at their strides. Heads that fill whole 32 bytes need no copy from the cache."""
    strides, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, **how):
        for tensor in (k, v):  # the stride of a dimension of length 1 is never used
            strides.append([tensor.stride(d) for d in range(4) if tensor.shape[d] > 1])
        return attend(q, k, v, **how)

    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 2 * hs}), tmp_path))
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    calls = [lambda model: model(random_idx(model, 2, 5))]
    if hs == 7:
        calls += [lambda model: model.generate(random_idx(model, 2, 5), max_length=9)]
    for call in calls:
        seen = []
        for model in ours, theirs:
            strides.clear()
            call(model)
            seen.append(list(strides))
        assert seen[0] == seen[1]
        assert seen[0]


class Counting(TorchDispatchMode):
    """Counts what is computed, and how often the host looks at a tensor, which waits for a GPU."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        waits = name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        if not func.is_view:
            self.counts["waits" if waits else "kernels"] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_one_wait_and_no_more_kernels_per_token(plain, temperature):
    ours, theirs = pair(plain)
    how = {"do_sample": False} if temperature == 0 else {"do_sample": True, "top_k": 50}
    idx = random_idx(ours, 2, 5)
    mask = torch.ones_like(idx)
    calls = {"ours": lambda length: ours.generate(idx, length, temperature),
             "theirs": lambda length: theirs.generate(idx, attention_mask=mask, max_length=length,
                                                      eos_token_id=300, pad_token_id=300, **how)}
    ours.config.eos_token_id = 300
    per_token = {}
    for name, call in calls.items():
        counts = []
        for length in (10, 30):
            torch.manual_seed(0)
            with Counting() as counting:
                assert call(length).shape[1] == length, "a row has ended, so this shows nothing"
            counts.append(counting.counts)
        per_token[name] = {kind: (counts[1][kind] - counts[0][kind]) / 20 for kind in counts[0]}
    assert per_token["ours"]["waits"] == 1
    assert per_token["theirs"]["waits"] >= 1
    assert per_token["ours"]["kernels"] <= per_token["theirs"]["kernels"], per_token


@pytest.mark.parametrize("ids", [{"eos_token_id": 3}, {"eos_token_id": None}], ids=str)
def test_the_generators_state_afterwards(ending, ids):
    """It is the one that transformers leaves behind, also after an early end."""
    ours, theirs = pair(ending)
    ours.config.eos_token_id = theirs.generation_config.eos_token_id = ids["eos_token_id"]
    for seed in range(5):
        assert_same_tokens(ours, theirs, random_idx(ours, 3, 2, seed), 48, seed, 1.0, 50)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        ours.generate(random_idx(ours, 3, 2, seed), 48)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("top_k", [1, 50, 0, 999])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_tokens(plain, device, temperature, top_k):
    ours, theirs = pair(plain, device=device)
    for seed, (B, T) in enumerate([(1, 1), (1, 9), (3, 2), (5, 8), (16, 4), (2, 30)]):
        assert_same_tokens(ours, theirs, random_idx(ours, B, T, seed), 40, seed, temperature, top_k)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sampled_tokens_of_other_dtypes(plain, device, dtype):
    ours, theirs = pair(plain, dtype, device)
    for seed in range(3):
        assert_same_tokens(ours, theirs, random_idx(ours, 5, 8), 48, seed, 1.0, 50)


def test_gpt2s_size(full):
    ours, theirs = pair(full)
    for B, seed in [(1, 0), (5, 42)]:
        assert_same_tokens(ours, theirs, random_idx(ours, B, 8), 20, seed, 1.0, 50)


# Where texts end. transformers reads generation_config.json if it is there, else config.json.

@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 50), (0.8, 3), (0, 50)])
def test_texts_that_end(ending, device, temperature, top_k):
    ours, theirs = pair(ending, device=device)
    lengths = set()
    for seed in range(15):
        idx = random_idx(ours, 1 + seed % 5, 1 + seed % 3, seed)
        lengths.add(assert_same_tokens(ours, theirs, idx, 48, seed, temperature, top_k).shape[1])
    assert len(lengths) > 1 or temperature == 0, "all ended at the same step: this shows little"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [
    {"eos_token_id": 5}, {"eos_token_id": [5]}, {"eos_token_id": [5, 7]},
    {"eos_token_id": [3, 50256]}, {"eos_token_id": [7, 3], "pad_token_id": 0},
    {"eos_token_id": 3, "pad_token_id": 9},
    {"eos_token_id": None}, {"eos_token_id": None, "pad_token_id": 2}, {"pad_token_id": 2},
], ids=str)
def test_the_ids_that_end_a_text(ending, tmp_path, file, ids):
    for name in ["config.json", "model.safetensors"]:
        (tmp_path / name).write_bytes((ending / name).read_bytes())
    before = json.loads((ending / "config.json").read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps(before | ids))
    ours, theirs = pair(tmp_path)
    for seed in range(5):
        assert_same_tokens(ours, theirs, random_idx(ours, 1 + seed, 2, seed), 48, seed, 1.0, 50)


def test_a_row_is_filled_up_even_with_what_the_model_does_not_have(ending, tmp_path):
    """A tokenizer got a [PAD], but the model was not resized. transformers fails when the first row
    ends. Here, the model never sees what fills a row up."""
    for name in ["config.json", "model.safetensors"]:
        (tmp_path / name).write_bytes((ending / name).read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3, "pad_token_id": 10}')
    ours, _ = pair(tmp_path)
    usual, _ = pair(ending)
    for seed in range(5):
        idx = random_idx(ours, 4, 2, seed)
        torch.manual_seed(seed)
        tokens = ours.generate(idx, 48)
        torch.manual_seed(seed)
        expected = usual.generate(idx, 48)
        assert (tokens == 10).any()
        assert torch.equal(tokens.where(tokens != 10, 3), expected)


# The call itself

def test_the_prompt_is_left_alone_and_the_tokens_can_be_trained_on(plain):
    ours, _ = pair(plain)
    idx = random_idx(ours, 2, 5)
    before = idx.clone()
    tokens = ours.generate(idx, 12)
    assert torch.equal(idx, before)
    assert torch.equal(tokens[:, :5], idx)
    assert tokens.shape == (2, 12)
    assert tokens.dtype == torch.int64
    ours(tokens).sum().backward()  # a tensor of inference mode would raise here


def test_defaults(plain):
    ours, _ = pair(plain)
    idx = random_idx(ours, 2, 5)
    torch.manual_seed(1)
    tokens = ours.generate(idx, 20)
    torch.manual_seed(1)
    assert torch.equal(tokens, ours.generate(idx, 20, temperature=1.0, top_k=50))


@pytest.mark.parametrize("taken_out", [0, 1], ids=["whole", "a block taken out"])
def test_the_cache_changes_no_token(plain, taken_out):
    """Greedy tokens are those of a loop without a cache. Generation counts the blocks that the
    model has, not those of its config."""
    ours, _ = pair(plain)
    del ours.transformer.h[:taken_out]
    idx = random_idx(ours, 2, 5)
    steps = idx
    for _ in range(10):
        steps = torch.cat((steps, ours(steps)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(ours.generate(idx, 15, temperature=0), steps)

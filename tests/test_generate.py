"""Promise: generate() takes the steps, samples the tokens and ends the rows of transformers'
generate(), to the last bit. It makes the device wait no more often, and stays on it."""
import copy
import shutil

import pytest
import torch
from checkpoints import DTYPES, change_json, pair, random_gpt2, random_idx, save
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_gpt2

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 48, "vocab_size": 301}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model whose texts never end."""
    return save(random_gpt2(**SIZES), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ending(tmp_path_factory):
    """A model of ten tokens, one of which ends a text: rows end at every step, batches early."""
    model = random_gpt2(**SIZES | {"vocab_size": 10}, bos_token_id=3, eos_token_id=3)
    ln_f, wte = model.transformer.ln_f, model.transformer.wte.weight.data
    ln_f.weight.data *= 0.1  # all ten are about as likely, and the end a little more
    ln_f.bias.data = 0.1 * wte[3]
    return save(model, tmp_path_factory.mktemp("ending"))


def generate_theirs(model, idx, **how):
    return model.generate(idx, attention_mask=torch.ones_like(idx), **how)


def assert_same_tokens(ours, theirs, idx, max_length, seed, temperature=1.0, top_k=50):
    """And the same state of the generator afterwards."""
    torch.manual_seed(seed)
    expected = generate_theirs(theirs, idx, max_length=max_length, do_sample=temperature > 0,
                               temperature=temperature, top_k=top_k)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    tokens = ours.generate(idx, max_length, temperature, top_k)
    assert torch.equal(tokens, expected) and tokens.dtype == idx.dtype
    assert torch.equal(torch.get_rng_state(), state)
    return tokens


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hs", [64, 4, 9, 1])
def test_every_steps_logits(tmp_path, monkeypatch, hs, dtype, device):
    """For odd head sizes too: how rows lie in the cache can change the rounding of a product."""
    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 2 * hs}), tmp_path), dtype, device)
    steps, sample = [], train_gpt2.sample
    monkeypatch.setattr(train_gpt2, "sample", lambda logits, *how: (
        steps.append(logits), sample(logits, *how))[1])
    for B, T in [(1, 1), (2, 5), (5, 13)]:
        steps.clear()
        idx = random_idx(ours, B, T)
        tokens = ours.generate(idx, 48, temperature=0)
        out = generate_theirs(theirs, idx, max_length=48, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)
        assert torch.equal(tokens, out.sequences)
        assert torch.equal(torch.stack(steps), torch.stack(out.logits))  # (48 - T, B, V)
        assert not steps[0].requires_grad  # or each step would keep its memory


@pytest.mark.parametrize(("hs", "how"), [(64, "forward"), (9, "forward"), (9, "generate")])
def test_keys_and_values_lie_in_memory_as_in_transformers(tmp_path, monkeypatch, hs, how):
    """How they lie can change the rounding, but only on some machines and for some sizes. So this
    looks at their strides. Heads that fill whole 32 bytes need no copy from the cache."""
    strides, attend = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):  # the stride of a dimension of length 1 is never used
        strides.append([(k.stride(d), v.stride(d)) for d in range(4) if k.shape[d] > 1])
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for model in pair(save(random_gpt2(**SIZES | {"n_embd": 2 * hs}), tmp_path)):
        idx = random_idx(model, 2, 5)
        model(idx) if how == "forward" else model.generate(idx, max_length=9)
    half = len(strides) // 2
    assert half >= 2 and strides[:half] == strides[half:]


class Counting(TorchDispatchMode):
    """Counts how often the host looks at a tensor, which waits for a GPU, and computes one."""
    waiting = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
    looks, computes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        look = func.overloadpacket.__name__ in self.waiting
        self.looks += look
        self.computes += not (look or func.is_view)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_one_wait_and_no_more_kernels_per_token(plain, temperature):
    ours, theirs = pair(plain)
    ours.config.eos_token_id, idx = 300, random_idx(ours, 2, 5)
    how = {"do_sample": temperature > 0, "eos_token_id": 300, "pad_token_id": 300}
    counts = []
    for length in (10, 30):
        torch.manual_seed(0)
        with Counting() as count:
            tokens = ours.generate(idx, length, temperature)
        torch.manual_seed(0)
        with Counting() as their_count:
            assert torch.equal(tokens, generate_theirs(theirs, idx, max_length=length, **how))
        assert tokens.shape[1] == length, "all have ended, so this shows nothing"
        counts.append((count.looks, count.computes, their_count.looks, their_count.computes))
    waits, kernels, their_waits, their_kernels = (more - few for few, more in zip(*counts))
    assert waits == 20 <= their_waits and kernels <= their_kernels


@pytest.mark.parametrize("temperature", [1.0, 0])
def test_everything_lies_on_one_device(plain, temperature):
    """As on a GPU: with and without caches, the positions, the ids that end a text, the tokens. The
    meta device takes its place. Its tensors have no values, so what looks at them gets answers."""
    answers = iter([False] * 5 + [True])  # five times not all rows have ended; all is finite

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name == "_local_scalar_dense":
                return next(answers)
            if name == "index":  # idx[...], the ids that the model doesn't have
                return torch.empty(0)
            for each in tree_leaves((args, kwargs)):
                if torch.is_tensor(each) and name not in ("lift_fresh", "_to_copy"):
                    assert each.is_meta or each.ndim == 0, f"{name} takes a tensor on the CPU"
            return func(*args, **kwargs or {})

    model = train_gpt2.GPT.from_pretrained(plain).to("meta")
    model.config.eos_token_id, idx = [3, 5], torch.zeros(2, 5, dtype=torch.int64, device="meta")
    with OneDevice():
        assert model(idx).shape == (2, 5, 301)
        assert model.generate(idx, 10, temperature).shape == (2, 10)


def test_compiled(plain, dynamo):
    """In a few graphs, whatever the lengths, and without a break: the tokens are the same."""
    ours, _ = pair(plain)
    idx = random_idx(ours, 3, 5)
    expected = ours.generate(idx, 48, temperature=0)
    ours.compile(backend="eager")
    for length in (30, 48):
        assert torch.equal(ours.generate(idx, length, temperature=0), expected[:, :length])
    assert not dynamo["graph_break"]
    assert 1 <= dynamo["stats"]["unique_graphs"] <= 8


# Tokens

@pytest.mark.parametrize(("dtype", "temperature", "top_k"), [
    (DTYPES[0], 0.7, 1), (DTYPES[0], 0.7, 50), (DTYPES[0], 1.0, 0), (DTYPES[0], 1.3, 999),
    *((dtype, 1.0, 50) for dtype in DTYPES)], ids=str)
def test_sampled_tokens(plain, device, dtype, temperature, top_k):
    ours, theirs = pair(plain, dtype, device)
    for seed, (B, T) in enumerate([(1, 1), (3, 2), (16, 4), (2, 30)]):
        idx = random_idx(ours, B, T, seed)
        assert_same_tokens(ours, theirs, idx, 40, seed, temperature, top_k)


def test_what_generate_leaves_alone(plain):
    """The prompt; training on the tokens, which inference mode would forbid. A block that
    the config doesn't know has a cache too."""
    ours, _ = pair(plain)
    ours.transformer.h.append(copy.deepcopy(ours.transformer.h[0]))
    idx = random_idx(ours, 40, 5)
    tokens = ours.generate(idx, 7, temperature=0)
    assert torch.equal(idx, random_idx(ours, 40, 5)) and torch.equal(tokens[:, :5], idx)
    assert torch.equal(tokens[:, 6], ours(tokens[:, :6])[:, -1].argmax(-1))
    ours(tokens).sum().backward()


# Where texts end. transformers reads generation_config.json if it is there, else config.json.

@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 50), (0.8, 3), (0, 50)])
def test_texts_that_end(ending, device, temperature, top_k):
    """At different steps. A pad token may be the tokenizer's alone, where transformers fails: here,
    the model never sees what fills a row up."""
    ours, theirs = pair(ending, device=device)
    lengths = set()
    for seed in range(15):
        idx = random_idx(ours, 1 + seed % 5, 1 + seed % 3, seed)
        expected = assert_same_tokens(ours, theirs, idx, 48, seed, temperature, top_k)
        lengths.add(expected.shape[1])
    assert len(lengths) > 1 or temperature == 0
    ours.config.pad_token_id = 10
    torch.manual_seed(seed)
    tokens = ours.generate(idx, 48, temperature, top_k)
    assert (tokens == 10).any() and torch.equal(tokens.where(tokens != 10, 3), expected)


def test_a_model_without_blocks(tmp_path):
    """It has no cache, and still knows where each token stands."""
    sizes = SIZES | {"n_layer": 0, "tie_word_embeddings": False}
    ours, theirs = pair(save(random_gpt2(**sizes), tmp_path))
    for seed in range(5):
        assert_same_tokens(ours, theirs, random_idx(ours, 3, 4, seed), 40, seed)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [
    {"eos_token_id": 5}, {"eos_token_id": [7, 3], "pad_token_id": 0}, {"eos_token_id": [3, 50256]},
    {"eos_token_id": None, "pad_token_id": 2}, {"pad_token_id": 2},
    {"eos_token_id": -1, "bos_token_id": -1, "pad_token_id": -1}], ids=str)
def test_the_ids_that_end_a_text(ending, tmp_path, file, ids):
    """Some write -1 for "none"."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ending / name, tmp_path)
    change_json(tmp_path / file, **ids)
    ours, theirs = pair(tmp_path)
    for seed in range(3):
        assert_same_tokens(ours, theirs, random_idx(ours, 1 + 2 * seed, 2, seed), 48, seed)
    assert -1 not in vars(ours.config).values()

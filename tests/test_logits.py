"""Promise: given the same weights, the logits are those of transformers' GPT2LMHeadModel to the
last bit, in every dtype and size, and the parameters are the same by name, shape and value.

Two models are compared only if their weights lie alike: both read from one file, or both in memory.
On some CPUs, the product of a single row rounds by how the weights are aligned.
"""
import json
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import SIZES, change_json, pair, random_gpt2, random_idx, save
from huggingface_hub import try_to_load_from_cache
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GPT2Config

from train_gpt2 import GPT, GPTConfig

SHAPES = [
    {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 40, "vocab_size": 100},
    {"n_layer": 1, "n_head": 1, "n_embd": 9, "n_positions": 33, "vocab_size": 11},  # an odd head
    {"n_layer": 2, "n_head": 6, "n_embd": 6, "n_positions": 16, "vocab_size": 2, "n_inner": 9},
    {"n_layer": 3, "n_head": 5, "n_embd": 65, "n_positions": 17, "vocab_size": 257,
     "layer_norm_epsilon": 0.01},
    {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 200, "vocab_size": 50},
]


def assert_equal_logits(ours, theirs, *sizes):
    """Of random tokens (B, T), for each of these sizes."""
    for B, T in sizes:
        idx = random_idx(ours, B, T)
        with torch.no_grad():
            logits = ours(idx)
            assert logits.shape == (B, T, ours.config.vocab_size)
            assert logits.dtype == ours.lm_head.weight.dtype
            assert torch.equal(logits, theirs(idx).logits), (B, T)


@pytest.mark.parametrize("dtype", checkpoints.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']}-wide")
def test_shapes_and_dtypes(tmp_path, shape, dtype, device):
    ours, theirs = pair(save(random_gpt2(**shape), tmp_path), dtype, device)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    whole = shape["n_positions"]
    assert_equal_logits(ours, theirs, (1, 1), (1, 2), (1, 7), (1, whole), (2, 1), (2, 13), (5, 8),
                        (5, whole), (16, 3))


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_layouts(tmp_path, capsys, layout, tied, device, one_thread):
    """The logits; and names, order, shapes and values of the parameters, so that each side's
    load_state_dict takes the other's. Old masks are ignored silently. c_proj is square: transposed,
    it would load just as well."""
    if layout == "hub" and not tied and checkpoints.TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 can't read a head of its own beside names without a prefix")
    model = random_gpt2(**SHAPES[0], tie_word_embeddings=tied)
    ours, theirs = pair(save(model, tmp_path, layout), device=device)
    assert not ours.training and capsys.readouterr().err == ""
    assert tied == (ours.lm_head.weight is ours.transformer.wte.weight)
    assert_equal_logits(ours, theirs, (1, 1), (5, 8), (16, 40))
    for names in ("state_dict", "named_parameters"):
        mine, others = dict(getattr(ours, names)()), dict(getattr(theirs, names)())
        assert list(mine) == list(others)
        for name, tensor in others.items():
            assert torch.equal(mine[name], tensor) and mine[name].is_contiguous(), name
    again, other = GPT(ours.config), random_gpt2(seed=1, **SHAPES[0], tie_word_embeddings=tied)
    again.load_state_dict(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    assert_equal_logits(again.to(device), other.to(device), (1, 1), (1, 8), (5, 40))


@pytest.mark.parametrize("name", checkpoints.RELATIVES)
def test_relatives(tmp_path, name, device):
    """Other activations, other scales of attention, a head of its own; the gradients too."""
    model = random_gpt2(**SIZES | {"n_layer": 3, "vocab_size": 99} | checkpoints.RELATIVES[name])
    ours, theirs = pair(save(model, tmp_path), device=device)
    assert_equal_logits(ours, theirs, (1, 1), (2, 13))
    checkpoints.assert_equal_gradients(ours, theirs, random_idx(ours, 4, 33))
    assert_equal_logits(ours.double(), theirs.double(), (1, 2), (2, 13))


def test_heads_of_one_channel_in_torchs_math_attention(tmp_path):
    """Its result lies in memory in another way then."""
    ours, theirs = pair(save(random_gpt2(**SIZES | {"n_embd": 2, "vocab_size": 9}), tmp_path))
    with sdpa_kernel(SDPBackend.MATH):
        assert_equal_logits(ours, theirs, (1, 1), (2, 5), (3, 9))
        checkpoints.assert_equal_gradients(ours, theirs, random_idx(ours, 3, 9))


@pytest.mark.parametrize("real", [False, True], ids=["one random layer", "the real one"])
def test_gpt2s_size(tmp_path, device, real):
    """Its width, its vocabulary and its context: logits, gradients and tokens."""
    if not real:
        config = GPTConfig(n_layer=1)
        model = random_gpt2(n_layer=1, bos_token_id=50256, eos_token_id=50256)
        ours, theirs = pair(save(model, tmp_path, "hub"), device=device)
    elif folder := try_to_load_from_cache("gpt2", "model.safetensors", checkpoints.REAL_CACHE):
        config = GPTConfig()
        ours, theirs = pair(Path(folder).parent, device=device)
    else:
        pytest.skip("the real gpt2 was not downloaded before")
    assert ours.config == config
    whole, block = (sum(p.numel() for p in part.parameters())
                    for part in (ours, ours.transformer.h[0]))
    assert whole + (12 - config.n_layer) * block == 124_439_808
    assert_equal_logits(ours, theirs, (1, 8), (5, 8), (1, 1024))
    idx = random_idx(ours, 5, 8)
    checkpoints.assert_equal_gradients(ours, theirs, idx)
    torch.manual_seed(42)
    tokens = ours.generate(idx, max_length=16)
    torch.manual_seed(42)
    assert torch.equal(tokens, theirs.generate(idx, max_length=16, do_sample=True))


def test_what_config_json_leaves_out(tmp_path):
    """It is gpt2's, as for transformers."""
    sizes = {"vocab_size": 8, "n_layer": 1}
    save(random_gpt2(**sizes), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    ours, theirs = (model.config for model in pair(tmp_path))
    assert ours == GPTConfig(**sizes)
    for name, value in vars(ours).items():
        assert value == getattr(theirs, "n_positions" if name == "block_size" else name), name


@pytest.mark.parametrize("name", ["max_position_embeddings", "hidden_size", "num_hidden_layers",
                                  "num_attention_heads", "transformers_weights"])
def test_other_names(tmp_path, name, one_thread):
    """transformers prefers these: only they have the size, or the file, that is meant."""
    sizes = SIZES | {"n_head": 4, "vocab_size": 99}
    save(random_gpt2(**sizes), tmp_path)
    if name == "transformers_weights":
        (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
        save(random_gpt2(seed=1, **sizes), tmp_path)
        change_json(tmp_path / "config.json", **{name: "other.safetensors"})
    else:
        meant = GPT2Config.attribute_map[name]
        change_json(tmp_path / "config.json", **{meant: 1, name: sizes[meant]})
    assert_equal_logits(*pair(tmp_path), (2, 13))


@pytest.mark.skipif(checkpoints.TRANSFORMERS < (5, 0), reason="it read only wte.weight of the pair")
@pytest.mark.parametrize("both", [False, True], ids=["head alone", "both, and different"])
def test_the_tied_pair_in_a_file(tmp_path, both):
    """Either name is enough. A head that differs from wte is used, as by transformers 5."""
    def change(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + both
        if not both:
            del tensors["transformer.wte.weight"]

    folder = save(random_gpt2(**SHAPES[0]), tmp_path)
    ours, theirs = pair(checkpoints.change_weights(folder, change))
    tied = theirs.lm_head.weight is theirs.transformer.wte.weight
    assert tied == (ours.lm_head.weight is ours.transformer.wte.weight)
    assert_equal_logits(ours, theirs, (2, 9))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "float16", "half"])
def test_the_dtype_is_the_one_that_transformers_takes(tmp_path, field, name, one_thread):
    """What config.json says, by its old name or its new one; else that of the first tensor."""
    def change(tensors):
        for key in tensors:  # the first by name is not wte
            tensors[key] = tensors[key].to(torch.float64 if "wte" in key else first)

    dtype = getattr(torch, name)
    first = dtype if field is None else torch.float32 if name == "bfloat16" else torch.bfloat16
    checkpoints.change_weights(save(random_gpt2(**SIZES, vocab_size=99), tmp_path), change)
    fields = {"dtype": None, "torch_dtype": None} | ({field: name} if field else {})
    change_json(tmp_path / "config.json", **fields)
    ours, theirs = pair(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype} == {dtype}
    assert_equal_logits(ours, theirs, (2, 9))


@pytest.mark.skipif(checkpoints.TRANSFORMERS < (5, 0), reason="it didn't convert these, and failed")
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_stored_in_other_dtypes(tmp_path, dtype):
    """They are converted, as by transformers."""
    def change(tensors):
        for name in ("transformer.h.0.attn.c_proj.weight", "transformer.ln_f.bias"):
            tensors[name] = tensors[name].mul(2).to(dtype)

    checkpoints.change_weights(save(random_gpt2(**SIZES, vocab_size=99), tmp_path), change)
    assert_equal_logits(*pair(tmp_path), (1, 1), (2, 9))

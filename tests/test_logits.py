"""Promise: given the same weights, the logits are those of transformers' GPT2LMHeadModel to the
last bit, in every dtype and size, and the parameters are the same by name, shape and value.

Two models are compared only if their weights lie alike: both read from one file, or both in memory.
On some CPUs, the product of a single row rounds by how the weights are aligned.
"""
import checkpoints
import pytest
import torch
from checkpoints import SIZES, change_json, pair, random_gpt2, random_idx, save
from mistakes import change_weights
from transformers import GPT2Config

from train_gpt2 import GPT, GPTConfig

SHAPES = [
    {"n_layer": 2, "n_head": 3, "n_embd": 48, "n_positions": 40, "vocab_size": 100},
    {"n_layer": 1, "n_head": 1, "n_embd": 9, "n_positions": 33, "vocab_size": 11},  # an odd head
    {"n_layer": 2, "n_head": 6, "n_embd": 6, "n_positions": 16, "vocab_size": 2, "n_inner": 9},
    {"n_layer": 3, "n_head": 5, "n_embd": 65, "n_positions": 17, "vocab_size": 257},
    {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 200, "vocab_size": 50},
    {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 20, "layer_norm_epsilon": 0.01},
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
def test_layouts(tmp_path, layout, tied, device, one_thread):
    """The logits; and names, order, shapes and values of the parameters. c_proj is square:
    transposed, it would load just as well."""
    if layout == "hub" and not tied and checkpoints.TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 can't read a head of its own beside names without a prefix")
    model = random_gpt2(**SHAPES[0], tie_word_embeddings=tied)
    ours, theirs = pair(save(model, tmp_path, layout), device=device)
    assert not ours.training
    assert tied == (ours.lm_head.weight is ours.transformer.wte.weight)
    assert_equal_logits(ours, theirs, (1, 1), (5, 8), (16, 40))
    for names in ("state_dict", "named_parameters"):
        mine, others = dict(getattr(ours, names)()), dict(getattr(theirs, names)())
        assert list(mine) == list(others)
        for name, tensor in others.items():
            assert torch.equal(mine[name], tensor) and mine[name].is_contiguous(), name


@pytest.mark.parametrize("name", checkpoints.RELATIVES)
def test_relatives(tmp_path, name, device):
    """Other activations, other scales of attention, a head of its own; the gradients too."""
    model = random_gpt2(**SIZES | checkpoints.RELATIVES[name] | {"n_layer": 3, "vocab_size": 99})
    ours, theirs = pair(save(model, tmp_path), device=device)
    assert_equal_logits(ours, theirs, (1, 1), (2, 13))
    checkpoints.assert_equal_gradients(ours, theirs, random_idx(ours, 4, 33))


@pytest.mark.skipif(checkpoints.TRANSFORMERS < (5, 0), reason="before, it scaled by 1 / sqrt(hs)")
def test_the_scale_is_not_1_by_the_root(tmp_path, device):
    """For heads of 8 channels the two differ, in the last bit of a float64."""
    folder = save(random_gpt2(**SIZES | {"n_head": 4, "vocab_size": 99}), tmp_path)
    assert_equal_logits(*pair(folder, torch.float64, device), (1, 2), (2, 13))


def test_gpt2s_size(tmp_path, device):
    """The gradients and the tokens too."""
    model = random_gpt2(bos_token_id=50256, eos_token_id=50256)
    ours, theirs = pair(save(model, tmp_path, "hub"), device=device)
    assert ours.config == GPTConfig()
    assert sum(p.numel() for p in ours.parameters()) == 124_439_808
    assert_equal_logits(ours, theirs, (1, 8), (5, 8), (1, 1024))
    idx = random_idx(ours, 5, 8)
    checkpoints.assert_equal_gradients(ours, theirs, idx)
    torch.manual_seed(42)
    tokens = ours.generate(idx, max_length=16)
    torch.manual_seed(42)
    assert torch.equal(tokens, theirs.generate(idx, max_length=16, do_sample=True))


def test_the_real_gpt2():
    """Hugging Face's own tests pin what the real weights say after "The dog"."""
    from huggingface_hub import snapshot_download
    try:
        snapshot_download("gpt2", etag_timeout=3,
                          allow_patterns=["config.json", "model.safetensors"])
    except Exception as error:  # noqa: BLE001 - whatever the reason, there are none
        pytest.skip(f"the real gpt2 is not cached and can't be downloaded: {type(error).__name__}")
    ours, theirs = pair("gpt2")
    assert_equal_logits(ours, theirs, (1, 8), (5, 8), (1, 1024))
    assert ours.generate(torch.tensor([[464, 3290]]), 20, temperature=0).tolist() == [[
        464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246,
        286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]]


def test_each_sides_load_state_dict_takes_the_others():
    """All weights are in memory of their own here."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 128, "vocab_size": 50}
    theirs, other = random_gpt2(**shape), random_gpt2(seed=1, **shape)
    ours = GPT(GPTConfig(**shape))
    ours.load_state_dict(theirs.state_dict())
    other.load_state_dict(ours.state_dict())
    for model in (theirs, other):
        assert_equal_logits(ours, model, (1, 1), (1, 8), (5, 64))


# config.json

def test_what_config_json_leaves_out(tmp_path):
    """It is gpt2's, as for transformers."""
    sizes = {"vocab_size": 8, "n_layer": 1}
    save(random_gpt2(**sizes), tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).unlink()
    change_json(tmp_path / "config.json", model_type="gpt2", **sizes)
    ours, theirs = GPT.from_pretrained(tmp_path).config, GPT2Config.from_pretrained(tmp_path)
    assert ours == GPTConfig(**sizes)
    for name, value in vars(ours).items():
        assert value == getattr(theirs, "n_positions" if name == "block_size" else name), name


@pytest.mark.parametrize("name", ["max_position_embeddings", "hidden_size", "num_hidden_layers",
                                  "num_attention_heads"])
def test_other_names_of_the_sizes(tmp_path, name, one_thread):
    """transformers prefers them: here, only the other name has the size that is meant."""
    meant, sizes = GPT2Config.attribute_map[name], SIZES | {"n_head": 4, "vocab_size": 99}
    save(random_gpt2(**sizes), tmp_path)
    change_json(tmp_path / "config.json", **{meant: 1, name: sizes[meant]})
    assert_equal_logits(*pair(tmp_path), (2, 13))


def test_another_file_that_config_json_names(tmp_path):
    """model.safetensors beside it is of another model."""
    model = save(random_gpt2(**SIZES, vocab_size=99), tmp_path) / "model.safetensors"
    model.rename(tmp_path / "other.safetensors")
    save(random_gpt2(seed=1, **SIZES, vocab_size=99), tmp_path)
    change_json(tmp_path / "config.json", transformers_weights="other.safetensors")
    assert_equal_logits(*pair(tmp_path), (2, 13))


@pytest.mark.parametrize("change", [
    lambda tensors: tensors.update({"lm_head.weight": tensors.pop("transformer.wte.weight")}),
    lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}),
], ids=["head alone", "both, and different"])
def test_the_tied_pair_in_a_file(tmp_path, change):
    """Either name is enough. A head that differs from wte is used, as by transformers 5."""
    if checkpoints.TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 reads only wte.weight of the pair")
    change_weights(save(random_gpt2(**SHAPES[0]), tmp_path), change)
    ours, theirs = pair(tmp_path)
    tied = theirs.lm_head.weight is theirs.transformer.wte.weight
    assert tied == (ours.lm_head.weight is ours.transformer.wte.weight)
    assert_equal_logits(ours, theirs, (2, 9))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES, ids=str)
def test_the_dtype_is_the_one_that_transformers_takes(tmp_path, field, dtype, one_thread):
    """What config.json says, by its old name or its new one; else that of the first tensor."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    stored = other if field else dtype

    def change(tensors):
        for name in tensors:  # the first by name is not wte
            tensors[name] = tensors[name].to(torch.float64 if "wte" in name else stored)

    change_weights(save(random_gpt2(**SIZES, vocab_size=99), tmp_path), change)
    fields = {"dtype": None, "torch_dtype": None}
    if field:
        fields[field] = str(dtype).removeprefix("torch.")
    change_json(tmp_path / "config.json", **fields)
    ours, theirs = pair(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype} == {dtype}
    assert_equal_logits(ours, theirs, (2, 9))


def test_cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA here: equality was tested on the CPU alone")

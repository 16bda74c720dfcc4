"""Promise: a mistake in the flags, in a call or in a checkpoint gets one clear line that names it,
the same from the command line and from Python. Any other exception keeps its traceback."""
import copy
import errno
import math
import os
from unittest.mock import Mock

import pytest
import torch
from checkpoints import TORCH, change_json, write_checkpoint
from mistakes import IDX, change_weights, refused, refused_everywhere

import train_gpt2
from train_gpt2 import GPT, InputError, KVCache, load_tokenizer, main

pytestmark = pytest.mark.usefixtures("one_thread")


# Flags

@pytest.mark.parametrize("flags", [
    "--nonsense", "--max-length 1e2", "--dtype float8", "--num-return-sequences 0",
    f"--seed {2**64}", f"--seed {-2**63 - 1}", "--device gpu", "--device cuda:99",
    "--device meta", "--device hpu"])
def test_flags_that_are_checked_before_a_download(offline, capsys, flags):
    """Offline, a download would fail first."""
    line = refused(capsys, ["--model", "gpt2", *flags.split()], *flags.strip("-").split())
    assert "Hub" not in line
    assert ("README" in line) == ("--device" in flags)


@pytest.mark.parametrize("flags", [
    "--max-length 3", "--max-length 65", "--top-k -1", "--temperature -0.1", "--temperature nan",
    "--temperature inf", "--temperature 1e-30"])
def test_flags_that_are_checked_with_the_model(tiny, capsys, flags):
    """Its context is 64, and the prompt has more than 3 tokens."""
    refused(capsys, ["--model", tiny, *flags.split()], *flags.strip("-").split())


def test_values_at_the_bounds_are_taken(tiny, capsys):
    for flag in (f"--seed={-2**63}", f"--seed={2**64 - 1}", "--top-k=401", "--temperature=1e-29"):
        main(["--model", str(tiny), flag])
        assert capsys.readouterr().out.count("> Hello") == 5


# Which exceptions become a line

@pytest.mark.parametrize("place", ["check_config", "read_json", "find_folder", "is_plain",
                                   "sample", "GPT.forward"])
def test_a_bug_keeps_its_traceback(tiny, monkeypatch, place):
    """Wherever in this file it is: none is taken for a damaged checkpoint."""
    for error in (ValueError("x"), KeyError("x"), RuntimeError("can't allocate x")):
        monkeypatch.setattr(f"train_gpt2.{place}", Mock(side_effect=error))
        with pytest.raises(type(error)) as caught:
            main(["--model", str(tiny)])
        assert caught.value is error


@pytest.mark.parametrize("place", ["train_gpt2.GPT.forward", "safetensors.torch.load_file",
                                   "json.loads", "transformers.AutoTokenizer.from_pretrained"])
def test_out_of_memory_gets_one_line(tmp_path, monkeypatch, capsys, place):
    """Which doesn't blame the file that is being read."""
    write_checkpoint(tmp_path, "named")
    for error in (lambda *_, **__: torch.empty(2**50), MemoryError("memory"),
                  OSError(errno.ENOMEM, "Cannot allocate memory")):
        monkeypatch.setattr(place, Mock(side_effect=error))
        assert "damaged" not in refused(capsys, ["--model", tmp_path], "memory")


def test_a_hub_model_that_cannot_be_reached_is_not_called_damaged():
    """transformers raises such an OSError for weights that it can't download."""
    with pytest.raises(OSError, match="^no network$"), train_gpt2.reading("somebody/model"):
        raise OSError("no network")


# Calls from Python

@pytest.fixture(scope="module")
def gpt(tiny):
    return GPT.from_pretrained(tiny)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (1, 0), (0, 3), (2, 65)], ids=str)
def test_the_shape_of_idx(gpt, shape):
    assert issubclass(InputError, ValueError)
    for call in (gpt, lambda idx: gpt.generate(idx, 64)):
        with pytest.raises(InputError, match=str(shape[-1])):
            call(torch.zeros(shape, dtype=torch.int64))


def test_the_prompt_of_generate(gpt):
    with pytest.raises(InputError, match="ids .-1.; the model's are 0 to 399"):
        gpt.generate(torch.tensor([[1, -1]]), 10)
    with pytest.raises(InputError, match="3, .* 3 tokens.* 64"):
        gpt.generate(IDX, 3)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_logit_that_is_not_a_number(gpt, number, temperature):
    """As float16 may give, in one row and step. The likeliest is then as wrong as a sampled one."""
    broken, logits = copy.deepcopy(gpt), []

    def second_step(module, args, out):
        logits.append(out)
        if len(logits) == 2:
            out[1, -1, 7] = number

    broken.lm_head.register_forward_hook(second_step)
    with pytest.raises(InputError, match="NaN or infinite: the weights.*float16"):
        broken.generate(IDX.repeat(3, 1), 10, temperature)


def test_a_cache_takes_one_token_at_a_time_after_the_prompt():
    cache = KVCache(4)
    cache.append(*torch.ones(2, 1, 2, 2, 8))
    with pytest.raises(AssertionError, match="one token"):
        cache.append(*torch.ones(2, 1, 2, 2, 8))


# Where the checkpoint is

def test_a_name_that_is_found_nowhere(offline, capsys):
    """The line says what to check. test_words.py has the network."""
    for name in ("gpt2", "models/nowhere", "a/b/c", "C:\\gpt2"):
        refused_everywhere(capsys, name, name, "Hub", "name", "network", "folder", "config.json")


def test_what_is_there_is_not_a_folder_of_a_model(offline, tmp_path, monkeypatch, capsys):
    """An empty folder, a lecture's checkpoint, and a LoRA adapter in a folder named gpt2."""
    monkeypatch.chdir(tmp_path)
    refused_everywhere(capsys, tmp_path, "config.json", "files: []")
    (tmp_path / "ckpt.pt").touch()
    refused_everywhere(capsys, "ckpt.pt", "ckpt.pt is a file", "Hub model", "README")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "adapter_config.json").touch()
    refused_everywhere(capsys, "gpt2", "folder gpt2", "no config.json", "adapter_config.json")


# Its files. test_fuzz.py damages them in far more ways; here is what the line says.

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 548105171\n"


@pytest.mark.parametrize(("kind", "name"), [
    ({}, "model.safetensors"), ({}, "config.json"), ({}, "tokenizer.json"),
    ({"tokenizer": "vocab.json"}, "vocab.json"), ({"layout": "shards"}, "model-00001-of-*")])
def test_a_damaged_file_is_named(tmp_path, capsys, kind, name):
    """Or the folder, if transformers reads the file. For git-lfs's, the line says what to do."""
    path, = write_checkpoint(tmp_path, **kind).glob(name)
    whole = path.read_bytes()
    read = load_tokenizer if name in ("tokenizer.json", "vocab.json") else GPT.from_pretrained
    blamed = tmp_path if kind else path
    for contents in (LFS, b"", whole[:len(whole) // 2]):
        path.write_bytes(contents)
        refused_everywhere(capsys, tmp_path, blamed, "incomplete", "git lfs pull", read=read)
    path.unlink()
    refused_everywhere(capsys, tmp_path, tmp_path, read=read)


@pytest.mark.parametrize(("fields", "says"), [
    ({"n_layer": "12"}, ["n_layer", "'12'"]),
    ({"n_positions": 0}, ["block_size", "0"]),
    ({"n_head": 3}, ["n_embd", "32", "n_head", "3"]),
    ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "'1e-5'"]),
    ({"eos_token_id": [1.5]}, ["generation_config.json", "eos_token_id", "1.5"]),
    ({"eos_token_id": [None]}, ["generation_config.json", "eos_token_id", "None"]),
    ({"pad_token_id": -1}, ["generation_config.json", "pad_token_id", "-1"]),
    ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"activation_function": "quick_gelu"}, ["activation_function", "'quick_gelu'", "gelu_new"]),
    ({"n_embd": 64}, ["shape", "[400, 32]", "[400, 64]"]),
    *[({name: 10**6}, ["larger"])
      for name in ("n_embd", "vocab_size", "n_layer", "n_inner", "n_positions")],
], ids=str)
def test_the_line_names_config_json_and_what_is_wrong_in_it(model, capsys, fields, says):
    for name in ("config.json", "generation_config.json"):  # the ids of the second win
        change_json(model / name, **fields)
    assert len(refused_everywhere(capsys, model, "config.json", model, *says)) < 1000


def wrapped(tensors):
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


@pytest.mark.parametrize("reader", ["here", "transformers"])
@pytest.mark.parametrize(("change", "says"), [
    (lambda tensors: tensors.pop("transformer.ln_f.bias"), ["lack", "transformer.ln_f.bias"]),
    (lambda tensors: tensors.pop("transformer.wte.weight"), ["lack", "transformer.wte.weight"]),
    (lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(31)}), ["ln_f.bias"]),
    (dict.clear, []),
    (wrapped, ["lack", "'transformer.h.0.", "instead", "'module.transformer."]),
])
def test_weights_that_do_not_fit(tmp_path, capsys, reader, change, says):
    """They are refused, never filled up with random numbers, whoever reads them."""
    change_weights(write_checkpoint(tmp_path), change)
    if reader == "transformers":  # which this name of n_layer leads to
        change_json(tmp_path / "config.json", num_hidden_layers=2)
    refused_everywhere(capsys, tmp_path, tmp_path, *says)


def test_what_is_ignored(model, gpt, capsys):
    """As in transformers: other files with weights, and the masks in old files, as in these. Only
    tensors that GPT-2 doesn't have are ignored aloud."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (model / name).write_text("broken")
    GPT.from_pretrained(model)
    assert capsys.readouterr().err == ""
    names = ["score.weight", "v_head.weight"]
    change_weights(model, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(2))))
    assert torch.equal(GPT.from_pretrained(model)(IDX), gpt(IDX))
    assert capsys.readouterr().err == f"{model}: ignoring {names}\n"


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)  # which unpickling calls


def test_no_code_in_a_bin_is_run(tmp_path, monkeypatch, capsys):
    """A .bin file is read only with torch 2.6 or later, and only a dict of tensors is taken."""
    monkeypatch.chdir(write_checkpoint(tmp_path, layout="bin"))
    says = [] if TORCH >= (2, 6) else ["upgrade torch to at least v2.6"]
    for contents in ([torch.ones(1)], {"x": Trap()}):
        torch.save(contents, "pytorch_model.bin")
        refused_everywhere(capsys, tmp_path, tmp_path, *says)
    assert not os.path.exists("ran")
    torch.load("pytorch_model.bin", weights_only=False)
    assert os.path.exists("ran")  # the trap works


@pytest.mark.parametrize(("bos", "prompt", "says"), [
    (0, "a newword b", ["404", "403"]), (404, "", ["404", "403"]),
    (None, "", ["empty", "no bos_token_id"])])
def test_a_prompt_that_the_model_cannot_take(tmp_path, capsys, bos, prompt, says):
    """404 was added to the tokenizer alone. test_words.py shows that other prompts work then."""
    folder = write_checkpoint(tmp_path, "added", vocab_size=404, bos_token_id=bos)
    refused(capsys, ["--model", folder, "--prompt", prompt], "prompt", *says)

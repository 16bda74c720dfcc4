"""Promise: a mistake in the flags, in a call or in a checkpoint gets one clear line that names it,
the same from the command line and from Python. Any other exception keeps its traceback."""
import copy
import errno
import math
import os
import re
import shutil
import time

import pytest
import safetensors.torch
import torch
import transformers
from checkpoints import LAYOUTS, change_json, random_gpt2, save, write_checkpoint
from mistakes import IDX, change_weights, refused, refused_everywhere

import train_gpt2
from train_gpt2 import GPT, InputError, KVCache, load_tokenizer, main

pytestmark = pytest.mark.usefixtures("one_thread")


# Flags

def words(flags):
    return re.split("[ =\n]", flags.strip("-"))


@pytest.mark.parametrize("flags", [
    "--nonsense", "Hello", "--seed", "--max-length 1e2", "--num-return-sequences 2.5",
    "--temperature 0,7", "--top-k all", "--dtype float8", "--num-return-sequences 0",
    "--num-return-sequences -1", f"--seed {2**64}", f"--seed {-2**63 - 1}", "--device gpu", "--device ", "--device two\nlines", "--device cuda:99",
    "--device meta", "--device hpu"])
def test_flags_that_are_checked_before_a_download(offline, capsys, flags):
    """Offline, a download would fail first."""
    line = refused(capsys, ["--model", "gpt2", *flags.split(" ")], *words(flags))
    assert "Hub" not in line
    assert ("README" in line) == ("--device" in flags)


@pytest.mark.parametrize("flags", [
    "--max-length -1", "--max-length 3", "--max-length 65", f"--max-length {10**30}", "--top-k -1",
    "--temperature -0.1", "--temperature nan", "--temperature inf", "--temperature=-inf",
    "--temperature 1e-45"])
def test_flags_that_are_checked_with_the_model(tiny, capsys, flags):
    """Its context is 64, the prompt has more than 3 tokens, and 1e-45 would overflow the logits."""
    refused(capsys, ["--model", tiny, *flags.split()], *words(flags))


@pytest.mark.parametrize("flag", [f"--seed={-2**63}", f"--seed={2**64 - 1}", f"--top-k={10**30}",
                                  "--temperature=1e-29"])
def test_values_at_the_bounds_are_taken(tiny, capsys, flag):
    main(["--model", str(tiny), flag])
    assert capsys.readouterr().out.count("> Hello") == 5


# Which exceptions become a line

def throw(error):
    raise error


NO_MEMORY = OSError(errno.ENOMEM, "Cannot allocate memory")
BUGS = [ValueError("x"), ZeroDivisionError("x"), RuntimeError("can't allocate x"), KeyError("x")]


@pytest.mark.parametrize("error", BUGS, ids=repr)
@pytest.mark.parametrize("place", ["check_config", "read_json", "find_folder",
                                   "is_plain", "sample", "GPT.forward"])
def test_a_bug_keeps_its_traceback(tiny, monkeypatch, place, error):
    """Wherever in this file it is: none is taken for a damaged checkpoint."""
    monkeypatch.setattr(f"train_gpt2.{place}", lambda *_, **__: throw(error))
    with pytest.raises(type(error)) as caught:
        main(["--model", str(tiny)])
    assert caught.value is error


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: throw(MemoryError("memory")),
                                  lambda: throw(NO_MEMORY)], ids=["torch", "Python", "system"])
@pytest.mark.parametrize("place", ["train_gpt2.GPT.forward", "safetensors.torch.load_file",
                                   "json.loads", "transformers.AutoTokenizer.from_pretrained"])
def test_out_of_memory_gets_one_line(tmp_path, monkeypatch, capsys, place, fail):
    """Which doesn't blame the file that is being read."""
    write_checkpoint(tmp_path, "named")
    monkeypatch.setattr(place, lambda *_, **__: fail())
    assert "damaged" not in refused(capsys, ["--model", tmp_path], "memory")


def test_a_hub_model_that_cannot_be_reached_is_not_called_damaged():
    """transformers raises such an OSError for weights that it can't download."""
    error = OSError("no network")
    with pytest.raises(OSError) as caught, train_gpt2.reading("somebody/model"):
        throw(error)
    assert caught.value is error


# Calls from Python

@pytest.fixture(scope="module")
def gpt(tiny):
    return GPT.from_pretrained(tiny)


@pytest.mark.parametrize("shape", [(3,), (1, 1, 3), (1, 0), (0, 3), (2, 65)], ids=str)
def test_idx(gpt, shape):
    """By either call, it is an InputError. A second argument, as in the lecture, is refused."""
    assert issubclass(InputError, ValueError)
    for call in (gpt, lambda idx: gpt.generate(idx, 64)):
        with pytest.raises(InputError, match=str(shape[-1])):
            call(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(TypeError, match="positional"):
        gpt(IDX, IDX)


@pytest.mark.parametrize(("arguments", "says"), [
    ({"idx": torch.tensor([[1, -1]])}, "-1"), ({"idx": torch.tensor([[10**6, 1]])}, "1000000"),
    ({"max_length": 3}, "3.* 3 tokens.* 64"), ({"temperature": 1e-30}, "1e-30"),
    ({"top_k": -1}, "-1")], ids=str)
def test_generate(gpt, arguments, says):
    with pytest.raises(InputError, match=says):
        gpt.generate(**{"idx": IDX, "max_length": 10} | arguments)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["all", "one"])
def test_logits_that_are_not_numbers(gpt, place, number, temperature):
    """As float16 may give. The likeliest of those would be as wrong as a sampled one."""
    broken = copy.deepcopy(gpt)
    with torch.no_grad():
        wte, bias = broken.transformer.wte.weight, broken.transformer.ln_f.bias
        (bias if place == "all" else wte[7]).fill_(number)  # 7 isn't in the prompt
    with pytest.raises(InputError, match="weights.*float16") as caught:
        broken.generate(IDX, 10, temperature)
    assert "temperature" not in str(caught.value)


def test_a_cache_takes_one_token_at_a_time_after_the_prompt():
    """It would get more of them wrong: the mask is that of a prompt."""
    cache = KVCache(4)
    for T in (2, 1):
        cache.append(*torch.ones(2, 1, 2, T, 8))
    with pytest.raises(AssertionError, match="one token"):
        cache.append(*torch.ones(2, 1, 2, 2, 8))


# Where the checkpoint is

@pytest.mark.parametrize("name", ["gpt2", "models/nowhere", "a/b/c", "no spaces", "two\nlines",
                                  "-x", "ends.git", "é", "http://127.0.0.1:9/gpt2", "C:\\gpt2"])
def test_a_name_that_is_found_nowhere(offline, capsys, name):
    """The line says what to check. test_words.py has the network."""
    says = ["Hub", "name", "network", "folder", "config.json"]
    line = refused(capsys, [f"--model={name}"], name.split("\n")[0], *says)
    with pytest.raises(OSError) as caught:
        GPT.from_pretrained(name)
    assert line == " ".join(str(caught.value).split())


def test_what_is_there_is_not_a_folder_of_a_model(offline, tmp_path, monkeypatch, capsys):
    """A lecture's checkpoint, an empty folder, a folder named as a model on the Hub, an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", tmp_path):
        refused_everywhere(capsys, name, "config.json", "files: []")
    for name in ("out/ckpt.pt", "gpt2/notes.txt", "lora/adapter_config.json",
                 "lora/adapter_model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert "Hub model" in refused_everywhere(capsys, "out/ckpt.pt", "out/ckpt.pt is a file")
    refused_everywhere(capsys, "gpt2", "folder gpt2", "config.json", "notes.txt")
    refused_everywhere(capsys, "lora", "folder lora", "config.json", "adapter_model.safetensors")


# Its files. test_fuzz.py damages them in far more ways; here is what the line says.

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
HTML = b"<!DOCTYPE html><html><head><title>Not found</title></head></html>"  # of a wrong link
NO_BIN = "a .bin file is read only with torch 2.6 or later"


@pytest.mark.parametrize(("kind", "name"), [
    ("today saved", "model.safetensors"), ("today saved", "config.json"),
    ("today saved", "tokenizer.json"), ("today bin", "pytorch_model.bin"),
    ("vocab.json saved", "vocab.json"), ("today shards", "model.safetensors.index.json"),
    ("today shards", "model-00001-of-*"), ("today bin shards", "pytorch_model-00001-of-*")])
def test_a_damaged_file_is_named(tmp_path, capsys, kind, name):
    """Or the folder, if transformers reads the file. A git-lfs pointer says what to do."""
    tokenizer, layout = kind.split(" ", 1)
    if layout not in LAYOUTS:
        pytest.skip(NO_BIN)
    path, = write_checkpoint(tmp_path, tokenizer, layout).glob(name)
    whole = path.read_bytes()
    how = {"read": load_tokenizer} if name in ("tokenizer.json", "vocab.json") else {}
    blamed = path if layout == "saved" and name != "vocab.json" else tmp_path
    for contents in (HTML, b"", whole[:-9], whole[:len(whole) // 2]):
        path.write_bytes(contents)
        refused_everywhere(capsys, tmp_path, blamed, "incomplete", **how)
    if name not in ("config.json", "vocab.json", "model.safetensors.index.json"):  # all large ones
        path.write_bytes(LFS)
        refused_everywhere(capsys, tmp_path, blamed, "git lfs pull", **how)
    path.unlink()
    refused_everywhere(capsys, tmp_path, tmp_path, **how)
    path.mkdir()
    refused_everywhere(capsys, tmp_path, tmp_path, **how)


@pytest.mark.parametrize(("fields", "says"), [
    ({"n_layer": "12"}, ["n_layer", "'12'"]),
    ({"n_positions": 0}, ["block_size", "0"]),
    ({"n_head": 3}, ["n_embd", "32", "n_head", "3"]),
    ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "'1e-5'"]),
    ({"eos_token_id": [1.5]}, ["generation_config.json", "eos_token_id", "1.5"]),
    ({"eos_token_id": [None]}, ["generation_config.json", "eos_token_id", "None"]),
    ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"activation_function": "quick_gelu"}, ["activation_function", "'quick_gelu'", "gelu_new"]),
    ({"n_embd": 64}, ["shape", "[400, 32]", "[400, 64]"]),
    *[({name: size}, ["larger"]) for size in (10**6, 10**18)
      for name in ("n_embd", "vocab_size", "n_layer", "n_inner", "n_positions")],
], ids=str)
def test_the_line_names_config_json_and_what_is_wrong_in_it(model, capsys, fields, says):
    for name in ("config.json", "generation_config.json"):  # the ids of the second win
        change_json(model / name, **fields)
    began = time.perf_counter()
    assert len(refused_everywhere(capsys, model, "config.json", model, *says)) < 1000
    assert time.perf_counter() - began < 10  # a million layers take minutes to build


def less(name):
    return lambda tensors: tensors.pop(name)


def prefixed(prefix):
    return lambda tensors: [tensors.update({prefix + name: tensors.pop(name)})
                            for name in list(tensors)]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name in ("saved", "bin", "shards")])
@pytest.mark.parametrize(("change", "says"), [
    (less("transformer.h.1.mlp.c_fc.bias"), ["lack", "h.1.mlp.c_fc.bias"]),
    (less("transformer.wte.weight"), ["lack", "transformer.wte.weight"]),
    (lambda tensors: tensors.update({"transformer.ln_f.bias": torch.ones(31)}), ["ln_f.bias"]),
    (dict.clear, []),
    (prefixed("_orig_mod."), ["lack", "'transformer.h.0.", "instead", "'_orig_mod.transformer."]),
    (prefixed("module."), ["lack", "'transformer.h.0.", "instead", "'module.transformer."]),
], ids=["one less", "no wte", "shape", "none", "compiled", "wrapped"])
def test_weights_that_do_not_fit(tmp_path, capsys, layout, change, says):
    """They are refused, never filled up with random numbers, whoever reads them."""
    shard = "model-00001-of-00001.safetensors"
    file = write_checkpoint(tmp_path) / "model.safetensors"
    change_weights(tmp_path, change)
    tensors = safetensors.torch.load_file(file)
    if layout == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    if layout == "shards":
        shutil.copy(file, tmp_path / shard)
        change_json(tmp_path / "model.safetensors.index.json", metadata={},
                    weight_map=dict.fromkeys(tensors, shard))
    if layout != "saved":
        file.unlink()
    refused_everywhere(capsys, tmp_path, tmp_path, *says)


def test_tensors_that_gpt2_does_not_have_are_ignored_aloud(model, gpt, capsys):
    """As transformers does. The masks in old files, as in these, are ignored silently."""
    GPT.from_pretrained(model)
    assert capsys.readouterr().err == ""
    names = ["score.weight", "v_head.weight"]
    change_weights(model, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(2))))
    assert torch.equal(GPT.from_pretrained(model)(IDX), gpt(IDX))
    assert capsys.readouterr().err == f"{model}: ignoring {names}\n"


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.skipif("bin" not in LAYOUTS, reason=NO_BIN)
@pytest.mark.parametrize("zip", [True, False], ids=["zip", "before torch 1.6"])
def test_no_code_in_a_bin_is_run(tmp_path, monkeypatch, capsys, zip):
    """Only a dict of tensors is taken."""
    monkeypatch.chdir(write_checkpoint(tmp_path, layout="bin"))
    path = tmp_path / "pytorch_model.bin"
    for contents in ([torch.ones(1)], {"model": {"x": torch.ones(1)}}, {"step": 1}, torch.ones(1),
                     {1: torch.ones(1)}, {"x": Trap()}):
        torch.save(contents, path, _use_new_zipfile_serialization=zip)
        refused_everywhere(capsys, tmp_path, tmp_path)
    assert not os.path.exists("ran")
    torch.load(path, weights_only=False)
    assert os.path.exists("ran")  # the trap works


def test_a_bin_before_torch_26(tmp_path, monkeypatch, capsys):
    """weights_only=True had a hole then. Nothing is opened, and the line says what to do."""
    folder = save(random_gpt2(n_layer=1, n_head=1, n_embd=8, vocab_size=8), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    # transformers asks what pip installed.
    monkeypatch.setattr(transformers.utils.import_utils, "is_torch_greater_or_equal",
                        lambda version, **_: False)
    monkeypatch.setattr(torch, "load", None)
    refused_everywhere(capsys, folder, folder, "upgrade torch to at least v2.6")


def test_model_safetensors_goes_before_all_others(model, gpt):
    """As in transformers."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (model / name).write_text("broken")
    assert torch.equal(GPT.from_pretrained(model)(IDX), gpt(IDX))


# Its tokenizer

@pytest.mark.parametrize(("bos", "prompt", "says"), [
    (0, "a newword b", ["404", "399"]), (None, "", ["empty", "bos_token_id"]),
    (10**6, "", ["1000000", "399"])], ids=["added token", "no bos", "large bos"])
def test_a_prompt_that_the_model_cannot_take(tmp_path, capsys, bos, prompt, says):
    """404 was added to the tokenizer alone. test_words.py shows that other prompts work then."""
    folder = write_checkpoint(tmp_path, "added", vocab_size=400, bos_token_id=bos)
    assert load_tokenizer(folder).token_to_id("newword") == 404
    refused(capsys, ["--model", folder, "--prompt", prompt], "prompt", *says)

"""Promise: a mistake in the flags, in a call or in a checkpoint gets one clear line that names it,
the same from the command line and from Python. Any other exception keeps its traceback."""
import copy
import json
import math
import os
import re
import shutil
import time

import pytest
import torch
from checkpoints import LAYOUTS, SIZES, change_json, random_gpt2, save, write_checkpoint
from hub import StandInHub
from mistakes import IDX, change_weights, refused, refused_everywhere, run, the_line
from torch.torch_version import TorchVersion

from train_gpt2 import GPT, InputError, KVCache, load_tokenizer, main

pytestmark = pytest.mark.usefixtures("one_thread")


# Flags

def words(flags):
    return re.split("[ =\n]", flags.strip("-"))


@pytest.mark.parametrize("flags", [
    "--nonsense", "Hello", "--seed", "--max-length 1e2", "--num-return-sequences 2.5",
    "--temperature 0,7", "--top-k all", "--dtype float8", "--num-return-sequences 0",
    "--num-return-sequences -1", f"--num-return-sequences {2**31}", f"--seed {2**64}",
    f"--seed {-2**63 - 1}", "--device gpu", "--device ", "--device two\nlines", "--device cuda:99",
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


def test_max_length_counts_the_prompts_tokens(tiny, capsys):
    """One more than these is enough. A prompt must leave room for it in the model."""
    prompt = "The model, the weights"
    tokens = len(load_tokenizer(tiny).encode(prompt).ids)
    args = ["--model", str(tiny), "--prompt", prompt, "--max-length"]
    refused(capsys, [*args, tokens], "max-length", tokens)
    main([*args, str(tokens + 1)])
    assert capsys.readouterr().out.count(f"> {prompt}") == 5
    refused(capsys, ["--model", tiny, "--prompt", prompt * 20], "prompt", "64")


# Which exceptions become a line

def throw(error):
    raise error


@pytest.mark.parametrize("error", [ValueError("x"), ZeroDivisionError("x"), RuntimeError("x"),
                                   AssertionError("x"), KeyError("x")], ids=repr)
def test_a_bug_keeps_its_traceback(tiny, monkeypatch, error):
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: throw(error))
    with pytest.raises(type(error)) as caught:
        main(["--model", str(tiny)])
    assert caught.value is error


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**50), lambda: throw(OSError("allocate"))],
                         ids=["out of memory", "OSError"])
def test_what_is_not_a_bug_gets_one_line(tiny, monkeypatch, capsys, fail):
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: fail())
    refused(capsys, ["--model", tiny], "allocate")


# Calls from Python

@pytest.fixture(scope="module")
def gpt(tiny):
    return GPT.from_pretrained(tiny)


def ids(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize("idx", [
    None, [[1, 2, 3]], "Hello", IDX.numpy(), ids(), ids(3), ids(1, 1, 3), ids(1, 0), ids(0, 3),
    ids(2, 65), ids(1, 3, dtype=torch.float32), ids(1, 3, dtype=torch.int32),
], ids=lambda idx: str(getattr(idx, "dtype", type(idx))) + str(list(getattr(idx, "shape", ""))))
def test_idx(gpt, idx):
    """By either call, it is an InputError. A second argument, as in the lecture, is refused."""
    assert issubclass(InputError, ValueError)
    for call in (gpt, lambda idx: gpt.generate(idx, 64)):
        with pytest.raises(InputError, match="idx"):
            call(idx)
    with pytest.raises(TypeError, match="positional"):
        gpt(IDX, IDX)


@pytest.mark.parametrize(("name", "value", "says"), [
    ("idx", torch.tensor([[1, -1]]), "-1,"), ("idx", torch.tensor([[10**6, 1]]), "1000000,"),
    ("idx", ids(1, 65), "65 .* 64"), ("max_length", 3, "3 tokens.* 64, not 3"),
    ("temperature", 1e-30, "1e-30"), ("top_k", -1, "-1")], ids=str)
def test_generate(gpt, name, value, says):
    with pytest.raises(InputError, match=f"{name}.* {says}"):
        gpt.generate(**{"idx": IDX, "max_length": 10, name: value})


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


@pytest.mark.parametrize("steps", [0, 1, 9])
def test_an_interrupted_generate_leaves_the_model_as_it_was(gpt, steps):
    """In the prompt, in the first new token, or later."""
    before = copy.deepcopy(gpt)
    left = [None] * steps
    hook = gpt.transformer.h[1].register_forward_hook(
        lambda *_: left.pop() if left else throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gpt.generate(IDX, 40)
    hook.remove()
    torch.manual_seed(0)
    tokens = before.generate(IDX, 40)
    torch.manual_seed(0)
    assert torch.equal(gpt.generate(IDX, 40), tokens)
    assert torch.equal(gpt(IDX), before(IDX))
    assert gpt(IDX).requires_grad  # it can still be trained


@pytest.mark.parametrize("lengths", [[5], [4, 1], [2, 2], [1, 2]], ids=str)
def test_a_cache_refuses_what_it_would_get_wrong(lengths):
    """More tokens than it has room for, or several at once when some are there already."""
    cache = KVCache((1, 2, 4, 8), like=torch.empty(0))
    *fit, last = [torch.ones(1, 2, length, 8) for length in lengths]
    for k in fit:
        cache.append(k, k)
    with pytest.raises(AssertionError, match="cache"):
        cache.append(last, last)


# Where the checkpoint is

@pytest.mark.parametrize("name", ["gpt2", "models/nowhere", "a/b/c", "no spaces", "two\nlines",
                                  "-x", "ends.git", "é", "http://127.0.0.1:9/gpt2", "C:\\gpt2"])
def test_a_name_that_is_found_nowhere(offline, tmp_path, monkeypatch, capsys, name):
    """The line says what to check. A file of that name doesn't count."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").touch()
    says = ["Hub", "name", "network", "folder", "config.json"]
    line = refused(capsys, [f"--model={name}"], name.split("\n")[0], *says)
    with pytest.raises(OSError) as caught:
        GPT.from_pretrained(name)
    assert line == " ".join(str(caught.value).split())


def test_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", tmp_path):
        refused_everywhere(capsys, name, "config.json")


def test_no_network_and_a_name_that_the_hub_does_not_have(tmp_path):
    with StandInHub({}) as hub:
        env = hub.env(tmp_path)
        the_line(*run("--model", "a/b", **env), "a/b", "Hub", "check the name", "404")
        nobody = env | {"HF_ENDPOINT": "http://127.0.0.1:9"}
        the_line(*run("--model", "gpt2", **nobody), "gpt2", "Hub", "network", "folder")


def test_the_next_run_mends_a_broken_download(tiny, tmp_path):
    """First the disk takes only half of the weights, then the line breaks off, then all is well."""
    def download(cut=(), **env):
        with StandInHub({"someone/tiny": tiny}, cut=cut) as hub:
            return run("--model", "someone/tiny", **hub.env(tmp_path), **env)

    if os.name == "posix":  # elsewhere there is no limit to set
        import resource
        half = (tiny / "model.safetensors").stat().st_size // 2
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:  # what starts now inherits the limit
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, limit[1]))
            result = download(PYTHONDONTWRITEBYTECODE="1")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        the_line(*result, "someone/tiny", "File too large")
    code, out, err = download(cut=["model.safetensors"])
    line = the_line(code, out, err.splitlines()[-1], "someone/tiny")  # others are huggingface_hub's
    assert "500" in line or "Connection broken" in line
    code, out, err = download()
    assert code == 0 and out.count("> Hello, I'm a language model,") == 5 and "error" not in err


# Its files. test_fuzz.py damages them in far more ways; here is what the line says.

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n"
HTML = b"<!DOCTYPE html><html><head><title>Not found</title></head></html>"  # of a wrong link


@pytest.mark.parametrize(("tokenizer", "layout", "name"), [
    ("today", "saved", "model.safetensors"), ("today", "saved", "config.json"),
    ("today", "saved", "tokenizer.json"), ("vocab.json", "saved", "vocab.json"),
    ("today", "shards", "model.safetensors.index.json"), ("today", "shards", "model-00001-of-*"),
    ("today", "bin", "pytorch_model.bin"), ("today", "bin shards", "pytorch_model-00001-of-*")])
def test_a_damaged_file_is_named(tmp_path, capsys, tokenizer, layout, name):
    """And what to do about it."""
    if layout not in LAYOUTS:
        pytest.skip("a .bin file is read only with torch 2.6 or later")
    path, = write_checkpoint(tmp_path, tokenizer, layout).glob(name)
    whole = path.read_bytes()
    how = {"read": load_tokenizer} if name in ("tokenizer.json", "vocab.json") else {}
    for contents in (HTML, b"", whole[:-9], whole[:len(whole) // 2]):
        path.write_bytes(contents)
        refused_everywhere(capsys, tmp_path, path, "incomplete", "download it again", **how)
    path.write_bytes(LFS)
    refused_everywhere(capsys, tmp_path, path, "git lfs pull", **how)
    path.unlink()
    refused_everywhere(capsys, tmp_path, path.name.removesuffix(".index.json"), **how)
    path.mkdir()
    refused_everywhere(capsys, tmp_path, path, **how)


@pytest.mark.parametrize(("fields", "says"), [
    ({"n_layer": "12"}, ["n_layer", "'12'"]),
    ({"n_positions": 0}, ["block_size", "0"]),
    ({"n_head": 3}, ["n_embd", "32", "n_head", "3"]),
    ({"layer_norm_epsilon": "1e-5"}, ["layer_norm_epsilon", "'1e-5'"]),
    ({"eos_token_id": [1.5]}, ["generation_config.json", "eos_token_id", "1.5"]),
    ({"model_type": "llama"}, ["model_type", "'llama'", "'gpt2'"]),
    ({"add_cross_attention": True}, ["add_cross_attention", "True"]),
    ({"activation_function": "quick_gelu"}, ["activation_function", "'quick_gelu'", "gelu_new"]),
    ({"n_layer": 10**6}, ["n_layer"]),
    ({"n_embd": 64}, ["shape", "[400, 32]", "[400, 64]"]),
    ({"n_positions": 10**8}, ["transformer.wpe.weight", 10**8]),
], ids=str)
def test_the_line_names_config_json_and_what_is_wrong_in_it(model, capsys, fields, says):
    for name in ("config.json", "generation_config.json"):  # the ids of the second win
        change_json(model / name, **fields)
    began = time.perf_counter()
    assert len(refused_everywhere(capsys, model, "config.json", model, *says)) < 1000
    assert time.perf_counter() - began < 10  # a million layers take minutes to build


@pytest.mark.parametrize(("change", "says"), [
    (lambda tensors: tensors.pop("h.1.mlp.c_fc.bias"), ["lack", "h.1.mlp.c_fc.bias"]),
    (lambda tensors: tensors.pop("wte.weight"), ["lack", "transformer.wte.weight"]),
    (dict.clear, ["n_layer"]),
    (lambda tensors: tensors.update({"ln_f.bias": torch.ones(31)}), ["ln_f.bias", "31", "32"]),
    (lambda tensors: tensors.update({"ln_f.bias": ids(32)}), ["ln_f.bias", "int64", "bfloat16"]),
], ids=["one less", "no head", "none", "shape", "integers"])
def test_weights_that_do_not_fit(model, capsys, change, says):
    change_weights(model, change)
    refused_everywhere(capsys, model, model, *says)


def test_tensors_that_gpt2_does_not_have_are_ignored_aloud(model, gpt, capsys):
    """As transformers does. The masks in old files, as in these, are ignored silently."""
    GPT.from_pretrained(model)
    assert capsys.readouterr().err == ""
    names = ["score.weight", "v_head.weight"]
    change_weights(model, lambda tensors: tensors.update(dict.fromkeys(names, torch.ones(2))))
    assert torch.equal(GPT.from_pretrained(model)(IDX), gpt(IDX))
    assert capsys.readouterr().err == f"{model}: ignoring {', '.join(names)}\n"


class Trap:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.skipif("bin" not in LAYOUTS, reason="a .bin is read only with torch 2.6 or later")
@pytest.mark.parametrize("zip", [True, False], ids=["zip", "before torch 1.6"])
def test_no_code_in_a_bin_is_run(tmp_path, monkeypatch, capsys, zip):
    """Only a dict of tensors is taken."""
    monkeypatch.chdir(write_checkpoint(tmp_path, layout="bin"))
    path = tmp_path / "pytorch_model.bin"
    for contents in ([torch.ones(1)], {"model": {"x": torch.ones(1)}}, {"step": 1}, torch.ones(1),
                     {1: torch.ones(1)}, {"x": Trap()}):
        torch.save(contents, path, _use_new_zipfile_serialization=zip)
        line = refused_everywhere(capsys, tmp_path, path)
    assert "no code in it was run" in line
    assert not os.path.exists("ran")
    torch.load(path, weights_only=False)
    assert os.path.exists("ran")  # the trap works


def test_a_bin_before_torch_26(model, monkeypatch, capsys):
    """weights_only=True had a hole then. The line says both ways out."""
    path = (model / "model.safetensors").rename(model / "pytorch_model.bin")
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.5.1"))
    refused_everywhere(capsys, model, path, "2.6", "2.5.1", "upgrade torch", "model.safetensors")


def test_an_index_that_lists_other_shards(tmp_path, capsys):
    """One outside the folder is not read, not even a good one. Missing tensors are named."""
    folder = tmp_path / "shards"
    (folder / "sub").mkdir(parents=True)
    index = write_checkpoint(folder, layout="shards") / "model.safetensors.index.json"
    shards = json.loads(index.read_text())["weight_map"]
    last = max(shards.values())
    for name in ("../x", "sub/x", str(tmp_path / "y")):
        shutil.copy(folder / last, folder / name)
        change_json(index, weight_map=shards | {"a": name})
        refused_everywhere(capsys, folder, index, name, "name of a file")
    change_json(index, weight_map=[])
    refused_everywhere(capsys, folder, index, "weight_map")
    change_json(index, weight_map={name: shard for name, shard in shards.items() if shard != last})
    refused_everywhere(capsys, folder, "lack", next(n for n in shards if shards[n] == last))


def test_model_safetensors_goes_before_all_others(model, gpt):
    """As in transformers."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (model / name).write_text("broken")
    assert torch.equal(GPT.from_pretrained(model)(IDX), gpt(IDX))


# Its tokenizer

@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token", "add_prefix_space",
                                  "split_special_tokens"])
def test_settings_of_a_tokenizer_that_are_not_supported(model, capsys, name):
    change_json(model / "tokenizer_config.json", **{name: True})
    refused_everywhere(capsys, model, "tokenizer_config.json", name, read=load_tokenizer)
    change_json(model / "tokenizer_config.json", **{name: False})
    assert load_tokenizer(model).encode("Hello").ids


@pytest.mark.parametrize(("bos", "prompt", "says"), [
    (0, "a newword b", ["404", "399"]), (None, "", ["empty", "bos_token_id"]),
    (10**6, "", ["1000000", "399"])], ids=["added token", "no bos", "large bos"])
def test_a_prompt_that_the_model_cannot_take(tmp_path, capsys, bos, prompt, says):
    """404 was added to the tokenizer alone. test_words.py shows that other prompts work then."""
    folder = write_checkpoint(tmp_path, "added", vocab_size=400, bos_token_id=bos)
    assert load_tokenizer(folder).token_to_id("newword") == 404
    refused(capsys, ["--model", folder, "--prompt", prompt], "prompt", *says)


@pytest.mark.parametrize("fields", [{}, {"vocab_size": 50257, "eos_token_id": None},
                                    {"vocab_size": 50000, "eos_token_id": 50256}], ids=str)
def test_no_tokenizer(model, capsys, fields):
    """gpt2's would be the wrong one. The line says how to save the right one."""
    for name in ("vocab.json", "merges.txt", "generation_config.json"):
        (model / name).unlink()
    change_json(model / "config.json", **fields)
    refused_everywhere(capsys, model, model, "tokenizer.json", "save_pretrained(folder, tokenizer)",
                       read=load_tokenizer)


def test_gpt2s_tokenizer_for_a_gpt2_without_one(offline, tiny, tmp_path, capsys):
    """It is downloaded, without gpt2's weights. Without a network, one line says so."""
    folder = save(random_gpt2(vocab_size=50257, eos_token_id=50256, **SIZES), tmp_path / "bare")
    refused_everywhere(capsys, folder, "gpt2", "Hub", "network", read=load_tokenizer)
    with StandInHub({"gpt2": tiny}) as hub:
        code, out, err = run("--model", folder, **hub.env(tmp_path / "cache"))
        assert not any("safetensors" in path for _, path in hub.requests)
    assert code == 0 and out.startswith("> Hello, I'm a language model,")
    assert f"{folder} has no tokenizer: using gpt2's" in err

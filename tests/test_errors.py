"""Every mistake gets one clear line: from the command line on stderr with exit code 2, from Python as an exception."""
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub.constants
import pytest
import tiktoken.registry
import torch
from checkpoints import ROOT, random_gpt2, save
from hub import StandInHub
from safetensors.torch import load_file, save_file

import train_gpt2
from train_gpt2 import GPT, GPTConfig

IDX = torch.tensor([[1, 2, 3]])
OTHER = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this tiny are slower with more, and far slower where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny model, for damaging."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """As on a machine without a network that has downloaded nothing yet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def the_line(code, out, err, *words):
    """The one line in which a run refused, after checking that there is nothing else and that it says the words."""
    *before, line = err.splitlines()
    assert code == 2 and out == ""
    assert line.startswith("train_gpt2.py: error: ")
    assert [text for text in before if text and not text.startswith(("using device", "Fetching"))] == []  # Hub's bar
    for word in words:
        assert word.lower().replace("_", "-") in line.lower().replace("_", "-")
    return line.removeprefix("train_gpt2.py: error: ")


def refused(capsys, args, *words):
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main([str(arg) for arg in args])
    return the_line(exit.value.code, *capsys.readouterr(), *words)


def refused_everywhere(capsys, folder, *words):
    """The command line and from_pretrained() refuse the model, in the same words."""
    line = refused(capsys, ["--model", folder], *words)
    with pytest.raises((ValueError, OSError)) as caught:
        GPT.from_pretrained(folder)
    assert line == " ".join(str(caught.value).split())
    return line


def start(*args, stdout=subprocess.PIPE, **env):
    """The script as a process of its own. What it writes is read as bytes: encodings are part of what is tested."""
    return subprocess.Popen([sys.executable, ROOT / "train_gpt2.py", *map(str, args)],
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,  # tiny models only wait for more threads
                            stdout=stdout, stderr=subprocess.PIPE)


def finish(process):
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # one that hangs must not outlive the tests; to one that has ended it does nothing
    return process.returncode, (out or b"").decode(errors="replace"), err.decode(errors="replace")


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


# Arguments: all are refused before the weights are read, so a model whose weights are broken gives the same lines.

@pytest.mark.parametrize("args, words", [
    (["--nonsense"], ["--nonsense"]),
    (["Hello"], ["Hello"]),  # --prompt forgotten
    (["--prompt", "Hello", "there"], ["there"]),  # the quotes forgotten
    (["--seed"], ["--seed"]),  # the value forgotten
    (["--max-length", "ten"], ["--max-length", "ten"]),
    (["--max-length", "1e2"], ["--max-length", "1e2"]),
    (["--num-return-sequences", "2.5"], ["--num-return-sequences", "2.5"]),
    (["--temperature", "hot"], ["--temperature", "hot"]),
    (["--temperature", "0,7"], ["--temperature", "0,7"]),  # a decimal comma
    (["--top-k", "all"], ["--top-k", "all"]),
    (["--seed", ""], ["--seed"]),
    (["--max-length", "-1"], ["max-length", "-1"]),
    (["--max-length", "0"], ["max-length", "0"]),
    (["--max-length", "3"], ["max-length", "3"]),  # fewer than the prompt's tokens
    (["--max-length", "65"], ["max-length", "65", "64"]),  # the model's context is 64
    (["--max-length", 10**30], ["max-length"]),
    (["--prompt", "one two three " * 50], ["prompt", "64"]),
    (["--prompt", "one two three " * 50, "--max-length", 1000], ["prompt", "64"]),
    (["--num-return-sequences", "0"], ["num-return-sequences"]),
    (["--num-return-sequences", "-1"], ["num-return-sequences"]),
    (["--temperature", "-0.1"], ["temperature", "-0.1"]),
    (["--temperature", "nan"], ["temperature", "nan"]),
    (["--temperature", "inf"], ["temperature", "inf"]),
    (["--temperature=-inf"], ["temperature", "-inf"]),
    (["--top-k", "-1"], ["top-k", "-1"]),
    (["--seed", 2**64], ["seed"]),
    (["--seed", -2**63 - 1], ["seed"]),
    (["--seed", 10**30], ["seed"]),
    (["--dtype", "float8"], ["dtype", "float8", "bfloat16"]),
    (["--dtype", "Float32"], ["dtype", "Float32"]),
    (["--dtype", ""], ["dtype"]),
    (["--device", "gpu"], ["device", "gpu"]),
    (["--device", ""], ["device"]),
    (["--device", "cpu:x"], ["device", "cpu:x"]),
    (["--device", "cuda:99"], ["device", "cuda:99"]),
    (["--device", "meta"], ["device", "meta"]),  # exists, but computes nothing
    (["--device", "vulkan"], ["device", "vulkan"]),
    (["--device", "hpu"], ["device", "hpu"]),  # torch looks for a module that is not installed
    (["--device", "two\nlines"], ["device"]),
], ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, list) else None)
def test_arguments(model, capsys, args, words):
    (model / "model.safetensors").write_bytes(b"garbage")
    assert "safetensors" not in refused(capsys, ["--model", model, *args], *words)


@pytest.mark.parametrize("number", [10**15, 10**30])
def test_more_sequences_than_any_memory_holds(tiny, capsys, number):
    refused(capsys, ["--model", tiny, "--num-return-sequences", number])


def test_max_length_must_exceed_the_prompts_tokens(tiny, capsys):
    tokens = len(train_gpt2.load_tokenizer(tiny, 10**6).encode("The model, the weights"))
    args = ["--model", tiny, "--prompt", "The model, the weights", "--max-length"]
    refused(capsys, [*args, tokens], "max-length", str(tokens))
    train_gpt2.main([str(arg) for arg in [*args, tokens + 1]])
    assert capsys.readouterr().out.count("> The model") == 5


@pytest.mark.parametrize("seed", [-2**63, 2**64 - 1])
def test_every_seed_that_torch_takes(tiny, capsys, seed):
    train_gpt2.main(["--model", str(tiny), f"--seed={seed}"])
    assert capsys.readouterr().out.count("> Hello") == 5


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_on_a_torch_without_it(tiny, capsys, device):
    if torch.version.cuda:
        pytest.skip("this torch is built with CUDA")
    assert re.search("README|pytorch.org|pip install", refused(capsys, ["--model", tiny, "--device", device], "CUDA"))


def test_arguments_are_checked_before_the_model_is_fetched(offline, capsys):
    assert "Hub" not in refused(capsys, ["--model", "gpt2", "--top-k", "-1"], "top-k")


# Model

@pytest.mark.parametrize("name", ["a/b/c", "no spaces", "two\nlines", "-x", "ends.git", "a--b", "é", "x" * 97,
                                  "a" * 5000, "http://huggingface.co/gpt2", "C:\\gpt2"])
def test_malformed_name(offline, capsys, name):
    refused(capsys, [f"--model={name}"], name.split("\n")[0])


@pytest.mark.parametrize("name", ["", "."])
def test_name_that_is_this_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert re.search("config.json|model.safetensors", refused_everywhere(capsys, name))


OFFLINE = ["gpt2", "cache", "Hub", "reached", "folder", "config.json", "model.safetensors"]  # and what to do about it


def test_offline_with_an_empty_cache(tmp_path):
    process = start("--model", "gpt2", HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="0",
                    HF_HOME=str(tmp_path))
    the_line(*finish(process), *OFFLINE)


def test_offline_because_the_user_said_so(offline, capsys):
    refused_everywhere(capsys, "gpt2", *OFFLINE)


def test_name_that_the_hub_does_not_have(tmp_path):
    with StandInHub({}) as hub:
        line = the_line(*finish(start("--model", "someone/gtp2", **hub.env(tmp_path))), "someone/gtp2", "Hub", "check")
        assert "reached" not in line  # it was: waiting for a better network would not help
        assert hub.requests


def test_model_on_the_hub_without_safetensors(model, tmp_path):
    """Old fine-tunes have pytorch_model.bin alone. It is not downloaded, so the line must convert the Hub's."""
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with StandInHub({"someone/old": model}) as hub:
        process = start("--model", "someone/old", **hub.env(tmp_path / "cache"))
        the_line(*finish(process), "model.safetensors", "from_pretrained('someone/old')")
        assert not any("pytorch_model.bin" in path for _, path in hub.requests)


def test_broken_download_is_mended_by_the_next_run(tiny, tmp_path):
    """First the disk takes no more than half of the weights, then the line breaks off, then all is well."""
    args = ["--model", "someone/tiny", "--num-return-sequences", "1"]
    if os.name == "posix":  # elsewhere there is no limit to set
        import resource
        half = (tiny / "model.safetensors").stat().st_size // 2
        with StandInHub({"someone/tiny": tiny}) as hub:
            limit = resource.getrlimit(resource.RLIMIT_FSIZE)
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (half, limit[1]))  # inherited by what is started now
                process = start(*args, **hub.env(tmp_path), PYTHONDONTWRITEBYTECODE="1")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            the_line(*finish(process), "someone/tiny", "File too large")
    with StandInHub({"someone/tiny": tiny}, cut=["model.safetensors"]) as hub:
        code, out, err = finish(start(*args, **hub.env(tmp_path)))  # huggingface_hub adds lines of its own
        the_line(code, out, err.splitlines()[-1], "someone/tiny", "500")
    with StandInHub({"someone/tiny": tiny}) as hub:
        code, out, err = finish(start(*args, **hub.env(tmp_path)))
    assert code == 0 and out.startswith("> Hello, I'm a language model,") and "error" not in err


def test_folder_that_is_not_there(offline, tmp_path, capsys):
    refused_everywhere(capsys, tmp_path / "nowhere", str(tmp_path / "nowhere"), "folder")


def test_relative_folder_that_is_not_there(offline, capsys):
    refused_everywhere(capsys, "models/nowhere", "models/nowhere", "folder", "cache", "Hub")  # could be on the Hub


def test_empty_folder(tmp_path, capsys):
    assert re.search("config.json|model.safetensors", refused_everywhere(capsys, tmp_path, str(tmp_path)))


def test_folder_without_config(model, capsys):
    (model / "config.json").unlink()
    refused_everywhere(capsys, model, "config.json")


def test_folder_without_weights(model, capsys):
    (model / "model.safetensors").unlink()
    refused_everywhere(capsys, model, "model.safetensors")


def test_the_line_that_converts_pytorch_model_bin_does(model, tmp_path, monkeypatch, capsys):
    """... and the file itself is never unpickled: that would run whatever code is in it."""
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(f"cos\nmkdir\n(S'{tmp_path}/unpickled'\ntR.".encode())
    refused_everywhere(capsys, model, "model.safetensors", "transformers")
    assert not (tmp_path / "unpickled").exists()
    theirs = random_gpt2(vocab_size=300, **OTHER)
    theirs.config.save_pretrained(model)
    torch.save(theirs.state_dict(), model / "pytorch_model.bin")
    line = str(pytest.raises((ValueError, OSError), GPT.from_pretrained, model).value)
    (tmp_path / "convert.py").write_text(re.search('python -c "(.*?)"', line)[1])
    monkeypatch.chdir(tmp_path)  # where a relative folder lands
    runpy.run_path(str(tmp_path / "convert.py"))
    converted = GPT.from_pretrained(re.search(r"save_pretrained\(r?'(.*?)'\)", line)[1])
    assert torch.equal(converted(IDX), theirs(IDX).logits)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_file_where_a_folder_should_be(offline, tiny, monkeypatch, capsys, name):
    refused_everywhere(capsys, tiny / name, name, "folder")
    monkeypatch.chdir(tiny)
    refused_everywhere(capsys, name, name, "folder")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_folder_where_a_file_should_be(model, capsys, name):
    (model / name).unlink()
    (model / name).mkdir()
    refused_everywhere(capsys, model, name)


# Files

@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data[:len(data) // 2], lambda data: data[:100], lambda data: data[:7],
    lambda data: b"", lambda data: random.Random(0).randbytes(1000), lambda data: data + b"x",
    lambda data: b"\xff" * 8 + data[8:],
    lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 548105171\n",
    lambda data: b"<!DOCTYPE html><html><head><title>Not found</title></head></html>",  # what a wrong link downloads
    lambda data: b"PK\x03\x04" + data,  # pytorch_model.bin, renamed
], ids=["last byte", "half", "header", "length", "empty", "random", "longer", "giant header", "LFS", "HTML", "pickle"])
def test_broken_weights(model, capsys, damage):
    path = model / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused_everywhere(capsys, model, "model.safetensors")


@pytest.mark.parametrize("text", [
    "", "{", "GPT-2", "[1, 2]", '"gpt2"', "null", "12", "{}", "[" * 10**5, '{"n_layer": 2}', '{"n_layer": 2', "\0",
    "version https://git-lfs.github.com/spec/v1",
], ids=lambda text: repr(text[:12]))
def test_config_that_is_no_json_object(model, capsys, text):
    (model / "config.json").write_text(text)
    refused_everywhere(capsys, model, "config.json")


@pytest.mark.parametrize("field", ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_config_without_a_field(model, capsys, field):
    config = json.loads((model / "config.json").read_text())
    del config[field]
    (model / "config.json").write_text(json.dumps(config))
    refused_everywhere(capsys, model, "config.json", field)


@pytest.mark.parametrize("value", ["12", 12.0, None, True, [12], {}, 0, -1, 10**18, 10**30])
@pytest.mark.parametrize("field", ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_config_with_an_impossible_size(model, capsys, field, value):
    change_config(model, **{field: value})
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(model)
    assert "config.json" in refused(capsys, ["--model", model]) or field == "vocab_size"


@pytest.mark.parametrize("field, value", [
    ("n_layer", 10**6), ("n_layer", 1), ("n_layer", 3), ("n_embd", 64), ("n_embd", 10**9), ("n_positions", 128),
    ("n_positions", 10**9), ("vocab_size", 50257), ("n_head", 3),
])
def test_config_that_the_tensors_contradict(model, capsys, field, value):
    change_config(model, **{field: value})
    began = time.perf_counter()
    line = refused_everywhere(capsys, model, "config.json")
    assert time.perf_counter() - began < 10  # a million layers take many minutes to build
    assert len(line) < 1000  # one line, and one that can be read


@pytest.mark.parametrize("field, value", [
    ("layer_norm_epsilon", 0), ("layer_norm_epsilon", "1e-5"), ("layer_norm_epsilon", math.nan),
    ("eos_token_id", "50256"), ("eos_token_id", 1.0), ("eos_token_id", [1]), ("eos_token_id", 2**63),
])
def test_config_with_another_impossible_value(model, capsys, field, value):
    change_config(model, **{field: value})
    refused_everywhere(capsys, model, "config.json", field)


def test_dropped_tensor(model, capsys):
    change_weights(model, lambda tensors: tensors.pop("h.1.mlp.c_fc.bias"))
    refused_everywhere(capsys, model, "model.safetensors", "h.1.mlp.c_fc.bias")


@pytest.mark.parametrize("name", ["score.weight", "h.0.crossattention.c_attn.weight", "h.0.attn.rotary", "wte.bias"])
def test_tensor_too_many(model, capsys, name):
    change_weights(model, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    refused_everywhere(capsys, model, "model.safetensors", name)


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight", "h.1.ln_1.bias", "ln_f.weight"])
def test_tensor_of_another_shape(model, capsys, name):
    change_weights(model, lambda tensors: tensors.update({name: tensors[name].flatten()[1:]}))
    refused_everywhere(capsys, model, "model.safetensors", name)


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight", "h.1.ln_1.bias"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64], ids=str)
def test_tensor_of_integers(model, capsys, name, dtype):
    change_weights(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused_everywhere(capsys, model, "model.safetensors", name)


def test_head_of_its_own(model, capsys):
    change_weights(model, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"] + 1}))
    refused_everywhere(capsys, model, "lm_head.weight", "wte.weight")


def test_no_tensors_at_all(model, capsys):
    change_weights(model, dict.clear)
    refused_everywhere(capsys, model, "model.safetensors")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("data", [
    b"", b"[]", b"null", b"{}", b"\n", b"\0\xff", b"[" * 10**5, b"{" + b'"a":{' * 10**5, b'{"a": 1}', b'{"a": "b"}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "#version\né €\n".encode(),
    b"#version\na b c\n",
], ids=lambda data: repr(data[:9]))
def test_broken_vocabulary(model, capsys, name, data):
    (model / name).write_bytes(data)
    line = refused(capsys, ["--model", model], "vocab")
    with pytest.raises(ValueError) as caught:
        train_gpt2.load_tokenizer(model, 10**6)
    assert line == " ".join(str(caught.value).split())


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_vocabulary_cut_short(model, capsys, name):
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[:len(data) * 2 // 3])
    refused(capsys, ["--model", model], name)


def test_vocabulary_of_a_larger_model(tmp_path, tiny, capsys):
    save(random_gpt2(vocab_size=300, **OTHER), tmp_path)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(tiny / name, tmp_path)
    refused(capsys, ["--model", tmp_path], "vocab", "300")


@pytest.mark.parametrize("missing", [["vocab.json"], ["merges.txt"], ["vocab.json", "merges.txt"]], ids=str)
def test_no_vocabulary_and_no_network(model, tmp_path, monkeypatch, capsys, missing):
    """A folder without one gets OpenAI's, and that is a download too."""
    for name in missing:
        (model / name).unlink()
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    refused(capsys, ["--model", model], "vocab")


# Another model

@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("model_type", "gptj"), ("model_type", "gpt_neo"), ("model_type", None),
    ("activation_function", "relu"), ("activation_function", "gelu"), ("activation_function", None), ("n_inner", 64),
    ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("reorder_and_upcast_attn", True),
    ("add_cross_attention", True), ("tie_word_embeddings", False),
])
def test_settings_that_are_not_built(model, capsys, field, value):
    (model / "model.safetensors").write_bytes(b"garbage")  # it is known before these are read
    change_config(model, **{field: value})
    refused_everywhere(capsys, model, "config.json", field, repr(value))


@pytest.mark.parametrize("config", [
    {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32000},
    {"model_type": "gptj", "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 50400},
])
def test_other_models(model, capsys, config):
    (model / "config.json").write_text(json.dumps(config))
    refused_everywhere(capsys, model, "model_type", config["model_type"])


# While it runs

def test_control_c(tiny, tmp_path):
    if os.name == "nt":
        pytest.skip("Windows has no signal that a parent could send here as Ctrl-C does")
    endless = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 200_000}
    vocab_size = json.loads((tiny / "config.json").read_text())["vocab_size"]
    save(random_gpt2(vocab_size=vocab_size, **endless), tmp_path)  # no end-of-text token, and minutes of context
    change_config(tmp_path, eos_token_id=None)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(tiny / name, tmp_path)
    # A shell that runs the tests in the background has SIGINT ignored, in what they start too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("--model", tmp_path, "--max-length", 200_000, "--num-return-sequences", 1)
    signal.signal(signal.SIGINT, before)
    assert process.stderr.readline().startswith(b"using device")  # the imports are done
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    began = time.perf_counter()
    code, out, err = finish(process)
    assert time.perf_counter() - began < 5  # at once, on a machine that does other things too
    assert code == 130 and out == "" and err.strip() == ""


def test_reader_that_leaves(tiny):
    """| head -1, with more to say than the pipe holds; and a reader that never reads at all."""
    head = start("--model", tiny, "--num-return-sequences", 2000)
    never = start("--model", tiny)
    never.stdout.close()
    assert head.stdout.readline().startswith(b"> Hello")
    head.stdout.close()
    for process in (head, never):
        assert [line for line in process.stderr.read().splitlines() if not line.startswith(b"using device")] == []
        assert process.wait(timeout=60) == 0


def test_full_disk_behind_stdout(tiny):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full, the disk of Linux that is always full")
    with open("/dev/full", "w") as full:
        process = start("--model", tiny, stdout=full)
        the_line(*finish(process), "No space left")


def test_encodings_that_cannot_show_the_text(tiny):
    prompts = {"ascii": (b"> Gr??e, ?: ? ", "Grüße, €: Ω "), "cp1252": (b"> Gr\xfc\xdfe, \x80: ? ", "Grüße, €: Ω ")}
    running = {encoding: start("--model", tiny, "--prompt", prompt, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
               for encoding, (_, prompt) in prompts.items()}
    for encoding, process in running.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.count(prompts[encoding][0]) == 5 and b"Error" not in err


def test_help_on_a_terminal_that_knows_ascii_only(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as exit:
        train_gpt2.main(["--help"])
    sys.stdout.flush()
    assert exit.value.code == 0 and b"--num-return-sequences" in sys.stdout.buffer.getvalue()


def test_prompt_that_is_no_unicode(tiny, capsys):
    """Bytes that are no UTF-8 reach Python's argv as lone surrogates, which neither UTF-8 nor a tokenizer can write."""
    train_gpt2.main(["--model", str(tiny), "--prompt", "caf\udce9"])
    assert capsys.readouterr().out.count("> caf?") == 5


def test_vocabulary_larger_than_the_tokenizers(tmp_path, tiny, capsys):
    """Some models pad their vocabulary to a multiple of 64. What is in the padding has no text."""
    save(random_gpt2(vocab_size=2000, **OTHER), tmp_path)
    for name in ["vocab.json", "merges.txt"]:
        shutil.copy(tiny / name, tmp_path)
    train_gpt2.main(["--model", str(tmp_path), "--temperature", "100", "--top-k", "0"])
    assert capsys.readouterr().out.count("> Hello, I'm a language model,") == 5


@pytest.mark.parametrize("temperature", ["1e-45", "5e-324"])
def test_temperature_so_small_that_the_logits_overflow(tiny, capsys, temperature):
    refused(capsys, ["--model", tiny, "--temperature", temperature], "temperature", temperature)


# From Python

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

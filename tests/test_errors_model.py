"""Promise: whatever is wrong with a model, its name, its folder, its files, gets one clear line that
names it, the same from the command line and from Python."""
import json
import math
import os
import random
import re
import runpy
import time

import pytest
import tiktoken.registry
import torch
from checkpoints import (
    TORCH,
    random_gpt2,
    save,
    save_tokenizer,
    save_vocabulary,
    train_bpe,
)
from hub import StandInHub
from mistakes import (
    IDX,
    SIZES,
    change_config,
    change_weights,
    finish,
    refused,
    refused_everywhere,
    start,
    the_line,
)

import train_gpt2
from train_gpt2 import GPT

pytestmark = pytest.mark.usefixtures("one_thread")


# Where it is

@pytest.mark.parametrize("name", ["a/b/c", "no spaces", "two\nlines", "-x", "ends.git", "a--b", "é", "x" * 97,
                                  "a" * 5000, "http://huggingface.co/gpt2", "C:\\gpt2"])
def test_malformed_name(offline, capsys, name):
    refused(capsys, [f"--model={name}"], name.split("\n")[0])


@pytest.mark.parametrize("name", ["", "."])
def test_name_that_is_this_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert re.search("config.json|model.safetensors", refused_everywhere(capsys, name))


OFFLINE = ["gpt2", "cache", "Hub", "network", "folder", "config.json", "model.safetensors"]  # and what to do


def test_offline_with_an_empty_cache(tmp_path):
    process = start("--model", "gpt2", HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="127.0.0.1", HF_HUB_OFFLINE="0",
                    HF_HOME=str(tmp_path))
    the_line(*finish(process), *OFFLINE)


def test_offline_because_the_user_said_so(offline, capsys):
    refused_everywhere(capsys, "gpt2", *OFFLINE)


def test_name_that_the_hub_does_not_have(tmp_path):
    with StandInHub({}) as hub:
        process = start("--model", "someone/gtp2", **hub.env(tmp_path))
        the_line(*finish(process), "someone/gtp2", "Hub", "check the name", "404")
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
        line = the_line(code, out, err.splitlines()[-1], "someone/tiny")
        assert "500" in line or "Connection broken" in line
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


def test_the_line_that_converts_pytorch_model_bin_does(tmp_path, monkeypatch, capsys):
    """All of the folder, its vocabulary too; and the file itself is never unpickled here: that would
    run whatever code is in it."""
    if TORCH < (2, 6):
        pytest.skip("transformers unpickles with torch 2.6 or newer alone")
    old = tmp_path / "old"
    old.mkdir()
    size = save_vocabulary(old)
    theirs = random_gpt2(vocab_size=size, eos_token_id=size - 1, bos_token_id=size - 1, **SIZES)
    theirs.config.save_pretrained(old)
    (old / "pytorch_model.bin").write_bytes(f"cos\nmkdir\n(S'{tmp_path}/unpickled'\ntR.".encode())
    line = refused_everywhere(capsys, old, "model.safetensors", "transformers")
    assert not (tmp_path / "unpickled").exists()
    torch.save(theirs.state_dict(), old / "pytorch_model.bin")
    (tmp_path / "convert.py").write_text(re.search('python -c "(.*?)"', line)[1])
    monkeypatch.chdir(tmp_path)  # where a relative folder lands
    runpy.run_path(str(tmp_path / "convert.py"))
    assert torch.equal(GPT.from_pretrained("converted")(IDX), theirs(IDX).logits)
    text = "Hello, I'm <|endoftext|>"
    tokens = train_gpt2.load_tokenizer(old).encode(text, allowed_special="all")
    assert train_gpt2.load_tokenizer("converted").encode(text, allowed_special="all") == tokens
    train_gpt2.main(["--model", "converted"])
    assert capsys.readouterr().out.count("> Hello") == 5


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


# Its config and its weights

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
    refused_everywhere(capsys, model, "config.json")  # it means gpt2's, which these weights do not fit


@pytest.mark.parametrize("value", ["12", 12.0, None, True, [12], {}, 0, -1, 10**18, 10**30])
@pytest.mark.parametrize("field", ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd"])
def test_config_with_an_impossible_size(model, capsys, field, value):
    change_config(model, **{field: value})
    with pytest.raises(ValueError, match="config.json"):
        GPT.from_pretrained(model)
    line = refused(capsys, ["--model", model])
    assert "config.json" in line or field == "vocab_size"  # which the vocabulary contradicts first


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
    ("eos_token_id", "50256"), ("eos_token_id", 1.0), ("eos_token_id", [1.0]), ("eos_token_id", 2**63),
    ("eos_token_id", -1), ("eos_token_id", [[1]]), ("eos_token_id", True), ("eos_token_id", {}),
    ("bos_token_id", [1]), ("bos_token_id", -1), ("pad_token_id", "x"), ("pad_token_id", [1]),
    ("n_inner", 0), ("n_inner", "64"), ("n_inner", -64), ("n_inner", 64.0), ("n_inner", False),
])
def test_config_with_another_impossible_value(model, capsys, field, value):
    change_config(model, **{field: value})
    refused_everywhere(capsys, model, "config.json", field)


@pytest.mark.parametrize("bos", [None, 10**6])
def test_empty_prompt_without_a_token_to_start_from(model, capsys, bos):
    change_config(model, bos_token_id=bos)
    refused(capsys, ["--model", model, "--prompt", ""], "prompt is empty", f"bos_token_id is {bos}")


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
@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.bool], ids=str)
def test_tensor_of_integers(model, capsys, name, dtype):
    change_weights(model, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused_everywhere(capsys, model, "model.safetensors", name)


def test_head_of_its_own(model, capsys):
    change_weights(model, lambda tensors: tensors.update({"lm_head.weight": tensors["wte.weight"] + 1}))
    refused_everywhere(capsys, model, "lm_head.weight", "wte.weight")


def test_no_tensors_at_all(model, capsys):
    change_weights(model, dict.clear)
    refused_everywhere(capsys, model, "model.safetensors")


# Shards

@pytest.fixture
def shards(tmp_path):
    """A folder with a model in shards, and its index."""
    size = save_tokenizer(tmp_path, train_bpe())
    model = random_gpt2(vocab_size=size, bos_token_id=0, eos_token_id=0, **SIZES)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path, tmp_path / "model.safetensors.index.json"


def change_index(index, change):
    raw = json.loads(index.read_text())
    change(raw["weight_map"])
    index.write_text(json.dumps(raw))


def test_missing_shard(shards, capsys):
    folder, _ = shards
    shard = min(folder.glob("model-00002-of-*"))
    shard.unlink()
    refused_everywhere(capsys, folder, shard.name)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_shard_cut_short(shards, capsys, length):
    folder, _ = shards
    shard = min(folder.glob("model-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:length])
    refused_everywhere(capsys, folder, shard.name)


def test_shards_exchanged(shards, capsys):
    folder, _ = shards
    one, other = sorted(folder.glob("model-*-of-*"))[:2]
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    refused_everywhere(capsys, folder, one.name, "index")


def test_index_that_says_another_shard(shards, capsys):
    folder, index = shards
    names = sorted(path.name for path in folder.glob("model-*-of-*"))
    name = "transformer.h.0.ln_1.weight"
    change_index(index, lambda map: map.update({name: next(n for n in names if n != map[name])}))
    refused_everywhere(capsys, folder, name, "index")


def test_index_without_a_tensor_and_with_one_too_many(shards, capsys):
    folder, index = shards
    change_index(index, lambda map: map.pop("transformer.ln_f.bias"))
    refused_everywhere(capsys, folder, "transformer.ln_f.bias", "index")
    shard = min(path.name for path in folder.glob("model-*-of-*"))
    change_index(index, lambda map: map.update({"transformer.ln_f.bias": shard}))
    refused_everywhere(capsys, folder, "transformer.ln_f.bias", shard)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}',
    '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ""}}', '{"weight_map": {"a": "."}}',
    '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": "nowhere.safetensors"}}',
], ids=repr)
def test_broken_index(shards, capsys, text):
    folder, index = shards
    index.write_text(text)
    refused_everywhere(capsys, folder)


def test_one_file_goes_before_the_shards(shards, tmp_path):
    """As in transformers, where both are there."""
    folder, index = shards
    index.write_text("broken")
    whole = random_gpt2(seed=1, vocab_size=400, **SIZES)
    save(whole, tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(folder / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(folder)(IDX), whole(IDX).logits)


# Its vocabulary

@pytest.fixture
def today(tmp_path):
    """A folder as transformers saves it today: a tokenizer.json."""
    size = save_tokenizer(tmp_path, train_bpe())
    return save(random_gpt2(vocab_size=size, bos_token_id=0, eos_token_id=0, **SIZES), tmp_path)


@pytest.mark.parametrize("data", [
    b"", b"[]", b"null", b"{}", b"\n", b"\0\xff", b"[" * 10**5, b"{" + b'"a":{' * 10**5, b'{"a": 1}', b'{"a": "b"}',
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", b'{"model": {"type": "BPE"}}',
], ids=lambda data: repr(data[:9]))
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_broken_vocabulary(model, today, capsys, name, data):
    folder = model if name == "vocab.json" else today
    (folder / name).write_bytes(data)
    line = refused(capsys, ["--model", folder], name)
    with pytest.raises(ValueError) as caught:
        train_gpt2.load_tokenizer(folder)
    assert line == " ".join(str(caught.value).split())


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_vocabulary_cut_short(model, today, capsys, name):
    folder = model if name == "vocab.json" else today
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:len(data) * 2 // 3])
    refused(capsys, ["--model", folder], name)


def test_vocabulary_of_a_larger_model(tmp_path, capsys):
    save_vocabulary(tmp_path, 400)
    save(random_gpt2(vocab_size=300, **SIZES), tmp_path)
    refused(capsys, ["--model", tmp_path], "vocab", "300")


def test_a_prompt_with_a_token_that_the_model_does_not_have(tmp_path, capsys):
    """A [PAD] that was added to the tokenizer alone is no reason to refuse other prompts."""
    size = save_tokenizer(tmp_path, train_bpe(), add_special=["[PAD]"])
    save(random_gpt2(vocab_size=size - 1, bos_token_id=0, eos_token_id=0, **SIZES), tmp_path)
    train_gpt2.main(["--model", str(tmp_path)])
    assert capsys.readouterr().out.count("> Hello") == 5
    refused(capsys, ["--model", tmp_path, "--prompt", "a [PAD] b"], "prompt", str(size - 2))


def test_no_vocabulary(model, tmp_path, capsys):
    """The model has 400 tokens: GPT-2's own vocabulary is not its."""
    for name in ("vocab.json", "merges.txt"):
        (model / name).unlink()
    refused(capsys, ["--model", model], "no vocabulary", "tokenizer.json")


def test_no_vocabulary_and_no_network(tmp_path, monkeypatch, capsys):
    """A folder that is GPT-2's gets GPT-2's own, and that is a download."""
    save(random_gpt2(vocab_size=50257, eos_token_id=50256, **SIZES), tmp_path)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(SystemExit):
        train_gpt2.main(["--model", str(tmp_path)])
    note, line = capsys.readouterr().err.splitlines()
    assert "no vocabulary" in note
    assert line.startswith("train_gpt2.py: error: ")
    assert "no vocabulary" in line


# Another model

@pytest.mark.parametrize("field, value", [
    ("model_type", "llama"), ("model_type", "gptj"), ("model_type", "gpt_neo"), ("model_type", None),
    ("activation_function", "relu"), ("activation_function", "gelu"), ("activation_function", None),
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

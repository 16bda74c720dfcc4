"""Promise: a mistake in the flags, in a call or in a checkpoint gets one clear line that names it,
the same from the command line and from Python; no weight is made up, and no file's code runs."""
import os
import time
from pathlib import Path

import pytest
import torch
from checkpoints import TORCH, change_json, change_weights, write_checkpoint

from train_gpt2 import GPT, GPTConfig, InputError, KVCache, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDX, read = torch.tensor([[1, 2, 3]]), GPT.from_pretrained
EARLY = ["--nonsense", "--max-length 1e2", "--dtype float8", "--num-return-sequences 0",
         "--device gpu", "--device cuda:99", "--device meta"]
LATE = ["--max-length 3", "--max-length 65", "--top-k -1", "--temperature -0.1",
        "--temperature nan", "--temperature inf", "--temperature 1e-31"]


@pytest.mark.parametrize("flags", EARLY + LATE)
def test_flags(tiny, refused, flags):
    """Some before a download, which would fail: the tests have no network. The others with a model
    whose context is 64, and a prompt of more than 3 tokens."""
    name, words = "no/model" if flags in EARLY else tiny, flags.strip("-").split()
    line = refused("--model", name, *flags.split(), says=words)
    assert "Hub" not in line and ("README" in line) == ("--device" in flags)


@pytest.mark.parametrize(("call", "error", "says"), [  # the context is 64; there are 400 tokens
    (lambda gpt: gpt(IDX[:, :0]), InputError, r"\(1, 0\)"),
    (lambda gpt: gpt(IDX.repeat(1, 22)), InputError, r"\(1, 66\), .* 64"),
    (lambda gpt: gpt(IDX[0]), InputError, r"\(3,\), .*\(B, T\)"),
    (lambda gpt: gpt(IDX[None]), InputError, r"\(1, 1, 3\), .*\(B, T\)"),
    (lambda gpt: gpt.generate(IDX - 2, 10), InputError, "ids .-1.; the model's are 0 to 399"),
    (lambda gpt: gpt.generate(IDX + 397, 10), InputError, "ids .400.; the model's are 0 to 399"),
    (lambda gpt: gpt.generate(IDX, 3), InputError, "max_length, 3, must be more than .* 3 tokens"),
    (lambda gpt: gpt.generate(IDX, 65), InputError, "65, .*can be more than .* context, 64"),
    (lambda gpt: [gpt(IDX, caches=caches) for caches in [[KVCache(), KVCache()]] * 2],
     ValueError, "one token at a time"),
    (lambda gpt: GPT(GPTConfig(n_embd=32, n_head=3)), AssertionError, "multiple of n_head 3"),
])
def test_calls(tiny, call, error, says):
    assert issubclass(InputError, ValueError)
    with pytest.raises(error, match=says):
        call(read(tiny))


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_logit_that_is_not_a_number(tiny, number, temperature):
    """As float16 may give, in one row and step. The likeliest is then as wrong as a sampled one."""
    gpt, steps = read(tiny), iter(range(10))

    def second_step(module, args, out):
        if next(steps) == 1:
            out[1, -1, 7] = number

    gpt.lm_head.register_forward_hook(second_step)
    with pytest.raises(InputError, match="NaN or infinite: .*weights.*float16"):
        gpt.generate(IDX.repeat(3, 1), 10, temperature)


# Checkpoints

@pytest.mark.parametrize("name", ["nowhere", "models/nowhere", "a/b/c", "C:\\gpt2", "ckpt.pt"])
def test_a_name_that_is_found_nowhere(tmp_path, monkeypatch, refused, name):
    """The line says what to check, and which model needs no network. ckpt.pt is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt.pt").touch()
    refused(name, read=read, says=[name, "a folder", "Hub", "name", "network", "HF_HUB_OFFLINE",
                                   Path("tests/shakespeare")])


@pytest.mark.parametrize(("kind", "name"), [
    ({}, "model.safetensors"), ({}, "config.json"), ({}, "tokenizer.json"),
    ({"tokenizer": "vocab.json"}, "vocab.json"), ({"layout": "shards"}, "model-00001-of-*")])
def test_a_broken_file_is_named(tmp_path, refused, kind, name):
    """Or the folder, if transformers reads the file. A pointer of git-lfs is a broken file too."""
    path, = write_checkpoint(tmp_path, **kind).glob(name)
    whole, lfs = path.read_bytes(), b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    reader = load_tokenizer if name in ("tokenizer.json", "vocab.json") else read
    for contents in (lfs, b"", whole[:len(whole) // 2]):
        path.write_bytes(contents)
        refused(tmp_path, says=[tmp_path if kind else path, "can't be read"], read=reader)
    path.unlink()
    refused(tmp_path, says=[tmp_path], read=reader)


def weights(change):
    return lambda folder: change_weights(folder, change)


def config(file="config.json", **fields):
    return lambda folder: change_json(folder / file, **fields)


def adapter_alone(folder):
    for path in folder.iterdir():
        path.unlink()
    config("adapter_config.json", peft_type="LORA")(folder)


@pytest.mark.parametrize(("change", "says"), [
    (config("adapter_config.json", peft_type="LORA"), ["adapter", "merge", "peft"]),
    (adapter_alone, ["adapter", "merge", "peft"]),
    (config(model_type="llama"), ["model_type", "'llama'"]),
    (config(quantization_config={"bits": 4}), ["quantization_config"]),
    (config(activation_function="quick_gelu"), ["activation_function", "quick_gelu", "gelu_new"]),
    (config(dtype="float8_e4m3fn"), ["float8_e4m3fn"]), (config(n_layer=20_000), ["20000 layers"]),
    (config(vocab_size=300, num_hidden_layers=2), ["don't fit", "wte.weight"]),
    (weights(lambda tensors: tensors.pop("ln_f.bias")), ["lack", "transformer.ln_f.bias"]),
    (weights(lambda tensors: tensors.pop("wte.weight")), ["lack", "transformer.wte.weight"]),
    (weights(lambda tensors: [tensors.update({f"module.{name}": tensors.pop(name)})
                              for name in list(tensors)]), ["lack", "instead", "'module."]),
], ids=["adapter", "adapter alone", "type", "quantized", "activation", "dtype", "layers", "size",
        "bias", "wte", "wrapped"])
def test_checkpoints(model, refused, change, says):
    """In a second, however many layers there should be. Weights that are missing or don't fit are
    never made up, whoever reads the file: the other name of n_layer leads to transformers."""
    change(model)
    start = time.perf_counter()
    refused(model, says=says, read=read)
    assert time.perf_counter() - start < 1
    if "lack" in says:
        change_json(model / "config.json", num_hidden_layers=2)
        refused(model, says=[model, *says], read=read)


def test_what_is_ignored(model, capsys):
    """As in transformers: other files with weights, and the masks in old files, as in these. Only
    tensors that GPT-2 doesn't have are ignored aloud, in float8 too."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin"):
        (model / name).write_text("broken")
    logits, names = read(model)(IDX), ["score.weight", "v_head.weight"]
    assert capsys.readouterr().err == ""
    more = dict.fromkeys(names, torch.ones(2).to(torch.float8_e4m3fn))
    change_weights(model, lambda tensors: tensors.update(more))
    assert torch.equal(read(model)(IDX), logits)
    assert capsys.readouterr().err == f"{model}: ignoring {names}\n"


class Trap:
    def __reduce__(self):
        return os.mkdir, ("ran",)  # which unpickling calls


def test_no_code_in_a_bin_is_run(tmp_path, monkeypatch, refused):
    """A .bin file is read only with torch 2.6 or later, and only a dict of tensors is taken."""
    monkeypatch.chdir(write_checkpoint(tmp_path, layout="bin"))
    says = [] if TORCH >= (2, 6) else ["upgrade torch to at least v2.6"]
    for contents in ([torch.ones(1)], {"x": Trap()}):
        torch.save(contents, "pytorch_model.bin")
        refused(tmp_path, says=[tmp_path, *says], read=read)
    assert not os.path.exists("ran")
    torch.load("pytorch_model.bin", weights_only=False)
    assert os.path.exists("ran")  # the trap works


@pytest.mark.parametrize(("bos", "prompt", "says"), [
    (0, "a newword b", "404]; the model's are 0 to 403"), (404, "", "404]"),
    (None, "", "empty, and the model has no bos_token_id")])
def test_a_prompt_that_the_model_cannot_take(tmp_path, refused, bos, prompt, says):
    """404 was added to the tokenizer alone. test_words.py shows that other prompts work then."""
    folder = write_checkpoint(tmp_path, "added", vocab_size=404, bos_token_id=bos)
    refused("--model", folder, "--prompt", prompt, says=["prompt", says])

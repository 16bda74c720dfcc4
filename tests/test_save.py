"""Promise: save_pretrained() writes the model as it is now into a folder that always loads again,
here, in transformers and on the command line; and whatever happens meanwhile, each of its files is
the old one or the new one, whole."""
import contextlib
import copy
import json
import sys

import checkpoints
import numpy
import pytest
import torch
from checkpoints import change_json, expected, pair, peer, train_bpe, words
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from train_gpt2 import GPT, GPTConfig, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"block_size": 64, "vocab_size": 50, "n_layer": 3, "n_head": 2, "n_embd": 32}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_weights(weights, *models):
    for model in models:
        assert list(model.state_dict()) == list(weights)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(("tokenizer", "layout", "dtype", "config"), [
    ("today", "saved", torch.float32, {"activation_function": "gelu", "n_inner": 96}),
    ("vocab.json", "hub", torch.bfloat16, {"layer_norm_epsilon": 1e-3, "pad_token_id": 7}),
    ("added", "shards", torch.float16, {"tie_word_embeddings": False, "eos_token_id": [3, 5]}),
    ("4, objects", "old", torch.float64, {"bos_token_id": None, "eos_token_id": None}),
], ids=str)
def test_saved_over_another_model(tmp_path, capsys, tokenizer, layout, dtype, config):
    """We and transformers read the same model, tokens and words, and nothing of the other model.
    Saved again, the bytes are the same."""
    mine, again, by_them = tmp_path / "mine", tmp_path / "again", tmp_path / "by them"
    folder = checkpoints.write_checkpoint(tmp_path, tokenizer, layout, dtype, **config)
    mine.mkdir()
    checkpoints.write_checkpoint(mine, "vocab.json", "shards", pad_token_id=8)
    change_json(mine / "added_tokens.json", newword=400)
    change_json(mine / "special_tokens_map.json", pad_token="<|pad|>")
    gpt, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    gpt.save_pretrained(mine, tokenizer)
    ours, theirs = pair(mine)
    assert_weights(gpt.state_dict(), ours, theirs)
    assert ours.config == gpt.config
    ours.save_pretrained(again, load_tokenizer(mine))
    assert contents(again).items() <= contents(mine).items()
    theirs.save_pretrained(by_them)
    assert contents(by_them)["model.safetensors"] == contents(mine)["model.safetensors"]
    pipe = peer(mine)
    for prompt in ["Hello", "a<|endoftext|> b", "[PAD]<|user|> a <|pad|>cat of newword<s></s> 日本"]:
        ids = tokenizer.encode(prompt).ids
        assert pipe.tokenizer(prompt)["input_ids"] == ids
        said = words(capsys, mine, prompt, "--max-length", len(ids) + 10)
        assert said == expected(pipe, prompt, max_length=len(ids) + 10)


def changed(gpt):
    """It trains, loses a block, most positions and the tie, gets two more tokens and another dtype,
    and uses a block twice. The config isn't told."""
    gpt(torch.arange(50)[None]).logsumexp(-1).mean().backward()
    torch.optim.AdamW(gpt.parameters(), lr=0.1).step()
    del gpt.transformer.h[1]
    gpt.transformer.wpe.weight = nn.Parameter(gpt.transformer.wpe.weight[:16])
    gpt.transformer.wte = nn.Embedding(52, 32)
    gpt.lm_head.weight = nn.Parameter(torch.randn(52, 32))
    gpt.transformer.h[1] = gpt.transformer.h[0]
    gpt.bfloat16()


def compiled(gpt):
    for i in range(3):
        gpt.transformer.h[i] = torch.compile(gpt.transformer.h[i], backend="eager")
    gpt.lm_head = torch.compile(gpt.lm_head, backend="eager")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", [changed, compiled])
def test_a_changed_model(tmp_path, request, change, tied):
    """What is saved is the model, not what its config says. Its head isn't saved if it is tied."""
    if change is compiled:
        request.getfixturevalue("dynamo")
    gpt = GPT(GPTConfig(**SMALL, tie_word_embeddings=tied))
    change(gpt)
    gpt.save_pretrained(tmp_path)
    weights = {name.replace("_orig_mod.", ""): p
               for name, p in gpt.named_parameters(remove_duplicate=False)}
    ours, theirs = pair(tmp_path)
    assert_weights(weights, ours, theirs)
    tied = tied and change is not changed
    assert theirs.config.tie_word_embeddings == tied
    assert (b"lm_head.weight" in contents(tmp_path)["model.safetensors"]) != tied


def test_as_a_mixin_of_the_hub(tmp_path):
    """huggingface_hub finds the config by its annotation."""
    Hub = type("Hub", (PyTorchModelHubMixin, GPT), {})
    gpt = Hub(GPTConfig(**SMALL))
    gpt.save_pretrained(tmp_path)
    again = Hub.from_pretrained(tmp_path)
    assert again.config == gpt.config
    assert_weights(gpt.state_dict(), again)


def test_tokenizers(tmp_path, capsys):
    """transformers knows the special tokens whose ids the config has, as any kind of number; an id
    of a plain token, or of none, has no name. It truncates to the context. llama.cpp's and
    CTranslate2's converters need n_ctx and an unk_token. Who may read others may read the files."""
    gpt = GPT(GPTConfig(**SMALL | {"vocab_size": 401}))
    folder = tmp_path / "models" / "mine"
    gpt.save_pretrained(str(folder))
    assert set(contents(folder)) == {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer = train_bpe(["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens(["word"])  # its id is 400
    for bos, eos, pad, names in [
            (0, [numpy.int64(1), 0], torch.tensor(2), ["<s>", "</s>", "<pad>", "</s>"]),
            (500, numpy.int32(0), 400, [None, "<s>", None, "<s>"])]:
        gpt.config.bos_token_id, gpt.config.eos_token_id, gpt.config.pad_token_id = bos, eos, pad
        gpt.save_pretrained(folder, tokenizer)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert [theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token] == names
        assert words(capsys, folder, "Hello") == expected(peer(folder), "Hello")
    assert len(theirs("word " * 500, truncation=True)["input_ids"]) == 64
    assert json.loads((folder / "config.json").read_text())["n_ctx"] == 64
    kind = json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert kind == "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 know
    (folder / "new").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    # One of transformers keeps all that it has.
    settings = {"padding_side": "left", "pad_token": "word", "model_max_length": 40,
                "chat_template": "{{ messages }}"}
    gpt.save_pretrained(folder, AutoTokenizer.from_pretrained(folder, **settings))
    again = AutoTokenizer.from_pretrained(folder)
    assert {name: getattr(again, name) for name in settings} == settings
    # What transformers would refuse is saved and read all the same.
    gpt.config.layer_norm_epsilon = 1
    gpt.save_pretrained(folder)
    assert GPT.from_pretrained(folder).config.layer_norm_epsilon == 1


def test_a_full_disk(model):
    """Nothing has changed then, and nothing stays behind."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    gpt, before = GPT.from_pretrained(model), contents(model)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (100, len(before["model.safetensors"]) // 2):  # bytes, for each file
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, old[1]))
        try:
            with pytest.raises((OSError, SafetensorError), match="File too large"):
                gpt.save_pretrained(model)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert contents(model) == before


def test_weights_that_cannot_be_replaced(model):
    """As on Windows, where another process has mapped them: nothing has changed then."""
    gpt, tokenizer = GPT.from_pretrained(model), load_tokenizer(model)
    weights = model / "model.safetensors"
    weights.unlink()
    (weights / "full").mkdir(parents=True)  # which a file can't replace either
    before = {path: path.read_bytes() for path in model.iterdir() if path.is_file()}
    with pytest.raises(OSError, match="model.safetensors"):
        gpt.save_pretrained(model, tokenizer)
    assert before == {path: path.read_bytes() for path in model.iterdir() if path.is_file()}


def test_ctrl_c_at_every_line(model):
    """Every file is the old one or the new one. The model's own folder, which it maps, is fine."""
    gpt, tokenizer = GPT.from_pretrained(model), load_tokenizer(model)
    weights = copy.deepcopy(gpt.state_dict())
    gpt.save_pretrained(model, tokenizer)
    assert_weights(weights, gpt, *pair(model))
    old = contents(model)
    nn.init.normal_(gpt.transformer.ln_f.weight)
    gpt.config.bos_token_id = None
    gpt.save_pretrained(model, tokenizer)
    new, seen, code, tracer = contents(model), [], GPT.save_pretrained.__code__, sys.gettrace()

    def trace(frame, event, arg):
        nonlocal lines
        lines -= event == "line"
        if lines < 0:
            raise KeyboardInterrupt
        return trace if frame.f_code is code else None

    lines = -1
    while lines < 0:  # each time, it comes one line further
        for name, data in old.items():
            (model / name).write_bytes(data)
        lines = len(seen)
        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt):
            gpt.save_pretrained(model, tokenizer)
        sys.settrace(tracer)
        now = contents(model)
        assert all(data in (old.get(name), new.get(name)) for name, data in now.items())
        assert {"config.json", "model.safetensors"} <= now.keys()  # some may lack a tokenizer
        seen.append(now == old)
    assert now == new and seen.count(True) > 20 and seen.count(False) > 5

"""Promise: save_pretrained() writes the model as it is now into a folder that always loads again,
here, in transformers and on the command line; and whatever happens meanwhile, each of its files is
the old one or the new one, whole."""
import copy
import json
import os
import subprocess
import sys

import checkpoints
import pytest
import safetensors.torch
import torch
from checkpoints import ROOT, expected, pair, peer, words, write_checkpoint
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer

from train_gpt2 import GPT, GPTConfig, InputError, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


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
    ("named", "old", torch.float64, {"bos_token_id": None, "eos_token_id": None}),
], ids=str)
def test_saved_over_another_model(tmp_path, capsys, tokenizer, layout, dtype, config):
    """We and transformers read the same model, tokens and words, and nothing of the other model.
    Saved again, the bytes are the same."""
    mine, again, by_them = tmp_path / "mine", tmp_path / "again", tmp_path / "by them"
    folder = write_checkpoint(tmp_path, tokenizer, layout, dtype, **config)
    mine.mkdir()
    write_checkpoint(mine, "slow", "shards", pad_token_id=8)
    checkpoints.change_json(mine / "special_tokens_map.json", pad_token="<|pad|>")
    gpt, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    gpt.save_pretrained(mine, tokenizer)
    ours, theirs = pair(mine)
    assert_weights(gpt.state_dict(), ours, theirs)
    assert ours.config == gpt.config
    before, of_mine = (json.loads((path / "config.json").read_text()) for path in (folder, mine))
    assert before | of_mine == of_mine | before  # where both have a field, it is the same
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
    """It trains, loses a block, most positions and the tie, gets two more tokens and another dtype.
    The config isn't told."""
    gpt(torch.arange(50)[None]).logsumexp(-1).mean().backward()
    torch.optim.AdamW(gpt.parameters(), lr=0.1).step()
    del gpt.transformer.h[1]
    gpt.transformer.wpe.weight = nn.Parameter(gpt.transformer.wpe.weight[:16])
    gpt.transformer.wte = nn.Embedding(52, 32)
    gpt.lm_head.weight = nn.Parameter(torch.randn(52, 32))
    gpt.bfloat16()


def compiled(gpt):
    for layer, block in enumerate(gpt.transformer.h):
        gpt.transformer.h[layer] = torch.compile(block, backend="eager")
    gpt.lm_head = torch.compile(gpt.lm_head, backend="eager")


def shared(gpt):
    gpt.transformer.h[2] = gpt.transformer.h[0]
    gpt.transformer.h[1].mlp.c_fc.weight = gpt.transformer.h[0].mlp.c_fc.weight


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", [changed, compiled, shared])
def test_a_changed_model(tmp_path, change, tied):
    """What is saved is the model, not what its config says. Its head isn't saved if it is tied."""
    if change is compiled and checkpoints.TORCH < (2, 4) and sys.version_info >= (3, 12):
        pytest.skip("this torch's compile runs on Python 3.11 at most")
    gpt = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=32,
                        tie_word_embeddings=tied))
    change(gpt)
    gpt.save_pretrained(tmp_path)
    weights = {name.replace("_orig_mod.", ""): p
               for name, p in gpt.named_parameters(remove_duplicate=False)}
    ours, theirs = pair(tmp_path)
    assert_weights(weights, ours, theirs)
    tied = tied and change is not changed
    assert theirs.config.tie_word_embeddings == tied
    assert (b"lm_head.weight" in contents(tmp_path)["model.safetensors"]) != tied


def test_tokenizers(tmp_path, capsys, monkeypatch):
    """Those of tokenizers and the fast ones of transformers are saved. transformers then knows the
    special tokens whose ids the config has; an id of a plain token, or of none, has no name.
    Another kind costs no weights, and leaves the tokenizer that was there."""
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=401))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "mine"
    gpt.save_pretrained("models/mine")
    assert set(contents(folder)) == {"config.json", "generation_config.json", "model.safetensors"}
    tokenizer = checkpoints.train_bpe(["<s>", "</s>", "<pad>"])
    tokenizer.add_tokens(["word"])  # its id is 400
    for bos, eos, pad, names in [(0, [1, 0], 2, ["<s>", "</s>", "<pad>"]),
                                 (500, 0, 400, [None, "<s>", None])]:
        gpt.config.bos_token_id, gpt.config.eos_token_id, gpt.config.pad_token_id = bos, eos, pad
        gpt.save_pretrained(folder, tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == names
        assert words(capsys, folder, "Hello") == expected(peer(folder), "Hello")
    before = contents(folder)["tokenizer.json"]
    nn.init.normal_(gpt.transformer.ln_f.weight)
    with pytest.raises(InputError, match="is saved.* a str "):
        gpt.save_pretrained(folder, "gpt2")
    assert_weights(gpt.state_dict(), *pair(folder))
    assert contents(folder)["tokenizer.json"] == before


# Whatever happens meanwhile

def test_into_the_folder_that_the_model_is_mapped_from(model):
    gpt, other = GPT.from_pretrained(model), GPT.from_pretrained(model)
    before = copy.deepcopy(gpt.state_dict())
    with torch.no_grad():
        gpt.transformer.ln_f.weight.mul_(2)
    after = copy.deepcopy(gpt.state_dict())
    for _ in range(2):
        gpt.save_pretrained(model)
        assert_weights(after, gpt, *pair(model))
    assert_weights(before, other)  # mapped from the file that is no more


def test_on_windows_a_model_is_not_mapped(model, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")  # where a mapped file can't be replaced
    gpt = GPT.from_pretrained(model)
    before = copy.deepcopy(gpt.state_dict())
    with (model / "model.safetensors").open("rb+") as file:  # in place, which a map would show
        file.write(bytes(os.path.getsize(file.name)))
    assert_weights(before, gpt)


def test_a_full_disk_and_ctrl_c(model, monkeypatch):
    """Nothing has changed then, and nothing stays behind."""
    def interrupted(*args, **options):
        write(*args, **options)
        raise KeyboardInterrupt

    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    gpt, before = GPT.from_pretrained(model), contents(model)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = len(before["model.safetensors"]) // 2  # of a file
    resource.setrlimit(resource.RLIMIT_FSIZE, (half, old[1]))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            gpt.save_pretrained(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(model) == before
    write = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpt.save_pretrained(model)
    assert contents(model) == before


FORKS = """
import glob, os, random, signal, sys, time, torch
from train_gpt2 import GPT
torch.set_num_threads(1)

def start_saving(times):
    gpt = GPT.from_pretrained(sys.argv[1])
    if child := os.fork():  # of a process that has imported torch, so that it starts at once
        return child
    for n in range(times):  # models of one number each, so that a mixture of two shows
        for p in gpt.parameters():
            torch.nn.init.constant_(p, n)
        gpt.save_pretrained(sys.argv[1])
    os._exit(0)

for kill in range(50):
    child = start_saving(10**9)
    time.sleep(0.02 + 0.1 * random.random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before"
    weights = torch.cat([p.flatten() for p in GPT.from_pretrained(sys.argv[1]).parameters()])
    assert weights.min() == weights.max(), "a mixture of two models"
    if kill > 10 and len(glob.glob(sys.argv[1] + "/.saving-*")) > 2:
        break  # three or more died while they wrote
children = [start_saving(30), start_saving(30)]  # at the same time
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork, which makes kills quick")
def test_killed_at_any_moment_and_two_at_once(tmp_path):
    """A killed process leaves its temporary folder behind; no other does."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=256, vocab_size=400))  # 7 MB
    for p in gpt.parameters():
        nn.init.constant_(p, 29)
    gpt.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", FORKS, tmp_path], check=True, cwd=ROOT)
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    left = list(tmp_path.glob(".saving-*"))
    assert len(os.listdir(tmp_path)) == 3 + len(left)
    assert len(left) > 2, "if few kills came while a file was written, this shows little"

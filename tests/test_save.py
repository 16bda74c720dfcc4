"""Promise: save_pretrained() writes a whole folder, which transformers and the command take as it
is; and whatever happens meanwhile, each of its files is the old one or the new one, whole."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import cycle

import pytest
import safetensors.torch
import torch
from checkpoints import (
    DECODED_TOGETHER,
    DECODED_TOGETHER_WHY,
    DTYPES,
    LAYOUTS,
    RELATIVES,
    ROOT,
    TOKENIZERS,
    expected,
    ignores_scale,
    pair,
    peer,
    random_idx,
    train_bpe,
    words,
    write_checkpoint,
)
from transformers import AutoTokenizer

from train_gpt2 import GPT, GPTConfig, load_tokenizer, main

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = [name for name, config in RELATIVES.items() if not ignores_scale(config)]
KINDS = list(zip(TOKENIZERS, cycle(LAYOUTS), cycle(DTYPES), cycle(CONFIGS)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_weights(weights, *models):
    """Not logits: the tensors of two files may be aligned otherwise, and so round otherwise."""
    for model in models:
        assert list(model.state_dict()) == list(weights)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: ", ".join(map(str, kind)))
def test_saved_and_read_again(tmp_path, capsys, kind):
    """By us and by transformers: the same model, tokens and words; saved again, the same bytes."""
    name, layout, dtype, relative = kind
    if name in DECODED_TOGETHER:
        pytest.skip(DECODED_TOGETHER_WHY)
    mine, again, by_them = tmp_path / "mine", tmp_path / "again", tmp_path / "by them"
    folder = write_checkpoint(tmp_path, name, layout, dtype, **RELATIVES[relative])
    gpt, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    gpt.save_pretrained(mine, tokenizer)
    (ours, theirs), reread = pair(mine), load_tokenizer(mine)
    ours.save_pretrained(again, reread)
    assert contents(again) == contents(mine)
    theirs.save_pretrained(by_them)
    assert contents(by_them)["model.safetensors"] == contents(mine)["model.safetensors"]
    config, of_mine = (json.loads((path / "config.json").read_text()) for path in (folder, mine))
    assert config | of_mine == of_mine | config  # where both have a field, it is the same
    assert ours.config == gpt.config
    assert_weights(gpt.state_dict(), ours, theirs)
    for idx in (random_idx(ours, 1, 1), random_idx(ours, 3, 9)):
        assert torch.equal(ours(idx), theirs(idx).logits)
    ids, pipe = range(ours.config.vocab_size), peer(mine)
    assert [reread.decode([id]) for id in ids] == [tokenizer.decode([id]) for id in ids]
    for prompt in ["Hello", "", "a<|endoftext|> b", "[PAD]<|user|> a cat of newword<s></s> 日本"]:
        ids = tokenizer.encode(prompt).ids
        assert reread.encode(prompt).ids == pipe.tokenizer(prompt)["input_ids"] == ids
        said = words(capsys, mine, prompt, "--max-length", len(ids) + 10)
        assert said == expected(pipe, prompt, max_length=len(ids) + 10)


@pytest.mark.parametrize("tied", [True, False])
def test_what_was_trained(model, tmp_path, capsys, tied):
    """Also with a head of its own, and when the folder that it came from is gone."""
    gpt, tokenizer = GPT.from_pretrained(model).train(), load_tokenizer(model)
    if not tied:
        gpt.lm_head.weight = torch.nn.Parameter(gpt.lm_head.weight.detach().clone())
    before = copy.deepcopy(gpt).bfloat16().state_dict()
    gpt(random_idx(gpt, 4, 20)).logsumexp(-1).mean().backward()
    torch.optim.AdamW(gpt.parameters(), lr=0.1).step()
    shutil.rmtree(model)
    gpt.bfloat16().save_pretrained(tmp_path, tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    assert not any(torch.equal(p, before[name]) for name, p in gpt.named_parameters())
    assert words(capsys, tmp_path, "Hello") == expected(peer(tmp_path), "Hello")


def test_a_model_made_from_nothing(tmp_path, capsys, monkeypatch):
    """Without a tokenizer, the command says how to save it. With one, transformers knows the
    special tokens whose ids the config has; an id of a plain token, or of none, has no name."""
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=400))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "mine"
    gpt.save_pretrained("models/mine")
    before = contents(folder)
    assert set(before) == {"config.json", "generation_config.json", "model.safetensors"}
    gpt.lm_head.weight = torch.nn.Parameter(gpt.transformer.wte.weight.detach().clone())
    gpt.save_pretrained(folder)  # a head of its own, but of the same numbers
    for path in (folder / "config.json", folder / "config.json" / "deeper"):  # this is a file
        with pytest.raises(OSError, match="config.json"):
            gpt.save_pretrained(path)
    assert contents(folder) == before
    assert_weights(gpt.state_dict(), *pair(folder))
    with pytest.raises(SystemExit):
        main(["--model", str(folder)])
    assert "model.save_pretrained(folder, tokenizer)" in capsys.readouterr().err
    tokenizer = train_bpe(["<s>", "</s>", "<pad>"])
    for bos, eos, pad, names in [(0, [1, 0], 2, ["<s>", "</s>", "<pad>"]),
                                 (500, 0, 399, [None, "<s>", None])]:
        gpt.config.bos_token_id, gpt.config.eos_token_id, gpt.config.pad_token_id = bos, eos, pad
        gpt.save_pretrained(folder, tokenizer)
        read = AutoTokenizer.from_pretrained(folder)
        assert [read.bos_token, read.eos_token, read.pad_token] == names
        assert words(capsys, folder, "Hello") == expected(peer(folder), "Hello")


def test_into_the_folder_that_the_model_is_mapped_from(model):
    gpt, other = GPT.from_pretrained(model), GPT.from_pretrained(model)
    before = copy.deepcopy(gpt.state_dict())
    with torch.no_grad():
        gpt.transformer.ln_f.weight.mul_(2)
    after = copy.deepcopy(gpt.state_dict())
    for _ in range(3):
        gpt.save_pretrained(model)
        assert_weights(after, gpt, *pair(model))
    assert_weights(before, other)  # mapped from the file that is no more
    other.save_pretrained(model)
    assert_weights(before, *pair(model))


def test_on_windows_a_model_is_not_mapped(model, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")  # where a mapped file can't be replaced
    gpt = GPT.from_pretrained(model)
    before = copy.deepcopy(gpt.state_dict())
    with (model / "model.safetensors").open("rb+") as file:  # in place, which a map would show
        file.write(bytes(os.path.getsize(file.name)))
    assert_weights(before, gpt)


def test_over_another_model(tiny, tmp_path, capsys):
    """With a tokenizer, nothing of the other model is read; without one, its tokenizer stays."""
    write_checkpoint(tmp_path, "slow", "shards", pad_token_id=7)
    gpt, tokenizer = GPT.from_pretrained(tiny), load_tokenizer(tiny)
    gpt.save_pretrained(tmp_path, tokenizer)
    assert GPT.from_pretrained(tmp_path).config == gpt.config
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    prompt = "Hello <|start|><|pad|> plain<|endoftext|>"
    assert load_tokenizer(tmp_path).encode(prompt).ids == tokenizer.encode(prompt).ids
    assert words(capsys, tmp_path, prompt) == expected(peer(tmp_path), prompt)
    TOKENIZERS["slow"](tmp_path)
    before = contents(tmp_path)
    gpt.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such rights and limits")
def test_no_right_to_write_a_full_disk_and_ctrl_c(model, monkeypatch):
    """Nothing has changed then, and nothing stays behind."""
    import resource
    gpt, before, write = GPT.from_pretrained(model), contents(model), safetensors.torch.save_file
    limit, old = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        model.chmod(0o555)
        os.seteuid(os.getuid() or 65534)  # nothing stops root, so root becomes nobody
        with pytest.raises(PermissionError, match=str(model)):
            gpt.save_pretrained(model)
        os.seteuid(os.getuid())
        model.chmod(0o755)
        resource.setrlimit(limit, (len(before["model.safetensors"]) // 2, old[1]))  # of a file
        with pytest.raises(OSError, match=str(model)):
            gpt.save_pretrained(model)
    finally:
        os.seteuid(os.getuid())
        resource.setrlimit(limit, old)
    assert contents(model) == before
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args, **options: (
        write(*args, **options), signal.raise_signal(signal.SIGINT)))
    with pytest.raises(KeyboardInterrupt):
        gpt.save_pretrained(model)
    assert contents(model) == before


FORKS = """
import os, random, signal, sys, time, torch
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

for kill in range(20):
    child = start_saving(10**9)
    time.sleep(0.02 + 0.1 * random.random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before"
    weights = torch.cat([p.flatten() for p in GPT.from_pretrained(sys.argv[1]).parameters()])
    assert weights.min() == weights.max(), "a mixture of two models"
children = [start_saving(100), start_saving(100)]  # at the same time
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork, which makes kills quick")
def test_killed_at_any_moment_and_two_at_once(tmp_path):
    """A killed process leaves its temporary folder behind; no other does."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=256, vocab_size=400))  # 7 MB
    for p in gpt.parameters():
        torch.nn.init.constant_(p, 99)
    gpt.save_pretrained(tmp_path)
    files = set(contents(tmp_path))
    subprocess.run([sys.executable, "-c", FORKS, tmp_path], check=True, cwd=ROOT)
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    left = set(os.listdir(tmp_path)) - files
    assert all(name.startswith(".saving-") for name in left)
    assert 3 < len(left) <= 20, "if few kills came while a file was written, this shows little"

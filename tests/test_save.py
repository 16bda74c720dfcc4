"""Promise: save_pretrained() writes the model as it is now into a folder that always loads again,
here, in transformers and on the command line; and whatever happens meanwhile, each of its files is
the old one or the new one, whole."""
import copy
import json
import os
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import tiktoken
import torch
from checkpoints import (
    ROOT,
    TORCH,
    TRANSFORMERS,
    change_json,
    expected,
    pair,
    peer,
    random_idx,
    train_bpe,
    words,
    write_checkpoint,
)
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train_gpt2 import GPT, GPTConfig, InputError, load_tokenizer, main

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_weights(weights, *models):
    """Not logits: the tensors of two files may be aligned otherwise, and so round otherwise."""
    for model in models:
        assert list(model.state_dict()) == list(weights)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == weights[name].dtype and torch.equal(tensor, weights[name]), name


def assert_equal_logits(ours, theirs):
    for idx in (random_idx(ours, 1, 1), random_idx(ours, 3, 9)):
        assert torch.equal(ours(idx), theirs(idx).logits)


@pytest.mark.parametrize(("tokenizer", "layout", "dtype", "config"), [
    ("today", "saved", torch.float32, {"activation_function": "gelu", "n_inner": 96}),
    ("vocab.json", "hub", torch.bfloat16, {"layer_norm_epsilon": 1e-3, "pad_token_id": 7}),
    ("added", "shards", torch.float16, {"tie_word_embeddings": False, "eos_token_id": [3, 5]}),
    ("named", "old", torch.float64, {"bos_token_id": None, "eos_token_id": None}),
], ids=str)
def test_saved_and_read_again(tmp_path, capsys, tokenizer, layout, dtype, config):
    """By us and by transformers: the same model, tokens and words; saved again, the same bytes."""
    mine, again, by_them = tmp_path / "mine", tmp_path / "again", tmp_path / "by them"
    folder = write_checkpoint(tmp_path, tokenizer, layout, dtype, **config)
    gpt, tokenizer = GPT.from_pretrained(folder), load_tokenizer(folder)
    gpt.save_pretrained(mine, tokenizer)
    (ours, theirs), reread = pair(mine), load_tokenizer(mine)
    ours.save_pretrained(again, reread)
    assert contents(again) == contents(mine)
    theirs.save_pretrained(by_them)
    assert contents(by_them)["model.safetensors"] == contents(mine)["model.safetensors"]
    before, of_mine = (json.loads((path / "config.json").read_text()) for path in (folder, mine))
    assert before | of_mine == of_mine | before  # where both have a field, it is the same
    assert ours.config == gpt.config
    assert_weights(gpt.state_dict(), ours, theirs)
    assert_equal_logits(ours, theirs)
    ids, pipe = range(ours.config.vocab_size), peer(mine)
    assert [reread.decode([id]) for id in ids] == [tokenizer.decode([id]) for id in ids]
    for prompt in ["Hello", "a<|endoftext|> b", "[PAD]<|user|> a cat of newword<s></s> 日本"]:
        ids = tokenizer.encode(prompt).ids
        assert reread.encode(prompt).ids == pipe.tokenizer(prompt)["input_ids"] == ids
        said = words(capsys, mine, prompt, "--max-length", len(ids) + 10)
        assert said == expected(pipe, prompt, max_length=len(ids) + 10)


# Models that were changed

def trained(gpt):
    gpt(random_idx(gpt, 4, 20)).logsumexp(-1).mean().backward()
    torch.optim.AdamW(gpt.parameters(), lr=0.1).step()
    gpt.bfloat16()


def without_a_block(gpt):
    del gpt.transformer.h[1]


def grown_vocabulary(gpt):
    """By two tokens, by hand."""
    old = gpt.transformer.wte.weight.data
    gpt.transformer.wte = nn.Embedding(len(old) + 2, old.shape[1])
    gpt.transformer.wte.weight.data[:len(old)] = old
    new = gpt.transformer.wte.weight
    gpt.lm_head.weight = new if gpt.config.tie_word_embeddings else nn.Parameter(new * 0.5)


def cropped_positions(gpt):
    """The config isn't told."""
    gpt.transformer.wpe.weight = nn.Parameter(gpt.transformer.wpe.weight[:16])


def crop_block_size(gpt):
    """As in nanoGPT."""
    gpt.config.block_size = 16
    cropped_positions(gpt)


def compiled_blocks(gpt):
    for layer, block in enumerate(gpt.transformer.h):
        gpt.transformer.h[layer] = torch.compile(block, backend="eager")


def more_tensors(gpt):
    """That GPT-2 doesn't have. They are saved, and ignored when they are read again."""
    gpt.transformer.h[0].register_buffer("seen", torch.tensor([True, False]))
    gpt.register_buffer("steps", torch.tensor(1000))


def shared_layers(gpt):
    gpt.transformer.h[2] = gpt.transformer.h[0]
    gpt.transformer.h[1].mlp.c_fc.weight = gpt.transformer.h[0].mlp.c_fc.weight


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("change", [
    trained, without_a_block, grown_vocabulary, cropped_positions, crop_block_size, compiled_blocks,
    more_tensors, shared_layers])
def test_a_changed_model(tmp_path, change, tied):
    """What is saved is the model, not what its config says."""
    if change is compiled_blocks and TORCH < (2, 4) and sys.version_info >= (3, 12):
        pytest.skip("this torch's compile runs on Python 3.11 at most")
    gpt = GPT(GPTConfig(block_size=64, vocab_size=50, n_layer=3, n_head=2, n_embd=32,
                        tie_word_embeddings=tied, eos_token_id=None))
    change(gpt)
    gpt.save_pretrained(tmp_path / "mine")
    ours, theirs = pair(tmp_path / "mine")
    weights = {name.replace("_orig_mod.", ""): p for name, p in
               gpt.named_parameters(remove_duplicate=False)}
    assert_weights(weights, ours, theirs)
    assert_equal_logits(ours, theirs)
    assert (ours.lm_head.weight is ours.transformer.wte.weight) == tied
    assert ours.config.block_size == len(gpt.transformer.wpe.weight)
    assert ours.config.vocab_size == theirs.config.vocab_size == len(gpt.transformer.wte.weight)
    if change is not compiled_blocks:  # torch 2.3 can't compile is_causal for a cache
        idx = random_idx(gpt, 2, 5)
        assert torch.equal(ours.generate(idx, 16, 0), gpt.generate(idx, 16, 0))


def test_a_compiled_head_that_is_tied(tmp_path):
    """It isn't saved a second time, under the name that torch.compile gives it."""
    gpt = GPT(GPTConfig(vocab_size=50, n_layer=1, n_head=2, n_embd=32))
    gpt.lm_head = torch.compile(gpt.lm_head)
    gpt.save_pretrained(tmp_path)
    assert not any("lm_head" in name for name in safetensors.torch.load_file(tmp_path / "model.safetensors"))


# Tokenizers

def test_with_and_without_a_tokenizer(tmp_path, capsys, monkeypatch):
    """Without one, the command says how to save it. With one, transformers knows the special tokens
    whose ids the config has; an id of a plain token, or of none, has no name."""
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=400))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models" / "mine"
    gpt.save_pretrained("models/mine")
    before = contents(folder)
    assert set(before) == {"config.json", "generation_config.json", "model.safetensors"}
    for path in (folder / "config.json", folder / "config.json" / "deeper"):  # this is a file
        with pytest.raises(OSError, match="config.json"):
            gpt.save_pretrained(path)
    assert contents(folder) == before
    with pytest.raises(SystemExit):
        main(["--model", str(folder)])
    says = "model.save_pretrained(folder, tokenizer)" if TRANSFORMERS >= (5, 0) else str(folder)
    assert says in capsys.readouterr().err
    tokenizer = train_bpe(["<s>", "</s>", "<pad>"])
    for bos, eos, pad, names in [(0, [1, 0], 2, ["<s>", "</s>", "<pad>"]),
                                 (500, 0, 399, [None, "<s>", None])]:
        gpt.config.bos_token_id, gpt.config.eos_token_id, gpt.config.pad_token_id = bos, eos, pad
        gpt.save_pretrained(folder, tokenizer)
        read = AutoTokenizer.from_pretrained(folder)
        assert [read.bos_token, read.eos_token, read.pad_token] == names
        assert words(capsys, folder, "Hello") == expected(peer(folder), "Hello")


def test_the_kinds_of_tokenizers(tiny, tmp_path):
    """Those of tokenizers and the fast ones of transformers. Another kind costs no weights, and
    leaves the tokenizer that was there."""
    gpt, tokenizer = GPT.from_pretrained(tiny), load_tokenizer(tiny)
    gpt.save_pretrained(tmp_path, tokenizer)
    before, text = contents(tmp_path), "Hello<|endoftext|> 日本"
    for fast in (AutoTokenizer.from_pretrained(tiny),
                 PreTrainedTokenizerFast(tokenizer_object=tokenizer)):
        gpt.save_pretrained(tmp_path, fast)
        assert contents(tmp_path).keys() == before.keys()
        assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids
    ranks = {bytes([i]): i for i in range(256)}
    other = tiktoken.Encoding("bytes", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    for kind in ("gpt2", other, AutoTokenizer):
        nn.init.normal_(gpt.transformer.ln_f.weight)
        with pytest.raises(InputError, match=f"is saved.* a {type(kind).__name__} "):
            gpt.save_pretrained(tmp_path, kind)
        assert_weights(gpt.state_dict(), *pair(tmp_path))
        assert load_tokenizer(tmp_path).encode(text).ids == tokenizer.encode(text).ids


# Over what is there

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
    """Nothing of the other model is read."""
    write_checkpoint(tmp_path, "slow", "shards", pad_token_id=7)
    change_json(tmp_path / "special_tokens_map.json", pad_token="<|pad|>")
    gpt, tokenizer = GPT.from_pretrained(tiny), load_tokenizer(tiny)
    gpt.save_pretrained(tmp_path, tokenizer)
    assert GPT.from_pretrained(tmp_path).config == gpt.config
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    prompt = "Hello <|start|><|pad|> plain<|endoftext|>"
    assert load_tokenizer(tmp_path).encode(prompt).ids == tokenizer.encode(prompt).ids
    assert words(capsys, tmp_path, prompt) == expected(peer(tmp_path), prompt)


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
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            gpt.save_pretrained(model)
    finally:
        os.seteuid(os.getuid())
        resource.setrlimit(limit, old)
    assert contents(model) == before
    monkeypatch.setattr(safetensors.torch, "save_file", lambda *args, **options: (
        write(*args, **options), signal.default_int_handler(signal.SIGINT, None)))
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

for kill in range(12):
    child = start_saving(10**9)
    time.sleep(0.02 + 0.1 * random.random())
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it had ended before"
    weights = torch.cat([p.flatten() for p in GPT.from_pretrained(sys.argv[1]).parameters()])
    assert weights.min() == weights.max(), "a mixture of two models"
children = [start_saving(30), start_saving(30)]  # at the same time
assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork, which makes kills quick")
def test_killed_at_any_moment_and_two_at_once(tmp_path):
    """A killed process leaves its temporary folder behind; no other does."""
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=256, vocab_size=400))  # 7 MB
    for p in gpt.parameters():
        torch.nn.init.constant_(p, 29)
    gpt.save_pretrained(tmp_path)
    files = set(contents(tmp_path))
    subprocess.run([sys.executable, "-c", FORKS, tmp_path], check=True, cwd=ROOT)
    assert_weights(gpt.state_dict(), *pair(tmp_path))
    left = set(os.listdir(tmp_path)) - files
    assert all(name.startswith(".saving-") for name in left)
    assert 2 < len(left) <= 12, "if few kills came while a file was written, this shows little"

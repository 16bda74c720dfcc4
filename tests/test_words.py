"""Promise: the command prints what transformers' pipeline says, for every kind of checkpoint that
people have; it reads plain files by itself, and it downloads what it reads and nothing more."""
import json
import os
import re
import shutil

import checkpoints
import pytest
import torch
from checkpoints import expected, peer, random_gpt2, save, words, write_checkpoint
from hub import StandInHub, Visitor
from mistakes import the_line
from transformers import pipeline

import train_gpt2
from train_gpt2 import GPT, load_tokenizer

EOT = checkpoints.EOT
PROMPTS = ["Hello, I'm a language model,", "",
           f"one{EOT} two \t\n\n naïve 🙂 日本語 ﬁ\u00a0\u2028\u0000",
           "[PAD]<|user|> newword of new <s></s><|pad|> a cat, cats <mask> plain x=12345 "]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def asked(monkeypatch):
    """The classes of transformers that are asked to read something."""
    classes, ask = [], train_gpt2.ask_transformers
    monkeypatch.setattr(train_gpt2, "ask_transformers", lambda reader, *args, **options: (
        classes.append(reader), ask(reader, *args, **options))[1])
    return classes


def assert_same_words(capsys, folder, prompts=PROMPTS):
    """Sampled and greedy, then logits and generate()'s tokens."""
    theirs = peer(folder)
    for prompt in prompts:
        length = len(theirs.tokenizer(prompt)["input_ids"]) + 10
        flags, how = ["--max-length", length, "--num-return-sequences"], {"max_length": length}
        assert words(capsys, folder, prompt, *flags, 3) == \
            expected(theirs, prompt, num_return_sequences=3, **how)
        assert words(capsys, folder, prompt, "--temperature", 0, *flags, 1) == \
            expected(theirs, prompt, num_return_sequences=1, do_sample=False, **how)
    ours, theirs = checkpoints.pair(folder)
    assert ours.lm_head.weight.dtype == theirs.dtype
    idx = checkpoints.random_idx(ours, 3, 9)
    assert torch.equal(ours(idx), theirs(idx).logits)
    torch.manual_seed(0)
    tokens = ours.generate(idx, 40)
    torch.manual_seed(0)
    mask = torch.ones_like(idx)
    assert torch.equal(tokens, theirs.generate(idx, attention_mask=mask, do_sample=True,
                                               max_length=40))


@pytest.mark.parametrize("tokenizer", checkpoints.TOKENIZERS)
def test_every_kind_of_tokenizer(tmp_path, capsys, asked, tokenizer):
    """With a plain one, transformers isn't asked anything. (transformers 4 also writes files and
    settings that make no difference, and so the folders that it saved aren't plain.)"""
    if tokenizer in checkpoints.DECODED_TOGETHER:
        pytest.skip(checkpoints.DECODED_TOGETHER_WHY)
    assert_same_words(capsys, write_checkpoint(tmp_path, tokenizer))
    if tokenizer in ("on the Hub", "alone") or checkpoints.TRANSFORMERS >= (5, 0):
        assert set(asked) == (set() if tokenizer in checkpoints.PLAIN else {"AutoTokenizer"})


KINDS = {
    **{layout: {"layout": layout} for layout in checkpoints.LAYOUTS if layout != "saved"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16 in shards": {"dtype": torch.float16, "layout": "shards"},
    "more ids than the tokenizer": {"vocab_size": 50304},
    **checkpoints.RELATIVES,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(tmp_path, capsys, asked, kind):
    """With one model.safetensors, transformers isn't asked anything."""
    if checkpoints.ignores_scale(KINDS[kind]):
        pytest.skip("transformers 4 ignores the scale settings under sdpa")
    assert_same_words(capsys, write_checkpoint(tmp_path, **KINDS[kind]), PROMPTS[:2])
    read_here = "shards" not in kind and "bin" not in kind
    assert set(asked) - {"AutoTokenizer"} == (set() if read_here else {"GPT2LMHeadModel"})


def test_fewer_ids_than_the_tokenizer(tmp_path, capsys):
    """Tokens that were added to the tokenizer alone: prompts without them work."""
    folder = write_checkpoint(tmp_path, "named", vocab_size=400)
    assert_same_words(capsys, folder, PROMPTS[:3])


@pytest.mark.parametrize(("ends", "strength"), [([20, 0, 30], 0.5), (0, 0.5), (0, 8)], ids=str)
def test_texts_that_end(tmp_path, capsys, ends, strength):
    """20 and 30 are not special tokens: the pipeline prints them, and fills up with 20. At strength
    8, a text ends at once: only the prompt is printed."""
    folder = write_checkpoint(tmp_path, eos_token_id=ends)
    model = random_gpt2(**GPT.from_pretrained(folder).config.__dict__ | {"n_positions": 96})
    likely = ends if isinstance(ends, list) else [ends]
    with torch.no_grad():  # at strength 0.5, these are about as likely as all others together
        model.transformer.ln_f.weight.mul_(0.3)
        model.transformer.ln_f.bias.copy_(strength * model.transformer.wte.weight[likely].sum(0))
    save(model, folder)
    assert_same_words(capsys, folder)
    for prompt in ("def", EOT, "", f"a{EOT}b") if strength == 8 else ():
        assert words(capsys, folder, prompt) == 5 * f"> {prompt}\n"


def test_an_empty_prompt_starts_from_bos(tmp_path, capsys):
    """Where that is an ordinary token, it is printed, as in the pipeline. generation_config.json
    has the last word about it, if there is one."""
    folder = write_checkpoint(tmp_path, bos_token_id=20)
    checkpoints.change_json(folder / "config.json", bos_token_id=30, eos_token_id=None)
    assert words(capsys, folder, "").startswith(f"> {load_tokenizer(folder).decode([20])}")
    assert_same_words(capsys, folder, [""])
    (folder / "generation_config.json").unlink()
    assert words(capsys, folder, "").startswith(f"> {load_tokenizer(folder).decode([30])}")
    assert_same_words(capsys, folder, [""])


# Flags

@pytest.fixture(scope="module")
def theirs(tiny):
    return peer(tiny)


@pytest.mark.parametrize("how", [
    {}, {"seed": 7}, {"num_return_sequences": 1}, {"max_length": 64}, {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 0}, {"top_k": 3}], ids=str)
def test_flags(tiny, theirs, capsys, how):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    assert words(capsys, tiny, "def main(", *flags) == expected(theirs, "def main(", **how)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_dtype(tiny, theirs, capsys, dtype):
    theirs = pipeline("text-generation", model=str(tiny), device="cpu", dtype=dtype,
                      tokenizer=theirs.tokenizer)
    assert words(capsys, tiny, "def main(", "--dtype", dtype) == expected(theirs, "def main(")


def test_real_words(real_tokenizer, tmp_path, capsys):
    """By the defaults, with gpt2's tokenizer and gpt2's files, but smaller weights."""
    save(random_gpt2(**checkpoints.SIZES, bos_token_id=50256, eos_token_id=50256), tmp_path, "hub")
    shutil.copy(real_tokenizer / "tokenizer.json", tmp_path)
    train_gpt2.main(["--model", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().out == expected(peer(tmp_path), PROMPTS[0])


# The Hub

CONFIGS = {"config.json", "generation_config.json", "tokenizer_config.json"}
UNUSED = {"tf_model.h5", "README.md", "model.fp16.safetensors", "pytorch_model.bin", "vocab.json",
          "merges.txt"}
SERVED = {  # with which tokenizer and weights, and which files of these are read
    "gpt2": ("on the Hub", "hub", {"model.safetensors", "tokenizer.json"}),
    "a/shards": ("slow", "shards", {"model.safetensors.index.json", "model-*", "vocab.json",
                                    "merges.txt", "added_tokens.json"}),
    "a/bin": ("today", "bin", {"pytorch_model.bin", "tokenizer.json"}),
    "in/part": ("on the Hub", "hub", UNUSED), "by/transformers": ("on the Hub", "old", UNUSED),
    "broken/off": ("today", "saved", UNUSED), "not/asked": ("today", "saved", UNUSED),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("served") for name in SERVED}
    for name, (tokenizer, layout, read) in SERVED.items():
        if layout in checkpoints.LAYOUTS:
            write_checkpoint(folders[name], tokenizer, layout)
        for unused in UNUSED - read:
            (folders[name] / unused).write_text("nobody should ask for this")
    with StandInHub(folders) as hub:
        yield hub


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    with Visitor(folder, **hub.env(folder / "cache")) as visitor:
        yield visitor


@pytest.mark.parametrize("name", ["gpt2", "a/shards", "a/bin"])
def test_what_is_downloaded(hub, online, name):
    """Exactly the files that are read, once."""
    _, layout, read = SERVED[name]
    if layout not in checkpoints.LAYOUTS:
        pytest.skip("a .bin file is read only with torch 2.6 or later")
    code, out, err = online.command("--device", "cpu", *["--model", name] * (name != "gpt2"))
    for unused in UNUSED - read:
        (hub.models[name] / unused).unlink()
    assert (code, out) == (0, expected(peer(hub.models[name]), PROMPTS[0])), err
    assert err.splitlines()[-1] == "using device: cpu"
    got = [path.rsplit("/", 1)[1] for method, path in hub.requests
           if method == "GET" and path.startswith(f"/{name}/resolve/")]
    assert len(got) == len(set(got))
    there = {path.name for path in hub.models[name].iterdir()}
    allowed = read | (CONFIGS | {"special_tokens_map.json"}) & there
    assert {re.sub("-0.*", "-*", name) for name in got} == allowed


def test_the_tokenizer_is_downloaded_without_the_weights(hub, online):
    _, out, err = online.run("print(load_tokenizer('not/asked').get_vocab_size())")
    assert out == "400\n", err
    assert not any("not/asked" in path and "safetensors" in path for _, path in hub.requests)


def test_what_is_in_the_cache_runs_offline(hub, online, tmp_path):
    """Downloaded by this file, by transformers, or by hand, only the three files needed."""
    names = ["a/shards", "in/part", "by/transformers"]
    for code in ("main(['--model', 'a/shards'])",
                 """import huggingface_hub; huggingface_hub.snapshot_download("in/part",
                    allow_patterns=["config.json", "model.safetensors", "tokenizer.json"])""",
                 """from transformers import AutoTokenizer, GPT2LMHeadModel
for cls in AutoTokenizer, GPT2LMHeadModel:
    cls.from_pretrained("by/transformers")"""):
        assert online.run(code)[0] == 0
    with Visitor(tmp_path, **online.env | {"HF_HUB_OFFLINE": "1"}) as offline:
        said = [offline.command("--device", "cpu", "--model", name) for name in names]
        the_line(*offline.command("--model", "not/there"), "not/there", "Hub", "network")
    for name, (code, out, err) in zip(names, said):
        assert out == expected(peer(hub.models[name]), PROMPTS[0]), err


def test_no_network_and_a_name_that_the_hub_does_not_have(hub, online):
    the_line(*online.command("--model", "not/there"), "not/there", "Hub", "check the name", "404")
    hub.down = True
    the_line(*online.command("--model", "by/none"), "by/none", "Hub", "network", "folder")
    hub.down = False


def test_the_next_run_mends_a_broken_download(hub, online):
    """First the disk takes only half of the weights, then the line breaks off, then all is well."""
    args = ["--model", "broken/off"]
    half = (hub.models["broken/off"] / "model.safetensors").stat().st_size // 2
    limit = """import resource; file_size = resource.RLIMIT_FSIZE
hard = resource.getrlimit(file_size)[1]; resource.setrlimit(file_size, ({}, hard))"""
    if os.name == "posix":  # elsewhere there is no limit to set
        online.run(limit.format(half))
        the_line(*online.command(*args), "broken/off", "File too large")
        online.run(limit.format("hard"))
    hub.cut = ["model.safetensors"]
    code, out, err = online.command(*args)
    hub.cut = []
    line = the_line(code, out, err.splitlines()[-1], "broken/off")  # others are huggingface_hub's
    assert "500" in line or "Connection broken" in line
    code, out, err = online.command(*args)
    assert code == 0 and out.count(f"> {PROMPTS[0]}") == 5 and "error" not in err


def test_transformers_adds_nothing_to_stderr(online, tmp_path):
    """No report, no progress bar, no advice, whether it reads the weights or can't."""
    write_checkpoint(tmp_path, "slow", "shards")
    code, out, err = online.command("--model", tmp_path, "--device", "cpu")
    assert (code, out, err) == (0, expected(peer(tmp_path), PROMPTS[0]), "using device: cpu\n")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    checkpoints.change_json(index, weight_map={name: shard for name, shard in places.items()
                                   if shard != max(places.values())})
    the_line(*online.command("--model", tmp_path), tmp_path, "lack", max(places, key=places.get))
    checkpoints.change_json(tmp_path / "config.json", vocab_size=300)
    the_line(*online.command("--model", tmp_path), tmp_path, "wte.weight")


def test_a_folder_goes_before_the_hub(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert GPT.from_pretrained("gpt2").config.vocab_size == 400

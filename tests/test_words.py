"""Promise: the command prints what transformers' pipeline says, for every kind of checkpoint that
people have; it downloads what it reads and nothing more."""
import re

import checkpoints
import pytest
import torch
from checkpoints import change_json, expected, peer, words, write_checkpoint
from hub import StandInHub, Visitor
from mistakes import the_line

from train_gpt2 import load_tokenizer

PROMPTS = ["Hello, I'm a language model,", "",
           f"one{checkpoints.EOT} two \t\n\n naïve 🙂 日本語 ﬁ\u00a0\u2028\u0000",
           "[PAD]<|user|> newword of new <s></s><|pad|> a cat, cats <mask> plain x=12345 "]

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same_words(capsys, folder, prompts):
    theirs = peer(folder)
    for prompt in prompts:
        length = len(theirs.tokenizer(prompt)["input_ids"]) + 10
        said = words(capsys, folder, prompt, "--max-length", length)
        assert said == expected(theirs, prompt, max_length=length)


ENDS = list(range(0, 400, 4))  # 0 is a special token, 20 a plain one, which is printed
KINDS = {  # test_tokenizer.py compares the ids of all tokenizers, test_logits.py reads all layouts
    **{name: {"tokenizer": name} for name in
       ("on the Hub", "added", "parts", "vocab.txt")},
    "fewer ids than the tokenizer": {"tokenizer": "named", "vocab_size": 400},
    "more ids than the tokenizer": {"vocab_size": 800},
    "float16 in shards": {"dtype": torch.float16, "layout": "shards"},
    "filled up with a special token": {"eos_token_id": ENDS},
    "filled up with a plain token": {"eos_token_id": [20, *ENDS]},
    **checkpoints.RELATIVES,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(tmp_path, capsys, kind):
    """Where the model has fewer ids than the tokenizer, prompts without the others work."""
    if kind == "vocab.txt" and checkpoints.TRANSFORMERS < (5, 0):
        pytest.skip("transformers 4 decodes the new tokens together with the prompt's")
    write_checkpoint(tmp_path, **KINDS[kind])
    assert_same_words(capsys, tmp_path, PROMPTS[:3] if "fewer" in kind else PROMPTS)


def test_an_empty_prompt_starts_from_bos(tmp_path, capsys):
    """Where that is an ordinary token, it is printed, as in the pipeline. generation_config.json
    has the last word about it, if there is one."""
    folder = write_checkpoint(tmp_path, bos_token_id=20)
    change_json(folder / "config.json", bos_token_id=30, eos_token_id=None)
    for bos in (20, 30):
        assert words(capsys, folder, "").startswith(f"> {load_tokenizer(folder).decode([bos])}")
        assert_same_words(capsys, folder, [""])
        (folder / "generation_config.json").unlink(missing_ok=True)


# Flags

@pytest.mark.parametrize("how", [
    {}, {"seed": 7}, {"num_return_sequences": 1}, {"max_length": 64}, {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 0}, {"top_k": 3}, {"temperature": 0, "num_return_sequences": 1},
], ids=str)
def test_flags(tiny, capsys, how):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    if how.get("temperature") == 0:
        how = how | {"temperature": 1.0, "do_sample": False}
    assert words(capsys, tiny, "def main(", *flags) == expected(peer(tiny), "def main(", **how)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtype(tiny, capsys, dtype):
    theirs = peer(tiny)
    theirs.model.to(getattr(torch, dtype))
    assert words(capsys, tiny, "def main(", "--dtype", dtype) == expected(theirs, "def main(")


# The Hub

SERVED = {  # with which tokenizer and weights
    "gpt2": ("on the Hub", "hub"), "a/shards": ("slow", "shards"), "a/bin": ("mapped", "bin"),
    "in/part": ("on the Hub", "hub"), "by/transformers": ("on the Hub", "old"),
}
CONFIGS = {"config.json", "generation_config.json", "tokenizer_config.json",
           "special_tokens_map.json"}
UNUSED = ["tf_model.h5", "README.md", "model.fp16.safetensors", "pytorch_model.bin", "vocab.json",
          "merges.txt"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp("served") for name in SERVED}
    for name, (tokenizer, layout) in SERVED.items():
        if layout in checkpoints.LAYOUTS:
            write_checkpoint(folders[name], tokenizer, layout)
    with StandInHub(folders) as hub:
        yield hub


@pytest.fixture(scope="module")
def online(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("online")
    with Visitor(folder, **hub.env(folder / "cache")) as visitor:
        yield visitor


@pytest.mark.parametrize(("name", "read"), [
    ("gpt2", {"model.safetensors", "tokenizer.json"}),
    ("a/shards", {"model.safetensors.index.json", "model-*", "vocab.json", "merges.txt",
                  "added_tokens.json"}),
    ("a/bin", {"pytorch_model.bin", "tokenizer.json"}),
])
def test_what_is_downloaded(hub, online, name, read):
    """Exactly the files that are read, once. The tokenizer comes without the weights."""
    if SERVED[name][1] not in checkpoints.LAYOUTS:
        pytest.skip("a .bin file is read only with torch 2.6 or later")
    folder, places = hub.models[name], f"/{name}/resolve/"
    there = {path.name for path in folder.iterdir()}
    unused = [folder / file for file in UNUSED if file not in there]
    for path in unused:
        path.write_text("nobody should ask for this")
    assert online.run(f"load_tokenizer({name!r})")[0] == 0
    assert not any(path.startswith(places) and path.endswith((".bin", ".safetensors"))
                   for _, path in hub.requests)
    code, out, err = online.command("--device", "cpu", *["--model", name] * (name != "gpt2"))
    for path in unused:
        path.unlink()
    assert (code, out) == (0, expected(peer(folder), PROMPTS[0])), err
    assert err.splitlines()[-1] == "using device: cpu"
    got = [path.rsplit("/", 1)[1] for method, path in hub.requests
           if method == "GET" and path.startswith(places)]
    assert len(got) == len(set(got))
    assert {re.sub("-0.*", "-*", file) for file in got} == read | CONFIGS & there


def test_what_is_in_the_cache_runs_offline(hub, online, tmp_path):
    """Downloaded by this file, by hand (only the three files needed), or by transformers."""
    downloads = {
        "a/shards": "main(['--model', 'a/shards'])",
        "in/part": "from huggingface_hub import snapshot_download\n"
                   "snapshot_download('in/part', ignore_patterns='*_config.json')",
        "by/transformers": "from transformers import AutoTokenizer, GPT2LMHeadModel\n"
                           "AutoTokenizer.from_pretrained('by/transformers')\n"
                           "GPT2LMHeadModel.from_pretrained('by/transformers')",
    }
    for code in downloads.values():
        assert online.run(code)[0] == 0
    with Visitor(tmp_path, **online.env | {"HF_HUB_OFFLINE": "1"}) as offline:
        said = {name: offline.command("--device", "cpu", "--model", name) for name in downloads}
    for name, (_, out, err) in said.items():
        assert out == expected(peer(hub.models[name]), PROMPTS[0]), err


def test_no_network_and_a_name_that_the_hub_does_not_have(hub, online):
    the_line(*online.command("--model", "not/there"), "not/there", "Hub", "check the name", "404")
    hub.down = True
    the_line(*online.command("--model", "by/none"), "by/none", "Hub", "network", "folder")
    hub.down = False


def test_transformers_adds_nothing_to_stderr(online, tmp_path):
    """No report, no progress bar, no advice, whether it reads the weights or can't."""
    write_checkpoint(tmp_path, "slow", "shards")
    code, out, err = online.command("--model", tmp_path, "--device", "cpu")
    assert (code, out, err) == (0, expected(peer(tmp_path), PROMPTS[0]), "using device: cpu\n")
    change_json(tmp_path / "config.json", vocab_size=300)
    the_line(*online.command("--model", tmp_path), tmp_path, "wte.weight")

"""Promise: the command prints what transformers' pipeline says, for every kind of checkpoint that
people have; it downloads what it reads and nothing more."""
import os
import subprocess
import sys

import checkpoints
import pytest
import torch
import transformers
from checkpoints import ROOT, change_json, expected, peer, words, write_checkpoint
from hub import StandInHub

from train_gpt2 import GPT, load_tokenizer, main

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
    **{name: {"tokenizer": name} for name in ("on the Hub", "added", "parts", "vocab.txt")},
    "fewer ids than the tokenizer": {"tokenizer": "added", "vocab_size": 400},
    "more ids than the tokenizer": {"vocab_size": 800},
    "float16 in shards": {"dtype": torch.float16, "layout": "shards"},
    "filled up with a special token": {"eos_token_id": ENDS},
    "filled up with a plain token": {"eos_token_id": [20, *ENDS]},
    "scaled": checkpoints.RELATIVES.get("scale by layer", {}) | {"activation_function": "gelu"},
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


@pytest.mark.parametrize("how", [
    {}, {"seed": 7}, {"num_return_sequences": 1}, {"max_length": 64}, {"temperature": 0.7},
    {"temperature": 1.8, "top_k": 0}, {"top_k": 3}, {"temperature": 0, "num_return_sequences": 1},
    {"dtype": "float64"}, {"dtype": "bfloat16"}, {"dtype": "float16"}], ids=str)
def test_flags(tiny, capsys, how):
    theirs = peer(tiny)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in how.items()]
    if how.get("temperature") == 0:
        how = how | {"temperature": 1.0, "do_sample": False}
    if "dtype" in how:
        theirs.model.to(getattr(torch, how["dtype"]))
        how = {}
    assert words(capsys, tiny, "def main(", *flags) == expected(theirs, "def main(", **how)


def test_only_what_is_read_is_downloaded(tmp_path):
    """Once, by the command as users run it, from real HTTP."""
    folder, cache = tmp_path / "served", tmp_path / "cache"
    folder.mkdir()
    wanted = {path.name for path in write_checkpoint(folder, "4", "hub").iterdir()}
    unused = [folder / "tf_model.h5", folder / "pytorch_model.bin", folder / "merges.txt"]
    for path in unused:
        path.write_text("nobody should ask for this")
    with StandInHub({"gpt2": folder}) as hub:
        run = subprocess.run([sys.executable, ROOT / "train_gpt2.py", "--device", "cpu"], check=True,
                             env=os.environ | hub.env(cache), stdout=subprocess.PIPE, text=True)
    asked = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert sorted(path.rsplit("/", 1)[1] for path in asked) == sorted(wanted)
    for path in unused:
        path.unlink()
    assert run.stdout == expected(peer(folder), PROMPTS[0])


def test_an_adapter_beside_a_model_of_the_hub(tmp_path, downloaded, refused):
    (write_checkpoint(tmp_path) / "adapter_config.json").write_text("{}")
    downloaded(tmp_path, "a/b")
    refused("a/b", says=["a/b", "adapter", "peft"], read=GPT.from_pretrained)


@pytest.mark.parametrize(("tokenizer", "layout", "left"), [
    ("vocab.json", "shards", "no"), ("on the Hub", "hub", "*_config.json"), ("4", "old", "no")])
def test_what_was_downloaded_runs_offline(tmp_path, capsys, downloaded, tokenizer, layout, left):
    """Also by hand, where only the three files that are needed were downloaded."""
    folder = write_checkpoint(tmp_path, tokenizer, layout)
    downloaded(folder, "a/b", left)
    assert words(capsys, "a/b", PROMPTS[0]) == expected(peer(folder), PROMPTS[0])


def test_transformers_adds_nothing_to_stderr(tmp_path, capsys, caplog, refused):
    """No report, no progress bar, no advice, whether it reads the weights or can't."""
    log = transformers.utils.logging
    write_checkpoint(tmp_path, "vocab.json", "shards")
    log.set_verbosity_warning(), log.enable_progress_bar(), log.enable_propagation()  # as users
    main(["--model", str(tmp_path), "--device", "cpu"])
    assert capsys.readouterr().err == "using device: cpu\n"
    change_json(tmp_path / "config.json", vocab_size=300)
    refused("--model", tmp_path, says=[tmp_path, "wte.weight"])
    log.set_verbosity_error(), log.disable_progress_bar(), log.disable_propagation()
    assert not caplog.records

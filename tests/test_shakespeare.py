"""Promise: the model in tests/shakespeare, which this repository trained, is small, good and whole:
it says what its pages show, and what transformers says, with no network."""
import re
import textwrap

import pytest
import torch
from checkpoints import ROOT, expected, pair, peer, words
from torch.nn import functional as F

from train_gpt2 import GPT, load_tokenizer, main

FOLDER = ROOT / "tests" / "shakespeare"
HELD_OUT = ROOT.parent / "shared" / "shakespeare" / "input.txt"
pytestmark = pytest.mark.usefixtures("one_thread")


def test_its_size():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"README.md", "config.json", "generation_config.json",
                          "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 3_000_000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_is_the_same_model_in_transformers(dtype):
    """The tokens of a text, its logits, and the most likely text after it."""
    (ours, theirs), tokenizer = pair(FOLDER, dtype), load_tokenizer(FOLDER)
    text = "ROMEO:\nBut soft! what light through yonder window"
    ids = tokenizer.encode(text).ids
    assert ids == peer(FOLDER).tokenizer(text)["input_ids"] and tokenizer.decode(ids) == text
    idx = torch.tensor([ids])
    assert torch.equal(ours(idx), theirs(idx).logits)
    assert torch.equal(ours.generate(idx, 40, temperature=0),
                       theirs.generate(idx, max_length=40, do_sample=False))


@pytest.mark.parametrize("prompt", ["Hello, I'm a language model,", "ROMEO:", ""])
def test_the_command_prints_what_the_pipeline_says(capsys, prompt):
    assert words(capsys, FOLDER, prompt) == expected(peer(FOLDER), prompt)


def test_the_most_likely_words(capsys):
    """No random model could say this. In float32, which rounds nearly alike on all machines."""
    said = words(capsys, FOLDER, "ROMEO:", "--dtype=float32", "--temperature=0",
                 "--num-return-sequences=1", "--max-length=24")
    assert said == "> ROMEO:\nI am a man that way to be a man.\n\nROMEO:\nI'll not stay.\n"


def test_the_sample_in_the_readme(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    flags, sample = re.search(r"^    python train_gpt2.py (--model tests/shakespeare.*)\n\n"
                              r"((?:    .*\n|\n)+)", readme, re.MULTILINE).groups()
    flags = re.findall(r'"(.*?)"|(\S+)', flags)
    main([quoted or plain for quoted, plain in flags])
    said = capsys.readouterr().out
    assert textwrap.indent(said, "    ").rstrip() == sample.rstrip()


@pytest.mark.skipif(not HELD_OUT.exists(), reason="its text isn't beside this project, in "
                                                  "../shared/shakespeare")
def test_how_well_it_predicts_what_it_was_not_trained_on():
    """In bits a character, over a fifth of the last 100,000 of the first million."""
    text = HELD_OUT.read_text(encoding="utf-8")[900_000:1_000_000]
    model, ids = GPT.from_pretrained(FOLDER).float(), load_tokenizer(FOLDER).encode(text).ids
    rows = torch.tensor(ids[:len(ids) // 129 * 129]).view(-1, 129)
    with torch.no_grad():
        nats = [F.cross_entropy(model(row[:, :-1]).flatten(0, 1), row[:, 1:].flatten())
                for row in rows[::5].split(16)]
    bits = torch.stack(nats).mean() * len(ids) / len(text) / torch.log(torch.tensor(2.0))
    assert bits < 2.2

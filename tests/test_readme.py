"""Promise: what the README says is so. Its programs run as they stand, its edits do what they say,
and its flags, files, versions and sample text are those of what lies beside it.

test_distributed.py runs the training program, and test_edits.py makes the edits.
"""
import re
import sys
from importlib.metadata import version

import pytest
import torch
from checkpoints import ROOT, pair, random_gpt2, write_checkpoint
from hub import StandInHub, Visitor
from tokenizers import Tokenizer
from transformers import GPT2LMHeadModel

import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROOF, PROGRAM, *RECIPES, CONVERT = PYTHON  # in this order


# Programs

@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The folder of a gpt2 of six layers."""
    folder = tmp_path_factory.mktemp("gpt2")
    return write_checkpoint(folder, "on the Hub", "hub", n_layer=6, n_head=4, n_embd=64)


@pytest.fixture(scope="module")
def run(gpt2, tmp_path_factory):
    """A function: a program and its arguments → its stdout, where the Hub has that gpt2."""
    folder = tmp_path_factory.mktemp("programs")
    with StandInHub({"gpt2": gpt2}) as hub, Visitor(folder, **hub.env(folder / "cache")) as visitor:
        def run(program, *arguments):
            argv = ["program.py", *map(str, arguments)]
            code, out, err = visitor.run(f"sys.argv = {argv}\nexec({program!r}, {{}})")
            assert code == 0, err
            return out
        yield run


def test_the_proof_and_the_recipes(run, gpt2):
    proof, likely, attention, stream = (run(program) for program in (PROOF, *RECIPES))
    assert proof == "True\nTrue\n"
    gpt, _ = pair(gpt2)
    tokenizer = train_gpt2.load_tokenizer(gpt2)
    prompt = "Hello, I'm a language model,"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    T = ids.shape[1]
    assert len(likely.splitlines()) == T - 1
    for line, probs, token in zip(likely.splitlines(), gpt(ids)[0].softmax(-1), ids[0, 1:]):
        word, best = (tokenizer.decode([i]) for i in (token, probs.argmax()))
        assert line.startswith(f"{word!r} {probs[token]:.1%}, most likely: {best!r} "
                               f"{probs.max():.1%}")
    peer = GPT2LMHeadModel.from_pretrained(gpt2, attn_implementation="eager")
    weights = peer(ids, output_attentions=True).attentions[5][0, 3]
    rows = [line.split()[-T:] for line in attention.splitlines()]
    assert rows == [[f"{weight:.0%}" for weight in row] for row in weights]
    torch.manual_seed(42)
    tokens = gpt.generate(ids, max_length=30)[0, T:].tolist()
    assert stream.rstrip("\n") == (prompt + tokenizer.decode(tokens)).rstrip("\ufffd\n")


@pytest.mark.skipif("torch.__version__ < (2, 6)", reason="the program asks for torch 2.6")
@pytest.mark.parametrize("kind", ["build-nanogpt", "nanoGPT without biases"])
def test_a_checkpoint_of_the_lecture(run, tmp_path, monkeypatch, kind):
    """Every weight and setting is that of the model that the checkpoint was made from. One of the
    lecture's size gets gpt2's tokenizer."""
    lecture = kind == "build-nanogpt"
    sizes = {"block_size": 64, "vocab_size": 50304 if lecture else 65, "n_layer": 2, "n_head": 2,
             "n_embd": 32}
    theirs = random_gpt2(**sizes, n_positions=64)
    saved = {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}
    for name, tensor in theirs.state_dict().items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            saved[f"_orig_mod.{name}"] = tensor.T.contiguous()  # as nn.Linear has it
        elif lecture or not name.endswith(".bias"):
            saved[f"_orig_mod.{name}"] = tensor
        else:
            tensor.zero_()  # a model without biases
    if lecture:  # its config is an object of a class in the training script
        config = type("GPTConfig", (), {"__module__": "__main__"})()
        vars(config).update(sizes)
        monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", type(config), raising=False)
        others = {"config": config, "step": 5000, "val_loss": 3.1}
    else:
        others = {"model_args": sizes | {"bias": False, "dropout": 0.0}, "iter_num": 1,
                  "optimizer": {}, "config": {"device": "cpu"}}
    torch.save({"model": saved} | others, tmp_path / "model.pt")
    run(CONVERT, tmp_path / "model.pt", tmp_path / "mine")
    gpt = train_gpt2.GPT.from_pretrained(tmp_path / "mine")
    end = 50256 if lecture else None
    assert gpt.config == train_gpt2.GPTConfig(
        **sizes, activation_function="gelu_new" if lecture else "gelu",
        bos_token_id=end, eos_token_id=end)
    weights = theirs.state_dict()
    assert gpt.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gpt.state_dict().items())
    assert (tmp_path / "mine" / "tokenizer.json").exists() == lecture


# Tables and commands

def test_the_sample_text(real_tokenizer):
    """It is what transformers' tests expect of the real gpt2, as test_logits.py has it."""
    pinned = (ROOT / "tests" / "test_logits.py").read_text(encoding="utf-8")
    ids = re.search(r"tolist\(\) == \[\[(.*?)\]\]", pinned, re.DOTALL)[1]
    tokenizer = Tokenizer.from_file(str(real_tokenizer / "tokenizer.json"))
    text = tokenizer.decode([int(id) for id in ids.split(",")])
    assert f"> {text}".replace("\n", "\n    ").replace("\n    \n", "\n\n") in README


def test_flags(capsys):
    """As --help shows them: the same ones, in the same order, with the same defaults."""
    with pytest.raises(SystemExit):
        train_gpt2.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    text = text.split("show this help message", 1)[1]
    shown = re.findall(r"(--[a-z-]+) \S+ .*?\(default: (.*?)\)", text)
    written = re.findall(r"^\| `(--[a-z-]+)` \| `?(.*?)`? \|", README, re.MULTILINE)
    assert shown == written


def test_commands():
    """A line each, so that they work in bash, PowerShell 5 and cmd alike."""
    programs = "pip|python|pytest|hf|torchrun"
    commands = re.findall(rf"^    (?:\$ )?((?:{programs}) ?.*)", README, re.MULTILINE)
    assert commands[:2] == ["pip install -r requirements.txt", "python train_gpt2.py"]
    assert "pip install -r requirements.txt\n    pytest\n" in README
    for command in commands:
        assert not re.search(r"&&|;(?! print)|\\|\$|^\w+=", command), command
    for name in re.findall(r"tests/(\w+\.py)", README):
        assert (ROOT / "tests" / name).exists()


def test_requirements_and_the_table_of_versions():
    """Lower bounds alone, so that nobody's torch is taken away. They hold here, and for all that is
    imported. One row of the table has them, and so the oldest Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
                  for line in lines if not line.startswith("#"))
    for name, bound in bounds.items():
        lowest, installed = (list(map(int, re.findall(r"\d+", text)))[:3]
                             for text in (bound, version(name)))
        assert installed >= lowest, name
    paths = [ROOT / "train_gpt2.py", *(ROOT / "tests").glob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    imports = re.findall(r"^\s*(?:from|import) (\w+)(?=.* import |$)", source, re.MULTILINE)
    others = set(imports) - {path.stem for path in paths} - sys.stdlib_module_names
    assert others - {"tiktoken_ext"} <= bounds.keys()  # a part of tiktoken
    rows = re.findall(r"^\| (3\.\d+)\.\d+ \| ([\d.]+)\S* \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 3
    python, *versions = min(rows, key=lambda row: int(row[0].removeprefix("3.")))
    assert f"Python {python} or later" in README
    assert all(map(str.startswith, versions, (bounds["torch"], bounds["transformers"])))

"""Promise: what the README says is so. Its programs run as they stand, its edits do what they say,
and its flags, files, versions and sample text are those of what lies beside it.

test_distributed.py runs the training program.
"""
import math
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from checkpoints import ROOT, pair, random_gpt2, random_idx, write_checkpoint
from hub import StandInHub
from test_edits import edited  # noqa: F401 - a fixture
from tokenizers import Tokenizer
from torch.nn import functional as F

import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
REQUIREMENTS = (ROOT / "requirements.txt").read_text().splitlines()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROOF, PROGRAM, *RECIPES, CONVERT = PYTHON  # in this order
EDITS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)


# Programs

@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A stand-in for the Hub that has a gpt2 of six layers."""
    served = tmp_path_factory.mktemp("served")
    write_checkpoint(served, "on the Hub", "hub", n_layer=6, n_head=4, n_embd=64)
    with StandInHub({"gpt2": served}) as hub:
        hub.folder = served
        yield hub


def run(hub, folder, *arguments):
    """The stdout of Python in the folder, with train_gpt2.py on its path."""
    env = os.environ | hub.env(folder / "cache") | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    process = subprocess.run([sys.executable, *map(str, arguments)], env=env, cwd=folder,
                             check=False, capture_output=True, encoding="utf-8")
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_proof_and_the_recipes(hub, tmp_path):
    """All in one process, each in a namespace of its own."""
    blocks = [PROOF, *RECIPES]
    code = f"for block in {blocks!r}:\n    exec(block, {{}})\n    print('----')"
    proof, likely, attention, stream, _ = run(hub, tmp_path, "-c", code).split("----\n")
    assert proof == "True\nTrue\n"
    assert len(PROOF.splitlines()) < 12
    gpt, _ = pair(hub.folder)
    tokenizer = train_gpt2.load_tokenizer(hub.folder)
    prompt = "Hello, I'm a language model,"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    assert len(likely.splitlines()) == ids.shape[1] - 1
    probs = gpt(ids)[0].softmax(-1)
    for line, before, token in zip(likely.splitlines(), probs, ids[0, 1:]):
        word, best = (tokenizer.decode([i]) for i in (token, before.argmax()))
        assert line.startswith(f"{word!r} {before[token]:.1%}, most likely: {best!r} "
                               f"{before.max():.1%}")
    rows = [line.split()[-ids.shape[1]:] for line in attention.splitlines()]
    assert rows[0] == ["100%"] + ["0%"] * (ids.shape[1] - 1)  # the first token sees itself alone
    assert all(abs(sum(int(cell[:-1]) for cell in row) - 100) < len(row) for row in rows)
    torch.manual_seed(42)
    tokens = gpt.generate(ids, max_length=30)[0, ids.shape[1]:].tolist()
    assert stream.rstrip("\n") == (prompt + tokenizer.decode(tokens)).rstrip("\ufffd\n")


def lecture_logits(weights, n_head, idx, approximate):
    """The lecture's model, and nanoGPT's, written down again for their own state_dict."""
    def at(name):
        return weights[f"transformer.{name}.weight"], weights.get(f"transformer.{name}.bias")

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *at(name))

    x = at("wte")[0][idx] + at("wpe")[0][:idx.shape[1]]
    B, T, C = x.shape
    for i in range(2):
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in
                   F.linear(norm(x, f"h.{i}.ln_1"), *at(f"h.{i}.attn.c_attn")).split(C, 2))
        mask = torch.full((T, T), -math.inf).triu(1)
        y = (q @ k.transpose(2, 3) / math.sqrt(C // n_head) + mask).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).reshape(B, T, C), *at(f"h.{i}.attn.c_proj"))
        y = F.gelu(F.linear(norm(x, f"h.{i}.ln_2"), *at(f"h.{i}.mlp.c_fc")),
                   approximate=approximate)
        x = x + F.linear(y, *at(f"h.{i}.mlp.c_proj"))
    return F.linear(norm(x, "ln_f"), weights["lm_head.weight"])


@pytest.mark.skipif("torch.__version__ < (2, 6)", reason="the program asks for torch 2.6")
@pytest.mark.parametrize("kind", ["build-nanogpt", "nanoGPT", "nanoGPT without biases"])
def test_a_checkpoint_of_the_lecture(hub, tmp_path, monkeypatch, kind):
    """The folder computes what the lecture's code does, to within rounding. One of the lecture's
    size gets gpt2's tokenizer."""
    sizes = {"vocab_size": 50304 if kind == "build-nanogpt" else 65, "n_layer": 2, "n_head": 2,
             "n_embd": 32, "block_size": 64}
    theirs = random_gpt2(**sizes | {"n_positions": 64}, seed=1)
    weights = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            tensor = tensor.T.contiguous()
        if not (kind == "nanoGPT without biases" and name.endswith(".bias")):
            weights[name] = tensor
    saved = {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}
    saved["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    if kind == "build-nanogpt":  # its config is an object of a class in the training script
        config = type("GPTConfig", (), {"__module__": "__main__"})()
        vars(config).update(sizes)
        monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", type(config), raising=False)
        checkpoint = {"model": saved, "config": config, "step": 5000, "val_loss": 3.1}
    else:
        checkpoint = {"model": saved, "model_args": sizes | {"bias": "with" not in kind,
                      "dropout": 0.0}, "iter_num": 1, "optimizer": {}, "config": {"device": "cpu"}}
    torch.save(checkpoint, tmp_path / "model.pt")
    (tmp_path / "convert.py").write_text(CONVERT, encoding="utf-8")
    run(hub, tmp_path, "convert.py", "model.pt", "mine")
    gpt, idx = train_gpt2.GPT.from_pretrained(tmp_path / "mine"), random_idx(theirs, 2, 33)
    approximate = "tanh" if kind == "build-nanogpt" else "none"
    expected = lecture_logits(weights, 2, idx, approximate)
    rounding = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (gpt(idx) - expected).abs().max() < 20 * rounding
    other = lecture_logits(weights, 2, idx, "none" if approximate == "tanh" else "tanh")
    assert (gpt(idx) - other).abs().max() > 100 * rounding  # the other GELU would show
    assert (tmp_path / "mine" / "tokenizer.json").exists() == (kind == "build-nanogpt")


# Edits

@pytest.fixture
def after(edited):  # noqa: F811
    """A function: the number of an edit on the page → the module with that edit."""
    def apply(number):
        pairs = []
        for hunk in re.split(r"^@@.*\n", EDITS[number], flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            pairs.append(tuple("".join(line[1:] for line in lines if line[0] in kinds)
                               for kinds in (" -", " +")))
        return edited(*pairs)
    return apply


@pytest.fixture(scope="module")
def both(hub):
    return pair(hub.folder)


def test_edit_dropout(after, hub, both):
    gpt, _ = both
    model = after(0).GPT.from_pretrained(hub.folder, dropout=0.5)
    idx = random_idx(gpt, 2, 9)
    assert torch.equal(model(idx), gpt(idx))
    assert not torch.equal(model.train()(idx), model(idx))
    assert torch.equal(model.eval().generate(idx, 20, temperature=0),
                       gpt.generate(idx, 20, temperature=0))


def test_edit_another_activation(after):
    module = after(1)
    model = module.GPT(module.GPTConfig(activation_function="relu2", n_layer=1, n_embd=24))
    assert torch.equal(model.transformer.h[0].mlp.act(torch.tensor([-2., 3.])),
                       torch.tensor([0., 9.]))


@pytest.mark.parametrize(("number", "ours", "theirs"), [
    (2, {"top_p": 0.9}, {"top_p": 0.9}), (3, {}, {"repetition_penalty": 1.3})],
    ids=["top-p", "penalty"])
def test_edits_of_sampling(after, hub, both, number, ours, theirs):
    """The tokens are those of transformers, and others than before."""
    gpt, peer = both
    model, idx = after(number).GPT.from_pretrained(hub.folder), random_idx(gpt, 3, 9)
    outs = []
    for sampler, how in [(gpt, {}), (model, ours), (peer, theirs)]:
        torch.manual_seed(1)
        how = how | ({"do_sample": True, "attention_mask": torch.ones_like(idx)}
                     if sampler is peer else {})
        outs.append(sampler.generate(idx, max_length=40, top_k=50, **how))
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_edit_the_lectures_attention(after, hub, both):
    gpt, _ = both
    model, idx = after(4).GPT.from_pretrained(hub.folder), random_idx(gpt, 2, 40)
    rounding = torch.finfo(torch.float32).eps * gpt(idx).abs().max()
    assert 0 < (model(idx) - gpt(idx)).abs().max() < 50 * rounding
    assert torch.equal(model.generate(idx[:, :5], 40, temperature=0),
                       gpt.generate(idx[:, :5], 40, temperature=0))


def test_edit_the_lectures_loss(after, hub, both):
    gpt, _ = both
    model, idx = after(5).GPT.from_pretrained(hub.folder), random_idx(gpt, 2, 9)
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert torch.equal(logits, gpt(idx[:, :-1]))
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()))
    assert torch.equal(model.generate(idx, 20, temperature=0), gpt.generate(idx, 20, temperature=0))


# Tables and commands

def test_the_sample_text(real_tokenizer):
    """It is what transformers' tests expect of the real gpt2, as test_logits.py has it."""
    pinned = (ROOT / "tests" / "test_logits.py").read_text(encoding="utf-8")
    ids = re.search(r"tolist\(\) == \[\[(.*?)\]\]", pinned, re.DOTALL)[1]
    text = Tokenizer.from_file(str(real_tokenizer / "tokenizer.json")).decode(
        [int(id) for id in ids.split(",")])
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
    commands = re.findall(r"^    (?:\$ )?((?:pip|python|pytest|hf|torchrun) ?.*)", README, re.MULTILINE)
    assert commands[:2] == ["pip install -r requirements.txt", "python train_gpt2.py"]
    assert "pip install -r requirements.txt\n    pytest\n" in README
    for command in commands:
        assert not re.search(r"&&|;(?! print)|\\|\$|^\w+=", command), command
    for name in re.findall(r"tests/(\w+\.py)", README):
        assert (ROOT / "tests" / name).exists()


def test_requirements_are_bounds_that_hold_here():
    """Lower ones only, so that nobody's torch is taken away. All that is imported is required."""
    required = set()
    for line in REQUIREMENTS:
        if not line.startswith("#"):
            name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups()
            installed = [int(part) for part in re.findall(r"\d+", version(name))[:3]]
            assert installed >= [int(part) for part in bound.split(".")], line
            required.add(name)
    paths = [ROOT / "train_gpt2.py", *(ROOT / "tests").glob("*.py")]
    imported = {name for path in paths for name in re.findall(
        r"^\s*(?:from|import) (\w+)(?=.* import |$)", path.read_text(encoding="utf-8"), re.MULTILINE)}
    others = imported - {path.stem for path in paths} - sys.stdlib_module_names
    assert others - {"tiktoken_ext"} <= required  # a part of tiktoken


def test_the_versions_of_the_table():
    """One row has the lower bounds of requirements.txt, and so the oldest Python."""
    bounds = dict(line.split(">=") for line in REQUIREMENTS if not line.startswith("#"))
    rows = re.findall(r"^\| (3\.\d+\.\d+) \| ([\d.]+)\S* \| ([\d.]+) \|", README, re.MULTILINE)
    assert len(rows) >= 3
    assert any(torch.startswith(bounds["torch"]) and transformers.startswith(bounds["transformers"])
               for _, torch, transformers in rows)
    oldest = min(tuple(map(int, python.split(".")[:2])) for python, _, _ in rows)
    assert f"Python {'.'.join(map(str, oldest))} or later" in README


def test_the_top_level():
    tracked = subprocess.run(["git", "ls-tree", "--name-only", "HEAD"], cwd=ROOT, check=False,
                             capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("this is not a git checkout")
    names = {"train_gpt2.py", "requirements.txt", "README.md", "tests", ".gitignore", ".ci"}
    assert set(tracked.stdout.split()) == names

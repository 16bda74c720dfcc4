"""Promise: what the README says is so. Its programs run as they stand, its edits do what they say,
and its commands, files and versions are those of what lies beside it. test_distributed.py runs the
training program, and test_edits.py makes the edits."""
import re
import runpy
import sys

import pytest
import torch
from checkpoints import ROOT, block, pair, random_gpt2, write_checkpoint
from transformers import GPT2LMHeadModel

import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")


# Programs

@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("gpt2"), "on the Hub", "hub", n_layer=6,
                            n_head=4, n_embd=64)


@pytest.fixture
def run(gpt2, downloaded, tmp_path, monkeypatch, capsys):
    """A function: a text in a program of the README, and arguments → what the program prints, and
    the names that it defines."""
    downloaded(gpt2, "gpt2")

    def run(marker, *arguments):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "program.py").write_text(block("python", marker), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
        names = runpy.run_path("program.py", run_name="__main__")
        return capsys.readouterr().out, names
    return run


def test_the_proof_and_the_recipes(run, gpt2):
    assert run("theirs.generate")[0] == "True\nTrue\n"
    likely, attention, stream = (run(each)[0] for each in ("topk(3)", "attn.scale", "half a char"))
    gpt, tokenizer = train_gpt2.GPT.from_pretrained(gpt2), train_gpt2.load_tokenizer(gpt2)
    prompt = "Hello, I'm a language model,"
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    T = ids.shape[1]
    for line, probs, token in zip(
            likely.splitlines(), gpt(ids)[0, :-1].softmax(-1), ids[0, 1:], strict=True):
        word, best = (tokenizer.decode([i]) for i in (token, probs.argmax()))
        said = f"{word!r} {probs[token]:.1%}, most likely: {best!r} {probs.max():.1%}"
        assert line.startswith(said)
    peer = GPT2LMHeadModel.from_pretrained("gpt2", attn_implementation="eager")
    rows = peer(ids, output_attentions=True).attentions[5][0, 3]
    for line, row in zip(attention.splitlines(), rows, strict=True):
        assert line.split()[-T:] == [f"{weight:.0%}" for weight in row]
    torch.manual_seed(42)
    tokens = gpt.generate(ids, max_length=30)[0, T:].tolist()
    assert stream == prompt + tokenizer.decode(tokens) + "\n"


@pytest.mark.skipif("torch.__version__ < (2, 6)", reason="the program asks for torch 2.6")
@pytest.mark.parametrize("kind", ["build-nanogpt", "nanoGPT without biases", "ours", "weights"])
def test_a_checkpoint_of_your_own(run, tmp_path, monkeypatch, kind):
    """Every weight and setting is the original's. One of the lecture's gets gpt2's tokenizer."""
    lecture, nano = kind == "build-nanogpt", "nanoGPT" in kind
    sizes = {"block_size": 64, "vocab_size": 50304 if lecture else 65, "n_layer": 2, "n_head": 2,
             "n_embd": 128}
    saved = weights = random_gpt2(**sizes, n_positions=64).state_dict()
    if lecture or nano:
        saved = {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}
        for name, tensor in weights.items():
            if nano and name.endswith(".bias"):
                tensor.zero_()  # a model without biases
            else:  # as nn.Linear has it
                linear = name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
                saved[f"_orig_mod.{name}"] = tensor.T.contiguous() if linear else tensor
    config = train_gpt2.GPTConfig(**sizes)
    if lecture:  # its config is an object of a class in the training script
        config = type("GPTConfig", (), {"__module__": "__main__"})()
        vars(config).update(sizes)
        monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", type(config), raising=False)
    others = {"config": config, "step": 5000, "val_loss": 3.1}
    if nano:
        others = {"model_args": sizes | {"bias": False, "dropout": 0.0}, "iter_num": 1,
                  "optimizer": {}, "config": {"device": "cpu"}}
    torch.save(saved if kind == "weights" else {"model": saved} | others, tmp_path / "model.pt")
    run("safe_globals", tmp_path / "model.pt", tmp_path / "mine")
    gpt, end = train_gpt2.GPT.from_pretrained(tmp_path / "mine"), 50256 if lecture else None
    assert gpt.config == train_gpt2.GPTConfig(**sizes, bos_token_id=end, eos_token_id=end,
                                              activation_function="gelu" if nano else "gelu_new")
    assert gpt.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in gpt.state_dict().items())
    assert (tmp_path / "mine" / "tokenizer.json").exists() == lecture


# Recipes for other tools. What they need is not in requirements.txt.

def test_lora(run, gpt2, tmp_path):
    """It trains, and what it merges is read by both sides."""
    pytest.importorskip("peft", reason="needs peft: pip install peft")
    (tmp_path / "README.md").write_text(README, encoding="utf-8")
    losses = [float(loss) for loss in re.findall(r"loss (\S+)\n", run("LoraConfig")[0])]
    assert len(losses) == 20 and losses[-1] < losses[0]
    (ours, theirs), (before, _) = pair(tmp_path / "mine"), pair(gpt2)
    idx = torch.tensor([[1, 2, 3]])
    assert torch.equal(ours(idx), theirs(idx).logits)
    same = [torch.equal(p, before.get_parameter(name)) for name, p in ours.named_parameters()]
    assert same.count(False) == 4 * len(ours.transformer.h)


def test_lm_eval(run, gpt2):
    """Every number is that of lm-eval's own HFLM."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install lm-eval")
    from lm_eval.models.huggingface import HFLM
    _, names = run("TemplateLM")
    hflm = HFLM(str(gpt2), device="cpu", batch_size=1)
    until = {**names["tiny"], "task": "until", "output_type": "generate_until",
             "doc_to_target": "barks", "doc_to_choice": None,
             "generation_kwargs": {"until": ["."], "max_gen_toks": 9}}
    for task in (names["tiny"], until):
        sides = [lm_eval.simple_evaluate(model, tasks=[task], log_samples=True)
                 for model in (names["LM"]("gpt2"), hflm)]
        ours, theirs = ([side["results"], *(row["resps"] for row in side["samples"][task["task"]])]
                        for side in sides)
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_linear(run):
    """Each layer is an nn.Linear for the quantizer, and then one of 8 bits."""
    said, names = run("quantize_dynamic")
    kinds = {type(module).__name__ for module in names["gpt"].modules()}
    assert said and "Conv1D" not in kinds and len({"DynamicQuantizedLinear", "Linear"} & kinds) == 1


# Tables and commands

def test_commands():
    """A line each, so that they work in bash, PowerShell 5 and cmd alike."""
    commands = re.findall("^    ((?:pip|python|pytest|hf|torchrun) ?.*)", README, re.MULTILINE)
    assert {"pip install -r requirements.txt", "python train_gpt2.py", "pytest"} <= {*commands}
    for command in commands:
        assert not re.search(r"&&|;(?! print)|\\|\$|^\w+=", command), command
    for name in re.findall(r"tests/(\w+\.py)", README):
        assert (ROOT / "tests" / name).exists()


def test_requirements_and_the_table_of_versions():
    """Lower bounds alone, so that nobody's torch is taken away, for all that the file imports. One
    row of the table has them, and so the oldest Python."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = dict(line.split(">=") for line in lines if not line.startswith("#"))
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    imports = re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE)
    assert set(imports) - sys.stdlib_module_names <= bounds.keys()
    rows = re.findall(r"^\| (3\.\d+)\.\d+ \| ([\d.]+)\S* \| ([\d.]+) \|", README, re.MULTILINE)
    python, *versions = min(rows, key=lambda row: int(row[0].removeprefix("3.")))
    assert len(rows) >= 3 and f"Python {python} or later" in README
    assert all(map(str.startswith, versions, (bounds["torch"], bounds["transformers"])))

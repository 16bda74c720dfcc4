"""Promise: the file is made to be changed. A learner's first edits work, or fail with the truth.

Each edit is made in a copy of the script, by replacing text that must be there once.
"""
import importlib.util
import itertools
import sys
import traceback

import pytest
import torch
from checkpoints import ROOT, random_idx, write_checkpoint

from train_gpt2 import GPT

SCRIPT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
NUMBERS = itertools.count()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function: edits of the script, as pairs (old text, new text) → the changed module."""
    def edit(*edits):
        text = SCRIPT
        for old, new in edits:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        name = f"edited_{next(NUMBERS)}"
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return edit


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    return write_checkpoint(tmp_path / "checkpoint")


FIELD = "    n_embd: int = 768\n"


def test_dropout(edited, checkpoint, tmp_path):
    """In the config and the blocks: off in eval mode, at work in training, saved and read again."""
    module = edited(
        (FIELD, FIELD + "    dropout: float = 0.0\n"),
        ("        self.mlp = MLP(config)\n",
         "        self.mlp = MLP(config)\n        self.drop = nn.Dropout(config.dropout)\n"),
        ("x = x + self.mlp(self.ln_2(x))", "x = x + self.drop(self.mlp(self.ln_2(x)))"))
    model, original = module.GPT.from_pretrained(checkpoint), GPT.from_pretrained(checkpoint)
    idx = random_idx(model, 2, 9)
    assert torch.equal(model(idx), original(idx))
    assert torch.equal(model.train()(idx), original(idx))
    model = module.GPT(module.GPTConfig(n_layer=1, n_embd=768, dropout=0.5))
    model.save_pretrained(tmp_path / "mine")
    model = module.GPT.from_pretrained(tmp_path / "mine")
    assert model.config.dropout == 0.5
    assert torch.equal(model(idx), model(idx))
    assert not torch.equal(model.train()(idx), model(idx))


def test_a_bool_and_a_str_in_the_config(edited, checkpoint, tmp_path):
    module = edited((FIELD, FIELD + '    bias: bool = True\n    norm: str = "layer"\n'))
    model = module.GPT.from_pretrained(checkpoint)
    assert model.config.bias is True
    model.config.bias, model.config.norm = False, "rms"
    model.save_pretrained(tmp_path / "mine")
    config = module.GPT.from_pretrained(tmp_path / "mine").config
    assert config.bias is False
    assert config.norm == "rms"


def test_another_activation(edited, checkpoint, tmp_path):
    module = edited(('"tanh": torch.tanh', '"tanh": torch.tanh, "mish": F.mish'))
    model = module.GPT(module.GPTConfig(n_layer=1, activation_function="mish"))
    model.save_pretrained(tmp_path / "mine")
    again = module.GPT.from_pretrained(tmp_path / "mine")
    idx = random_idx(model, 1, 5)
    assert torch.equal(again(idx).argmax(-1), model(idx).argmax(-1))


def test_top_p(edited, checkpoint):
    """Before the softmax, as one would write it. With p = 0, it leaves the likeliest token."""
    line = "    probs = torch.softmax(logits, dim=-1)  # (B, V)\n"
    module = edited((line, """\
    likely = logits.sort(descending=True).values
    before = likely.softmax(dim=-1).cumsum(dim=-1) - likely.softmax(dim=-1)
    least = likely.masked_fill((before > P).logical_and(before > 0), math.inf).amin(-1, True)
    logits = logits.masked_fill(logits < least, -math.inf)
""" + line))
    model = module.GPT.from_pretrained(checkpoint)
    idx = random_idx(model, 2, 5)
    module.P = 0.0
    assert torch.equal(model.generate(idx, 30), model.generate(idx, 30, temperature=0))
    module.P = 0.9
    assert not torch.equal(model.generate(idx, 30), model.generate(idx, 30))


def test_a_new_layer_on_a_pretrained_checkpoint(edited, checkpoint):
    """The message names the parameters that the checkpoint lacks. From nothing, it trains."""
    module = edited(
        ("        self.mlp = MLP(config)\n",
         "        self.mlp = MLP(config)\n        self.gate = nn.Linear(config.n_embd, 1)\n"),
        ("x = x + self.mlp(self.ln_2(x))", "x = x + self.gate(x) * self.mlp(self.ln_2(x))"))
    with pytest.raises(module.InputError, match=r"model has parameters.*h\.0\.gate\.weight"):
        module.GPT.from_pretrained(checkpoint)
    model = module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=50))
    model(random_idx(model, 2, 9)).sum().backward()
    assert model.transformer.h[0].gate.weight.grad.any()


def test_a_layer_taken_away(edited, checkpoint, capsys):
    """The checkpoint has more than the model: it works, and stderr says what is left out."""
    layer = "        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)\n"
    module = edited((layer, ""),
                    ("x = x + self.attn(self.ln_1(x), cache)", "x = x + self.attn(x, cache)"))
    model = module.GPT.from_pretrained(checkpoint)
    assert "h.0.ln_1.weight" in capsys.readouterr().err
    assert model(random_idx(model, 2, 9)).isfinite().all()


@pytest.mark.parametrize(("old", "new", "error"), [
    ("q, k, v = self.c_attn(x)", "q, k = self.c_attn(x)", "too many values to unpack"),
    ("y = y.transpose(1, 2).reshape(B, T, C)", "y = y.transpose(0, 3).view(B, T, C)", "view"),
    ("half = 0.5 * x", "half = 0.5 * x / (x.ndim - 3)", None),
    ("half = 0.5 * x", "half = 0.5 * x + 1 // (x.ndim - 3)", "by zero"),
    ("self.act(self.c_fc(x))", "self.act(self.fc(x))", "has no attribute 'fc'"),
    ('"wpe": embedding(config.block_size, C),', '"wpe": embedding(config.n_positions, C),',
     "no attribute 'n_positions'"),
], ids=["unpacking", "transpose", "infinity", "division", "name", "config"])
def test_a_bug_keeps_its_traceback(edited, checkpoint, capsys, old, new, error):
    """On the command line too, with the learner's own line in it."""
    module = edited((old, new))
    arguments = ["--model", str(checkpoint), "--device", "cpu"]
    if error is None:  # no exception: the logits become NaN
        with pytest.raises(SystemExit):
            module.main(arguments)
        assert "NaN or infinite" in capsys.readouterr().err
        return
    with pytest.raises(Exception, match=error) as caught:
        module.main(arguments)
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert any(new in line for line in lines), lines


def test_the_lectures_call_with_targets(checkpoint):
    """`model(x, y)` must not take y for a cache."""
    model = GPT.from_pretrained(checkpoint)
    idx = random_idx(model, 2, 9)
    with pytest.raises(TypeError, match="positional argument"):
        model(idx, idx)

"""Promise: the file is made to be changed. A learner's first edits and those of the README work, or
fail with the truth, and tests/edited.py tells an edit from a bug.

Each edit is made in a copy of train_gpt2.py, by replacing text that must be there once.
"""
import importlib
import re
import shutil
import subprocess
import sys
import traceback

import edited as check
import pytest
import torch
from checkpoints import ROOT, pair, random_idx, write_checkpoint
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import train_gpt2

SCRIPT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
DROPOUT, ACTIVATION, TOP_P, PENALTY, ATTENTION, LOSS = DIFFS  # in this order

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In the layout of gpt2 on the Hub, with causal masks in the file."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="hub")


def changed(text, *edits):
    """If the text isn't there because train_gpt2.py was edited, that is a reason to skip."""
    for old, new in edits:
        if text.count(old) != 1:
            why = f"this text isn't there once: {old}"
            git = subprocess.run("git show HEAD:./train_gpt2.py", check=False, shell=True, cwd=ROOT,
                                 capture_output=True)
            assert git.stdout != SCRIPT.encode(), why
            pytest.skip(f"train_gpt2.py was edited here: {why}")
        text = text.replace(old, new)
    return text


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function: edits of the script, as pairs (old text, new text) → the changed module."""
    def edit(*edits):
        (tmp_path / "changed.py").write_text(changed(SCRIPT, *edits), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("changed", None)
        return importlib.import_module("changed")
    return edit


def pairs(diff):
    """The edits of a diff, as pairs (old text, new text)."""
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        yield tuple("".join(line[1:] for line in lines if line[0] in kinds)
                    for kinds in (" -", " +"))


def after(line, more):
    return line, line + more


def fresh(module, **config):
    return module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=50, **config))


def ours_again(model, folder):
    """The model, saved and read again by its own file."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


# The README's edits

MASKS = {  # how the mask is held: changes of the README's diff
    "in a buffer that isn't saved": [],
    "in a saved buffer": [(", persistent=False", "")],
    "in a saved buffer of bool": [
        ('"bias", ones.tril().view(1, 1, *ones.shape), persistent=False',
         '"mask", ones.tril().bool()'),
        ("self.bias[:, :, S - T:S, :S] == 0", "~self.mask[S - T:S, :S]")],
    "in a plain tensor": [('self.register_buffer("bias", ', "self.bias = ("),
                          (", persistent=False", "")],
}


@pytest.mark.parametrize("mask", MASKS)
def test_the_lectures_attention(edited, checkpoint, tmp_path, mask):
    """On a pretrained checkpoint, it only rounds differently. Saved, it is read by all sides."""
    module = edited(*pairs(changed(ATTENTION, *MASKS[mask])))
    model = module.GPT.from_pretrained(checkpoint)
    *model_rows, cache_row = check.compare(model, checkpoint)
    verdicts = {verdict for *_, verdict in model_rows}
    assert verdicts - {check.EQUAL} == {check.FINE}, model_rows
    assert cache_row[-1] == check.EQUAL
    again, idx = ours_again(model, tmp_path / "mine"), random_idx(model, 2, 9)
    assert list(again.state_dict()) == list(model.state_dict())
    assert torch.equal(again(idx).argmax(-1), model(idx).argmax(-1))
    for reader in (module.GPT, train_gpt2.GPT, GPT2LMHeadModel):
        for name, p in reader.from_pretrained(tmp_path / "mine").named_parameters():
            assert torch.equal(p, model.get_parameter(name)), name
    assert fresh(module)(random_idx(fresh(module), 2, 9)).isfinite().all()


def test_dropout(edited, checkpoint, tmp_path):
    """Off in eval mode, at work in training, saved and read again. gpt2's config.json has no
    dropout, so it is given on loading."""
    module = edited(*pairs(DROPOUT))
    original = train_gpt2.GPT.from_pretrained(checkpoint)
    idx = random_idx(original, 2, 9)
    assert torch.equal(module.GPT.from_pretrained(checkpoint).train()(idx), original(idx))
    loaded = module.GPT.from_pretrained(checkpoint, dropout=0.5)
    for model in (loaded, ours_again(loaded, tmp_path / "mine")):
        assert model.config.dropout == 0.5 and not model.training
        assert torch.equal(model(idx), original(idx))
        assert torch.equal(model.generate(idx, 20, temperature=0),
                           original.generate(idx, 20, temperature=0))
        assert not torch.equal(model.train()(idx), original(idx))
    for field, says in [({"dropouts": 0.1}, "dropouts"), ({"n_embd": 48}, "weights don't fit")]:
        with pytest.raises((module.InputError, TypeError), match=says):
            module.GPT.from_pretrained(checkpoint, **field)


def test_another_activation(edited, checkpoint, tmp_path):
    """In a new model and in a pretrained one, saved and read again."""
    module = edited(*pairs(ACTIVATION))
    relu2 = {"activation_function": "relu2"}
    for model in (fresh(module, **relu2), module.GPT.from_pretrained(checkpoint, **relu2)):
        again, idx = ours_again(model, tmp_path / "mine"), random_idx(model, 1, 5)
        y = again.transformer.h[0].mlp.act(torch.tensor([-2., 3.]))
        assert torch.equal(y, torch.tensor([0., 9.]))
        assert torch.equal(again(idx).argmax(-1), model(idx).argmax(-1))


@pytest.mark.parametrize(("diff", "ours", "theirs"), [
    (TOP_P, {"top_p": 0.9}, {"top_p": 0.9}), (PENALTY, {}, {"repetition_penalty": 1.3})],
    ids=["top-p", "repetition penalty"])
def test_sampling(edited, checkpoint, diff, ours, theirs):
    """The tokens are those of transformers, and others than before."""
    original, peer = pair(checkpoint)
    model = edited(*pairs(diff)).GPT.from_pretrained(checkpoint)
    idx = random_idx(original, 3, 9)
    theirs = theirs | {"do_sample": True, "attention_mask": torch.ones_like(idx)}
    outs = []
    for sampler, how in [(original, {}), (model, ours), (peer, theirs)]:
        torch.manual_seed(1)
        outs.append(sampler.generate(idx, max_length=40, top_k=50, **how))
    assert torch.equal(outs[1], outs[2])
    assert not torch.equal(outs[0], outs[1])


def test_the_lectures_loss(edited, checkpoint):
    """Before the edit, `model(x, y)` must not take y for a cache."""
    original = train_gpt2.GPT.from_pretrained(checkpoint)
    model = edited(*pairs(LOSS)).GPT.from_pretrained(checkpoint)
    idx = random_idx(original, 2, 9)
    x, y = idx[:, :-1], idx[:, 1:]
    with pytest.raises(TypeError, match="positional argument"):
        original(x, y)
    logits, loss = model(x, y)
    assert torch.equal(logits, original(x))
    assert torch.equal(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    assert torch.equal(model.generate(idx, 20, temperature=0),
                       original.generate(idx, 20, temperature=0))


# Other edits

def test_other_fields_of_the_config(edited, checkpoint, tmp_path):
    """A bool, a str, and an annotation that isinstance can't take."""
    module = edited(after("    n_embd: int = 768\n", """\
    bias: bool = True
    norm: str = "layer"
    windows: list[int] | None = None
"""))
    model = module.GPT.from_pretrained(checkpoint)
    assert model.config.bias is True
    model.config.bias, model.config.norm, model.config.windows = False, "rms", [1, 2]
    config = ours_again(model, tmp_path / "mine").config
    assert (config.bias, config.norm, config.windows) == (False, "rms", [1, 2])


def test_a_bias_of_your_own_in_attention(edited, checkpoint, tmp_path):
    """It has the name of the masks in older files, but it is saved and read again."""
    module = edited(after("        self.c_proj = Conv1D(config.n_embd, config.n_embd)\n",
                          "        self.bias = nn.Parameter(torch.zeros(config.n_embd))\n"),
                    ("self.c_proj(y)", "self.c_proj(y + self.bias)"))
    model = fresh(module)
    model.transformer.h[0].attn.bias.data.fill_(0.5)
    idx = random_idx(model, 2, 9)
    assert torch.equal(ours_again(model, tmp_path)(idx), model(idx))
    with pytest.raises(module.InputError, match=r"lack.*transformer\.h\.0\.attn\.bias"):
        module.GPT.from_pretrained(checkpoint)


def test_a_new_layer(edited, checkpoint, capsys):
    """The message names the parameters that the checkpoint lacks. From nothing, it trains."""
    module = edited(after("        self.mlp = MLP(config)\n",
                          "        self.gate = nn.Linear(config.n_embd, 1)\n"),
                    ("x + self.mlp(self.ln_2(x))", "x + self.gate(x) * self.mlp(self.ln_2(x))"))
    with pytest.raises(module.InputError, match=r"lack parameters of.*h\.0\.gate\.weight"):
        module.GPT.from_pretrained(checkpoint)
    assert check.main(module, checkpoint) == 1
    line, = capsys.readouterr().out.splitlines()
    assert "h.0.gate.weight" in line
    model = fresh(module)
    model(random_idx(model, 2, 9)).sum().backward()
    assert model.transformer.h[0].gate.weight.grad.any()


def test_a_layer_taken_away(edited, checkpoint, capsys):
    """The checkpoint has more than the model: it works, and stderr says what is left out."""
    layer = "        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)\n"
    module = edited((layer, ""), ("self.attn(self.ln_1(x), cache)", "self.attn(x, cache)"))
    model = module.GPT.from_pretrained(checkpoint)
    assert "h.0.ln_1.weight" in capsys.readouterr().err
    assert model(random_idx(model, 2, 9)).isfinite().all()
    assert check.main(module, checkpoint) == 1


@pytest.mark.parametrize(("old", "new", "error"), [
    ("q, k, v = self.c_attn(x)", "q, k = self.c_attn(x)", "too many values to unpack"),
    ("torch.empty(config.block_size, C)", "torch.empty(config.n_positions, C)", "'n_positions'"),
], ids=["unpacking", "config"])
def test_a_bug_keeps_its_traceback(edited, checkpoint, old, new, error):
    """On the command line and in edited.py, with the learner's own line in it."""
    module = edited((old, new))
    for call in (lambda: module.main(["--model", str(checkpoint), "--device", "cpu"]),
                 lambda: check.main(module, checkpoint)):
        with pytest.raises(Exception, match=error) as caught:
            call()
        lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert any(new in line for line in lines), lines


# tests/edited.py

VERDICTS = {  # the worst verdict, and edits
    "none": [check.EQUAL],
    "the lecture's GELU": [check.FINE, ("self.act = ACTIVATIONS[config.activation_function]",
                                        'self.act = nn.GELU(approximate="tanh")')],
    "forgotten scale": [check.LARGE, ("scale=self.scale", "scale=1.0")],
    "no causal mask": [check.LARGE, ("is_causal=is_causal", "is_causal=False")],
    "no final LayerNorm": [check.LARGE, ("        x = self.transformer.ln_f(x)\n", "")],
    "forgotten bias": [check.LARGE, ("torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)",
                                     "torch.mm(x.view(-1, x.shape[-1]), self.weight)")],
    "cache off by one": [check.CACHE, (
        "start = caches[0].length if caches else 0",
        "start = caches[0].length + (caches[0].length > 0) if caches else 0")],
}


@pytest.mark.parametrize("edit", VERDICTS)
def test_edited_py(edited, capsys, edit):
    """Its verdict on each line, its last sentence and its exit status."""
    worst, *edits = VERDICTS[edit]
    code = check.main(edited(*edits))
    table, meaning = capsys.readouterr().out.split("\n\n")
    *model, cache = (line.rpartition("  ")[2] for line in table.splitlines()[1:])
    assert meaning.strip() == check.MEANING[worst]
    assert code == (worst in (check.LARGE, check.CACHE))
    if worst == check.LARGE:
        assert model.count(worst) >= 5  # of six: one token sees no mask, and needs none
    else:
        assert set(model) <= {check.EQUAL, worst}
        assert cache == (worst if worst == check.CACHE else check.EQUAL)


def test_edited_py_as_a_program(checkpoint, tmp_path):
    """On the file in its own repository, with the folder that it is given."""
    (tmp_path / "tests").mkdir()
    for name in ("edited.py", "checkpoints.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    _, bug = VERDICTS["forgotten scale"]
    (tmp_path / "train_gpt2.py").write_text(changed(SCRIPT, bug), encoding="utf-8")
    run = subprocess.run([sys.executable, tmp_path / "tests" / "edited.py", checkpoint],
                         check=False, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert check.LARGE in run.stdout and check.MEANING[check.LARGE] in run.stdout

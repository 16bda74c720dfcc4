"""Promise: the file is made to be changed. A learner's first edits work, or fail with the truth,
and tests/edited.py tells an edit from a bug.

Each edit is made in a copy of train_gpt2.py, by replacing text that must be there once.
"""
import importlib.util
import itertools
import shutil
import subprocess
import sys
import traceback

import edited as check
import pytest
import torch
from checkpoints import ROOT, random_idx, write_checkpoint
from transformers import GPT2LMHeadModel

import train_gpt2

SCRIPT = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
NUMBERS = itertools.count()

pytestmark = pytest.mark.usefixtures("one_thread", "unedited")


def fail_or_skip(why):
    """An edited train_gpt2.py is a reason to skip, but not one that git knows as it is."""
    git = ["git", "show", "HEAD:train_gpt2.py"]
    if shutil.which("git") and SCRIPT.encode() == subprocess.run(
            git, check=False, cwd=ROOT, capture_output=True).stdout:
        pytest.fail(why)
    pytest.skip(f"train_gpt2.py was edited here: {why}")


@pytest.fixture(scope="module")
def unedited(checkpoint):
    """What follows is about the file as it was, where a bug of an edit would only confuse."""
    try:
        rows = list(check.compare(train_gpt2.GPT.from_pretrained(checkpoint), checkpoint))
    except Exception as error:  # noqa: BLE001 - any bug of the edit
        fail_or_skip(repr(error))
    if {verdict for *_, verdict in rows} != {check.EQUAL}:
        fail_or_skip("it isn't bit-identical to transformers: see `python tests/edited.py`")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """In the layout of gpt2 on the Hub, with causal masks in the file."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), layout="hub")


def changed(*edits):
    text = SCRIPT
    for old, new in edits:
        if text.count(old) != 1:
            fail_or_skip(f"this text isn't there once: {old}")
        text = text.replace(old, new)
    return text


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A function: edits of the script, as pairs (old text, new text) → the changed module."""
    def edit(*edits):
        name = f"edited_{next(NUMBERS)}"
        path = tmp_path / f"{name}.py"
        path.write_text(changed(*edits), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module
    return edit


def after(line, more):
    return line, line + more


def ours_again(model, folder):
    """The model, saved and read again by its own file."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


FIELD = "    n_embd: int = 768\n"
DROPOUT = [after(FIELD, "    dropout: float = 0.0\n"),
           after("        self.mlp = MLP(config)\n",
                 "        self.drop = nn.Dropout(config.dropout)\n"),
           ("x = x + self.mlp(self.ln_2(x))", "x = x + self.drop(self.mlp(self.ln_2(x)))")]
INIT = "        self.c_proj = Conv1D(config.n_embd, config.n_embd)\n"
SDPA = "F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=self.scale)\n"
TRIL = "torch.tril(torch.ones(config.block_size, config.block_size))"
MASKS = {  # the line in __init__, and in forward what is hidden, (T, S)
    "buffer named bias": (f'self.register_buffer("bias", {TRIL}[None, None])',
                          "self.bias[:, :, S - T:S, :S] == 0"),
    "buffer": (f'self.register_buffer("mask", {TRIL})', "self.mask[S - T:S, :S] == 0"),
    "buffer that isn't saved": (f'self.register_buffer("mask", {TRIL}, persistent=False)',
                                "self.mask[S - T:S, :S] == 0"),
    "bool buffer": (f'self.register_buffer("mask", {TRIL}.bool())', "~self.mask[S - T:S, :S]"),
    "plain tensor": (f"self.mask = {TRIL}", "self.mask[S - T:S, :S] == 0"),
    "number from a tensor": (f"self.size = int({TRIL}.sum(0).max().item())",
                             "~torch.ones(self.size, self.size).tril().bool()[S - T:S, :S]"),
}


def lectures_attention(mask="buffer named bias"):
    """Written out, as the lecture has it."""
    init, hidden = MASKS[mask]
    return [after(INIT, f"        {init}\n"), (SDPA, f"""\\
            (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        S = k.size(2)
        y = y.masked_fill({hidden}, float("-inf"))
        y = F.softmax(y, dim=-1) @ v
""")]


@pytest.mark.parametrize("mask", MASKS)
def test_the_lectures_attention(edited, checkpoint, tmp_path, mask):
    """On a pretrained checkpoint, however it holds its mask; also saved and read again."""
    module = edited(*lectures_attention(mask))
    model = module.GPT.from_pretrained(checkpoint)
    rows = list(check.compare(model, checkpoint))
    assert {verdict for *_, verdict in rows} <= {check.EQUAL, check.FINE}, rows
    idx = random_idx(model, 2, 9)
    again = ours_again(model, tmp_path / "mine")
    assert list(again.state_dict()) == list(model.state_dict())
    for reader in (module.GPT, train_gpt2.GPT, GPT2LMHeadModel):
        for name, p in reader.from_pretrained(tmp_path / "mine").named_parameters():
            assert torch.equal(p, model.get_parameter(name)), name
    assert torch.equal(again(idx).argmax(-1), model(idx).argmax(-1))
    fresh = module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=50))
    assert fresh(random_idx(fresh, 2, 9)).isfinite().all()


def test_a_bias_of_your_own_in_attention(edited, checkpoint, tmp_path):
    """It has the name of the masks in older files, but it is saved and read again."""
    module = edited(after(INIT, "        self.bias = nn.Parameter(torch.zeros(config.n_embd))\n"),
                    ("        return self.c_proj(y)\n", "        return self.c_proj(y + self.bias)\n"))
    model = module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=50))
    model.transformer.h[0].attn.bias.data.fill_(0.5)
    idx = random_idx(model, 2, 9)
    assert torch.equal(ours_again(model, tmp_path)(idx), model(idx))
    with pytest.raises(module.InputError, match=r"lack.*transformer\.h\.0\.attn\.bias"):
        module.GPT.from_pretrained(checkpoint)


def test_dropout(edited, checkpoint, tmp_path):
    """In the config and the blocks: off in eval mode, at work in training, saved and read again.
    gpt2's config.json has no dropout, so it is given on loading."""
    module = edited(*DROPOUT)
    original = train_gpt2.GPT.from_pretrained(checkpoint)
    idx = random_idx(original, 2, 9)
    assert torch.equal(module.GPT.from_pretrained(checkpoint).train()(idx), original(idx))
    loaded = module.GPT.from_pretrained(checkpoint, dropout=0.5)
    for model in (loaded, ours_again(loaded, tmp_path / "mine")):
        assert model.config.dropout == 0.5 and not model.training
        assert torch.equal(model(idx), original(idx))
        assert not torch.equal(model.train()(idx), original(idx))
    for field, says in [({"dropouts": 0.1}, "dropouts"), ({"n_embd": 48}, "weights don't fit")]:
        with pytest.raises((module.InputError, TypeError), match=says):
            module.GPT.from_pretrained(checkpoint, **field)


def test_other_fields_of_the_config(edited, checkpoint, tmp_path):
    """A bool, a str, and an annotation that isinstance can't take."""
    module = edited(after(FIELD, '    bias: bool = True\n    norm: str = "layer"\n'
                                 "    windows: list[int] | None = None\n"))
    model = module.GPT.from_pretrained(checkpoint)
    assert model.config.bias is True
    model.config.bias, model.config.norm, model.config.windows = False, "rms", [1, 2]
    config = ours_again(model, tmp_path / "mine").config
    assert (config.bias, config.norm, config.windows) == (False, "rms", [1, 2])


def test_another_activation(edited, checkpoint, tmp_path):
    module = edited(('"tanh": torch.tanh', '"tanh": torch.tanh, "mish": F.mish'))
    mish = {"activation_function": "mish"}
    for model in (module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, **mish)),
                  module.GPT.from_pretrained(checkpoint, **mish)):
        again, idx = ours_again(model, tmp_path / "mine"), random_idx(model, 1, 5)
        assert again.transformer.h[0].mlp.act is torch.nn.functional.mish
        assert torch.equal(again(idx).argmax(-1), model(idx).argmax(-1))


def test_top_p(edited, checkpoint):
    """In sample(), before the softmax, as one would write it. p = 0 leaves the likeliest token."""
    line = "    probs = torch.softmax(logits, dim=-1)  # (B, V)\n"
    module = edited(("def sample(logits, temperature, top_k):",
                     "def sample(logits, temperature, top_k, top_p=0.9):"), (line, """\
    likely = logits.sort(descending=True).values
    before = likely.softmax(dim=-1).cumsum(dim=-1) - likely.softmax(dim=-1)
    least = likely.masked_fill((before > top_p).logical_and(before > 0), math.inf).amin(-1, True)
    logits = logits.masked_fill(logits < least, -math.inf)
""" + line))
    model = module.GPT.from_pretrained(checkpoint)
    idx = random_idx(model, 2, 5)
    assert not torch.equal(model.generate(idx, 30), model.generate(idx, 30))
    module.sample.__defaults__ = (0.0,)
    assert torch.equal(model.generate(idx, 30), model.generate(idx, 30, temperature=0))


def test_a_repetition_penalty(edited, checkpoint):
    """In generate(), which knows the previous ids. So large a penalty forbids them."""
    module = edited(("            new = sample(", """\
            seen = logits.gather(1, idx)
            logits = logits.scatter(1, idx, torch.where(seen < 0, seen * 1e9, seen / 1e9))
            logits = logits - logits.amax(-1, keepdim=True)
            new = sample("""))
    model = module.GPT.from_pretrained(checkpoint)
    model.config.eos_token_id = None
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for row in model.generate(idx, 60, temperature=0).tolist():
        assert len(set(row)) == 60
    assert any(len(set(row)) < 60 for row in
               train_gpt2.GPT.from_pretrained(checkpoint).generate(idx, 60, temperature=0).tolist())


def test_a_new_layer_on_a_pretrained_checkpoint(edited, checkpoint, capsys):
    """The message names the parameters that the checkpoint lacks. From nothing, it trains."""
    module = edited(after("        self.mlp = MLP(config)\n",
                          "        self.gate = nn.Linear(config.n_embd, 1)\n"),
                    ("x = x + self.mlp(self.ln_2(x))",
                     "x = x + self.gate(x) * self.mlp(self.ln_2(x))"))
    with pytest.raises(module.InputError, match=r"lack parameters of the model.*h\.0\.gate\.weight"):
        module.GPT.from_pretrained(checkpoint)
    assert check.main(module, checkpoint) == 1
    line, = capsys.readouterr().out.splitlines()
    assert "h.0.gate.weight" in line
    model = module.GPT(module.GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=50))
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
    ("y = y.transpose(1, 2).reshape(B, T, C)", "y = y.transpose(0, 3).view(B, T, C)", "view"),
    ("self.act(self.c_fc(x))", "self.act(self.fc(x))", "has no attribute 'fc'"),
    ("torch.empty(config.block_size, C)", "torch.empty(config.n_positions, C)", "'n_positions'"),
], ids=["unpacking", "view", "name", "config"])
def test_a_bug_keeps_its_traceback(edited, checkpoint, old, new, error):
    """On the command line and in edited.py, with the learner's own line in it."""
    module = edited((old, new))
    for call in (lambda: module.main(["--model", str(checkpoint), "--device", "cpu"]),
                 lambda: check.main(module, checkpoint)):
        with pytest.raises(Exception, match=error) as caught:
            call()
        lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
        assert any(new in line for line in lines), lines


def test_the_lectures_call_with_targets(checkpoint):
    """`model(x, y)` must not take y for a cache."""
    model = train_gpt2.GPT.from_pretrained(checkpoint)
    idx = random_idx(model, 2, 9)
    with pytest.raises(TypeError, match="positional argument"):
        model(idx, idx)


# tests/edited.py

CORRECT = {
    "the lecture's GELU": [("self.act = ACTIVATIONS[config.activation_function]",
                            'self.act = nn.GELU(approximate="tanh")')],
    "the lecture's attention": lectures_attention(),
    "dropout": DROPOUT,
}
BUGS = {
    "forgotten scale": [("scale=self.scale", "scale=1.0")],
    "no causal mask": [("is_causal=is_causal", "is_causal=False")],
    "transposed c_proj": [("        return self.c_proj(y)\n", """\
        y = torch.addmm(self.c_proj.bias, y.view(-1, C), self.c_proj.weight.T)
        return y.view(B, T, C)
""")],
    "no final LayerNorm": [("        x = self.transformer.ln_f(x)\n", "")],
    "forgotten bias": [("torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)",
                        "torch.mm(x.view(-1, x.shape[-1]), self.weight)")],
    "cache off by one": [("start = caches[0].length if caches else 0",
                          "start = caches[0].length + (caches[0].length > 0) if caches else 0")],
}


@pytest.mark.parametrize("edit", [None, *CORRECT, *BUGS])
def test_edited_py(edited, capsys, edit):
    """Its verdict on each line, its last sentence and its exit status."""
    code = check.main(edited(*(CORRECT | BUGS).get(edit, [])))
    table, meaning = capsys.readouterr().out.split("\n\n")
    *model, cache = (line.rpartition("  ")[2] for line in table.splitlines()[1:])
    if edit == "cache off by one":
        worst = check.CACHE
        assert (set(model), cache) == ({check.EQUAL}, check.CACHE)
    elif edit in BUGS:
        worst = check.LARGE
        assert model.count(check.LARGE) >= 5  # of six: one token sees no mask, and needs none
    else:
        worst = check.EQUAL if edit in (None, "dropout") else check.FINE
        assert set(model) <= {check.EQUAL, worst} and cache == check.EQUAL
    assert meaning.strip() == check.MEANING[worst]
    assert code == (edit in BUGS)


def test_edited_py_as_a_program(checkpoint, tmp_path):
    """On the file in its own repository, with the folder that it is given."""
    (tmp_path / "tests").mkdir()
    for name in ("edited.py", "checkpoints.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    (tmp_path / "train_gpt2.py").write_text(changed(*BUGS["forgotten scale"]), encoding="utf-8")
    run = subprocess.run([sys.executable, tmp_path / "tests" / "edited.py", checkpoint],
                         check=False, stdout=subprocess.PIPE, text=True)
    assert run.returncode == 1
    assert check.LARGE in run.stdout and check.MEANING[check.LARGE] in run.stdout

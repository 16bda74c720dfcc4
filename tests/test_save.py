"""Promise: save_pretrained() writes a whole folder, which transformers and the command take as it
is; and whatever happens meanwhile, the old model or the new one is there, whole."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    EOT,
    ROOT,
    pair,
    random_gpt2,
    random_idx,
    read_tokenizer,
    save,
    save_tokenizer,
    save_vocabulary,
    train_bpe,
)
from test_words import KINDS, expected, ids, peer, today, words
from transformers import AutoModelForCausalLM

from train_gpt2 import GPT, GPTConfig, find_folder, main, read_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written

@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_saved_and_read_again(tmp_path, capsys, kind):
    """By us and by transformers: the same model, the same words; and saved again, the same bytes."""
    folder, mine, again = tmp_path / "theirs", tmp_path / "mine", tmp_path / "again"
    folder.mkdir()
    kind(folder)
    model = GPT.from_pretrained(folder)
    model.save_pretrained(mine)
    GPT.from_pretrained(mine).save_pretrained(again)
    assert contents(again) == contents(mine)
    ours, theirs = pair(mine)
    assert type(AutoModelForCausalLM.from_pretrained(mine)) is type(theirs)
    assert ours.config == model.config
    assert {p.dtype for p in ours.parameters()} == {theirs.dtype} == {model.lm_head.weight.dtype}
    dtype = json.loads((mine / "config.json").read_text())["dtype"]
    assert f"torch.{dtype}" == str(model.lm_head.weight.dtype)
    for B, T in [(1, 1), (3, 9)]:
        idx = random_idx(model, B, T)
        assert torch.equal(ours(idx), model(idx))
        assert torch.equal(theirs(idx).logits, model(idx))
    before, after = peer(folder), peer(mine)
    for prompt in ("Hello, I'm", "", f"a{EOT} b"):
        length = str(len(before.tokenizer(prompt)["input_ids"]) + 10)
        said = words(capsys, mine, prompt, "--max-length", length)
        assert said == words(capsys, folder, prompt, "--max-length", length)
        assert said == expected(before, prompt, max_length=int(length))
        assert said == expected(after, prompt, max_length=int(length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_file_is_the_one_that_transformers_writes(tmp_path, dtype):
    theirs = random_gpt2(**ids(100)).to(dtype)
    save(theirs, tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    assert contents(tmp_path / "ours")["model.safetensors"] == contents(tmp_path / "theirs")["model.safetensors"]
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    for key, value in json.loads((tmp_path / "ours" / "config.json").read_text()).items():
        assert config.get(key, value) == value, key


def test_what_was_trained(tmp_path, capsys):
    today(tmp_path)
    model = GPT.from_pretrained(tmp_path).train()
    idx = random_idx(model, 4, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(idx).logsumexp(-1).mean().backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "mine")
    ours, theirs = pair(tmp_path / "mine")
    assert ours.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(ours(idx), model(idx))
    assert torch.equal(theirs(idx).logits, model(idx))
    assert words(capsys, tmp_path / "mine", "Hello") == expected(peer(tmp_path / "mine"), "Hello")


def test_a_model_made_from_nothing(tmp_path, capsys, monkeypatch):
    """It has no vocabulary. Its folder says so when it is asked to speak, unless GPT-2's fits."""
    torch.manual_seed(0)
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 64}
    GPT(GPTConfig(**small, vocab_size=100)).save_pretrained(tmp_path / "own")
    assert set(contents(tmp_path / "own")) == {"config.json", "model.safetensors"}
    ours, theirs = pair(tmp_path / "own")
    assert torch.equal(ours(random_idx(ours, 2, 9)), theirs(random_idx(ours, 2, 9)).logits)
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "own")])
    assert "has no vocabulary" in capsys.readouterr().err
    # With a vocabulary put there for it, before or after, it speaks.
    model = GPT(GPTConfig(**small, vocab_size=save_vocabulary(tmp_path / "own"), bos_token_id=0))
    model.save_pretrained(tmp_path / "own")
    assert words(capsys, tmp_path / "own", "Hello").count("> Hello") == 5


def test_the_vocabulary_of_another_model(tmp_path, tiny, capsys):
    """The README's way to save a model made from nothing with a vocabulary."""
    gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=64, vocab_size=400, bos_token_id=0))
    gpt.vocabulary = read_vocabulary(find_folder(tiny, weights=False))
    gpt.save_pretrained(tmp_path)
    assert words(capsys, tmp_path, "Hello").count("> Hello") == 5
    assert read_tokenizer(tmp_path)("Hello")["input_ids"] == read_tokenizer(tiny)("Hello")["input_ids"]


def test_a_head_of_its_own(tmp_path, tiny):
    """As load_state_dict(assign=True) makes it. It could only be saved by dropping it."""
    model = GPT.from_pretrained(tiny)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(tmp_path)  # another tensor, but of the same numbers
    assert contents(tmp_path) == before
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    with pytest.raises(ValueError, match="lm_head"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_name_of_several_folders_a_path_and_a_name(tmp_path, monkeypatch):
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=10))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("models/of/mine")
    model.save_pretrained(tmp_path / "other")
    assert contents(tmp_path / "models" / "of" / "mine") == contents(tmp_path / "other")


# Saving over another

def test_into_the_folder_that_the_model_is_mapped_from(tmp_path):
    today(tmp_path)
    model, other = GPT.from_pretrained(tmp_path), GPT.from_pretrained(tmp_path)
    idx = random_idx(model, 2, 9)
    before = model(idx)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(2)
    after = model(idx)
    for _ in range(3):
        model.save_pretrained(tmp_path)
        assert torch.equal(model(idx), after)
        assert torch.equal(other(idx), before)  # mapped from the file that is no more
        assert torch.equal(GPT.from_pretrained(tmp_path)(idx), after)
    other.save_pretrained(tmp_path)
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx), before)
    assert torch.equal(model(idx), after)


def test_on_windows_a_model_is_not_mapped(tmp_path, monkeypatch):
    """There, a file that is mapped can be neither replaced nor deleted."""
    today(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    model = GPT.from_pretrained(tmp_path)
    monkeypatch.undo()
    before = model(random_idx(model, 2, 9))
    path = tmp_path / "model.safetensors"
    with path.open("rb+") as file:  # what no one should do to a mapped file shows here that it is none
        file.write(bytes(path.stat().st_size))
    assert torch.equal(model(random_idx(model, 2, 9)), before)


def test_over_a_model_with_another_vocabulary_and_other_ends(tmp_path, capsys):
    """Nothing of the other may stay: it would speak for this one."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
    size = save_vocabulary(mine)
    save(random_gpt2(**ids(size, first=size - 1)), mine)
    save_tokenizer(other, train_bpe(["<s>", "</s>"], size), bos_token="<s>", eos_token="</s>")
    random_gpt2(**ids(size, pad_token_id=7)).save_pretrained(other, max_shard_size="20KB")
    (other / "README.md").write_text("mine to keep")
    GPT.from_pretrained(mine).save_pretrained(other)
    assert words(capsys, other, "Hello <s>") == words(capsys, mine, "Hello <s>")
    assert pair(other)[1].generation_config.pad_token_id is None
    assert (other / "README.md").read_text() == "mine to keep"


def test_the_vocabulary_is_that_of_the_checkpoint_even_if_its_folder_is_gone(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    today(tmp_path / "a")
    said = words(capsys, tmp_path / "a", "Hello")
    model = GPT.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert words(capsys, tmp_path / "b", "Hello") == said
    assert read_tokenizer(tmp_path / "b")("Hello")["input_ids"]


# What goes wrong

def assert_as_before(folder, before):
    """Not a byte of it has changed, and nothing half-written stays behind."""
    assert contents(folder) == before


def test_a_file_in_its_place(tmp_path):
    (tmp_path / "mine").write_text("a file")
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=10))
    with pytest.raises(OSError, match="mine"):
        model.save_pretrained(tmp_path / "mine")
    with pytest.raises(OSError, match="mine"):
        model.save_pretrained(tmp_path / "mine" / "deeper")
    assert (tmp_path / "mine").read_text() == "a file"


SAVE_ONCE = """
import sys
sys.path.insert(0, sys.argv[2])
from train_gpt2 import GPT
GPT.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])
"""


def test_no_right_to_write(tmp_path):
    if os.name == "nt":
        pytest.skip("Windows has no such rights")
    command = [sys.executable, "-c", SAVE_ONCE, tmp_path, ROOT]
    if os.getuid() == 0:  # whom no right stops, unless that is taken from him
        command = ["setpriv", "--bounding-set=-dac_override", *command]
        if subprocess.run(["setpriv", "--bounding-set=-dac_override", "true"], check=False).returncode:
            pytest.skip("run as root, and there is no setpriv to take root's rights away")
    today(tmp_path)
    before = contents(tmp_path)
    tmp_path.chmod(0o555)
    try:
        process = subprocess.run(command, check=False, capture_output=True, text=True)
    finally:
        tmp_path.chmod(0o755)
    assert "PermissionError" in process.stderr and str(tmp_path) in process.stderr, process.stderr
    assert_as_before(tmp_path, before)


def test_full_disk(tmp_path):
    """No file may grow beyond half of the weights."""
    resource = pytest.importorskip("resource")  # which Windows has not
    today(tmp_path)
    model, before = GPT.from_pretrained(tmp_path), contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    half = len(before["model.safetensors"]) // 2
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (half, limits[1]))
        with pytest.raises(OSError, match=tmp_path.name):
            model.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert_as_before(tmp_path, before)
    model.save_pretrained(tmp_path)


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.getuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here: that takes Linux and root")
    try:
        today(disk)  # 150 KB, of which a second one has no room
        model, before = GPT.from_pretrained(disk), contents(disk)
        for _ in range(3):
            with pytest.raises(OSError, match="disk"):
                model.save_pretrained(disk)
            assert_as_before(disk, before)
        del model
    finally:
        subprocess.run(["umount", str(disk)], check=True)


KILL = """
import os, random, signal, sys, time, torch
from pathlib import Path
folder, kills = Path(sys.argv[1]), int(sys.argv[3])
sys.path.insert(0, sys.argv[2])
from train_gpt2 import GPT
torch.set_num_threads(1)
files = {path.name for path in folder.iterdir()}
rng, left_behind = random.Random(0), 0
for kill in range(kills):
    model = GPT.from_pretrained(folder)
    child = os.fork()  # of a process in which torch is already imported
    if child == 0:
        with torch.no_grad():
            for n in range(10**9):
                for p in model.parameters():
                    p.fill_(kill + n % 7)
                model.save_pretrained(folder)
    time.sleep(0.02 + 0.1 * rng.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left_behind += {path.name for path in folder.iterdir()} != files
    numbers = {n.item() for p in GPT.from_pretrained(folder).parameters() for n in p.unique()}
    assert len(numbers) == 1, f"neither one model nor the other: {numbers}"
GPT.from_pretrained(folder).save_pretrained(folder)
assert {path.name for path in folder.iterdir()} == files, "what was left behind is still there"
print(left_behind)
"""


def test_killed_at_any_moment(tmp_path):
    """Many times, while it saves one model after another, each of one number alone: what is there
    afterwards is always one of them, whole; and the next save sweeps up what the killed one left."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows has no fork, which makes many kills quick")
    today(tmp_path)
    model = random_gpt2(**ids(400, n_embd=256))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0)
    save(model, tmp_path)  # 7 MB: some milliseconds of writing
    (tmp_path / "generation_config.json").unlink()
    kills = 20
    process = subprocess.run([sys.executable, "-c", KILL, tmp_path, ROOT, str(kills)], check=False,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > kills // 5, "few kills came while a file was written: this shows little"
    ours, theirs = pair(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C while it writes: nothing has changed, nothing stays behind."""
    import safetensors.torch
    today(tmp_path)
    model, before = GPT.from_pretrained(tmp_path), contents(tmp_path)

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"the first half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert_as_before(tmp_path, before)

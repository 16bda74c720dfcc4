"""What all tests share. Each file says in its first line which promise it proves."""
import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `pytest` doesn't, `python -m pytest` does
CACHE = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
# As without a network: huggingface_hub, imported later, finds only what a test puts there.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": CACHE.name}

try:
    from transformers import GPT2LMHeadModel
    GPT2LMHeadModel.from_pretrained  # noqa: B018 - without a torch that it likes, this raises
except ImportError:
    sys.exit(f"transformers {importlib.metadata.version('transformers')} does not run with torch "
             f"{torch.__version__}: pip install \"transformers<5\"")

from checkpoints import TORCH, change_json, write_checkpoint

import train_gpt2

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_configure(config):
    config.option.reportchars += "s"  # say why a test is skipped, without being asked


def pytest_report_header():
    names = "torch", "transformers", "safetensors", "tokenizers", "huggingface_hub", "numpy"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return [*versions, f"equality is tested on: {', '.join(DEVICES)}"]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def one_thread():
    """Models this tiny are slower with more threads, and far slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def dynamo():
    """The counters of torch.compile, at nothing."""
    if TORCH < (2, 4) and sys.version_info >= (3, 12):
        pytest.skip("this torch's compile runs on Python 3.11 at most")
    import torch._dynamo
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny checkpoint with the files and the layout of gpt2 on the Hub."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "on the Hub", "hub", n_positions=64)


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny checkpoint's folder, for damaging."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def downloaded():
    """A function: puts a folder into the cache as the Hub's model of this name, but for the files
    that a pattern leaves out. The tests have no network."""
    def downloaded(folder, name, left_out="no"):
        path = Path(CACHE.name, f"models--{name.replace('/', '--')}")
        commit, ignore = 40 * "0", shutil.ignore_patterns(left_out)
        shutil.copytree(folder, path / "snapshots" / commit, ignore=ignore)
        files = {file.name: {"size": 1, "blob_id": "0"} for file in Path(folder).iterdir()}
        (path / "trees").mkdir()
        change_json(path / "trees" / f"{commit}.json", format_version=1, files=files)
        (path / "refs").mkdir()
        (path / "refs" / "main").write_text(commit)
    yield downloaded
    for path in Path(CACHE.name).glob("models--*"):
        shutil.rmtree(path)


@pytest.fixture
def refused(capsys):
    """A function: flags → the one line in which the command refuses them. It has the words in
    `says`. With a folder first, `read` refuses that folder in the same words."""
    def refused(*flags, says=(), read=None):
        args = ["--model", *flags] if read else flags
        with pytest.raises(SystemExit) as exit:
            train_gpt2.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        line, = [line for line in err.splitlines() if line and not line.startswith("using device")]
        assert (exit.value.code, out) == (2, "") and line.startswith("train_gpt2.py: error: ")
        for word in says:
            assert str(word).lower().replace("_", "-") in line.lower().replace("_", "-"), line
        if read:
            with pytest.raises((train_gpt2.InputError, OSError)) as caught:
                read(flags[0])
            assert line.endswith(" ".join(str(caught.value).split()))
        return line
    return refused

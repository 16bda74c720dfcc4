"""What all tests share. Each file says in its first line which promise it proves."""
import importlib.metadata
import io
import platform
import shutil
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `pytest` does not, `python -m pytest` does

try:
    from transformers import GPT2LMHeadModel
    GPT2LMHeadModel.from_pretrained  # noqa: B018 - without a torch that it likes, this raises
except ImportError:
    sys.exit(f"transformers {importlib.metadata.version('transformers')} does not run with torch "
             f"{torch.__version__}: pip install \"transformers<5\"")

from checkpoints import REAL_TOKENIZER, write_checkpoint


def pytest_configure(config):
    config.option.reportchars += "s"  # say why a test is skipped, without being asked


def pytest_report_header():
    names = ("torch", "transformers", "safetensors", "tokenizers", "tiktoken", "huggingface_hub",
             "numpy")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return f"Python {platform.python_version()}, {', '.join(versions)}"


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Where equality is tested: also on CUDA where there is one, else test_cuda says so."""
    return request.param


@pytest.fixture
def one_thread():
    """Models this tiny are slower with more threads, and far slower beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny checkpoint with the files and the layout of gpt2 on the Hub."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), "on the Hub", "hub", n_positions=64)


@pytest.fixture
def real_tokenizer():
    if not (REAL_TOKENIZER / "vocab.json").exists():
        pytest.skip("gpt2's real tokenizer is not beside this project, in ../shared/gpt2-vocab")
    return REAL_TOKENIZER


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of the tiny checkpoint's folder, for damaging."""
    return shutil.copytree(tiny, tmp_path / "model")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """As on a machine without a network that has downloaded nothing yet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def terminal():
    """A function: an encoding → a stream that says it is a terminal, and what returns its bytes."""
    def opened(encoding="utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        stream.isatty = lambda: True
        return stream, stream.buffer.getvalue
    return opened

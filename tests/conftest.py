"""What all tests share. Each file says in its first line which promise it proves."""
import importlib.metadata
import io
import os
import platform
import shutil
import struct
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # `pytest` does not, `python -m pytest` does

try:
    from transformers import AutoTokenizer, GPT2LMHeadModel

    GPT2LMHeadModel.from_pretrained  # noqa: B018 - without a torch that it likes, this raises
except ImportError:
    sys.exit(f"transformers {importlib.metadata.version('transformers')} does not run with torch "
             f"{torch.__version__}: pip install \"transformers<5\"")

from checkpoints import LAYOUTS, REAL_TOKENIZER, random_gpt2, save, save_vocab_json


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


@pytest.fixture(params=LAYOUTS)
def layout(request):
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
    folder = tmp_path_factory.mktemp("tiny")
    size = save_vocab_json(folder)
    model = random_gpt2(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=size,
                        bos_token_id=size - 1, eos_token_id=size - 1)
    save(model, folder, "hub")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)  # tokenizer.json
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    (folder / "special_tokens_map.json").unlink(missing_ok=True)  # transformers 4 wrote these two
    (folder / "added_tokens.json").unlink(missing_ok=True)
    return folder


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """The folder of a model of gpt2's size, 124M parameters, in the Hub's layout, no tokenizer."""
    model = random_gpt2(bos_token_id=50256, eos_token_id=50256)
    return save(model, tmp_path_factory.mktemp("full"), "hub")


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
    """A function: an encoding → a stream to a terminal, and what returns the bytes that it got."""
    fcntl, pty, termios = (pytest.importorskip(name, reason="Windows has no such terminals")
                           for name in ("fcntl", "pty", "termios"))

    def opened(encoding="utf-8"):
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        stream = io.TextIOWrapper(io.FileIO(writer, "w"), encoding=encoding)

        def shown():
            stream.close()
            got = b""
            try:
                while chunk := os.read(reader, 4096):
                    got += chunk
            except OSError:
                pass  # so Linux says that the other side has closed
            os.close(reader)
            return got
        return stream, shown
    return opened

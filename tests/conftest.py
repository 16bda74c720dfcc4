import sys

import pytest
import torch
from checkpoints import (
    LAYOUTS,
    REAL_VOCABULARY,
    ROOT,
    random_gpt2,
    save,
    save_vocabulary,
)


def pytest_configure(config):
    config.option.reportchars += "s"  # say why a test is skipped, without being asked


sys.path.insert(0, str(ROOT))  # `python -m pytest` puts the project's root there, `pytest` does not


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA here")
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a whole tiny model: a checkpoint in the Hub's layout, and a vocabulary of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    size = save_vocabulary(folder)
    model = random_gpt2(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=size,
                        bos_token_id=size - 1, eos_token_id=size - 1)
    return save(model, folder, "hub")


@pytest.fixture(scope="session")
def full(tmp_path_factory):
    """The folder of a model of gpt2's size, 124M parameters, in the Hub's layout, without a vocabulary."""
    return save(random_gpt2(bos_token_id=50256, eos_token_id=50256), tmp_path_factory.mktemp("full"), "hub")


@pytest.fixture
def real_vocabulary():
    if not (REAL_VOCABULARY / "vocab.json").exists():
        pytest.skip("GPT-2's real vocabulary is not beside this project, in ../shared/gpt2-vocab")
    return REAL_VOCABULARY

"""GPT-2 checkpoints with random weights, in every layout that exists, for the tests and the benchmark."""
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
REAL_VOCABULARY = ROOT.parent / "shared" / "gpt2-vocab"  # where a developer may have it; never needed
LAYOUTS = ("hub", "saved", "old")

logging.set_verbosity_error()  # transformers warns about generation settings that these models lack on purpose
logging.disable_progress_bar()
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns of every process that a test starts


def random_gpt2(seed=0, **config):
    """transformers' model in eval mode, every parameter random: a bias or a LayerNorm left out must show."""
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config}
    model = GPT2LMHeadModel(GPT2Config(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                p.normal_(1, 0.2, generator=generator)
            elif p.ndim == 1:
                p.normal_(0, 0.2, generator=generator)
            else:
                p.normal_(0, 0.3 if "te." in name else p.shape[0] ** -0.5, generator=generator)
    return model


def save(model, folder, layout="saved"):
    """Write the model as save_pretrained does, as the Hub's gpt2 is, or as old fine-tunes are; returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder)
    if layout == "saved":
        return folder
    tensors = {name: p.detach().clone() for name, p in model.state_dict().items()}
    n = model.config.n_positions
    mask = torch.ones(n, n).tril().view(1, 1, n, n)
    for layer in range(model.config.n_layer):
        tensors[f"transformer.h.{layer}.attn.bias"] = mask.clone() if layout == "hub" else mask.bool().clone()
        if layout == "old":
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if layout == "hub":
        del tensors["lm_head.weight"]
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_ctx": n}))
    return folder


def save_vocabulary(folder, vocab_size=400):
    """Train a byte-level BPE on this project's own text, <|endoftext|> last as in GPT-2; returns its size."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(ROOT / "train_gpt2.py"), str(ROOT / "README.md")], vocab_size=vocab_size - 1, show_progress=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    vocabulary = tokenizer.get_vocab()
    (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return len(vocabulary)

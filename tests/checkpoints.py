"""GPT-2 checkpoints with random weights, as people have them, for the tests and the benchmark."""
import json
import math
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about settings that are meant
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns of every process that a test starts

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
REAL_VOCABULARY = ROOT.parent / "shared" / "gpt2-vocab"  # where a developer may have it
LAYOUTS = ("hub", "saved", "old")
TRANSFORMERS, TORCH = (tuple(map(int, module.__version__.split(".")[:2])) for module in (transformers, torch))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EOT = "<|endoftext|>"

logging.disable_progress_bar()


# The weights

def random_gpt2(seed=0, **config):
    """transformers' model in eval mode, every parameter random: a bias or a LayerNorm left out must
    show. Without the special ids that `config` does not name."""
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
    """Write the model as save_pretrained does, as the Hub's gpt2 is, or as old fine-tunes are;
    returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder)
    if layout == "saved":
        return folder
    tensors = {name: p.detach().clone() for name, p in model.state_dict().items()}
    n = model.config.n_positions
    mask = torch.ones(n, n).tril().view(1, 1, n, n)
    for layer in range(model.config.n_layer):
        name = f"transformer.h.{layer}.attn"
        tensors[f"{name}.bias"] = mask.clone() if layout == "hub" else mask.bool().clone()
        if layout == "old":
            tensors[f"{name}.masked_bias"] = torch.tensor(-1e4)
    if layout == "hub":
        del tensors["lm_head.weight"]
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", n_ctx=n)
    return folder


def pair(folder, dtype="auto", device="cpu"):
    """Our model and transformers', from one folder. dtype "auto" is what each takes by itself."""
    from train_gpt2 import GPT
    ours, theirs = GPT.from_pretrained(folder), GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
    if dtype != "auto":
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    return ours.to(device), theirs.to(device)


OTHER_SCALE = "transformers 4 scales by 1 / sqrt(hs), 5 by hs**-0.5: of this hs, in float64 they differ"


def same_scale(hs, dtype):
    """Whether the installed transformers scales heads of hs channels as today's does."""
    return TRANSFORMERS >= (5, 0) or dtype != torch.float64 or hs**-0.5 == 1 / math.sqrt(hs)


def random_idx(model, B, T, seed=0):
    """Token ids (B, T) that the model has, on its device."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    return idx.to(model.lm_head.weight.device)


# The vocabulary

def train_bpe(special=(EOT,), vocab_size=400):
    """A byte-level BPE of this project's own text, with its special tokens first, as the trainer
    of tokenizers puts them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train([str(ROOT / "train_gpt2.py"), str(ROOT / "README.md")], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return bpe


def save_vocabulary(folder, vocab_size=400):
    """vocab.json and merges.txt as OpenAI's are, <|endoftext|> last; returns their size."""
    folder = Path(folder)
    bpe = train_bpe([], vocab_size - 1)
    bpe.model.save(str(folder))
    vocab = bpe.get_vocab()
    vocab[EOT] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    return len(vocab)


def save_tokenizer(folder, bpe, add_special=(), add_words=(), **names):
    """What the save_pretrained of today's transformers writes of a tokenizer; returns its size."""
    names = names or dict.fromkeys(["bos_token", "eos_token", "unk_token"], EOT)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    if add_special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(add_special)})
    tokenizer.add_tokens(list(add_words))
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def as_on_the_hub(tokenizer_json):
    """A tokenizer.json in the older form that the Hub's gpt2 has."""
    raw = json.loads(tokenizer_json)
    for key in ("type", "byte_fallback", "ignore_merges"):
        raw["model"].pop(key, None)
    raw["model"]["merges"] = [" ".join(merge) for merge in raw["model"]["merges"]]
    raw["pre_tokenizer"].pop("use_regex", None)
    for token in raw["added_tokens"]:
        token["normalized"] = True
    return json.dumps(raw, ensure_ascii=False)


def read_tokenizer(folder):
    """transformers' tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


# Files

def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields))

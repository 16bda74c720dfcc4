"""GPT-2 checkpoints of every kind that people have, with random weights, for all tests."""
import json
import os
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about intended settings
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns in every process that a test starts

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
REAL_TOKENIZER = ROOT.parent / "shared" / "gpt2-vocab"  # where a developer may have gpt2's own
TRANSFORMERS, TORCH = (tuple(map(int, module.__version__.split(".")[:2]))
                       for module in (transformers, torch))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
EOT = "<|endoftext|>"

transformers.utils.logging.disable_progress_bar()


# Weights

def random_gpt2(seed=0, **config):
    """transformers' model in eval mode with every parameter random, so that a forgotten bias or
    LayerNorm shows. It has only the special ids that `config` names."""
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config}
    model = GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                p.normal_(1, 0.2, generator=generator)
            elif p.ndim == 1:
                p.normal_(0, 0.2, generator=generator)
            else:
                std = 0.3 if "te." in name or "lm_head" in name else p.shape[0] ** -0.5
                p.normal_(0, std, generator=generator)
    return model


LAYOUTS = ["saved", "shards", "hub", "old"]
if TORCH >= (2, 6):
    LAYOUTS += ["bin", "bin shards"]  # before, neither side reads a .bin file


def save(model, folder, layout="saved"):
    """Write the model as save_pretrained does, whole or in shards; as the Hub's gpt2 is; as old
    fine-tunes are, in safetensors or .bin files. Returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size="50KB" if layout == "shards" else "5GB")
    if layout in ("saved", "shards"):
        return folder
    tensors = {name: p.detach().clone() for name, p in model.state_dict().items()}
    n, tied = model.config.n_positions, model.config.tie_word_embeddings
    for layer in range(model.config.n_layer):  # with the causal masks that old files contain
        mask = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"transformer.h.{layer}.attn.bias"] = mask if layout == "hub" else mask.bool()
        if layout != "hub":
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if layout == "hub":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
                   if not tied or name != "lm_head.weight"}
    change_json(folder / "config.json", n_ctx=n)
    if layout in ("hub", "old"):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    (folder / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    shards = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in tensors.items() if shards[name] == shard}
        torch.save(part, folder / shard)
    change_json(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=shards)
    return folder


def pair(folder, dtype="auto", device="cpu"):
    """Our model and transformers', read from the same folder. dtype "auto" is each one's choice."""
    from train_gpt2 import GPT
    ours = GPT.from_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
    if dtype != "auto":
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    return ours.to(device), theirs.to(device)


def random_idx(model, B, T, seed=0):
    """Token ids (B, T) that the model has, on its device."""
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(model.config.vocab_size, (B, T), generator=generator)
    return idx.to(model.lm_head.weight.device)


def loss_of(model, idx):
    """Next-token cross-entropy of either side's model."""
    logits = model(idx[:, :-1])
    logits = getattr(logits, "logits", logits)  # transformers wraps its own
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())


def assert_equal_gradients(ours, theirs, idx):
    losses = []
    for model in (ours, theirs):
        model.zero_grad()
        losses.append(loss_of(model, idx))
        losses[-1].backward()
    assert torch.equal(*losses)
    parameters = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.equal(parameters[name].grad, p.grad), name


# Tokenizers

def train_bpe(special=(EOT,), vocab_size=400, model=None, trainer=trainers.BpeTrainer, **parts):
    """A byte-level BPE trained on this project's own text, with its special tokens first, as the
    trainers of tokenizers put them; or, by `model`, `trainer` and parts, another tokenizer."""
    tokenizer = tokenizers.Tokenizer(model or models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet() if model is None else []
    tokenizer.train([str(ROOT / "train_gpt2.py"), str(ROOT / "README.md")], trainer(
        vocab_size=vocab_size, special_tokens=list(special), show_progress=False,
        initial_alphabet=alphabet))
    return tokenizer


def save_tokenizer(folder, tokenizer=None, special=(), words=(), **names):
    """What today's transformers saves of a tokenizer, with more tokens; returns its size."""
    names = names or dict.fromkeys(["bos_token", "eos_token", "unk_token"], EOT)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer or train_bpe(), **names)
    if special:
        wrapped.add_special_tokens({"additional_special_tokens": list(special)})
    wrapped.add_tokens(list(words))
    wrapped.save_pretrained(folder)
    return len(wrapped)


def save_vocab_json(folder, vocab_size=400):
    """vocab.json and merges.txt as OpenAI's are, with <|endoftext|> last; returns their size."""
    train_bpe([], vocab_size - 1).model.save(str(folder))
    change_json(folder / "vocab.json", **{EOT: vocab_size - 1})
    return vocab_size


def read_tokenizer(folder):
    """transformers' tokenizer of a folder."""
    return AutoTokenizer.from_pretrained(folder)


def change_json(path, **fields):
    """Set fields of a JSON file, which may not exist yet."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | fields))


# Every kind of tokenizer: each function writes one into an empty folder and returns its size.

def on_the_hub(folder):
    """A tokenizer.json in the older form that the Hub's gpt2 has."""
    bpe = json.loads(train_bpe().to_str())
    for key in ("type", "byte_fallback", "ignore_merges"):
        bpe["model"].pop(key, None)
    bpe["model"]["merges"] = [" ".join(merge) for merge in bpe["model"]["merges"]]
    bpe["pre_tokenizer"].pop("use_regex", None)
    bpe["added_tokens"][0]["normalized"] = True
    change_json(folder / "tokenizer.json", **bpe)
    change_json(folder / "tokenizer_config.json", model_max_length=1024)
    return 400


def tokenizer_json_alone(folder, listed=(EOT,)):
    train_bpe(listed).save(str(folder / "tokenizer.json"))
    return 400


def added_tokens(folder):
    """Special and plain ones, with all their options; one begins with another. It was saved while
    it padded and truncated."""
    special = ["[PAD]", "<|user|>", AddedToken("<mask>", lstrip=True, rstrip=True, special=True)]
    words = ["new", "newword", "a", AddedToken("cat", single_word=True)]
    bpe = train_bpe()
    bpe.enable_padding(length=40, pad_id=7)
    bpe.enable_truncation(max_length=3)
    return save_tokenizer(folder, bpe, special=special, words=words)


def own_special_tokens(folder):
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return save_tokenizer(folder, train_bpe(special.values(), 300), **special)


def other_parts(folder):
    """Another normalizer and pre-tokenizer, and a token before each text."""
    digits = pre_tokenizers.Digits(individual_digits=True)
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=True)
    before = tokenizers.processors.TemplateProcessing(f"{EOT} $A", special_tokens=[(EOT, 0)])
    return save_tokenizer(folder, train_bpe(
        normalizer=normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizer=pre_tokenizers.Sequence([digits, spaces]), post_processor=before))


def saved_by_a_slow_tokenizer(folder):
    """As transformers 4.34 to 4.57 wrote it, with tokens of all options."""
    size = save_vocab_json(folder)
    options = dict.fromkeys(["lstrip", "rstrip", "single_word", "normalized"], False)
    added = {EOT: {"normalized": True}, "<mask>": {"lstrip": True}, "[PAD]": {},
             "<|user|>": {"rstrip": True}, "newword": {"special": False, "normalized": True},
             "cat": {"special": False, "single_word": True}}
    added = {name: {"content": name, "special": True, **options, **own}
             for name, own in added.items()}
    names = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT, "pad_token": "[PAD]"}
    change_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer", **names,
                added_tokens_decoder={size - 1 + i: own for i, own in enumerate(added.values())})
    change_json(folder / "added_tokens.json",
                **{name: size - 1 + i for i, name in enumerate(added) if i})
    change_json(folder / "special_tokens_map.json", **names)
    return size - 1 + len(added)


def bert(folder):
    """vocab.txt, as Chinese GPT-2s have it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    train_bpe(special, model=models.WordPiece(unk_token="[UNK]"),
              trainer=trainers.WordPieceTrainer,
              pre_tokenizer=pre_tokenizers.BertPreTokenizer()).model.save(str(folder))
    # transformers 4 would clean up spaces by default here, which is refused.
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer",
                clean_up_tokenization_spaces=False)
    return 400


def tokens_that_only_the_config_names(folder):
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast",
                bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|user|>", "of"],
                pad_token={"content": "[PAD]", "normalized": False, "__type": "AddedToken"})
    return tokenizer_json_alone(folder) + 5 - ("of" in train_bpe().get_vocab())


def tokens_that_only_the_map_names(folder):
    """As before transformers 5: special_tokens_map.json names a token that nothing else has."""
    change_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    change_json(folder / "special_tokens_map.json", bos_token=EOT, pad_token="[PAD]")
    return tokenizer_json_alone(folder) + 1


PLAIN = {  # read here, without transformers
    "today": save_tokenizer, "on the Hub": on_the_hub, "alone": tokenizer_json_alone,
    "own": own_special_tokens, "parts": other_parts,
}
TOKENIZERS = PLAIN | {  # the others are read by transformers
    "added": added_tokens, "vocab.json": save_vocab_json, "slow": saved_by_a_slow_tokenizer,
    "vocab.txt": bert, "named": tokens_that_only_the_config_names,
    "mapped": tokens_that_only_the_map_names,
    # ByteLevelBPETokenizer(...).save() too: transformers makes <|endoftext|> special by itself.
    "unlisted": lambda folder: tokenizer_json_alone(folder, listed=()) + 1,
}


# Every kind of model

RELATIVES = {
    "gelu": {"activation_function": "gelu", "n_inner": 96},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "untied": {"tie_word_embeddings": False},
}
if TRANSFORMERS >= (5, 0):  # before, it ignored these settings under sdpa
    RELATIVES |= {
        "no scale": {"scale_attn_weights": False},
        "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
        "both scales": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    }


def write_checkpoint(folder, tokenizer="today", layout="saved", dtype=None, **config):
    """A whole folder; by default vocab_size and the special ids fit the tokenizer. Returns it."""
    size = TOKENIZERS[tokenizer](folder)
    end = size - 1 if tokenizer == "vocab.json" else 0
    config = {"vocab_size": size, "bos_token_id": end, "eos_token_id": end, **SIZES,
              "n_positions": 96, **config}
    return save(random_gpt2(**config).to(dtype), folder, layout)


# What is printed

def peer(folder):
    """transformers' pipeline, with the dtype and the tokenizer that it finds by itself."""
    return transformers.pipeline("text-generation", model=str(folder), device="cpu", dtype="auto",
                                 tokenizer=read_tokenizer(folder))


def expected(theirs, prompt, seed=42, **how):
    """The pipeline's text, as the command prints it. transformers 4 is told 5's defaults: to leave
    spaces alone, and that max_length counts even where its own max_new_tokens is set."""
    transformers.set_seed(seed)
    how = {"max_length": 30, "num_return_sequences": 5, "temperature": 1.0, "do_sample": True,
           "clean_up_tokenization_spaces": False} | how
    if TRANSFORMERS < (5, 0):
        length = len(theirs.tokenizer(prompt)["input_ids"])
        how["max_new_tokens"] = how.pop("max_length") - max(1, length)
    return "".join(f"> {row['generated_text']}\n" for row in theirs(prompt, **how))


def words(capsys, folder, prompt, *flags):
    """What our command prints."""
    from train_gpt2 import main
    main(["--model", str(folder), "--device", "cpu", f"--prompt={prompt}", *map(str, flags)])
    return capsys.readouterr().out

"""GPT-2 checkpoints of every kind that people have, with random weights, for all tests."""
import json
import os
import re
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # no warnings about intended settings
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or it warns in every process that a test starts

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, AutoTokenizer, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
REAL_CACHE = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
REAL_TOKENIZER = ROOT.parent / "shared" / "gpt2-vocab"  # where a developer may have gpt2's own
TRANSFORMERS, TORCH = (tuple(map(int, module.__version__.split(".")[:2]))
                       for module in (transformers, torch))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ["saved", "shards", "hub", "old"]
if TORCH >= (2, 6):
    LAYOUTS += ["bin"]  # before, neither side reads a .bin file
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
EOT = "<|endoftext|>"

transformers.utils.logging.disable_progress_bar()


def block(kind, marker):
    """The code block of the README, in Python or a diff, that has this text in it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [block for block in re.findall(rf"```{kind}\n(.*?)```", readme, re.DOTALL)
             if marker in block]
    assert len(found) == 1, f"README.md must have one {kind} block with this text: {marker}"
    return found[0]


def randomize(model, seed=0):
    """Make every parameter random, so that a forgotten bias or LayerNorm shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_scale = "ln_" in name and name.endswith("weight")
            is_table = "te." in name or "lm_head" in name
            std = 0.2 if p.ndim == 1 else 0.3 if is_table else p.shape[0] ** -0.5
            p.normal_(float(is_scale), std, generator=generator)
    return model.eval()


def random_gpt2(seed=0, **config):
    """transformers' model in eval mode. It has only the special ids that `config` names."""
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **config}
    return randomize(GPT2LMHeadModel(transformers.GPT2Config(**config)), seed)


def save(model, folder, layout="saved"):
    """Write the model as save_pretrained does, whole or in shards; as the Hub's gpt2 is; as old
    fine-tunes are, in a safetensors or .bin file. Returns the folder."""
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size="50KB" if layout == "shards" else "5GB")
    if layout in ("saved", "shards"):
        return folder
    tensors = {name: p.detach().clone() for name, p in model.state_dict().items()}
    n = model.config.n_positions
    for layer in range(model.config.n_layer):  # with the causal masks that old files contain
        mask = torch.ones(n, n).tril().view(1, 1, n, n)
        tensors[f"transformer.h.{layer}.attn.bias"] = mask if layout == "hub" else mask.bool()
        if layout != "hub":
            tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if layout == "hub":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()
                   if name != "lm_head.weight" or not model.config.tie_word_embeddings}
    (folder / "model.safetensors").unlink()
    if layout == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_weights(folder, change):
    """Change the dict of tensors in a folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()  # not written over: a model may be mapped from it
    save_file(tensors, folder / "model.safetensors")
    return folder


def pair(folder, dtype=None, device="cpu"):
    """Our model and transformers', read from the same folder; without a dtype, each in its own."""
    from train_gpt2 import GPT
    theirs = GPT2LMHeadModel.from_pretrained(folder, dtype="auto")
    return GPT.from_pretrained(folder).to(device, dtype), theirs.to(device, dtype)


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
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, theirs.get_parameter(name).grad), name


def train_bpe(special=(EOT,), vocab_size=400, model=None, trainer=trainers.BpeTrainer, **parts):
    """A byte-level BPE trained on this project's own text, with its special tokens first; or, by
    `model`, `trainer` and other parts, another tokenizer."""
    tokenizer = tokenizers.Tokenizer(model or models.BPE())
    default = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
               "decoder": decoders.ByteLevel()}
    for name, part in (default | parts).items():
        setattr(tokenizer, name, part)
    how = {"vocab_size": vocab_size, "special_tokens": [*special], "show_progress": False,
           "initial_alphabet": pre_tokenizers.ByteLevel.alphabet() if model is None else []}
    tokenizer.train([str(ROOT / "train_gpt2.py"), str(ROOT / "README.md")], trainer(**how))
    return tokenizer


def save_tokenizer(folder, bpe=None, **names):
    """What today's transformers saves of a tokenizer; returns its size."""
    names = names or dict.fromkeys(["bos_token", "eos_token", "unk_token"], EOT)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe or train_bpe(), **names)
    wrapped.save_pretrained(folder)
    return len(wrapped)


def save_vocab_json(folder, vocab_size=400):
    """vocab.json and merges.txt as OpenAI's are, with <|endoftext|> last; returns their size."""
    train_bpe([], vocab_size - 1).model.save(str(folder))
    change_json(folder / "vocab.json", **{EOT: vocab_size - 1})
    return vocab_size


def change_json(path, **fields):
    """Set fields of a JSON file, which may not exist yet."""
    raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(raw | fields))


# Every kind of tokenizer: each function writes one into an empty folder and returns its size.

def on_the_hub(folder):
    """As the Hub's gpt2 has it."""
    bpe = json.loads(train_bpe().to_str())
    bpe["model"] |= dict.fromkeys(["continuing_subword_prefix", "end_of_word_suffix"], "")
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
    bpe = train_bpe()
    bpe.add_special_tokens(special)
    bpe.add_tokens(["new", "newword", "a", AddedToken("cat", single_word=True)])
    bpe.enable_padding(length=40, pad_id=7)
    bpe.enable_truncation(max_length=3)
    return save_tokenizer(folder, bpe, eos_token=EOT, additional_special_tokens=special)


def own_parts(folder):
    """Its own special tokens, normalizer and pre-tokenizer, and a token before each text."""
    bpe = train_bpe(
        ["<s>", "</s>", "<pad>"], normalizer=normalizers.Lowercase(),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True),
        post_processor=TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)]))
    return save_tokenizer(folder, bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def saved_by_transformers_4(folder, objects=False):
    """As GPT2TokenizerFast of 4.57 wrote it, except vocab.json and merges.txt. The other files only
    repeat what tokenizer.json has."""
    options = dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)
    token = {"content": EOT, **options}
    names = dict.fromkeys(["bos_token", "eos_token", "unk_token"], token if objects else EOT)
    change_json(folder / "special_tokens_map.json", **names)
    if objects:
        names = {key: {"__type": "AddedToken", **token, "special": True} for key in names}
    change_json(folder / "tokenizer_config.json", **names, add_bos_token=False, errors="replace",
                add_prefix_space=False, clean_up_tokenization_spaces=False, pad_token=None,
                extra_special_tokens={}, model_max_length=1024, tokenizer_class="GPT2Tokenizer",
                added_tokens_decoder={"0": token | {"special": True}})
    return tokenizer_json_alone(folder)


def bert(folder):
    """vocab.txt, as Chinese GPT-2s have it."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [prefix + chr(code) for prefix in ("", "##") for code in range(33, 127)]
    (folder / "vocab.txt").write_text("\n".join(special + pieces))
    # transformers 4 would clean up spaces by default here, which is refused.
    change_json(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer",
                clean_up_tokenization_spaces=False)
    return len(special + pieces)


PLAIN = {  # read here, without transformers
    "today": save_tokenizer, "on the Hub": on_the_hub, "alone": tokenizer_json_alone,
    "parts": own_parts, "4": saved_by_transformers_4,
    "4, objects": lambda folder: saved_by_transformers_4(folder, objects=True),
}
TOKENIZERS = PLAIN | {  # the others are read by transformers
    "added": added_tokens, "vocab.json": save_vocab_json, "vocab.txt": bert,
    # ByteLevelBPETokenizer(...).save() too: transformers makes <|endoftext|> special by itself.
    "unlisted": lambda folder: tokenizer_json_alone(folder, listed=()) + 1,
}
RELATIVES = {
    "gelu": {"activation_function": "gelu", "n_inner": 96},
    **{name: {"activation_function": name} for name in ("relu", "silu", "tanh")},
    "untied": {"tie_word_embeddings": False},
    "cross-attention": {"add_cross_attention": True},  # which nothing uses without an encoder
}
if TRANSFORMERS >= (5, 0):  # before, it ignored these settings under sdpa
    RELATIVES |= {"no scale": {"scale_attn_weights": False},
                  "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
                  # 8 ** -0.5 isn't 1 / sqrt(8) in float64; before, it scaled by that.
                  "8 channels a head": {"n_head": 4}}


def write_checkpoint(folder, tokenizer="today", layout="saved", dtype=None, **config):
    """A whole folder; by default vocab_size and the special ids fit the tokenizer. Returns it."""
    size = TOKENIZERS[tokenizer](folder)
    end = size - 1 if tokenizer == "vocab.json" else 0
    config = {"vocab_size": size, "bos_token_id": end, "eos_token_id": end, **SIZES,
              "n_positions": 96, **config}
    return save(random_gpt2(**config).to(dtype), folder, layout)


def peer(folder):
    """transformers' pipeline, with the dtype and the tokenizer that it finds by itself."""
    return transformers.pipeline("text-generation", model=str(folder), device="cpu", dtype="auto",
                                 tokenizer=AutoTokenizer.from_pretrained(folder))


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

"""GPT-2 in one file: the model, the sampling of text, loading and saving Hugging Face's files.

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The
file has the name of the one in Karpathy's lecture "Let's reproduce GPT-2", but no training loop: a
loop depends on your text, schedule and machines. The README has a short one to copy.

Shapes, in comments:
    B   rows of the batch
    T   tokens of a row in this call of the model
    S   tokens of a row that are attended to: these T and the cached ones before them (KVCache)
    C   channels, the width of the model (n_embd)
    nh  attention heads (n_head)
    hs  the width of one head, C / nh
    V   tokens in the vocabulary (vocab_size)

With the same weights, logits, gradients and sampled tokens equal those of transformers'
GPT2LMHeadModel to the last bit: in eval mode, on the same device, with the same torch and the
default attention ("sdpa"). How a sum of floats rounds depends on the order of its parts, and even
on how a tensor lies in memory, so both are as in transformers. A line that is odd for that reason
alone has a comment that begins with BITS. On a first reading, skip these, and the check_ functions.
"""
import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import tiktoken
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from torch.nn import functional as F
from tqdm import trange

# --------------------------------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The sizes of a GPT-2 and its special tokens, by default those of `gpt2`, 124M parameters.

    ValueError if one of them is impossible.
    """
    block_size: int = 1024  # the context: how many tokens the model can look at
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
    n_layer: int = 12  # blocks
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # the width inside the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    # GPT-2 has one special token, <|endoftext|>, which stands before, between and after texts.
    bos_token_id: int | None = 50256  # an empty prompt starts from it
    eos_token_id: int | list | None = 50256  # ends a text: one id, a list of them, or None
    pad_token_id: int | None = None  # fills up a row that has ended; None: the first eos does

    def __post_init__(self):  # the dataclass calls it when the fields are set
        check_config(self)

    @property
    def end_ids(self):
        """The ids that end a text, as a list."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


class Conv1D(nn.Module):
    """x @ weight + bias: (..., n_in) → (..., n_out).

    A linear layer whose weight is (n_in, n_out), as all checkpoints of GPT-2 store it. (nn.Linear's
    is (n_out, n_in), so the lecture transposes them.) OpenAI wrote it as a convolution of width 1.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # filled by GPT or a checkpoint
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        # x @ weight + bias. BITS: as one addmm, with all but the last dimension flattened into one.
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class KVCache:
    """The keys and values that one block's attention has computed in one call of generate().

    The lecture runs the model on the whole text again for each new token. But a token sees only
    itself and the tokens before it, so its key and value never change. With these kept, the model
    runs on the newest token alone: its query meets the keys and values of all. (Queries need no
    cache, as each is used once.)
    """

    def __init__(self, shape, like):
        self.k = like.new_empty(shape)  # (B, nh, max_length, hs), of the dtype and device of `like`
        self.v = like.new_empty(shape)
        self.length = 0  # how many tokens are in it

    def append(self, k, v):
        """Add the keys and values of T tokens, (B, nh, T, hs); returns those of all S so far."""
        start, end = self.length, self.length + k.shape[2]
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (B, nh, S, hs)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and from the tokens before it: (B, T, C) → (B, T, C).

    Each head computes softmax(q @ k.T / sqrt(hs) + mask) @ v. The mask is 0 where a token may look,
    and minus infinity at the tokens after it, so that their part in the softmax is 0.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = Conv1D(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs)
        # BITS: transformers attends to contiguous copies of k and v, and how rows are aligned in
        # memory can change the rounding. In the cache, rows of whole 32 bytes are aligned as well.
        if cache is None or hs * k.element_size() % 32:
            k = k.clone(memory_format=torch.contiguous_format)
            v = v.clone(memory_format=torch.contiguous_format)
        # The mask is for a prompt, which comes while the cache is empty: S is T. One new token
        # needs none: it is the last, and may look at all that the cache holds.
        is_causal = True if T > 1 else False  # noqa: SIM210 - in torch.compile T > 1 is no bool
        # BITS: the scale is given, as the default, 1 / sqrt(hs), can differ in the last bit.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=hs**-0.5)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) → the heads side by side
        return self.c_proj(y)


def gelu(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), of Hendrycks & Gimpel 2016; any shape.

    BITS: the lecture's nn.GELU(approximate="tanh") is the same formula, but rounds at other points.
    And `half` comes first: x is used three times, and autograd adds up its three gradients in the
    order of these lines, backwards.
    """
    half = 0.5 * x
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return half * (1.0 + torch.tanh(inner))


class MLP(nn.Module):
    """Each token by itself, through a wider layer: (B, T, C) → (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)

    def forward(self, x):
        x = gelu(self.c_fc(x))  # (B, T, n_inner)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention, then the MLP; each reads x normalised, and adds to it: (B, T, C) → (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


def embedding(rows, width):
    """nn.Embedding(rows, width) with no numbers in it yet: GPT draws them, or a checkpoint has
    them. The usual constructor draws some at once, and a start would take 1 to 2 s longer."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class GPT(nn.Module):
    """GPT-2 with its language modelling head; names and shapes of the parameters are those of
    transformers' GPT2LMHeadModel. GPT(config) has random weights, drawn as GPT-2's once were."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vocabulary = {}  # {name: bytes}: the checkpoint's vocabulary files, to save them again
        self.transformer = nn.ModuleDict({
            "wte": embedding(config.vocab_size, config.n_embd),  # token embedding
            "wpe": embedding(config.block_size, config.n_embd),  # position embedding
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        })
        # The token embedding is the head's weight too. The head's own is dropped at once, so it is
        # made on "meta", as a shape without memory.
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False, device="meta")
        self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters():
            if p.ndim == 2 and not p.is_meta:  # biases are 0 already, and LayerNorm's weights 1
                std = 0.02
                if name.endswith("c_proj.weight"):
                    # x is a sum of the outputs of 2 * n_layer such layers. They start smaller, so
                    # that x does not grow with their number (section 2.3 of the paper).
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)

    def forward(self, idx, caches=None):
        """idx (B, T) int64 → logits (B, T, V) in the weights' dtype. ValueError if idx has another
        shape or dtype, or more than block_size tokens.

        generate() gives `caches` too, one for each block: with them, first the prompt and then each
        new token alone; it gets the logits of the last token only, (B, 1, V).
        """
        check_idx(idx, self.config.block_size)
        h = self.transformer.h
        start = caches[0].length if caches else 0  # the position of the first token of idx
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, cache in zip(h, caches or [None] * len(h)):
            x = block(x, cache)
        x = self.transformer.ln_f(x)
        if caches:
            x = x[:, -1:]  # the last token predicts the next, and the head is the widest product
        return self.lm_head(x)

    def generate(self, idx, max_length, temperature=1.0, top_k=50):
        """Continue each row of idx (B, T) int64: (B, at most max_length) int64, prompt included.

        Draws from torch's global random numbers. temperature=0 takes the likeliest token instead,
        top_k=0 draws from all V. After an eos token, the rest of a row is pad_token_id; when all
        rows have one, generation ends. ValueError if an argument is impossible.
        """
        check_generate(self.config, idx, max_length, temperature, top_k)
        B, T = idx.shape
        config, weight = self.config, self.lm_head.weight
        shape = (B, config.n_head, max_length, config.n_embd // config.n_head)
        ends = torch.tensor(config.end_ids, dtype=torch.int64, device=idx.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        fill = config.pad_token_id
        if fill is None:
            fill = [*config.end_ids, 0][0]  # without end ids no row ends, and the 0 is not used
        with torch.inference_mode():  # no_grad, and a little faster
            caches = [KVCache(shape, like=weight) for _ in self.transformer.h]
            new = idx  # what is not in the caches yet
            for _ in trange(T, max_length, unit="token", delay=1, disable=None, leave=False):
                logits = self(new, caches)[:, -1]  # (B, V)
                new = sample(logits.float(), temperature, top_k)  # (B, 1)
                # A row that has ended goes on unseen: it changes no other, and `fill` is shown.
                idx = torch.cat((idx, new.masked_fill(ended, fill)), dim=1)
                ended = ended | (new == ends).any(dim=1, keepdim=True)  # is it one of the end ids?
                if ended.all():
                    break
        return idx.clone()  # a tensor made in inference mode cannot be trained on

    @classmethod
    def from_pretrained(cls, name):
        """The model of a folder, or of that name on the Hugging Face Hub (`gpt2`), in eval mode.

        Its dtype is the one that transformers gives it: config.json's, else that of the weights.
        Weights of that dtype are memory-mapped: read from their file when first used, not copied.
        Training them leaves the file as it is. ValueError if a file is broken or no GPT-2's,
        OSError if one cannot be found, read or downloaded.
        """
        folder = find_folder(name)
        config = read_config(folder)
        weights = read_weights(folder, config)
        try:
            with torch.device("meta"):  # shapes without memory
                model = cls(config)
            model.transformer.load_state_dict(weights, assign=True)  # the weights take their place
        except (RuntimeError, TypeError) as error:  # names or shapes differ; sizes beyond 64 bits
            raise ValueError(f"the weights in {folder} (model.safetensors) do not fit its "
                             f"config.json: {error!s:.400}") from None
        model.lm_head.weight = model.transformer.wte.weight  # again, as wte's is another now
        model.vocabulary = read_vocabulary(folder)
        return model.eval()

    def save_pretrained(self, folder):
        """Write a folder that from_pretrained, --model, transformers and the Hub take as it is: the
        weights, config.json, and the vocabulary of the checkpoint that the model came from, if any.

        Each file is first written elsewhere in the folder, then moved to its place in one step. So
        a crash leaves no file half-written, and a file that this model is mapped from is not
        written over. OSError if the folder cannot be written, ValueError if the head has come to
        have a weight of its own.
        """
        write_folder(self, Path(folder))


# --------------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature, top_k):
    """The next token of each row, drawn as transformers draws it: (B, V) float32 → (B, 1) int64.

    The lecture draws among the k likeliest, with as many random numbers. Here all V tokens get one,
    and the others have probability 0. So with the lecture's seed it says other words, as likely.
    ValueError if the logits, or what temperature makes of them, are not finite.
    """
    if temperature:
        logits = logits / temperature
    if not logits.amax(dim=-1).isfinite().all():  # or on a GPU, multinomial ends the process
        raise ValueError(f"the logits overflow at temperature {temperature}: use a higher "
                         "temperature, or float32")
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # the k-th largest: (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = torch.softmax(logits, dim=-1)  # (B, V)
    return torch.multinomial(probs, num_samples=1)


# A check_ function returns nothing. It raises ValueError if its arguments cannot work.


def check_config(config):
    for name, value in vars(config).items():
        if name == "layer_norm_epsilon":
            good = type(value) is float and 0 < value < 1
        elif name.endswith("_id"):
            ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
            good = value is None or all(type(id) is int and 0 <= id < 2**63 for id in ids)
        elif name == "n_inner" and value is None:
            good = True
        else:
            good = type(value) is int and 0 < value < 2**63
        if not good:
            raise ValueError(f"{name} cannot be {value!r}")
    if config.n_embd % config.n_head:
        raise ValueError(f"n_embd, {config.n_embd}, must be a multiple of n_head, {config.n_head}")


def check_idx(idx, block_size):
    if not isinstance(idx, torch.Tensor) or idx.dtype != torch.int64:
        raise ValueError(f"idx must be an int64 tensor, not {getattr(idx, 'dtype', type(idx))}")
    if idx.ndim != 2 or idx.numel() == 0:
        raise ValueError(f"idx must be (B, T), B and T at least 1, not {tuple(idx.shape)}")
    if idx.shape[1] > block_size:
        raise ValueError(f"the prompt (idx) has {idx.shape[1]} tokens, and block_size, the most "
                         f"that the model can look at, is {block_size}")


def check_sampling(temperature, top_k):
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite, and at least 0, not {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0, not {top_k}")


def check_generate(config, idx, max_length, temperature, top_k):
    check_sampling(temperature, top_k)
    check_idx(idx, config.block_size)
    if not idx.shape[1] < max_length <= config.block_size:
        raise ValueError(f"max_length must be over the prompt's {idx.shape[1]} tokens and at most "
                         f"the model's block_size, {config.block_size}, not {max_length}")
    # On a GPU, an id that the model does not have ends the whole process. But to look at the ids
    # is to wait for the GPU, so forward() does not: this is once, before the first of many steps.
    if idx.min() < 0 or idx.max() >= config.vocab_size:
        raise ValueError("the prompt (idx) holds an id that is no token of the model: these are "
                         f"0 to {config.vocab_size - 1}")


# --------------------------------------------------------------------------------------------------
# Files: where they are, the config, the weights, the vocabulary, saving

CONFIG_FILES = ["config.json", "generation_config.json"]
WEIGHT_FILES = ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"]
VOCABULARY_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
OLD_VOCABULARY_FILES = ["vocab.json", "merges.txt", "added_tokens.json"]  # before tokenizer.json

EOT = "<|endoftext|>"  # GPT-2's special token

DTYPES = {"float32": torch.float32, "float64": torch.float64,
          "bfloat16": torch.bfloat16, "float16": torch.float16}

# The settings of config.json that change the arithmetic, each with the one value supported here.
SUPPORTED_MODEL = {
    "model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
    "add_cross_attention": False, "tie_word_embeddings": True}


def find_folder(name, weights=True):
    """The Path of the folder `name`, or of the Hub's model of that name: cached, else downloaded.

    What is not read here is not downloaded. OSError if the model, or its weights, cannot be found.
    """
    folder = Path(name)
    if not folder.is_dir():
        # Imported here, as it takes a while, and a folder need not wait for it.
        from huggingface_hub import snapshot_download
        files = CONFIG_FILES + VOCABULARY_FILES + (WEIGHT_FILES if weights else [])
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=files))
            if not (folder / "tokenizer.json").exists():
                snapshot_download(str(name), allow_patterns=OLD_VOCABULARY_FILES)
        except Exception as error:
            raise OSError(f"{name} is no folder here, and not to be had from the cache or the "
                          "Hugging Face Hub: check the name and the network, or name a folder that "
                          f"has config.json and model.safetensors ({error})") from error
    if weights and not any((folder / file).is_file() for file in WEIGHT_FILES[:2]):
        convert = ("from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; [X."
                   f"from_pretrained({str(name)!r}).save_pretrained('converted') for X in (M, T)]")
        raise FileNotFoundError(f"{folder} has no model.safetensors; a pytorch_model.bin can be "
                                f"converted, with the vocabulary: python -c \"{convert}\"")
    return folder


def read_json(path):
    """The dict in a JSON file. ValueError if it is broken, OSError if it cannot be read."""
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise TypeError("it is no JSON object")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is broken or cut short ({error}); fetch it again") from None
    return raw


def read_config(folder):
    """The GPTConfig of a folder. What config.json does not say is gpt2's, as in transformers. And
    as in its generate(), the special ids are those of generation_config.json, if there is one.

    ValueError if it is no GPT-2 as supported here, OSError if it cannot be read.
    """
    raw = read_json(folder / "config.json")
    for key, supported in SUPPORTED_MODEL.items():
        if raw.get(key, supported) != supported:
            raise ValueError(f"config.json in {folder} says that {key} is {raw[key]!r}, and only "
                             f"{supported!r} is supported here")
    raw["block_size"] = raw.get("n_positions", GPTConfig.block_size)
    if (folder / "generation_config.json").exists():
        said = read_json(folder / "generation_config.json")
        raw |= {key: said.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        return GPTConfig(**{key: raw[key] for key in vars(GPTConfig()) if key in raw})
    except ValueError as error:
        raise ValueError(f"config.json (or generation_config.json) in {folder}: {error}") from None


def read_weights(folder, config):
    """{name in GPT.transformer: tensor} of a folder, in the dtype that transformers gives a model.

    The Hub's gpt2 has these names. Others have `transformer.` before them, and lm_head.weight too,
    which is wte.weight once more. The causal masks that are in older files are no parameters.
    ValueError if the weights are broken or do not fit the config, OSError if they cannot be read.
    """
    tensors, raw = read_tensors(folder), read_json(folder / "config.json")
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    stored = floats[0] if floats else torch.float32
    dtype = raw.get("dtype") or raw.get("torch_dtype") or stored  # torch_dtype: in older files
    dtype = str(dtype).removeprefix("torch.")
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        if dtype not in DTYPES or tensor.dtype not in DTYPES.values():
            raise ValueError(f"{name} of model.safetensors in {folder} is {tensor.dtype}, to be "
                             f"used as {dtype}; supported here are {', '.join(DTYPES)}")
        # Windows cannot replace a file that is mapped, and saving may have to: so copy there.
        tensor = tensor.to(DTYPES[dtype], copy=sys.platform == "win32")
        weights[name.removeprefix("transformer.")] = tensor
    head = weights.pop("lm_head.weight", None)
    if head is not None:  # the one tensor may be stored by either name, or by both
        wte = weights.setdefault("wte.weight", head)
        if not torch.equal(wte, head):
            raise ValueError(f"model.safetensors in {folder} has an lm_head.weight that is not its "
                             "wte.weight; supported here is only one tensor for both")
    if config.n_layer > len(weights):  # now, as to build a million blocks would take minutes
        raise ValueError(f"model.safetensors in {folder} has {len(weights)} tensors, too few for "
                         f"the n_layer of config.json, {config.n_layer}")
    return weights


def read_tensors(folder):
    """All tensors of a folder, by name: of its model.safetensors or, if a big model is split into
    shards, of those files that model.safetensors.index.json names for them."""
    if (folder / "model.safetensors").is_file():
        return read_safetensors(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    shard_of = read_json(index).get("weight_map")
    if not shard_of or not isinstance(shard_of, dict):
        raise ValueError(f"{index} has no weight_map, which says where each tensor is")
    tensors = {}
    for shard in sorted({str(shard) for shard in shard_of.values()}):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder} has no {shard}, which {index.name} names")
        found = read_safetensors(folder / shard)
        for name in found.keys() ^ {name for name in shard_of if shard_of[name] == shard}:
            raise ValueError(f"{folder / shard} and {index.name} disagree on where {name} is")
        tensors |= found
    return tensors


def read_safetensors(path):
    """The tensors of one file, memory-mapped: what is not used is not read. They are sorted by
    name, as for transformers, which may take the dtype of the first for the model's."""
    try:
        return dict(sorted(safetensors.torch.load_file(path).items()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is broken or cut short ({error}); fetch it again") from None


def load_tokenizer(name):
    """The vocabulary of a folder, or of the Hub's model of that name, as a tiktoken.Encoding.

    ValueError if it is broken or of another kind than GPT-2's, OSError if it cannot be found.
    """
    return read_tokenizer(find_folder(name, weights=False))[0]


def byte_alphabet():
    """{character: byte}. JSON holds text, not bytes, so GPT-2's files write each byte as a visible
    character: the 188 that are one in Latin-1 as that, the other 68 as chr(256), chr(257), ... in
    order. A space is written Ġ."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): b for i, b in enumerate(others)}


def read_tokenizer(folder):
    """A folder's tiktoken.Encoding, and the ids to show as text: all but those of special tokens.

    GPT-2's tokens come from byte-pair encoding. A regex, r50k_pat_str, cuts the text into pieces:
    words, numbers, punctuation, each with the space before it, and longer white space. A piece
    starts as its single bytes. Then, as long as two neighbours joined are a token, those two are
    joined whose token has the lowest rank. The rank is the id: training made the tokens in turn.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        path = folder / "vocab.json"  # in older checkpoints: {token: id} alone
    if not path.exists():
        return openai_tokenizer(folder)
    raw = read_json(path)
    try:
        if path.name == "vocab.json":  # give it the form of a tokenizer.json
            listed = [{"content": EOT, "id": raw[EOT], "special": True}] if EOT in raw else []
            raw = {"model": {"vocab": raw}, "added_tokens": listed,
                   "pre_tokenizer": {"type": "ByteLevel"}}
            if (folder / "added_tokens.json").exists():
                raise ValueError("added_tokens.json is not supported: save it with transformers' "
                                 "AutoTokenizer, which makes a tokenizer.json")
        if (folder / "tokenizer_config.json").exists():
            raw["tokenizer_config"] = read_json(folder / "tokenizer_config.json")
        check_tokenizer(raw)
        vocab, merges = raw["model"]["vocab"], raw["model"].get("merges")
        # Added tokens are found in a text as a whole, before it is cut: no joining makes them. But
        # a single byte stays, as the joining starts from it.
        added = {token["content"]: token["id"] for token in raw["added_tokens"]}
        special = {token["id"] for token in raw["added_tokens"] if token["special"]}
        byte_of = byte_alphabet()
        ranks = {bytes([byte_of[character] for character in token]): id
                 for token, id in vocab.items() if token not in added or len(token) == 1}
        check_vocabulary(vocab, added, ranks, merges)
        encoding = tiktoken.Encoding(folder.name, pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                     special_tokens=added)
        for token, id in added.items():
            if encoding.encode(token, allowed_special="all") != [id]:
                raise ValueError(f"{token!r} begins with another added token, which hides it")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        why = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is no vocabulary of GPT-2's kind: {why!s:.400}") from None
    return encoding, {*ranks.values(), *added.values()} - special


def openai_tokenizer(folder):
    """GPT-2's own vocabulary, for a folder that has none, if its config.json is GPT-2's."""
    config = read_config(folder)
    if 50256 not in config.end_ids or config.vocab_size < 50257:
        raise ValueError(f"{folder} has no vocabulary (tokenizer.json or vocab.json), and by its "
                         "config.json it is not GPT-2's: put that of its training there")
    print(f"{folder} has no vocabulary: taking GPT-2's own", file=sys.stderr)
    try:
        return tiktoken.get_encoding("gpt2"), range(50256)
    except OSError as error:
        raise OSError(f"{folder} has no vocabulary, and GPT-2's cannot be had: {error}") from None


# The settings of tokenizer.json that change how a text becomes tokens, with the values supported
# here. A normalizer changes the text, the pre_tokenizer cuts it, the model joins bytes, and the
# post_processor may add tokens. None: the setting is absent or null.
SUPPORTED_TOKENIZER = {
    "normalizer.type": [None],
    "pre_tokenizer.type": ["ByteLevel"], "pre_tokenizer.use_regex": [True, None],
    "pre_tokenizer.add_prefix_space": [False, None],
    "model.type": ["BPE", None], "model.dropout": [None, 0],
    "model.continuing_subword_prefix": ["", None], "model.end_of_word_suffix": ["", None],
    "post_processor.type": ["ByteLevel", "TemplateProcessing", None],
    "post_processor.single": [[{"Sequence": {"id": "A", "type_id": 0}}], None],  # adds no token
    # These are in tokenizer_config.json.
    "tokenizer_config.add_prefix_space": [False, None],
    "tokenizer_config.add_bos_token": [False, None],
    "tokenizer_config.add_eos_token": [False, None]}


def check_tokenizer(raw):
    for key, supported in SUPPORTED_TOKENIZER.items():
        part, field = key.split(".")
        value = (raw.get(part) or {}).get(field)
        if value not in supported:
            raise ValueError(f"{key} is {value!r}, and only {supported[0]!r} is supported here")
    for token in raw["added_tokens"]:
        rules = [rule for rule in ("lstrip", "rstrip", "single_word") if token.get(rule)]
        if rules or token["content"] == "":
            raise ValueError(f"the added token {token['content']!r} is empty, or it has lstrip, "
                             "rstrip or single_word, which are not supported here")


def check_vocabulary(vocab, added, ranks, merges):
    ids = sorted((vocab | added).values())
    if ids != list(range(len(ids))):
        raise ValueError("its ids are not the numbers from 0 on, each once")
    if sum(len(token) == 1 for token in ranks) < 256:
        raise ValueError("it does not have all 256 bytes")
    # transformers joins in the order of the merges, tiktoken in the order of the ids.
    if merges is not None:
        made = ["".join(merge).replace(" ", "") for merge in merges]  # ["a", "b"], or older: "a b"
        made_ids = [vocab[token] for token in made if token not in added]
        if made_ids != sorted(id for token, id in ranks.items() if len(token) > 1):
            raise ValueError("its merges do not make its tokens in the order of their ids")


def read_vocabulary(folder):
    """{file name: content} of a folder's vocabulary, for save_pretrained."""
    files = [folder / name for name in VOCABULARY_FILES + OLD_VOCABULARY_FILES]
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def write_folder(model, folder):
    """What GPT.save_pretrained does."""
    config = vars(model.config) | SUPPORTED_MODEL
    config["n_positions"] = config.pop("block_size")
    config["architectures"] = ["GPT2LMHeadModel"]
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    files = model.vocabulary | {"config.json": json.dumps(config, indent=2).encode()}
    weights = model.state_dict()
    if not torch.equal(weights.pop("lm_head.weight"), weights["transformer.wte.weight"]):
        raise ValueError("lm_head.weight is no longer wte.weight; one tensor for both can be saved")
    folder.mkdir(parents=True, exist_ok=True)
    for left_behind in folder.glob(".saving-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    # Within the folder, so that it is on the same disk: only there is a move one step.
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        temporary = Path(temporary)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        try:
            safetensors.torch.save_file(weights, temporary / "model.safetensors", {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder} cannot be written: {error}") from None
        for name in [*files, "model.safetensors"]:
            (temporary / name).replace(folder / name)
    # Of a model that was saved here before, generation_config.json would overrule our ids, and the
    # vocabulary is not ours. If we have none it stays, as somebody may have put it there for us.
    stale = VOCABULARY_FILES + OLD_VOCABULARY_FILES if model.vocabulary else []
    for name in ["generation_config.json", *stale]:
        if name not in files:
            (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The command line


def main(argv=None):
    """Exits with 2 after a mistake, named in stderr's last line, and with 130 when interrupted."""
    gc.freeze()  # what is imported stays: to look through it for garbage at exit would take 0.3 s
    parser = argparse.ArgumentParser(
        "train_gpt2.py", description="Complete a prompt with GPT-2.", usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for flag, default, meaning in [
            ("--model", "gpt2", "name on the Hub, or folder with config.json, model.safetensors"),
            ("--prompt", "Hello, I'm a language model,", "text to complete; '' starts a new one"),
            ("--num-return-sequences", 5, "how many completions"),
            ("--max-length", 30, "tokens in each, the prompt's included"),
            ("--temperature", 1.0, "over 1 wilder, under 1 tamer, 0 the likeliest token each time"),
            ("--top-k", 50, "draw from the K likeliest tokens; 0 draws from all"),
            ("--seed", 42, "the same seed and flags say the same words"),
            ("--device", "auto", "cpu, cuda, cuda:1, mps, ...; auto is cuda, else mps, else cpu")]:
        parser.add_argument(flag, default=default, type=type(default), help=meaning)
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES],
                        help="of weights and arithmetic; auto is the checkpoint's")
    args = parser.parse_args(argv)
    if sys.stdout:  # it is None if it was closed
        sys.stdout.reconfigure(errors="replace")  # for what a console cannot show, a question mark
    try:
        complete(**vars(args))  # --max-length is its max_length, and so on
    except BrokenPipeError:  # `| head -1` has seen enough: what is left to print goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # too little memory is no bug, and the other RuntimeErrors are
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def complete(model, prompt, num_return_sequences, max_length, temperature, top_k, seed, device,
             dtype):
    """Print completions. Checks come as early as they can, as download and weights take long."""
    check_sampling(temperature, top_k)
    if not 0 < num_return_sequences < 2**31:
        raise ValueError(f"num_return_sequences must be 1 to 2**31 - 1, not {num_return_sequences}")
    if not -2**63 <= seed < 2**64:
        raise ValueError(f"seed must be a number of 64 bits, not {seed}")
    device = find_device(device)
    folder = find_folder(model)
    config = read_config(folder)
    tokenizer, readable = read_tokenizer(folder)
    if max(readable) >= config.vocab_size:
        raise ValueError(f"the vocabulary in {folder} is not the model's: it has an id "
                         f"{max(readable)}, and the model {config.vocab_size} tokens")
    tokens = tokenizer.encode(prompt, allowed_special="all")
    if not tokens and config.bos_token_id not in range(config.vocab_size):
        raise ValueError("the prompt is empty, and the model has no token to start from: its "
                         f"bos_token_id is {config.bos_token_id}")
    tokens = tokens or [config.bos_token_id]
    idx = torch.tensor([tokens])  # (1, T)
    check_generate(config, idx, max_length, temperature, top_k)
    print(f"using device: {device}", file=sys.stderr)
    gpt = GPT.from_pretrained(folder).to(device, DTYPES.get(dtype))
    torch.manual_seed(seed)
    idx = idx.to(device).repeat(num_return_sequences, 1)  # (B, T)
    for row in gpt.generate(idx, max_length, temperature, top_k).tolist():
        # As in the pipeline, special tokens are not shown, so neither is the end of a row and what
        # fills it up; nor are ids without a token, which a model of a rounded vocab_size has.
        new = [token for token in row[len(tokens):] if token in readable]
        print(">", prompt + tokenizer.decode(new), flush=True)


def find_device(name):
    """The device of that name; for "auto", the best. ValueError if it cannot be used."""
    if name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device {name} cannot be used: {reason} (this torch is built for CUDA "
                         f"{torch.version.cuda}; see the README)") from None
    return name


if __name__ == "__main__":
    main()

"""GPT-2 in one file: the model, sampling, and reading and writing Hugging Face checkpoints.

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". The
file is named after the one in Karpathy's lecture "Let's reproduce GPT-2 (124M)", but it has no
training loop, because a loop depends on your text and your machines. The README has one to copy.

Shapes in comments:
    B   batch: the number of rows
    T   time: the number of tokens in each row of this call
    S   the number of tokens that can be attended to: these T and the cached ones before them
    C   channels: the width of the model (n_embd)
    nh  the number of attention heads (n_head)
    hs  head size: the width of one head, C / nh
    V   the number of tokens in the vocabulary (vocab_size)

Given the same weights, logits, gradients and sampled tokens are bit-identical to those of
transformers' GPT2LMHeadModel in eval mode. Two tags mark odd-looking code to skip on a first
reading:
    BITS  rounds like transformers. A sum of floats rounds differently if the order of its terms
          changes, or even if the tensors are laid out differently in memory.
    FAST  only makes startup faster.
"""
import argparse
import gc
import json
import math
import os
import pickle
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from tqdm import trange


class InputError(ValueError):
    """A bad argument or checkpoint. The command line prints it, and OSError, in one line. Other
    exceptions are bugs and keep their traceback."""


# --------------------------------------------------------------------------------------------------
# Model


@dataclass
class GPTConfig:
    """The sizes and settings of a GPT-2. The defaults are those of `gpt2`, with 124M parameters.

    Raises InputError if one of them is impossible.
    """
    block_size: int = 1024  # the most tokens that a text can have
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # The rest is for checkpoints that differ from gpt2, and is named as in config.json.
    n_inner: int | None = None  # the width inside the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # divide attention scores by sqrt(hs)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the number of the layer, from 1
    tie_word_embeddings: bool = True  # lm_head and the token embedding share a weight
    bos_token_id: int | None = 50256  # used as the prompt if that is empty
    eos_token_id: int | list | None = 50256  # ends a text: an id, a list of ids, or None
    pad_token_id: int | None = None  # fills up rows that have ended; None: the first eos id

    def __post_init__(self):
        sizes = ["block_size", "vocab_size", "n_layer", "n_head", "n_embd"]
        for name in sizes if self.n_inner is None else [*sizes, "n_inner"]:
            size = getattr(self, name)
            if type(size) is not int or not 0 < size < 2**28:
                raise InputError(f"{name} must be an integer from 1 to 2**28 - 1, not {size!r}")
        if self.n_embd % self.n_head != 0:
            raise InputError(f"n_embd, {self.n_embd}, must be a multiple of n_head, {self.n_head}")
        if self.activation_function not in list(ACTIVATIONS):
            raise InputError(f"activation_function must be one of {', '.join(ACTIVATIONS)}, not "
                             f"{self.activation_function!r}")
        if type(self.layer_norm_epsilon) is not float or not 0 < self.layer_norm_epsilon < 1:
            raise InputError(f"layer_norm_epsilon can't be {self.layer_norm_epsilon!r}")
        others = [id for id in (self.bos_token_id, self.pad_token_id) if id is not None]
        for id in self.eos_token_ids + others:
            if type(id) is not int or not 0 <= id < 2**63:
                raise InputError(f"bos_token_id, eos_token_id or pad_token_id can't be {id!r}")

    @property
    def eos_token_ids(self):
        """The ids that end a text, as a list. It is empty if texts never end."""
        if self.eos_token_id is None:
            return []
        return self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]


class Conv1D(nn.Module):
    """A linear layer, x @ weight + bias: (..., n_in) → (..., n_out).

    Its weight is (n_in, n_out), as GPT-2 checkpoints store it. nn.Linear's is (n_out, n_in), which
    is why the lecture transposes on loading. OpenAI's code called this a convolution of width 1.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # uninitialized; GPT fills it
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        # BITS: a single addmm, with all dimensions but the last flattened into one
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class KVCache:
    """The keys and values that one attention layer has computed so far in a call of generate().

    The lecture runs the model on the whole text again for each new token. But a token attends only
    to itself and to the tokens before it, so its key and value never change. With those cached, the
    model runs on the new token alone, and its query attends to all keys and values so far.
    """

    def __init__(self, shape, like):
        self.k = like.new_empty(shape)  # (B, nh, max_length, hs), with the dtype and device of like
        self.v = like.new_empty(shape)
        self.length = 0  # the number of tokens in it

    def append(self, k, v):
        """Add the keys and values of T tokens, (B, nh, T, hs); return those of all S tokens."""
        start, end = self.length, self.length + k.shape[2]
        assert start == 0 or end == start + 1, "the cache takes a prompt, then one token at a time"
        assert end <= self.k.shape[2], "the cache is full"
        self.k[:, :, start:end] = k
        self.v[:, :, start:end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]  # (B, nh, S, hs)


def attend(q, k, v, scale):
    """softmax(q @ k.T * scale + mask) @ v for each head: q (B, nh, T, hs), k and v (B, nh, S, hs)
    → (B, nh, T, hs). The mask is 0 for tokens that may be attended to, and -inf for later ones.
    A single token needs no mask, since none is later; if T > 1, the cache was empty and S is T."""
    # BITS: transformers attends to contiguous copies of k and v, and their strides and alignment
    # can change the rounding. KVCache rows (stride hs) of whole 32-byte blocks need no copy.
    hs = k.shape[3]
    if k.stride(2) != hs or hs * k.element_size() % 32 != 0:
        k = k.clone(memory_format=torch.contiguous_format)
        v = v.clone(memory_format=torch.contiguous_format)
    is_causal = True if q.shape[2] > 1 else False  # noqa: SIM210 - when compiled, > isn't a bool
    # BITS: the default scale, 1 / sqrt(hs), can differ from hs**-0.5 in the last bit.
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to the tokens before it: (B, T, C) → (B, T, C)."""

    def __init__(self, config, layer=1):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer

    def forward(self, x, cache=None):
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, nh, S, hs)
        y = attend(q, k, v, self.scale)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


def gelu_new(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), from Hendrycks & Gimpel 2016; any shape.

    BITS: nn.GELU(approximate="tanh") is the same formula but rounds differently. `half` comes first
    because autograd adds up the three gradients of x in the reverse order of these lines.
    """
    half = 0.5 * x
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return half * (1.0 + torch.tanh(inner))


ACTIVATIONS = {
    "gelu_new": gelu_new, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MLP(nn.Module):
    """Each token goes through a wider layer by itself: (B, T, C) → (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.act = ACTIVATIONS[config.activation_function]
        self.c_proj = Conv1D(n_inner, config.n_embd)

    def forward(self, x):
        x = self.act(self.c_fc(x))  # (B, T, n_inner)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention, then the MLP. Each reads a normalized x and adds to x: (B, T, C) → (B, T, C)."""

    def __init__(self, config, layer=1):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


def embedding(rows, width):
    """An uninitialized nn.Embedding. FAST: initializing it on meta would import torch._dynamo."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class GPT(nn.Module):
    """GPT-2 with its language modeling head. GPT(config) has GPT-2's random starting weights.

    Names and shapes of the parameters match those of transformers' GPT2LMHeadModel. There is no
    dropout, and the loss is up to you: see the README.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": embedding(V, C),  # token embedding
            "wpe": embedding(config.block_size, C),  # position embedding
            "h": nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layer + 1)),
            "ln_f": nn.LayerNorm(C, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(C, V, bias=False, device="meta")  # FAST: a shape without memory
        self.lm_head.weight = (self.transformer.wte.weight if config.tie_word_embeddings
                               else nn.Parameter(torch.empty(V, C)))
        for name, p in self.named_parameters():
            # FAST: skips meta tensors. Biases are already 0, and LayerNorm weights 1.
            if p.ndim == 2 and not p.is_meta:
                std = 0.02
                if name.endswith("c_proj.weight"):
                    # 2 * n_layer of these layers add to x. They start smaller, so that x doesn't
                    # grow with the depth (section 2.3 of the paper).
                    std /= math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=std)

    def forward(self, idx, *, caches=None):
        """idx (B, T) int64 → logits (B, T, V) in the dtype of the weights.

        generate() passes `caches`, one KVCache per block, first with the prompt and then with each
        new token, and gets the logits of the last token only, (B, 1, V). Raises InputError if idx
        has another shape or dtype, or more than block_size tokens.
        """
        if caches is None:  # generate() has already checked
            check_idx(idx, self.config.block_size)
        start = caches[0].length if caches else 0  # the position of the first token of idx
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * len(self.transformer.h)):
            x = block(x, cache)  # (B, T, C)
        x = self.transformer.ln_f(x)
        if caches:
            x = x[:, -1:]  # the last token predicts the next one, and lm_head is the widest layer
        return self.lm_head(x)

    def generate(self, idx, max_length, temperature=1.0, top_k=50):
        """Continue each row of idx (B, T) int64: (B, at most max_length) int64, prompt included.

        Samples from the top_k likeliest tokens with torch's global generator; top_k=0 samples from
        all tokens, temperature=0 takes the likeliest. After its eos token, a row is filled up with
        pad_token_id; once every row has ended, generation stops. The rows of idx must not be padded
        to one length, since padding would be read as text. Raises InputError.
        """
        config = self.config
        check_generate(config, idx, max_length, temperature, top_k)
        B, T = idx.shape
        shape = (B, config.n_head, max_length, config.n_embd // config.n_head)
        fills = [config.pad_token_id, *config.eos_token_ids, 0]  # 0: without eos, no row ever ends
        fill = next(id for id in fills if id is not None)
        eos = torch.tensor(config.eos_token_ids, dtype=torch.int64, device=idx.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
        with torch.inference_mode():  # no_grad, and a little faster
            caches = [KVCache(shape, like=self.lm_head.weight) for _ in self.transformer.h]
            new = idx  # the tokens that aren't in the caches yet
            for _ in trange(T, max_length, unit="token", delay=1, disable=None, leave=False):
                logits = self(new, caches=caches)[:, -1].float()  # (B, V)
                new, finite = sample(logits, temperature, top_k)  # (B, 1), ()
                # The model still gets what ended rows sample; the result gets `fill` instead.
                idx = torch.cat((idx, new.masked_fill(ended, fill)), dim=1)
                ended = ended | (new == eos).any(dim=1, keepdim=True)
                # Checking a tensor means waiting for the GPU, so check once per token.
                if ended.all() | ~finite:
                    if not finite:
                        raise InputError("the logits are NaN or infinite: the weights are bad, or "
                                         "float16 overflowed (use float32 or bfloat16)")
                    break
        return idx.clone()  # autograd can't use a tensor made in inference mode

    @classmethod
    def from_pretrained(cls, name):
        """Load the model in the folder `name`, or of that name on the Hugging Face Hub (`gpt2`).

        The model is in eval mode, in the dtype that transformers would pick. Where possible, it is
        memory-mapped: weights are read on first use, not copied. Training doesn't change the file.
        Raises InputError if the checkpoint is damaged or isn't a GPT-2, OSError if a file can't be
        found, read or downloaded.
        """
        folder = find_folder(name)
        config, weights = read_config(folder), read_weights(folder)
        # A file may hold either of a tied pair. If it holds both and they differ, they're untied.
        wte = weights.get("transformer.wte.weight", weights.get("lm_head.weight"))
        head = weights.get("lm_head.weight", wte)
        if config.tie_word_embeddings and wte is not None:
            weights |= {"transformer.wte.weight": wte, "lm_head.weight": head}
            config.tie_word_embeddings = head is wte or torch.equal(head, wte)
        if config.n_layer > len(weights):  # before a million blocks are built
            raise InputError(f"{folder} has too few tensors for the n_layer of its config.json")
        with torch.device("meta"):  # FAST: shapes without memory, until the weights are assigned
            model = cls(config)
        try:
            missing, ignored = model.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:  # shapes differ
            raise InputError(f"the weights in {folder} don't fit its config.json: "
                             f"{error!s:.400}") from None
        if missing:
            raise InputError(f"the model has parameters that the weights in {folder} lack: "
                             f"{', '.join(missing[:5])}")
        if ignored:
            print(f"{folder}: ignoring {', '.join(ignored[:5])}", file=sys.stderr)
        if config.tie_word_embeddings:  # again, because each name got a parameter of its own
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder for from_pretrained, --model, transformers and the Hub: config.json,
        model.safetensors and, given a tokenizers.Tokenizer, its files.

        Each file is written to a temporary folder and then moved into place. So a crash leaves no
        half-written file, and a file that a model is mapped from stays intact. Raises OSError.
        """
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        head, wte = self.lm_head.weight, self.transformer.wte.weight
        tied = head is wte or (self.config.tie_word_embeddings and torch.equal(head, wte))
        if tied:
            del weights["lm_head.weight"]
        config = asdict(self.config) | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
            "n_positions": self.config.block_size, "tie_word_embeddings": tied,
            "dtype": str(wte.dtype).removeprefix("torch.")}
        ids = {name: config[name] for name in SPECIAL_IDS}
        files = {"config.json": config, "generation_config.json": ids}
        stale = []  # an older tokenizer's files, which would be read with the new one's
        if tokenizer is not None:
            files["tokenizer.json"] = json.loads(tokenizer.to_str())
            files["tokenizer_config.json"] = tokenizer_config(tokenizer, self.config)
            stale = ["special_tokens_map.json", "added_tokens.json"]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the folder, so on the same disk, where moving a file is a single step
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            for name, content in files.items():
                Path(temporary, name).write_text(json.dumps(content, indent=2), encoding="utf-8")
            try:
                safetensors.torch.save_file(
                    weights, Path(temporary, "model.safetensors"), metadata={"format": "pt"})
            except safetensors.SafetensorError as error:
                raise OSError(f"could not write to {folder}: {error}") from None
            for name in [*files, "model.safetensors"]:
                Path(temporary, name).replace(folder / name)
        for name in stale:
            (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Sampling


def sample(logits, temperature, top_k):
    """The next token of each row, sampled as in transformers: logits (B, V) float32 → (B, 1) int64;
    and () bool, False if NaN or infinite logits make the tokens meaningless.

    The lecture samples from the k likeliest only. Here the others stay in, with probability 0, so a
    seed gives tokens other than the lecture's, from the same distribution.
    """
    logits = logits / (temperature or 1.0)
    finite = (logits.amax(dim=-1).abs() < math.inf).all()  # NaN isn't less than anything
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True), finite
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # the k-th largest: (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = torch.softmax(logits, dim=-1)  # (B, V)
    probs = probs.nan_to_num(1.0)  # on a GPU, NaN in multinomial would end the process
    return torch.multinomial(probs, num_samples=1), finite


def check_idx(idx, block_size):
    if not isinstance(idx, torch.Tensor) or idx.dtype != torch.int64:
        raise InputError(f"idx must be an int64 tensor, not {getattr(idx, 'dtype', type(idx))}")
    if idx.ndim != 2 or idx.numel() == 0:
        raise InputError(f"idx must be (B, T) with B and T at least 1, not {tuple(idx.shape)}")
    if idx.shape[1] > block_size:
        raise InputError(f"the prompt (idx) has {idx.shape[1]} tokens, more than the model's "
                         f"block_size, {block_size}")


def check_generate(config, idx, max_length, temperature, top_k):
    check_idx(idx, config.block_size)
    if not idx.shape[1] < max_length <= config.block_size:
        raise InputError(f"max_length must be more than the prompt's {idx.shape[1]} tokens, and at "
                         f"most the model's block_size, {config.block_size}, not {max_length}")
    if temperature != 0 and not 1e-30 < temperature < math.inf:  # below, the logits overflow
        raise InputError(f"temperature must be 0, or positive and finite, not {temperature}")
    if top_k < 0:
        raise InputError(f"top_k must be at least 0, not {top_k}")
    # On a GPU, an out-of-range id trips a CUDA assert, which can't be recovered from.
    for id in torch.stack(idx.aminmax()).tolist():
        if not 0 <= id < config.vocab_size:
            raise InputError(f"the prompt (idx) has the id {id}, but the model's ids are 0 to "
                             f"{config.vocab_size - 1}")


# --------------------------------------------------------------------------------------------------
# Checkpoints: the folder, and the config, the weights and the tokenizer in it


DTYPES = ["float32", "float64", "bfloat16", "float16"]
SPECIAL_IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]
EOT = "<|endoftext|>"  # gpt2's special token


def find_folder(name, weights=True):
    """The Path of the folder `name`, or else of the Hub's model of that name, downloaded."""
    return Path(name) if Path(name).is_dir() else download(name, weights)


def download(name, weights=True):
    """Download the files of a Hub model that are read here; return its folder's Path."""
    from huggingface_hub import snapshot_download  # FAST: rarely needed
    files = ["config.json", "generation_config.json",
             "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    if weights:
        files += ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    fallback = []  # read only where one of the above is missing
    try:
        folder = Path(snapshot_download(str(name), allow_patterns=files))
        if weights and not any(folder.glob("model*.safetensors")):
            fallback += ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
        if not (folder / "tokenizer.json").exists():
            fallback += ["vocab.json", "merges.txt", "added_tokens.json"]
        if fallback:  # folder.name is the commit: stay on that one
            snapshot_download(str(name), revision=folder.name, allow_patterns=fallback)
    except Exception as error:  # noqa: BLE001 - huggingface_hub's and its HTTP library's
        raise OSError(f"{name} was not found locally, and could not be downloaded from the Hugging "
                      "Face Hub: check the name and the network, or name a folder that holds "
                      f"config.json and weights ({error})") from None
    return folder


def damaged(path, why):
    """The InputError for a file that can't be read."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return InputError(f"{path} is only a git-lfs pointer: run `git lfs pull` in its folder")
    return InputError(f"{path} is damaged or incomplete ({why!s:.200}): download it again")


def read_json(path, default=None):
    """The dict in a JSON file, or the default, if one is given and the file doesn't exist."""
    if default is not None and not path.exists():
        return default
    try:
        raw = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(raw, dict):
        raise damaged(path, "not a JSON object")
    return raw


def read_config(folder):
    """The GPTConfig of a folder. As in transformers, missing keys take gpt2's values, and the
    special ids come from generation_config.json alone if there is one."""
    raw = read_json(folder / "config.json")
    for key, supported in [("model_type", "gpt2"), ("add_cross_attention", False)]:
        if raw.get(key, supported) != supported:
            raise InputError(f"config.json in {folder}: {key} is {raw[key]!r}, but only "
                             f"{supported!r} is supported")
    # transformers calls block_size n_positions, and also reads sizes by these other names.
    for name, other in [("block_size", "n_positions"), ("block_size", "max_position_embeddings"),
                        ("n_embd", "hidden_size"), ("n_layer", "num_hidden_layers"),
                        ("n_head", "num_attention_heads")]:
        if other in raw:
            raw[name] = raw[other]
    if (folder / "generation_config.json").exists():
        ids = read_json(folder / "generation_config.json")
        raw |= {name: ids.get(name) for name in SPECIAL_IDS}
    known = {field.name for field in fields(GPTConfig)} & raw.keys()
    try:
        return GPTConfig(**{name: raw[name] for name in known})
    except InputError as error:
        raise InputError(f"config.json (or generation_config.json) in {folder}: {error}") from None


def read_weights(folder):
    """{name in GPT's state_dict: tensor} of a folder, in the dtype that transformers would use:
    config.json's, or else that of the first float tensor."""
    tensors, config = read_tensors(folder), read_json(folder / "config.json")
    floats = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = config.get("dtype") or config.get("torch_dtype") or (floats[0] if floats else None)
    dtype = str(dtype).removeprefix("torch.")
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # causal masks in older files
            continue
        if name.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # as in the Hub's gpt2
            name = f"transformer.{name}"
        if dtype not in DTYPES or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise InputError(f"can't load {name} in {folder}, {tensor.dtype}, as {dtype}: only "
                             f"{', '.join(DTYPES)} are supported")
        # Windows can't replace a mapped file, and saving may need to, so copy there.
        weights[name] = tensor.to(getattr(torch, dtype), copy=sys.platform == "win32")
    return weights


def read_tensors(folder):
    """All tensors of a folder by name, from one file, or from shards that an index lists."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            files = read_json(index).get("weight_map")  # {tensor: file}
            if not isinstance(files, dict) or not files:
                raise damaged(index, "it has no weight_map")
            tensors = {}
            for file in sorted(set(map(str, files.values()))):
                if Path(file).name != file or not file.isprintable():  # such as ../../x
                    raise damaged(index, f"{file} isn't the name of a file")
                tensors |= read_file(folder / file)
            return tensors
    raise FileNotFoundError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def read_file(path):
    """The tensors of a file by name, memory-mapped if possible.

    A .bin file is a pickle, which could run any code. weights_only=True prevents that, but before
    torch 2.6 there was a way around it (CVE-2025-32434).
    """
    if path.suffix != ".safetensors" and torch.__version__ < (2, 6):
        raise InputError(f"reading {path} safely needs torch 2.6 or later, but this is "
                         f"{torch.__version__}: upgrade torch, or use a model.safetensors")
    try:
        if path.suffix == ".safetensors":  # by name: the first may set the dtype
            return dict(sorted(safetensors.torch.load_file(path).items()))
        mmap = zipfile.is_zipfile(path)  # since torch 1.6
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                   for name, tensor in tensors.items()):
            raise pickle.UnpicklingError
        return tensors
    except pickle.UnpicklingError:  # ours, or torch's, which advises to run the code
        raise damaged(path, "it contains more than tensors; no code in it was run") from None
    except Exception as error:  # noqa: BLE001 - a damaged file can raise almost anything
        raise damaged(path, error) from None


def load_tokenizer(name):
    """The tokenizers.Tokenizer of a folder, or of a Hub model, with the special tokens that
    transformers gives it. Use it as tokenizer.encode(text).ids and tokenizer.decode(ids).

    Raises InputError if it is damaged or missing, OSError if it can't be read or downloaded.
    """
    folder = tokenizer_folder(find_folder(name, weights=False))
    settings = read_json(folder / "tokenizer_config.json", default={})
    if "added_tokens_decoder" not in settings:  # older folders have a second file
        settings |= read_json(folder / "special_tokens_map.json", default={})
    added = {}  # {token: id}, in older folders
    path = folder / "tokenizer.json"
    if not path.exists():
        path = folder / "vocab.json"
        settings = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT} | settings
        added = read_json(folder / "added_tokens.json", default={})
    try:
        if path.name == "vocab.json":
            tokenizer = Tokenizer(models.BPE.from_file(str(path), str(folder / "merges.txt")))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer = Tokenizer.from_file(str(path))
        specials = special_tokens(settings)
        tokenizer.add_tokens([AddedToken(token, special=token in specials)
                              for token in sorted(added, key=added.get)])
        # Makes decode() skip these. Those in `known` keep their options, such as lstrip.
        known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([known.get(token, token) for token in specials])
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more specific
        raise damaged(path, error) from None
    refused = ["add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"]
    if not isinstance(tokenizer.model, models.BPE):  # for BPE, transformers ignores the next one
        refused.append("clean_up_tokenization_spaces")
    for setting in refused:
        if settings.get(setting):
            raise InputError(f"tokenizer_config.json in {folder}: {setting} is not supported")
    tokenizer.no_padding()  # it may have been saved while it padded and truncated
    tokenizer.no_truncation()
    return tokenizer


def tokenizer_folder(folder):
    """The folder itself if it has a tokenizer, or the Hub's gpt2's if its config is like gpt2's."""
    def has_one(folder):
        files = {path.name for path in folder.iterdir()}
        return "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files

    if has_one(folder):
        return folder
    config = read_config(folder)
    if (50256 in config.eos_token_ids and config.vocab_size >= 50257
            and not (folder / "tokenizer_config.json").exists()):  # other kinds would have one
        print(f"{folder} has no tokenizer: using gpt2's", file=sys.stderr)
        gpt2 = download("gpt2", weights=False)
        if has_one(gpt2):
            return gpt2
    raise InputError(f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt): "
                     "save one with model.save_pretrained(folder, tokenizer)")


def special_tokens(settings):
    """The special tokens that a tokenizer_config.json names, each as a string or a dict."""
    names = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]
    tokens = [settings.get(f"{name}_token") for name in names]
    tokens += settings.get("additional_special_tokens") or []
    extra = settings.get("extra_special_tokens") or []
    tokens += extra.values() if isinstance(extra, dict) else extra
    return [token["content"] if isinstance(token, dict) else token for token in tokens if token]


def tokenizer_config(tokenizer, config):
    """What transformers needs besides tokenizer.json: a class that takes it unchanged, and which
    special tokens are bos, eos and pad."""
    ids = {"bos_token": config.bos_token_id, "pad_token": config.pad_token_id,
           "eos_token": config.eos_token_ids[0] if config.eos_token_ids else None}
    names = {"tokenizer_class": "PreTrainedTokenizerFast"}
    added = tokenizer.get_added_tokens_decoder()  # {id: AddedToken}
    for name, id in ids.items():
        if id in added and added[id].special:
            names[name] = added[id].content
    return names


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv=None):
    """Exit status: 2 after bad input (stderr's last line says why), 130 after Ctrl-C."""
    gc.freeze()  # FAST: so that Python doesn't scan everything imported for garbage at exit
    parser = argparse.ArgumentParser(
        "train_gpt2.py", description="Complete a prompt with GPT-2.", usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="gpt2", help="name of a Hub model, or folder of a checkpoint")
    flag("--prompt", default="Hello, I'm a language model,", help="text to complete, may be empty")
    flag("--num-return-sequences", type=int, default=5, help="how many completions")
    flag("--max-length", type=int, default=30, help="tokens in each, the prompt's included")
    flag("--temperature", type=float, default=1.0,
         help="above 1 is wilder, below 1 is tamer, 0 always takes the likeliest token")
    flag("--top-k", type=int, default=50, help="sample from the K likeliest tokens; 0: from all")
    flag("--seed", type=int, default=42, help="the same seed and flags give the same text")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto takes the best")
    flag("--dtype", default="auto", choices=["auto", *DTYPES], help="auto keeps the checkpoint's")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, nor if it is closed (None)
        sys.stdout.reconfigure(errors="replace")  # what the console can't show becomes ?
    try:
        complete(**vars(args))  # --max-length is its max_length, and so on
    except BrokenPipeError:  # the reader is gone, as in `| head -1`: discard the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise  # only running out of memory says "allocate"; all others are bugs
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")


def complete(model, prompt, num_return_sequences, max_length, temperature, top_k, seed, device,
             dtype):
    """Print num_return_sequences completions, each after `> `."""
    if not 0 < num_return_sequences < 2**31:
        raise InputError(f"num_return_sequences must be 1 to 2**31 - 1, not {num_return_sequences}")
    if not -2**63 <= seed < 2**64:
        raise InputError(f"seed must be a 64-bit number, not {seed}")
    device = find_device(device)
    folder = find_folder(model)
    tokenizer = load_tokenizer(folder)
    prompt = prompt.encode(errors="replace").decode()  # argv may hold bytes that aren't UTF-8
    ids = tokenizer.encode(prompt).ids
    gpt = GPT.from_pretrained(folder)
    if not ids and gpt.config.bos_token_id is None:
        raise InputError("the prompt is empty, and the model has no bos_token_id to start from")
    print(f"using device: {device}", file=sys.stderr)
    gpt.to(device, None if dtype == "auto" else getattr(torch, dtype))
    idx = torch.tensor([ids or [gpt.config.bos_token_id]], device=device)  # (1, T)
    torch.manual_seed(seed)
    rows = gpt.generate(idx.repeat(num_return_sequences, 1), max_length, temperature, top_k)
    for row in rows.tolist():
        # The prompt as given, then the new tokens (after an empty prompt, bos too). As in the
        # pipeline, decode() skips special tokens.
        print(">", prompt + tokenizer.decode(row[len(ids):]), flush=True)


def find_device(name):
    """A device name that torch can use; "auto" picks the best. Raises InputError if it can't."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {name} can't be used ({error!s:.200}); torch.version.cuda is "
                         f"{torch.version.cuda}: see the README") from None
    return name


if __name__ == "__main__":
    main()

"""GPT-2 in one file: the model, sampling, and Hugging Face checkpoints.

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". In
comments, "the lecture" is Karpathy's "Let's reproduce GPT-2 (124M)". The file doesn't train by
itself; the README has a program that does. Shapes in comments:
    B   batch: the number of rows
    T   time: the number of tokens in each row of this call
    S   the number of tokens that can be attended to: these T and the cached ones before them
    C   channels: the width of the model (n_embd)
    nh  the number of attention heads (n_head)
    hs  head size: the width of one head, C / nh
    V   the number of tokens in the vocabulary (vocab_size)

Logits, gradients and sampled tokens are bit-identical to those of transformers' GPT2LMHeadModel in
eval mode. Two tags mark odd-looking code that you can skip on a first reading:
    BITS  is there to round exactly as transformers does. A sum of floats rounds differently if the
          order of its terms changes, or even if its tensors are laid out differently in memory.
    FAST  only saves time when the program starts or ends.
"""
import argparse
import gc
import json
import math
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from tqdm import trange


class InputError(ValueError):
    """A bad argument or checkpoint: the command reports it in one line, without a traceback."""


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---------------------------------------------- Model ---------------------------------------------

@dataclass
class GPTConfig:
    """The sizes and settings of a GPT-2; the defaults are those of `gpt2` (124M parameters). Fields
    that you add are saved and loaded too. Impossible values raise InputError: see check_config."""
    block_size: int = 1024  # maximum context length
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    # The rest are for checkpoints that differ from gpt2. Their names are those of config.json.
    n_inner: int | None = None  # the width inside the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    scale_attn_weights: bool = True  # divide attention scores by sqrt(hs)
    scale_attn_by_inverse_layer_idx: bool = False  # and by the layer's number, from 1
    tie_word_embeddings: bool = True  # lm_head and the token embedding share a weight
    bos_token_id: int | None = 50256  # what the command starts from if the prompt is empty
    eos_token_id: int | list | None = 50256  # ends a text: an id, a list of ids, or None
    pad_token_id: int | None = None  # fills up rows that have ended; None: the first eos id

    def __post_init__(self):
        check_config(self)

    @property
    def eos_token_ids(self):
        """The ids that end a text, as a list. It is empty if texts never end."""
        ids = self.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]


class Conv1D(nn.Module):
    """A linear layer, x @ weight + bias: (..., n_in) → (..., n_out). GPT-2 checkpoints store the
    weight as (n_in, n_out). nn.Linear's is (n_out, n_in), so the lecture transposes on loading."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))  # GPT or a checkpoint fills it
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        # x @ weight + bias. BITS: as one addmm, with all dimensions but the last flattened
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], -1)


class KVCache:
    """The keys and values that one attention layer has computed so far during a call to generate().

    A token attends only to itself and to those before it, so its key and value never change. With
    these cached, the model runs on each new token alone, and not on the whole text again.
    """

    def __init__(self, max_length):
        self.max_length = max_length  # how many tokens fit
        self.length = 0  # how many are in it

    def append(self, k, v):
        """Add the keys and values of T tokens, (B, nh, T, hs); return those of all S tokens."""
        B, nh, T, hs = k.shape
        assert self.length == 0 or T == 1, "after the prompt, the cache takes one token at a time"
        if self.length == 0:
            self.k = k.new_empty(B, nh, self.max_length, hs)
            self.v = v.new_empty(B, nh, self.max_length, hs)
        self.k.narrow(2, self.length, T).copy_(k)  # unlike a slice, it raises if there is no room
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.k[:, :, :self.length], self.v[:, :, :self.length]  # (B, nh, S, hs)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to the tokens before it: (B, T, C) → (B, T, C)."""

    def __init__(self, config, layer=1):  # layers count from 1
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)  # q, k and v of all heads
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        # BITS: not 1 / sqrt(hs), which can differ in the last bit
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
        if cache is None or hs * k.element_size() % 32 != 0:
            # BITS: transformers' k and v are contiguous, and another layout can change the
            # rounding. The cache's doesn't if a head fills whole blocks of 32 bytes. contiguous()
            # isn't enough: it keeps unusual strides where a dimension is 1.
            k = k.clone(memory_format=torch.contiguous_format)
            v = v.clone(memory_format=torch.contiguous_format)
        # softmax(q @ k.transpose(2, 3) * scale + mask) @ v, where the mask is 0 for tokens that may
        # be attended to, and -inf for later ones. One token after cached ones needs no mask.
        is_causal = cache is None or cache.length == T  # these T are all that is in the cache
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)  # from (B, nh, T, hs): the heads side by side again
        return self.c_proj(y)


def gelu_new(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), from Hendrycks & Gimpel 2016, for any shape.

    BITS: nn.GELU(approximate="tanh") is the same formula but rounds differently. x is used three
    times, and autograd adds their gradients in reverse order, so `half` comes first.
    """
    half = 0.5 * x
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return half * (1.0 + torch.tanh(inner))


ACTIVATIONS = {
    "gelu_new": gelu_new, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MLP(nn.Module):
    """Each token passes, on its own, through a wider layer: (B, T, C) → (B, T, C)."""

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


class GPT(nn.Module):
    """GPT-2 with its language modeling head. GPT(config) has random initial weights. Parameters are
    named as in transformers' GPT2LMHeadModel. For dropout and the loss, see the README."""

    def __init__(self, config, init=True):  # False: from_pretrained() will fill the weights
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        # The embeddings of tokens and positions. FAST: nn.Embedding(V, C) would draw random weights
        # that are then overwritten; torch.empty doesn't.
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding.from_pretrained(torch.empty(V, C), freeze=False),
            "wpe": nn.Embedding.from_pretrained(torch.empty(config.block_size, C), freeze=False),
            "h": nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layer + 1)),
            "ln_f": nn.LayerNorm(C, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(C, V, bias=False, device="meta")  # FAST: not allocated yet
        self.lm_head.weight = (self.transformer.wte.weight if config.tie_word_embeddings
                               else nn.Parameter(torch.empty(V, C)))
        for name, p in self.named_parameters():
            if init and p.ndim == 2:  # Conv1D's biases are already 0, and LayerNorm weights 1
                # The 2 * n_layer layers named c_proj add to x. They start smaller, so that x
                # doesn't grow with the depth (section 2.3 of the paper).
                shrink = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, std=0.02 / shrink)

    def forward(self, idx, *, caches=None):
        """Token ids, idx (B, T) int64 → logits (B, T, V). Raises InputError if T is more than
        block_size. generate() passes `caches`, one KVCache per block: first with the prompt, then
        with each new token. It gets only the last token's logits, (B, 1, V)."""
        if idx.ndim != 2 or idx.numel() == 0 or idx.shape[1] > self.config.block_size:
            raise InputError("idx must be (B, T), not empty, with T at most the model's block_size "
                             f"{self.config.block_size}, but it is {tuple(idx.shape)}")
        start = caches[0].length if caches else 0  # the position of the first token of idx
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * len(self.transformer.h)):
            x = block(x, cache)  # (B, T, C)
        x = self.transformer.ln_f(x)
        if caches:
            x = x[:, -1:]  # generate() needs only these logits, and lm_head is the widest layer
        return self.lm_head(x)

    @torch.no_grad()
    def generate(self, idx, max_length, temperature=1.0, top_k=50):
        """Continue each row of idx (B, T) int64. Returns (B, at most max_length) int64, the prompt
        included. Raises InputError if an argument is bad, or the logits aren't finite.

        Samples from the top_k most likely tokens with torch's global generator; top_k=0 samples
        from all, temperature=0 takes the most likely one. After its eos token, a row is filled up
        with pad_token_id; generation stops once every row has ended. Prompts can't be padded: the
        model would read the padding as text.
        """
        T, V = idx.shape[-1], len(self.transformer.wte.weight)
        require(T < max_length <= self.config.block_size, f"max_length, {max_length}, must be more "
                f"than the prompt's {T} tokens, and at most {self.config.block_size} (block_size)")
        require(temperature == 0 or 1e-30 < temperature < math.inf,  # below, the logits overflow
                f"temperature must be 0, or positive and finite, not {temperature}")
        require(top_k >= 0, f"top_k must be at least 0, not {top_k}")
        # On a GPU, an out-of-range id trips a CUDA assert, which can't be recovered from.
        bad = idx[(idx < 0) | (idx >= V)].tolist()
        require(not bad, f"the prompt (idx) has the ids {bad[:5]}; the model's are 0 to {V - 1}")
        eos_ids, pad = self.config.eos_token_ids, self.config.pad_token_id
        fill = pad if pad is not None else (eos_ids or [0])[0]  # without eos_ids, no row ever ends
        eos = torch.tensor(eos_ids, dtype=idx.dtype, device=idx.device)
        ended = torch.zeros(len(idx), 1, dtype=torch.bool, device=idx.device)
        finite = True
        caches = [KVCache(max_length) for _ in self.transformer.h]
        new = idx  # the tokens that aren't in the caches yet
        for _ in trange(T, max_length, unit="token", delay=1, disable=None, leave=False):
            logits = self(new, caches=caches)[:, -1].float()  # (B, 1, V) → (B, V)
            finite = finite & logits.amax(dim=-1).isfinite().all()  # amax of NaN is NaN
            new = sample(logits, temperature, top_k)  # (B, 1)
            # An ended row still feeds the model what it samples, since the model may lack `fill`.
            idx = torch.cat((idx, new.masked_fill(ended, fill)), dim=1)
            ended = ended | (new == eos).any(dim=1, keepdim=True)  # (B, 1)
            if ended.all():
                break
        require(finite, "the logits are NaN or infinite: the weights are bad, or float16 "
                        "overflowed (use float32 or bfloat16)")
        return idx

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """The model in the folder `name`, or of that name on the Hugging Face Hub (`gpt2`), in eval
        mode and in the dtype that transformers would pick. Its file is memory-mapped if possible;
        training doesn't change it. `overrides` replace fields of the config, such as dropout=0.1
        once you have added that field. Raises InputError if the checkpoint is damaged or isn't a
        GPT-2, OSError if it can't be downloaded or opened."""
        config, weights = read_checkpoint(name)
        config = replace(config, **overrides)
        # A file may hold either of a tied pair, or both. If both are there and differ, untie them.
        wte, head = "transformer.wte.weight", "lm_head.weight"
        if config.tie_word_embeddings and (wte in weights or head in weights):
            embedding = weights.setdefault(wte, weights.get(head))
            output = weights.setdefault(head, embedding)
            config.tie_word_embeddings = output is embedding or torch.equal(output, embedding)
        # A damaged config.json could ask for more memory than any machine has. 10 is a loose bound.
        size = config.n_embd * max(config.vocab_size, config.block_size,
                                   config.n_layer * max(config.n_embd, config.n_inner or 0))
        require(size <= 10 * sum(tensor.numel() for tensor in weights.values()),
                f"config.json in {name} asks for a far larger model than the weights there")
        model = cls(config, init=False)
        try:
            missing, unused = model.load_state_dict(weights, strict=False, assign=True)
        except RuntimeError as error:
            raise InputError(f"{name}: weights don't fit config.json: {error!s:.400}") from None
        # Buffers that you added may be missing.
        missing = [key for key, _ in model.named_parameters() if key in missing]
        require(not missing, f"the weights in {name} lack parameters of the model, {missing[:5]}, "
                             f"and have {unused[:5]} instead")
        if unused:
            print(f"{name}: ignoring {unused[:5]}", file=sys.stderr)
        if config.tie_word_embeddings:  # again: assign=True gave each name its own parameter
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder for from_pretrained, --model, transformers and the Hub: the model as it is
        now and, if given, a tokenizers.Tokenizer or a fast tokenizer of transformers. A crash
        leaves no file half-written. Raises OSError or SafetensorError; and InputError for another
        kind of tokenizer, after the model is saved."""
        wte = self.transformer.wte.weight
        tied = self.lm_head.weight is wte
        weights = {}
        for name, tensor in self.state_dict().items():
            name = name.replace("_orig_mod.", "")  # torch.compile(block) adds this
            if not (tied and name == "lm_head.weight"):
                # A copy, because safetensors takes no tensors that share memory.
                weights[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        # The sizes are those of the modules, since you may have changed or removed some.
        positions = weights.get("transformer.wpe.weight", range(self.config.block_size))
        config = asdict(self.config) | {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
            "n_layer": len(self.transformer.h), "vocab_size": len(wte), "tie_word_embeddings": tied,
            "n_positions": len(positions), "dtype": str(wte.dtype).removeprefix("torch.")}
        del config["block_size"]  # transformers' name for it is n_positions
        files = {"config.json": config,
                 "generation_config.json": {key: config[key] for key in SPECIAL_IDS}}
        tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if isinstance(tokenizer, Tokenizer):
            ids = config | {"eos_token_id": (self.config.eos_token_ids or [None])[0]}
            tokens = tokenizer.get_added_tokens_decoder()
            names = {key.removesuffix("_id"): tokens[ids[key]].content  # "bos_token": "<s>"
                     for key in SPECIAL_IDS if ids[key] in tokens and tokens[ids[key]].special}
            files["tokenizer.json"] = json.loads(tokenizer.to_str())
            files["tokenizer_config.json"] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Write everything beside its place, then move it: a move within a disk is a single step.
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            for name, content in files.items():
                text = json.dumps(content, indent=2, default=str)  # str: of a field that you added
                Path(temporary, name).write_text(text, encoding="utf-8")
            path = Path(temporary, "model.safetensors")
            safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)
        if "tokenizer.json" in files:
            for name in OLDER_FILES:  # they would change the new tokenizer
                (folder / name).unlink(missing_ok=True)
        require(tokenizer is None or "tokenizer.json" in files, f"{folder} is saved, but without a "
                f"tokenizer: a {type(tokenizer).__name__} isn't of the tokenizers library")


# --------------------------------------------- Sampling -------------------------------------------

def sample(logits, temperature, top_k):
    """The next token of each row, as in transformers: logits (B, V) float32 → (B, 1) int64. Tokens
    outside the top k get probability 0. The lecture drops them, so the same seed gives other tokens
    there."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # the k-th largest: (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = torch.softmax(logits, dim=-1)  # (B, V)
    probs = probs.nan_to_num(nan=1.0)  # on a GPU, NaN in multinomial would trip a CUDA assert
    return torch.multinomial(probs, num_samples=1)


# ------------------------------------------- Checkpoints ------------------------------------------

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
SPECIAL_IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]
OLDER_FILES = ["special_tokens_map.json", "added_tokens.json"]  # of transformers 4's tokenizers


def check_config(config):
    """Raise InputError if a value is impossible. Fields that you add are not checked."""
    for name in ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner"]:
        size = getattr(config, name)
        require((type(size) is int and size > 0) or (name == "n_inner" and size is None),
                f"{name} can't be {size!r}")
    require(config.n_embd % config.n_head == 0,
            f"n_embd, {config.n_embd}, must be a multiple of n_head, {config.n_head}")
    require(str(config.activation_function) in ACTIVATIONS, "activation_function can't be "
            f"{config.activation_function!r}, only one of {', '.join(ACTIVATIONS)}")
    epsilon = config.layer_norm_epsilon
    require(isinstance(epsilon, (int, float)), f"layer_norm_epsilon can't be {epsilon!r}")
    optional = [i for i in (config.bos_token_id, config.pad_token_id) if i is not None]
    for token in config.eos_token_ids + optional:
        require(type(token) is int and 0 <= token < 2**63,
                f"bos_token_id, eos_token_id or pad_token_id can't be {token!r}")


def find_folder(name, files):
    """The Path of the folder `name`, or else of the Hub's model of that name, with these files."""
    path = Path(name)
    if path.is_dir():
        return path
    require(not path.is_file(), f"{name} is a file, not a folder or the name of a Hub model: the "
                                "README shows how to convert a checkpoint of the lecture")
    from huggingface_hub import snapshot_download  # FAST: rarely needed
    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - huggingface_hub's libraries raise many kinds
        if hasattr(error, "snapshot_path"):  # offline: use the files that are in the cache
            return Path(error.snapshot_path)
        raise OSError(f"{name} was not found locally, and could not be downloaded from the Hugging "
                      "Face Hub: check the name and the network, or name a folder that holds "
                      f"config.json and weights ({error})") from None


@contextmanager
def reading(path):
    """Name the file or folder when a library fails to read it. Put only library calls inside, so
    that our own bugs keep their traceback."""
    try:
        yield
    except Exception as error:
        of_the_hub = isinstance(error, OSError) and not Path(path).exists()
        if getattr(error, "filename", None) or of_the_hub or out_of_memory(error):
            raise  # it isn't damage, or the error already names its file
        why = str(error).strip().split("\n")[0].split(". ")[0]  # the rest may be bad advice
        raise InputError(f"{path} can't be read ({why}). It may be damaged or incomplete. After a "
                         "`git clone` without git-lfs, run `git lfs pull` there") from None


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        words in str(error) for words in ("DefaultCPUAllocator", "Cannot allocate memory"))


def ask_transformers(class_name, name, **options):
    """Load a folder or a Hub model with a class of transformers."""
    import transformers  # FAST: rarely needed
    transformers.utils.logging.set_verbosity_error()
    if Path(name).is_dir():  # else something may be downloaded, which should show its progress
        transformers.utils.logging.disable_progress_bar()
    reader = getattr(transformers, class_name)
    with reading(name):
        return reader.from_pretrained(str(name), **options)


def read_json(path):
    """The dict in a JSON file. It is empty if the file doesn't exist."""
    if not path.exists():
        return {}
    with reading(path):
        return dict(**json.loads(path.read_bytes()))  # ** raises if it isn't a dict


def read_checkpoint(name):
    """The GPTConfig of a folder or Hub model, and {name in GPT's state_dict: tensor}."""
    folder = find_folder(name, ["config.json", "generation_config.json", "model.safetensors"])
    require((folder / "config.json").exists(), f"the folder {folder} isn't a model: it has no "
            f"config.json. Its files: {sorted(os.listdir(folder))[:5]}")
    raw = read_json(folder / "config.json")
    supported = {"model_type": "gpt2", "add_cross_attention": False, "quantization_config": None}
    for key, value in supported.items():
        require(raw.get(key, value) == value, f"config.json in {folder}: {key} must be {value!r}, "
                                              f"not {raw.get(key)!r}")
    path = folder / "model.safetensors"
    # transformers prefers these names to n_positions and so on, or model.safetensors.
    other_names = {"max_position_embeddings", "hidden_size", "num_hidden_layers",
                   "num_attention_heads", "transformers_weights"}
    if path.exists() and not other_names & raw.keys():
        with reading(path):
            tensors = safetensors.torch.load_file(path)
        tensors = dict(sorted(tensors.items()))  # by name: the first may set the dtype
    else:
        model, info = ask_transformers("GPT2LMHeadModel", name, dtype="auto",
                                       output_loading_info=True, ignore_mismatched_sizes=True)
        raw, tensors = model.config.to_dict(), model.state_dict()
        # transformers fills what is missing or doesn't fit with random numbers.
        unfit, missing, extra = (sorted(info[f"{kind}_keys"])[:5]
                                 for kind in ("mismatched", "missing", "unexpected"))
        require(not unfit, f"the weights in {name} don't fit config.json: {unfit}")
        require(not missing, f"the weights in {name} lack {missing}, and have {extra} instead")
    # As in transformers, the dtype is config.json's, or else that of the first float tensor.
    first = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or first).removeprefix("torch.")
    require(dtype in DTYPES, f"{name} is in {dtype}, but only {', '.join(DTYPES)} are supported")
    weights = {}
    for key, tensor in tensors.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")) and tensor.ndim != 1:
            continue  # an older file's causal mask; a bias that you added has one dimension
        if key.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # the Hub's gpt2 lacks the prefix
            key = f"transformer.{key}"
        if tensor.is_floating_point():
            require(tensor.dtype in DTYPES.values(), f"can't load {key} in {name}: {tensor.dtype}")
            tensor = tensor.to(DTYPES[dtype])
        # Windows can't replace a mapped file, and saving may need to, so copy on Windows.
        weights[key] = tensor.clone() if sys.platform == "win32" else tensor
    # Missing fields take gpt2's values. Special ids come from generation_config.json if it exists.
    raw["block_size"] = raw.get("n_positions", GPTConfig.block_size)
    if (folder / "generation_config.json").exists():
        ids = read_json(folder / "generation_config.json")
        raw |= {key: ids.get(key) for key in SPECIAL_IDS}
    known = {field.name: raw[field.name] for field in fields(GPTConfig) if field.name in raw}
    try:
        return GPTConfig(**known), weights
    except InputError as error:
        raise InputError(f"config.json or generation_config.json in {folder}: {error}") from None


def load_tokenizer(name):
    """The tokenizers.Tokenizer of a folder or Hub model: tokenizer.encode(text).ids and
    tokenizer.decode(ids). A plain tokenizer.json is read here, and any other kind by transformers.
    Raises InputError if it is damaged or missing, OSError if it can't be downloaded or opened."""
    folder = find_folder(name, ["config.json", "tokenizer.json", "tokenizer_config.json",
                                *OLDER_FILES])
    path = folder / "tokenizer.json"
    with reading(path):
        tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
    if tokenizer is None or not is_plain(tokenizer, folder):
        theirs = ask_transformers("AutoTokenizer", name, trust_remote_code=False)
        tokenizer = getattr(theirs, "backend_tokenizer", None)
        require(tokenizer and (type(tokenizer.model).__name__ == "BPE" or
                               not theirs.clean_up_tokenization_spaces),
                f"the tokenizer in {name} isn't supported: a {type(theirs).__name__} that isn't of "
                "the tokenizers library, or needs clean_up_tokenization_spaces")
        require(tokenizer.get_vocab_size(with_added_tokens=False), f"{name} has no tokenizer: save "
                "one with model.save_pretrained(folder, tokenizer)")
    tokenizer.no_padding()  # it may have been saved with these on
    tokenizer.no_truncation()
    return tokenizer


def is_plain(tokenizer, folder):
    """FAST: whether transformers would surely take this tokenizer.json as it is, so that it needn't
    be imported. A wrong False costs time; a wrong True would change the tokens."""
    settings, model = read_json(folder / "tokenizer_config.json"), tokenizer.model
    if type(model).__name__ != "BPE" or any((folder / name).exists() for name in OLDER_FILES):
        return False
    kind = (settings.get("tokenizer_class")
            or read_json(folder / "config.json").get("tokenizer_class") or "GPT2Tokenizer")
    if kind in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        # transformers takes only the vocabulary and merges of these. All else becomes gpt2's.
        options = ["dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                   "fuse_unk", "byte_fallback", "ignore_merges"]
        rules = (tokenizer.normalizer, str(tokenizer.pre_tokenizer),
                 type(tokenizer.decoder).__name__)
        gpt2s = (None, "ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)",
                 "ByteLevel")
        if rules != gpt2s or any(getattr(model, option) for option in options):
            return False
        names = ["bos_token", "eos_token", "unk_token"]
        settings = dict.fromkeys(names, "<|endoftext|>") | settings
    elif kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return False
    # These settings change a tokenizer, unless they name a token that is special in it already.
    added = tokenizer.get_added_tokens_decoder().values()
    special = [token.content for token in added if token.special]
    endings = ("_token", "_special_tokens", "added_tokens_decoder", "_files", "add_prefix_space")
    return all(not value or value in special
               for key, value in settings.items() if key.endswith(endings))


# ------------------------------------------- Command line -----------------------------------------

def main(argv=None):
    """Run the command. After bad input, it exits with status 2, and stderr's last line says why."""
    gc.freeze()  # FAST: so that Python doesn't scan everything imported for garbage at exit
    parser = argparse.ArgumentParser(
        "train_gpt2.py", description="Complete a prompt with GPT-2.", usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="gpt2", help="name of a Hub model, or folder of a checkpoint")
    flag("--prompt", default="Hello, I'm a language model,", help="text to complete; may be empty")
    flag("--num-return-sequences", type=int, default=5, help="how many completions")
    flag("--max-length", type=int, default=30, help="tokens in each, including the prompt's")
    flag("--temperature", type=float, default=1.0, help="higher is wilder; 0: the most likely")
    flag("--top-k", type=int, default=50, help="sample from the K most likely tokens; 0: from all")
    flag("--seed", type=int, default=42, help="same seed, flags and device: same text")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto: cuda, else cpu")
    flag("--dtype", default="auto", choices=["auto", *DTYPES], help="auto keeps the checkpoint's")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's lacks it; a closed one is None
        # A console shows ? for characters it lacks. Files and pipes get UTF-8, even on Windows.
        sys.stdout.reconfigure(encoding=None if sys.stdout.isatty() else "utf-8", errors="replace")
    try:
        complete(**vars(args))  # --max-length is its max_length, and so on
    except Exception as error:
        if not isinstance(error, (InputError, OSError)) and not out_of_memory(error):
            raise
        parser.error(" ".join(str(error).split()))


def complete(model, prompt, num_return_sequences, seed, device, dtype, **options):
    """Print num_return_sequences completions, each after `> `. The options are generate()'s."""
    require(num_return_sequences > 0, f"num_return_sequences can't be {num_return_sequences}")
    require(-2**63 <= seed < 2**64, f"seed must be a 64-bit number, not {seed}")
    if device == "auto":  # never MPS: see the README
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise InputError(f"device {device} can't be used ({error!s:.200}): see the README, or use "
                         f"--device cpu (torch.version.cuda is {torch.version.cuda})") from None
    gpt, tokenizer = GPT.from_pretrained(model), load_tokenizer(model)
    prompt = prompt.encode(errors="replace").decode()  # argv may hold bytes that aren't UTF-8
    ids, bos = tokenizer.encode(prompt).ids, gpt.config.bos_token_id
    require(ids or bos is not None, "the prompt is empty, and the model has no bos_token_id to use")
    print(f"using device: {device}", file=sys.stderr)
    gpt.to(device, DTYPES.get(dtype))  # None, for "auto", changes nothing
    idx = torch.tensor([ids or [bos]], device=device)  # (1, T)
    torch.manual_seed(seed)
    rows = gpt.generate(idx.repeat(num_return_sequences, 1), **options)
    for row in rows.tolist():
        # The prompt as given, then the new tokens (and bos, if the prompt is empty). decode()
        # skips special tokens, as transformers' pipeline does.
        print(">", prompt + tokenizer.decode(row[len(ids):]), flush=True)


if __name__ == "__main__":
    main()

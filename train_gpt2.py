"""GPT-2 in one file: the model, sampling, and Hugging Face checkpoints.

The model is that of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". In
comments, "the lecture" is Karpathy's "Let's reproduce GPT-2 (124M)". The README has a program that
trains the model. Shapes in comments:
    B, T    batch and time: B rows of T tokens each
    S       the number of tokens that can be attended to: these T and the cached ones before them
    C       channels: the width of the model (n_embd)
    nh, hs  the number of attention heads (n_head), and the width of one head, C / nh
    V       the number of tokens in the vocabulary (vocab_size)

Logits, gradients and sampled tokens are bit-identical to those of transformers' GPT2LMHeadModel in
eval mode. Two tags mark code that you can skip on a first reading:
    BITS  is there to round exactly as transformers does. A sum of floats rounds differently if the
          order of its terms changes, or even if its tensors are laid out differently in memory.
    FAST  only saves time or memory.
"""
import argparse
import gc
import json
import math
import shutil
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F


class InputError(ValueError):
    """A bad argument or checkpoint: the command reports it in one line, without a traceback."""


def require(condition, message):
    if not condition:
        raise InputError(message)


# ---------------------------------------------- Model ---------------------------------------------

@dataclass
class GPTConfig:
    """The sizes and settings of a GPT-2; the defaults are those of `gpt2` (124M parameters). Fields
    that you add are saved and loaded too."""
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
    scale_attn_by_inverse_layer_idx: bool = False  # and by its layer's number, from 1
    tie_word_embeddings: bool = True  # lm_head and the token embedding share a weight
    bos_token_id: int | None = 50256  # what the command starts from if the prompt is empty
    eos_token_id: int | list | None = 50256  # ends a text: an id, a list of ids, or None
    pad_token_id: int | None = None  # pads rows that have ended; None: the first eos id

    @property
    def eos_token_ids(self):
        """The ids that end a text, as a list. It is empty if texts never end."""
        ids = self.eos_token_id
        return ids if isinstance(ids, list) else [] if ids is None else [ids]


class Conv1D(nn.Module):
    """A linear layer, x @ weight + bias: (..., n_in) → (..., n_out). GPT-2 checkpoints store the
    weight as (n_in, n_out). nn.Linear's is (n_out, n_in), so the lecture transposes on loading."""

    def __init__(self, n_in, n_out, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.weight, std=std)

    def forward(self, x):
        return F.linear(x, self.weight.T, self.bias)


class KVCache:
    """The keys and values that an attention layer has computed so far in a call to generate(). They
    don't change, since a token attends only to itself and to those before it. With them cached, the
    model runs on each new token alone, and not on the whole text again."""

    def __init__(self):
        self.length, self.k, self.v = 0, None, None  # length: the number of tokens

    def append(self, k, v):
        """Add the keys and values of T tokens, (B, nh, T, hs); return those of all S tokens."""
        T = k.shape[2]
        if self.length > 0 and T > 1:
            raise ValueError("after the prompt, the cache takes one token at a time")
        self.k = torch.cat((self.k, k) if self.length > 0 else (k,), dim=2)
        self.v = torch.cat((self.v, v) if self.length > 0 else (v,), dim=2)
        self.length += T
        return self.k, self.v  # (B, nh, S, hs)


class CausalSelfAttention(nn.Module):
    """Each token attends to itself and to the tokens before it: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, layer=1):  # layers count from 1
        super().__init__()
        C, self.n_head = config.n_embd, config.n_head
        assert C % self.n_head == 0, f"n_embd {C} must be a multiple of n_head {self.n_head}"
        self.c_attn = Conv1D(C, 3 * C)  # q, k and v of all heads
        self.c_proj = Conv1D(C, C, std=0.02 / math.sqrt(2 * config.n_layer))
        # BITS: 1 / sqrt(hs) can differ from this in the last bit
        self.scale = (C // self.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer

    def forward(self, x, cache=None):
        B, T, C = x.shape
        nh, hs = self.n_head, C // self.n_head
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q = q.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, nh, hs).transpose(1, 2)  # (B, nh, T, hs)
        # BITS: without a cache too, append() copies k and v, as transformers does
        k, v = (cache or KVCache()).append(k, v)  # (B, nh, S, hs)
        # softmax(q @ k.transpose(2, 3) * scale + mask) @ v, where the mask is 0 for tokens that may
        # be attended to, and -inf for later ones. A single new token attends to all S: no mask.
        is_causal = cache is None or T > 1
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=self.scale)
        y = y.transpose(1, 2).contiguous().view(B, T, C)  # the heads side by side again
        return self.c_proj(y)


SQRT_2_PI = math.sqrt(2.0 / math.pi)


def gelu_new(x):
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), from Hendrycks & Gimpel 2016, for any shape.
    BITS: nn.GELU(approximate="tanh") is the same formula but rounds differently."""
    return 0.5 * x * (1.0 + torch.tanh(SQRT_2_PI * (x + 0.044715 * torch.pow(x, 3.0))))


class LeanGELU(torch.autograd.Function):
    """FAST: gelu_new, keeping only x for the backward pass. Autograd would keep three more tensors
    of that size, and training would take 50% more memory."""
    forward = staticmethod(gelu_new)
    generate_vmap_rule = True  # for torch.func.vmap

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # BITS: what autograd would compute, in its order
        x, = ctx.saved_tensors
        x32 = x.to(grad.dtype)  # float32 if CUDA's autocast was on, as in torch.pow
        tanh = torch.tanh(SQRT_2_PI * (x + 0.044715 * torch.pow(x32, 3.0)))
        inner = SQRT_2_PI * torch.ops.aten.tanh_backward(grad * (0.5 * x), tanh)
        cubic = 0.044715 * inner * (3.0 * torch.pow(x32, 2.0))
        outer = grad * (1.0 + tanh)
        return inner.to(x.dtype) + cubic.to(x.dtype) + 0.5 * outer.to(x.dtype)


def lean_gelu(x):  # jit can't export a LeanGELU; torch.compile saves the memory by itself
    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return gelu_new(x) if traced else LeanGELU.apply(x)


ACTIVATIONS = {
    "gelu_new": lean_gelu, "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}


class MLP(nn.Module):
    """A wider layer, applied to each token on its own: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        n_inner, act = config.n_inner or 4 * config.n_embd, config.activation_function
        require(act in ACTIVATIONS, f"activation_function {act!r} isn't one of {[*ACTIVATIONS]}")
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.act = ACTIVATIONS[act]
        self.c_proj = Conv1D(n_inner, config.n_embd, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, x):
        x = self.act(self.c_fc(x))  # (B, T, n_inner)
        return self.c_proj(x)


class Block(nn.Module):
    """Attention, then the MLP. Each reads a normalized x and adds to x: (B, T, C) → (B, T, C)."""

    def __init__(self, config: GPTConfig, layer=1):
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

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(V, C),  # token embeddings
            "wpe": nn.Embedding(config.block_size, C),  # position embeddings
            "h": nn.ModuleList(Block(config, layer) for layer in range(1, config.n_layer + 1)),
            "ln_f": nn.LayerNorm(C, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(C, V, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        for module in (self.transformer.wte, self.transformer.wpe, self.lm_head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, idx, *, caches=None):
        """Token ids, idx (B, T) int64 → logits (B, T, V). Raises InputError if T > block_size.
        generate() passes one KVCache per block, first with the prompt, then with each new token,
        and gets the logits of the last token alone, (B, 1, V)."""
        T = idx.shape[-1]
        if idx.ndim != 2 or not 0 < T <= self.config.block_size:
            raise InputError(f"idx is {tuple(idx.shape)}, but must be (B, T) with T from 1 to the "
                             f"block_size, {self.config.block_size}")
        start = caches[0].length if caches else 0  # the position of the first token of idx
        positions = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        for block, cache in zip(self.transformer.h, caches or [None] * len(self.transformer.h)):
            x = block(x, cache)  # (B, T, C)
        x = self.transformer.ln_f(x)
        if caches:
            x = x[:, -1:]  # generate() needs only these logits, and lm_head is the largest layer
        return self.lm_head(x)

    @torch.no_grad()
    def generate(self, idx, max_length, temperature=1.0, top_k=50):
        """Continue each row of idx (B, T) int64. Returns (B, at most max_length) int64, the prompt
        included. Samples from the top_k most likely tokens (0: from all) with torch's global
        generator; temperature=0 takes the most likely one. After its eos token, a row is padded
        with pad_token_id; generation stops once every row has ended. Prompts can't be padded: the
        model would read the padding as text. Raises InputError if an argument is bad, or the logits
        aren't finite."""
        B, T, V = len(idx), idx.shape[-1], len(self.transformer.wte.weight)
        require(T < max_length <= self.config.block_size,
                f"max_length, {max_length}, must be more than the prompt's {T} tokens, and neither "
                f"can be more than the model's context, {self.config.block_size}")
        require((temperature == 0 or 1e-30 < temperature < math.inf) and top_k >= 0,
                f"temperature {temperature} or top_k {top_k} is negative, too small or not finite")
        # On a GPU, an out-of-range id trips a CUDA assert, which can't be recovered from.
        bad = idx[(idx < 0) | (idx >= V)].tolist()
        require(not bad, f"the prompt (idx) has the ids {bad[:5]}; the model's are 0 to {V - 1}")
        eos_ids, pad = self.config.eos_token_ids, self.config.pad_token_id
        if pad is None:
            pad = eos_ids[0] if eos_ids else 0  # without eos_ids, no row ever ends
        eos, ended = idx.new_tensor(eos_ids), idx.new_zeros(B, 1, dtype=torch.bool)
        caches = [KVCache() for _ in self.transformer.h]
        finite, new = True, idx  # new: the tokens that aren't in the caches yet
        for _ in range(T, max_length):
            # A model without blocks has no caches, and reads the whole text.
            logits = self(new if caches else idx, caches=caches)[:, -1].float()  # (B, V)
            finite &= logits.amax(dim=-1).isfinite().all()  # amax of NaN is NaN
            new = sample(logits, temperature, top_k)  # (B, 1)
            # An ended row still feeds the model what it samples, since the model may lack pad.
            idx = torch.cat((idx, new.masked_fill(ended, pad)), dim=1)
            ended = ended | torch.isin(new, eos)  # (B, 1)
            if ended.all():
                break
        require(finite, "the logits are NaN or infinite: bad weights, an edit of the model, or a "
                        "float16 overflow (use float32 or bfloat16)")
        return idx

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """The model in the folder `name`, or of that name on the Hugging Face Hub (`gpt2`), in eval
        mode and in the dtype that transformers would pick. Its file is memory-mapped if possible;
        training doesn't change the file. `overrides` replace fields of the config. Raises
        InputError if the checkpoint is damaged or isn't a GPT-2, OSError if it can't be downloaded,
        RuntimeError if the shapes of the weights don't fit."""
        config, weights, dtype = read_checkpoint(name)
        config = replace(config, **overrides)
        require(config.n_layer <= len(weights), f"{name} has fewer than {config.n_layer} layers")
        with NoInit():
            model = cls(config)
        parameters = dict(model.named_parameters()).keys()
        missing = sorted(parameters - weights.keys())[:5]
        unused = sorted(weights.keys() - model.state_dict().keys())[:5]
        require(not missing, f"the weights in {name} lack {missing}, and have {unused} instead")
        if unused:
            print(f"{name}: ignoring {unused}", file=sys.stderr)
        weights |= {key: weights[key].to(dtype) for key in parameters}
        model.load_state_dict(weights, strict=False, assign=True)
        if config.tie_word_embeddings:  # again: assign=True gave each name its own parameter
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write a folder that --model, transformers and the Hub can read: the model as it is now
        and, if given, a tokenizers.Tokenizer or a tokenizer of transformers. A crash leaves no file
        half-written. Raises OSError or SafetensorError."""
        from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerFast
        wte = self.transformer.wte.weight
        # Copies, because safetensors refuses tensors that share memory. torch.compile(block) adds
        # _orig_mod to the names.
        weights = {name.replace("_orig_mod.", ""): tensor.to("cpu", copy=True).contiguous()
                   for name, tensor in self.state_dict().items()}
        if tied := self.lm_head.weight is wte:
            del weights[HEAD]
        # The sizes are those of the modules, since you may have changed some, or removed wpe.
        positions = len(weights.get("transformer.wpe.weight", range(self.config.block_size)))
        config = vars(self.config) | {
            "n_layer": len(self.transformer.h), "vocab_size": len(wte), "tie_word_embeddings": tied,
            "n_positions": positions, "n_ctx": positions,  # n_ctx is for llama.cpp
            "architectures": ["GPT2LMHeadModel"], "dtype": str(wte.dtype).removeprefix("torch.")}
        del config["block_size"]  # transformers' name for it is n_positions
        # Numbers of NumPy and torch become Python's; what JSON can't hold becomes text.
        config = json.loads(json.dumps(
            config, default=lambda value: value.item() if hasattr(value, "item") else str(value)))
        ids = {key: config[key] for key in SPECIAL_IDS}
        fast = tokenizer
        if isinstance(tokenizer, Tokenizer):
            tokens = tokenizer.get_added_tokens_decoder()
            first = {key: i[0] if isinstance(i, list) and i else i for key, i in ids.items()}
            names = {key.removesuffix("_id"): tokens[i].content for key, i in first.items()
                     if isinstance(i, int) and i in tokens and tokens[i].special}
            # transformers 5 would save a new name for it, which transformers 4 doesn't know.
            kind = type("PreTrainedTokenizerFast", (PreTrainedTokenizerFast,), {})
            fast = kind(tokenizer_object=tokenizer, model_max_length=positions,
                        unk_token=names.get("eos_token"), **names)  # unk_token: for CTranslate2
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Write to a temporary folder, then move: on one disk, a move is a single step.
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            GenerationConfig(**ids).save_pretrained(temporary)
            GPT2Config().save_pretrained(temporary)
            path = Path(temporary, "config.json")
            path.write_text(json.dumps(json.loads(path.read_text()) | config, indent=2))
            file = Path(temporary, "model.safetensors")
            safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
            shutil.copymode(path, file)  # else only you could read it
            if fast is not None:
                fast.save_pretrained(temporary)
            if isinstance(tokenizer, Tokenizer):  # transformers 4 may have changed it
                tokenizer.save(str(path.with_name("tokenizer.json")))
            new = {path.name for path in Path(temporary).iterdir()}
            for name in sorted(new, key="model.safetensors".__ne__):  # first, as Windows may refuse
                path.with_name(name).replace(folder / name)
            if fast is not None:  # what is left of an old tokenizer could change the new one
                for name in set(TOKENIZER_FILES) - new:
                    (folder / name).unlink(missing_ok=True)


# --------------------------------------------- Sampling -------------------------------------------

def sample(logits, temperature, top_k):
    """The next token of each row: logits (B, V) float32 → (B, 1) int64. As in transformers, tokens
    outside the top k get probability 0; the lecture drops them, so the same seed samples others."""
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
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"  # the tied pair
SPECIAL_IDS = ["bos_token_id", "eos_token_id", "pad_token_id"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json"]
# How a GPT2Tokenizer prints, up to its vocabulary and merges.
GPT2_RULES = (
    "None, ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True), ByteLevel, "
    "BPE(dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None, "
    "fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=")
# Settings of a tokenizer that don't change the tokens of a text.
HARMLESS = ["tokenizer_class", "model_max_length", "backend", "is_local", "name_or_path", "errors",
            "clean_up_tokenization_spaces", "padding_side", "chat_template"]


class NoInit(torch.overrides.TorchFunctionMode):
    """FAST: in this context, parameters get no random values, since a file's replace them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensor = (kwargs or {}).get("tensor")  # torch.nn.init passes it by name
        if func in (nn.init.normal_, nn.init.kaiming_uniform_) and type(tensor) is nn.Parameter:
            return tensor
        return func(*args, **kwargs or {})


@contextmanager
def blaming(what):
    """Turn a library's error into an InputError. Only for library calls: bugs keep a traceback."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {error}") from error


def find_folder(name, files):
    """The folder `name`, or else a download of these files of the Hub's model of that name."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download  # FAST: rarely needed
    try:
        return Path(snapshot_download(str(name), allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - huggingface_hub's libraries raise many kinds
        if hasattr(error, "snapshot_path"):  # offline: use the files that are in the cache
            return Path(error.snapshot_path)
        small = Path(__file__).parent / "tests" / "shakespeare"
        hint = f" --model {small} needs no network." if small.exists() else ""
        raise OSError(f"{name} isn't a folder here, and could not be downloaded from the Hugging "
                      "Face Hub. Check the name and the network. If you have downloaded it before, "
                      f"set HF_HUB_OFFLINE=1.{hint} ({error})") from None


def ask_transformers(class_name, name, **options):
    """Load a folder or a Hub model with one of transformers' classes."""
    import transformers  # FAST: rarely needed
    transformers.utils.logging.set_verbosity_error()
    if Path(name).is_dir():  # else something may be downloaded, which should show its progress
        transformers.utils.logging.disable_progress_bar()
    with blaming(f"{name} can't be read"):
        return getattr(transformers, class_name).from_pretrained(str(name), **options)


def read_json(path):
    """The dict in a JSON file. It is empty if the file doesn't exist."""
    with blaming(f"{path} can't be read"):
        return json.loads(path.read_bytes()) if path.exists() else {}


def read_checkpoint(name):
    """The GPTConfig of a folder or Hub model, {name in GPT's state_dict: tensor}, and the dtype."""
    folder = find_folder(name, ["config.json", "generation_config.json", "adapter_config.json",
                                "model.safetensors"])
    require(not (folder / "adapter_config.json").exists(),
            f"{name} has a LoRA adapter: merge it with peft, or delete adapter_config.json if the "
            "weights there are merged already")
    raw = read_json(folder / "config.json")
    kind, quantized = raw.get("model_type", "gpt2"), raw.get("quantization_config")
    require(kind == "gpt2" and not quantized, f"{name} isn't a plain GPT-2: its config.json has "
            f"model_type {kind!r} and quantization_config {quantized}")
    path = folder / "model.safetensors"
    # transformers prefers these to n_positions and so on, or to model.safetensors.
    other_names = {"max_position_embeddings", "hidden_size", "num_hidden_layers",
                   "num_attention_heads", "transformers_weights"}
    if raw and path.exists() and not other_names & raw.keys():
        with blaming(f"{path} can't be read"):
            tensors = safetensors.torch.load_file(path)
    else:
        model, info = ask_transformers("GPT2LMHeadModel", name, dtype="auto",
                                       output_loading_info=True, ignore_mismatched_sizes=True)
        raw, tensors = model.config.to_dict(), model.state_dict()
        # transformers makes up random numbers for these.
        bad = [*info["missing_keys"], *info["mismatched_keys"]]
        require(not bad, f"the weights in {name} lack or don't fit {bad[:5]}, and have "
                         f"{[*info['unexpected_keys']][:5]} instead")
    # As in transformers, the dtype is config.json's, or else that of the first float tensor.
    first = next((t.dtype for _, t in sorted(tensors.items()) if t.is_floating_point()), None)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or first
    dtype = getattr(torch, str(dtype), dtype)  # "half" is torch.float16 too
    require(dtype in DTYPES.values(), f"{name} is in {dtype}, and not in {', '.join(DTYPES)}")
    weights = {}
    for key, tensor in tensors.items():
        if key.endswith((".attn.bias", ".attn.masked_bias")) and tensor.ndim != 1:
            continue  # an older file's causal mask; a bias that you added has one dimension
        if key.startswith(("wte.", "wpe.", "h.", "ln_f.")):  # the Hub's gpt2 lacks the prefix
            key = f"transformer.{key}"
        # Windows can't replace a mapped file, and saving may have to: copy there.
        weights[key] = tensor.clone() if sys.platform == "win32" else tensor
    # Missing fields take gpt2's values. Special ids come from generation_config.json if it exists.
    raw["block_size"] = raw.get("n_positions", GPTConfig.block_size)
    if ids := read_json(folder / "generation_config.json"):
        raw |= {key: ids.get(key) for key in SPECIAL_IDS}
    raw |= {key: None for key in SPECIAL_IDS if raw.get(key) == -1}  # some write -1 for "none"
    config = GPTConfig(**{key: raw[key] for key in raw.keys() & GPTConfig.__annotations__})
    # A file may hold either of a tied pair, or both. If both are there and differ, untie them.
    pair = [weights[key] for key in (WTE, HEAD) if key in weights]
    if config.tie_word_embeddings and pair:
        weights[WTE] = pair[0]
        config.tie_word_embeddings = len(pair) == 1 or torch.equal(*pair)
    return config, weights, dtype


def load_tokenizer(name):
    """The tokenizers.Tokenizer of a folder or Hub model: tokenizer.encode(text).ids and
    tokenizer.decode(ids). A plain tokenizer.json is read here, and any other kind by transformers.
    Raises InputError if a file is damaged or missing, OSError if a download fails."""
    folder = find_folder(name, ["config.json", *TOKENIZER_FILES])
    path = folder / "tokenizer.json"
    with blaming(f"{path} can't be read"):
        tokenizer = Tokenizer.from_file(str(path)) if path.exists() else None
    if tokenizer is None or not is_plain(tokenizer, folder):
        theirs = ask_transformers("AutoTokenizer", name, trust_remote_code=False)
        tokenizer = getattr(theirs, "backend_tokenizer", None)
        require(tokenizer and tokenizer.get_vocab_size(with_added_tokens=False),
                f"{name} has no fast tokenizer. Save one: model.save_pretrained(folder, tokenizer)")
        require(type(tokenizer.model).__name__ == "BPE" or not theirs.clean_up_tokenization_spaces,
                f"{name} needs clean_up_tokenization_spaces, which isn't supported")
    tokenizer.no_padding()  # it may have been saved with these on
    tokenizer.no_truncation()
    return tokenizer


def is_plain(tokenizer, folder):
    """FAST: True if transformers would surely take this tokenizer.json as it is, and so needn't be
    imported. A wrong False costs a second; a wrong True would change the tokens."""
    settings, model = read_json(folder / "tokenizer_config.json"), tokenizer.model
    kind = (settings.get("tokenizer_class")
            or read_json(folder / "config.json").get("tokenizer_class") or "GPT2Tokenizer")
    if kind in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        # Of these, transformers takes vocabulary, merges and added tokens. The rest is gpt2's.
        names = ["bos_token", "eos_token", "unk_token"]
        settings = dict.fromkeys(names, "<|endoftext|>") | settings
        decoder = type(tokenizer.decoder).__name__
        rules = f"{tokenizer.normalizer}, {tokenizer.pre_tokenizer}, {decoder}, {model}"
        if not rules.replace('""', "None").startswith(GPT2_RULES):  # no prefix: "" or None
            return False
    elif kind not in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        return False
    tokens = {str(i): token.__getstate__()  # its text, as "content", and its options
              for i, token in tokenizer.get_added_tokens_decoder().items()}
    known = [tokens]  # values that only repeat tokenizer.json, and so are harmless
    for token in tokens.values():
        if token["special"]:
            known += [token["content"], token | {"__type": "AddedToken"}]
    older = read_json(folder / "special_tokens_map.json")  # of transformers 4
    for key, value in [*settings.items(), *older.items()]:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "content" in item:
                item = {"special": True, "__type": "AddedToken"} | item  # not all files say so
            if item and item not in known and key not in HARMLESS:
                return False
    # added_tokens.json counts if there is no added_tokens_decoder. Only BPE ignores a clean-up.
    added = settings.get("added_tokens_decoder", not (folder / "added_tokens.json").exists())
    return type(model).__name__ == "BPE" and added in (tokens, True)


# ------------------------------------------- Command line -----------------------------------------

def main(argv=None):
    """Run the command. After bad input, it exits with status 2, and stderr's last line says why."""
    parser = argparse.ArgumentParser(
        "train_gpt2.py", description="Complete a prompt with GPT-2.", usage=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", default="gpt2", help="name of a Hub model, or folder of a checkpoint")
    flag("--prompt", default="Hello, I'm a language model,", help="text to complete; may be empty")
    flag("--num-return-sequences", type=int, default=5, help="how many completions")
    flag("--max-length", type=int, default=30, help="tokens in each, including the prompt's")
    flag("--temperature", type=float, default=1.0, help="higher is more random; 0: the likeliest")
    flag("--top-k", type=int, default=50, help="sample from the K most likely tokens; 0: from all")
    flag("--seed", type=int, default=42, help="same seed, flags and device: same text")
    flag("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto: cuda, else cpu")
    flag("--dtype", default="auto", choices=["auto", *DTYPES], help="auto keeps the checkpoint's")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's lacks it
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # in files on Windows, too
    try:
        complete(**vars(args))  # --max-length becomes max_length, and so on
    except (InputError, OSError) as error:
        parser.error(" ".join(str(error).split()))


def complete(model, prompt, num_return_sequences, seed, device, dtype, **options):
    """Print num_return_sequences completions, each after `> `. The options are generate()'s."""
    require(num_return_sequences > 0, f"num_return_sequences can't be {num_return_sequences}")
    if device == "auto":  # never MPS: see the README
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with blaming(f"device {device} can't be used (see the README, or try --device cpu)"):
        torch.ones(1, device=device).item()
    gpt, tokenizer = GPT.from_pretrained(model), load_tokenizer(model)
    ids, bos = tokenizer.encode(prompt).ids, gpt.config.bos_token_id
    require(ids or bos is not None, "the prompt is empty, and the model has no bos_token_id to use")
    print(f"using device: {device}", file=sys.stderr)
    gpt.to(device, DTYPES.get(dtype))  # None, for "auto", changes nothing
    idx = torch.tensor([ids or [bos]] * num_return_sequences, device=device)  # (B, T)
    torch.manual_seed(seed)
    for row in gpt.generate(idx, **options).tolist():
        # The prompt as given, then the new tokens (and bos, if the prompt is empty). decode()
        # skips special tokens, as transformers' pipeline does.
        print(">", prompt + tokenizer.decode(row[len(ids):]), flush=True)


if __name__ == "__main__":
    gc.freeze()  # FAST: so that Python doesn't scan everything imported for garbage at exit
    main()

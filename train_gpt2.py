"""GPT-2 in one file: the model, the loading of Hugging Face's weights, the sampling of text.

With the same weights, logits, gradients and sampled tokens are those of transformers' GPT2LMHeadModel to the last
bit. That takes the same arithmetic in the same order: where a line could be simpler, a comment says why it is not.
From Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". In comments, B is the batch, T this
call's tokens, S all so far, C the channels (n_embd), nh the heads, hs = C / nh the size of one."""
import argparse
import gc
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import tiktoken.load
import torch
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from tqdm import trange


@dataclass
class GPTConfig:
    """The sizes of a GPT-2, by default those of `gpt2`, 124M parameters. ValueError for impossible ones."""
    block_size: int = 1024  # the context: how many tokens the model can look at (n_positions in config.json)
    vocab_size: int = 50257  # 256 bytes, 50,000 merges, <|endoftext|>
    n_layer: int = 12  # blocks
    n_head: int = 12
    n_embd: int = 768
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int | None = 50256  # <|endoftext|>, which ends a text; None: nothing does

    def __post_init__(self):
        for name, value in vars(self).items():
            is_int64 = type(value) is int and 0 <= value < 2**63
            if not ((is_int64 and value > 0) or (name == "eos_token_id" and (is_int64 or value is None))
                    or (name == "layer_norm_epsilon" and type(value) is float and 0 < value < 1)):
                raise ValueError(f"{name} cannot be {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, and {self.n_embd} is not one of {self.n_head}")


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and from those before it: (B, T, C) → (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # queries, keys, values of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
    def forward(self, x, cache=None):
        B, T, C = x.shape
        hs = C // self.n_head
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, hs).permute(0, 2, 3, 1, 4)  # (B, 3, nh, T, hs)
        q, k, v = qkv.unbind(1)
        if cache is not None:
            new, k, v = cache  # views: new (B, 2, nh, T, hs), to be filled here; k and v (B, nh, S, hs), with it
            new.copy_(qkv[:, 1:])
        # Hugging Face has copies: strides and alignment can change last bits. The cache's do not if hs fills 32 bytes.
        if cache is None or hs * x.element_size() % 32:
            k, v = (t.clone(memory_format=torch.contiguous_format) for t in (k, v))
        # is_causal would show a lone new token the first key alone. The default scale, 1 / sqrt(hs), can be a bit off.
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=T > 1, scale=hs**-0.5)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each token by itself, four times as wide: (B, T, C) → (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4C)
        # GELU by tanh (Hendrycks & Gimpel 2016), as GPT-2 was trained, written out: nn.GELU rounds at other points.
        x = 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        return self.c_proj(x)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it: (B, T, C) → (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)
    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with its language modelling head, initialised as in transformers: N(0, 0.02), c_proj by the paper's 2.3."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            # nn.Embedding(V, C) initialises itself, which on meta imports torch's compiler, for a second or two
            "wte": nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.n_embd), freeze=False),
            "wpe": nn.Embedding.from_pretrained(torch.empty(config.block_size, config.n_embd), freeze=False),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "ln_f": nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon),
        })
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # one tensor: what reads a token also predicts it
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2 and not p.is_meta:
                if "c_" in name:  # stored (in, out) like a checkpoint's, so that both multiply alike
                    p.data = torch.empty(p.shape[::-1], device=p.device).t()
                # Each layer adds to the stream through two c_proj; smaller ones keep it from growing with the depth.
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02)

    def forward(self, idx, cache=None, start=0):
        """idx (B, T) int64 → logits (B, T, vocab_size) in the weights' dtype; ValueError for other shapes. With a
        cache from generate() that holds `start` tokens, T is 1 or start is 0, and the logits are the last token's."""
        check(idx, self.config.block_size)
        h, end = self.transformer.h, start + idx.shape[1]
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(start, end, device=idx.device))  # (B, T, C)
        layers = [None] * len(h) if cache is None else zip(cache[..., start:end, :], *cache[..., :end, :].unbind(2))
        for block, layer in zip(h, layers):
            x = block(x, layer)
        x = self.transformer.ln_f(x)
        return self.lm_head(x if cache is None else x[:, -1:])

    def generate(self, idx, max_length, temperature=1.0, top_k=50):
        """Continue the rows of idx (B, T) int64 by draws from torch's global generator: (B, ≤ max_length) int64, or
        ValueError. temperature=0 takes the likeliest token, top_k=0 draws from all. A row that has said the end-of-text
        token is filled up with it; when all have, generation ends."""
        check(idx, self.config.block_size, max_length, temperature, top_k)
        (B, T), c, h = idx.shape, self.config, self.transformer.h
        if not 0 <= idx.min() <= idx.max() < c.vocab_size:
            raise ValueError(f"idx must hold token ids, from 0 to {c.vocab_size - 1}")
        eos = -1 if c.eos_token_id is None else c.eos_token_id
        with torch.inference_mode():  # no_grad, but small operations take a fifth less
            cache = self.lm_head.weight.new_empty(len(h), B, 2, c.n_head, max_length, c.n_embd // c.n_head)
            new, ended = idx, torch.zeros(B, 1, dtype=torch.bool, device=idx.device)
            for S in trange(T, max_length, unit="token", delay=1, disable=None, leave=False):  # None: on terminals only
                new = sample(self(new, cache, S - new.shape[1])[:, -1].float(), temperature, top_k)  # (B, 1)
                idx = torch.cat((idx, new := new.masked_fill(ended, eos)), dim=1)
                if (ended := ended | (new == eos)).all():
                    break
        return idx.clone()  # outside of inference mode: a tensor that can be trained on

    @classmethod
    def from_pretrained(cls, name):
        """The model of a Hub name (`gpt2`) or a folder with config.json and model.safetensors: float32, eval mode. A
        float32 file is mapped, not copied, and training leaves it as it is. ValueError or OSError if that cannot be."""
        config = read_config(folder := find_folder(name))
        try:
            weights = read_weights(folder, config)
            with torch.device("meta"):  # shapes without numbers
                model = cls(config)
            model.transformer.load_state_dict(weights, assign=True)
        except (RuntimeError, TypeError) as error:  # names and shapes that do not fit, or sizes beyond 64 bits
            raise ValueError(f"model.safetensors in {folder} does not fit its config.json: {error!s:.400}") from None
        model.lm_head.weight = model.transformer.wte.weight
        return model.eval()


def check(idx, block_size, max_length=None, temperature=1.0, top_k=0):
    """ValueError unless idx is int64 (B, T), B at least 1, T 1 to block_size, and can be continued in this way."""
    dtype, shape = getattr(idx, "dtype", type(idx)), tuple(getattr(idx, "shape", ()))
    if dtype != torch.int64 or len(shape) != 2 or 0 in shape:
        raise ValueError(f"idx must be int64 (B, T), B and T at least 1; it is {dtype} {shape}")
    if shape[1] > block_size:
        raise ValueError(f"the prompt (idx) has {shape[1]} tokens, more than the model's block_size of {block_size}")
    if max_length is not None and not shape[1] < max_length <= block_size:
        raise ValueError(f"max_length {max_length} must be over the prompt's {shape[1]} tokens, at most {block_size}")
    if not 0 <= temperature < math.inf or top_k < 0:
        raise ValueError(f"temperature must be finite, and it and top_k at least 0; they are {temperature} and {top_k}")


def sample(logits, temperature, top_k):
    """Draw the next tokens (B, 1) from float32 logits (B, vocab_size), or at temperature 0 take the likeliest, as
    transformers does: from the whole vocabulary. Among the k alone, the same seed would say other words."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature  # a copy, to write to
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits.masked_fill_(logits < kth, -math.inf)
    probs = logits = torch.softmax(logits, dim=-1)  # both names, which frees the logits
    if probs[:, 0].isnan().any():  # as is all of the row then; on a GPU, multinomial would end the process
        raise ValueError(f"the logits overflow at temperature {temperature}; raise it, or use float32")
    return torch.multinomial(probs, num_samples=1)


def find_folder(name):
    """The Path of the folder `name`, or of the Hub's model of that name: cached, else downloaded. Raises OSError."""
    folder = Path(name)
    if not folder.is_dir():
        import huggingface_hub as hub  # not at the top: a folder need not wait for it
        try:
            files = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]
            folder = Path(hub.snapshot_download(str(name), allow_patterns=files))
        except Exception as error:
            unknown = isinstance(error, (hub.errors.HFValidationError, hub.errors.RepositoryNotFoundError))
            why = "does not have it" if unknown else f"could not be reached or read ({error})"
            raise OSError(f"{name} is no folder here nor in the cache, and the Hugging Face Hub {why}; check that, or "
                          "name a folder that holds config.json and model.safetensors") from error
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} has no model.safetensors; a pytorch_model.bin can be converted: python -c "
                                "\"from transformers import GPT2LMHeadModel as M; "
                                f"M.from_pretrained({str(name)!r}).save_pretrained('converted')\"")
    return folder


def read_config(folder):
    """The GPTConfig of a folder's config.json. ValueError if it is broken or not of a GPT-2 as built here."""
    try:
        raw = json.loads((folder / "config.json").read_bytes())
        for key, built in {  # what changes the arithmetic is built or refused: wrong logits look like right ones
                "model_type": "gpt2", "activation_function": "gelu_new", "n_inner": None, "add_cross_attention": False,
                "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False,
                "tie_word_embeddings": True}.items():
            if raw.get(key, built) != built:
                raise ValueError(f"{key} is {raw[key]!r}, not {built!r}")
        return GPTConfig(raw["n_positions"], raw["vocab_size"], raw["n_layer"], raw["n_head"], raw["n_embd"],
                         raw.get("layer_norm_epsilon", 1e-5), raw.get("eos_token_id", 50256))
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # no JSON, a field missing, no object
        raise ValueError(f"config.json in {folder} is not that of a GPT-2 as built here: {error}") from None


def read_weights(folder, config):
    """The tensors of a folder's model.safetensors as GPT(config) takes them, float32; or ValueError, OSError. The
    Hub's gpt2 has GPT's names, save_pretrained puts `transformer.` before them, old fine-tunes add lm_head.weight.
    All store c_attn, c_fc and c_proj as (in, out): nn.Linear gets transposed views; a copy sums in another order."""
    try:
        tensors = safetensors.torch.load_file(path := folder / "model.safetensors")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is broken or half there ({error}); fetch it again (git: 'git lfs pull')") from None
    masks = (".attn.bias", ".attn.masked_bias")  # causal ones, no parameters
    weights = {name.removeprefix("transformer."): t for name, t in tensors.items() if not name.endswith(masks)}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} holds {tensor.dtype}, not floating-point numbers")
        conv1d = tensor.ndim == 2 and name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        weights[name] = tensor.float().t() if conv1d else tensor.float()
    head = weights.pop("lm_head.weight", None)
    if head is not None and not torch.equal(weights.setdefault("wte.weight", head), head):
        raise ValueError(f"{path}: lm_head.weight is not wte.weight, and only one tensor for both is built here")
    if config.n_layer != len({name.split(".")[1] for name in weights if name.startswith("h.")}):
        raise ValueError(f"{path} does not hold the {config.n_layer} layers of n_layer in config.json")
    return weights


def load_tokenizer(folder, vocab_size):
    """GPT-2's byte-pair encoding as a tiktoken.Encoding: the folder's own or, if it has none, OpenAI's. Raises
    ValueError if it is broken or knows more tokens than the model's vocab_size, OSError if it cannot be had."""
    if (folder / "merges.txt").exists():
        kept, os.environ["TIKTOKEN_CACHE_DIR"] = os.environ.get("TIKTOKEN_CACHE_DIR"), ""  # or it may read an old copy
        try:
            rank = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(folder / "merges.txt"), str(folder / "vocab.json"))
            tokenizer = tiktoken.Encoding(  # which checks explicit_n_vocab: a merge that is there twice leaves a gap
                "gpt2", pat_str=r50k_pat_str, mergeable_ranks=rank, explicit_n_vocab=len(rank) + 1,
                special_tokens={"<|endoftext|>": max(rank.values()) + 1})
        except (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"vocab.json and merges.txt in {folder} are not a GPT-2 vocabulary: {error!r}") from None
        finally:
            os.environ.pop("TIKTOKEN_CACHE_DIR") if kept is None else os.environ.update(TIKTOKEN_CACHE_DIR=kept)
    else:
        try:
            tokenizer = tiktoken.get_encoding("gpt2")
        except OSError as error:
            raise OSError(f"{folder} has no vocab.json and merges.txt, and OpenAI's cannot be had: {error}") from None
    if tokenizer.n_vocab > vocab_size:
        raise ValueError(f"the vocabulary of {folder} has {tokenizer.n_vocab} tokens, the model only {vocab_size}")
    return tokenizer


def main(argv=None):
    """The command line. Exits with 2 after a mistake, which stderr's last line names, with 130 when interrupted."""
    gc.freeze()  # what is imported stays: no collection has to look through it again, nor the last one at exit
    p = argparse.ArgumentParser("train_gpt2.py", description="Complete a prompt with GPT-2.", usage=argparse.SUPPRESS,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", default="gpt2", help="Hub name, or folder with config.json and model.safetensors")
    p.add_argument("--prompt", default="Hello, I'm a language model,", help="to complete; '' starts from <|endoftext|>")
    p.add_argument("--num-return-sequences", type=int, default=5, help="how many completions")
    p.add_argument("--max-length", type=int, default=30, help="tokens in each, the prompt's included")
    p.add_argument("--temperature", type=float, default=1.0, help="over 1 wilder, under 1 tamer, 0 likeliest")
    p.add_argument("--top-k", type=int, default=50, help="draw from the K likeliest tokens; 0 draws from all")
    p.add_argument("--seed", type=int, default=42, help="the same seed says the same words")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto is cuda, else mps, else cpu")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the arithmetic")
    sys.stdout.reconfigure(errors="replace")  # what a console cannot show becomes a question mark
    try:
        complete(**vars(p.parse_args(argv)))
    except BrokenPipeError:  # `| head -1` has seen enough; Python's last flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise  # a bug; too little memory is not
        p.exit(2, f"{p.prog}: error: {' '.join(str(error).split())}\n")


def complete(model, prompt, num_return_sequences, max_length, temperature, top_k, seed, device, dtype):
    """Print completions. What can be refused is refused before the weights are read."""
    check(torch.zeros(1, 1, dtype=torch.int64), sys.maxsize, max_length, temperature, top_k)  # the flags alone
    if not 0 < num_return_sequences < 2**31 or not -2**63 <= seed < 2**64:
        raise ValueError(f"num_return_sequences, {num_return_sequences}, must be at least 1, seed, {seed}, of 64 bits")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {device} cannot be used: {str(error).splitlines()[0]}; this torch is built for CUDA "
                         f"{torch.version.cuda}, and the README says how to get one with it") from None
    config = read_config(folder := find_folder(model))
    tokenizer = load_tokenizer(folder, config.vocab_size)
    tokens = tokenizer.encode(prompt, allowed_special="all") or [tokenizer.eot_token]
    check(idx := torch.tensor([tokens]), config.block_size, max_length)  # (1, T)
    print(f"using device: {device}", file=sys.stderr)
    gpt = GPT.from_pretrained(folder).to(device, getattr(torch, dtype))
    torch.manual_seed(seed)
    idx = idx.to(device).repeat(num_return_sequences, 1)  # (B, T)
    for row in gpt.generate(idx, max_length, temperature, top_k).tolist():
        # up to the end of the text, without the ids beyond eot_token, which the model alone knows and which are no text
        new = row[len(tokens):(row + [config.eos_token_id]).index(config.eos_token_id, len(tokens))]
        print(">", prompt + tokenizer.decode([token for token in new if token < tokenizer.eot_token]), flush=True)


if __name__ == "__main__":
    main()

"""How fast train_gpt2.py is, in turns with transformers and a lecture's script: a Markdown table.

    python tests/benchmark.py

It makes its checkpoints in a temporary folder; random weights are as fast as trained ones. It takes
a while on two cores; --only runs a part. A ratio is our time over the other's in the same
round: the table has the median of these ratios, then the lowest and the highest. It can differ from
the ratio of the two median times beside it.
"""
import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from checkpoints import REAL_TOKENIZER, ROOT, random_gpt2, save, save_vocab_json

sys.path.insert(0, str(ROOT))
from train_gpt2 import GPT

PROMPT = 8  # tokens in a row before the first new one, as in the script's own prompt

PIPELINE = """
import sys
from transformers import pipeline, set_seed
generator = pipeline("text-generation", model=sys.argv[1], device=sys.argv[2])
set_seed(42)
prompt = "Hello, I'm a language model,"
new = {"max_new_tokens": 30 - len(generator.tokenizer(prompt)["input_ids"])}
for text in generator(prompt, **new, num_return_sequences=5, temperature=1.0, do_sample=True):
    print(">", text["generated_text"])
"""

# As in the lecture: transformers' weights are copied into modules of its own, and each token takes
# a run over all tokens before it. It samples from the 50 most likely alone, so its text differs.
LECTURE = """
import sys, tiktoken, torch
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext.openai_public import r50k_pat_str
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

class Block(nn.Module):
    def __init__(self, C, n_head):
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.attn.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh"))

class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.vocab_size, c.n_embd),
            "wpe": nn.Embedding(c.n_positions, c.n_embd),
            "h": nn.ModuleList(Block(c.n_embd, c.n_head) for _ in range(c.n_layer)),
            "ln_f": nn.LayerNorm(c.n_embd)})
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)

    def forward(self, idx):
        positions = torch.arange(idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

folder, device = sys.argv[1:]
peer = GPT2LMHeadModel.from_pretrained(folder)
model, weights = GPT(peer.config), peer.state_dict()
with torch.no_grad():
    for name, p in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        p.copy_(weights[name].t() if conv1d else weights[name])
model.eval().to(device)
ranks = data_gym_to_mergeable_bpe_ranks(f"{folder}/merges.txt", f"{folder}/vocab.json")
tokenizer = tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks,
                              special_tokens={})
torch.manual_seed(42)
x = torch.tensor([tokenizer.encode("Hello, I'm a language model,")] * 5, device=device)
while x.shape[1] < 30:
    with torch.no_grad():
        probs, ids = F.softmax(model(x)[:, -1], dim=-1).topk(50)
        x = torch.cat((x, ids.gather(1, torch.multinomial(probs, 1))), dim=1)
for row in x.tolist():
    print(">", tokenizer.decode([token for token in row if token < len(ranks)]))
"""

# A small process in between, since the peak memory of a child is at least that of its parent.
COLD = """
import json, subprocess, sys, time
start = time.perf_counter()
stdout = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True).stdout.decode()
seconds, peak = time.perf_counter() - start, float("nan")
if sys.platform != "win32":
    import resource
    unit = 2**20 if sys.platform == "darwin" else 2**10
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit
print(json.dumps((seconds, peak, stdout)))
"""


def cold(*arguments):
    """Run Python in a fresh process: seconds, peak MiB (not a number on Windows), stdout."""
    command = [sys.executable, "-c", COLD, sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8",
                          errors="replace", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else sys.exit(done.stderr)


def compare(what, unit, rounds, runs):
    """Run all in turns, ours first; yield a row of the table for each peer. A run returns a number,
    its MiB (None: not shown) and its words, which must equal ours (None: they differ by design)."""
    results = {name: [] for name in runs}
    for i in range(rounds + 1):
        print(what, f"round {i} of {rounds}" if i else "warm-up", sep=", ", file=sys.stderr)
        for name, run in runs.items():
            results[name].append(run())
    (_, ours), *peers = results.items()

    def median(rows):
        values, mib, _ = zip(*rows[1:])
        peak = "" if mib[0] is None else f", peak {statistics.median(mib):.0f} MiB"
        return f"{statistics.median(values):.3g} {unit}{peak}"

    for name, peer in peers:
        ratios = [a[0] / b[0] for a, b in zip(ours[1:], peer[1:])]
        same = "equal" if all(a[2] == b[2] for a, b in zip(ours, peer)) else "DIFFERENT"
        yield (what, median(ours), f"{name}: {median(peer)}", f"{statistics.median(ratios):.2f}",
               f"{min(ratios):.2f}–{max(ratios):.2f}", "" if peer[0][2] is None else same)


def whole(what, folder, args, **more):
    """Whole processes: the command and the pipeline."""
    yield from compare(what, "s", args.rounds, {
        "ours": lambda: cold("train_gpt2.py", "--model", folder, "--device", args.device),
        "pipeline": lambda: cold("-c", PIPELINE, folder, args.device), **more})


def job(folder, args):
    lecture = {"a lecture's script": lambda: (*cold("-c", LECTURE, folder, args.device)[:2], None)}
    yield from whole("the command", folder, args, **lecture)


def old(folder, args):
    """Folders as transformers 4 and before left them: a .bin file, then also no tokenizer.json."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder)
    save(model, folder / "bin", "bin")
    for name in "tokenizer.json", "vocab.json", "merges.txt":
        if (folder / name).exists():
            shutil.copy(folder / name, folder / "bin")
    yield from whole("the command, .bin", folder / "bin", args)
    (folder / "bin" / "tokenizer.json").unlink(missing_ok=True)
    yield from whole("the command, .bin and vocab.json", folder / "bin", args)


def generation(what, folder, args, B, length):
    """Sample B rows up to length: milliseconds a token."""
    classes = {"ours": GPT, "generate()": transformers.GPT2LMHeadModel}
    idx = torch.arange(B * PROMPT, device=args.device).view(B, PROMPT)
    theirs = {"do_sample": True, "top_k": 50, "attention_mask": torch.ones_like(idx)}

    def writer(name, cls):
        model, how = cls.from_pretrained(folder).to(args.device), {}
        if name == "generate()":
            how = theirs

        def run():
            torch.manual_seed(42)
            start = time.perf_counter()
            out = model.generate(idx, max_length=length, **how).cpu()  # .cpu() waits for the GPU
            return 1000 * (time.perf_counter() - start) / (length - PROMPT), None, out.tolist()
        return run

    yield from compare(what, "ms/token", args.rounds, {
        name: writer(name, cls) for name, cls in classes.items()})


def narrow(folder, args):
    model = save(random_gpt2(n_embd=96, vocab_size=1000), folder / "narrow")
    for length in 256, 1024:
        yield from generation(f"width 96, 5 rows, length {length}", model, args, 5, length)


def full(folder, args):
    for B in 1, 5:
        yield from generation(f"124M, {B} rows, length 128", folder, args, B, 128)


def machine(device):
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() says little
    cpu = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    return (f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {gpu}, "
            f"{platform.platform()}; Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}.")


def main():
    parts = {part.__name__: part for part in (job, old, narrow, full)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how many are counted")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, metavar="PART",
                        help=", ".join(parts))
    args = parser.parse_args()
    rows = []
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            folder = save(random_gpt2(bos_token_id=50256, eos_token_id=50256), folder, "hub")
            if REAL_TOKENIZER.exists():  # the lecture's script reads the last two
                for name in "tokenizer.json", "vocab.json", "merges.txt":
                    shutil.copy(REAL_TOKENIZER / name, folder)
            else:
                save_vocab_json(folder)
            for name in args.only:
                rows.extend(parts[name](folder, args))
    finally:  # what an interrupted benchmark has measured is shown too
        head = ("what", "ours (median)", "other (median)", "median ratio", "lowest–highest",
                "words")
        print(machine(args.device), f"{args.rounds} rounds, in turns, after a warm-up.\n")
        for row in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

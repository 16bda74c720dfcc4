"""How fast train_gpt2.py is, in turns with transformers and a lecture's script: a Markdown table.

    python tests/benchmark.py

It makes its checkpoints in a temporary folder; random weights are as fast as trained ones. It takes
half an hour on two cores; --only runs a part. Ratios are ours over the peer's: of seconds, below 1
is faster; of tokens/s, above 1.
"""
import argparse
import importlib.util
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

# Set before transformers is imported, here and by the peers: no warnings, no questions to the Hub
os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  HF_HUB_OFFLINE="1", PYTHONUTF8="1")

import torch
import transformers
from checkpoints import REAL_TOKENIZER, ROOT, random_gpt2, save, save_vocab_json

sys.path.insert(0, str(ROOT))
from train_gpt2 import GPT, Conv1D

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
# a run over all tokens before it. It samples from the 50 likeliest alone, so its text differs.
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

def load(folder):
    peer = GPT2LMHeadModel.from_pretrained(folder)
    model, weights = GPT(peer.config), peer.state_dict()
    for name, p in model.state_dict().items():
        conv1d = name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))
        p.copy_(weights[name].t() if conv1d else weights[name])
    return model

folder, device = sys.argv[1:]
model = load(folder).eval().to(device)
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

LOAD = """
import sys, time
{}
start = time.perf_counter()
model = {}
print(time.perf_counter() - start)
"""

# Both sides learn to predict the next one of the same tokens; the losses of all steps are compared.
TRAIN = """
import json, statistics, sys, time, torch
from torch.nn import functional as F
{}
folder, device, autocast = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
model = {}.to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
idx = torch.randint(50257, (4, 129), generator=torch.Generator().manual_seed(0)).to(device)
seconds, losses = [], []
for _ in range(5):
    start = time.perf_counter()
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=autocast):
        logits = {}
        loss = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())  # which waits for the GPU
    seconds.append(time.perf_counter() - start)
print(json.dumps([statistics.median(seconds[1:]), losses]))
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


def cold(*arguments, cwd=ROOT):
    """Run Python in a fresh process: seconds, peak MiB (not a number on Windows), stdout."""
    command = [sys.executable, "-c", COLD, sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, encoding="utf-8",
                          errors="replace", check=False)
    return json.loads(done.stdout) if done.returncode == 0 else sys.exit(done.stderr)


def writer(model, B, length, per_second=False):
    """A run for compare(): sample B rows up to length. Milliseconds a step, or tokens a second."""
    idx = torch.arange(B * PROMPT, device=next(model.parameters()).device).view(B, PROMPT)
    theirs = {"do_sample": True, "top_k": 50, "attention_mask": torch.ones_like(idx)}
    if not isinstance(model, transformers.PreTrainedModel):
        theirs = {}

    def run():
        torch.manual_seed(42)
        start = time.perf_counter()
        out = model.generate(idx, max_length=length, **theirs).cpu()  # .cpu() waits for the GPU
        step = (time.perf_counter() - start) / (length - PROMPT)
        return B / step if per_second else 1000 * step, None, out.tolist()
    return run


def products(model, B):
    """A run for compare(): only the matrix products of one token in B rows, in milliseconds."""
    layers = [module for module in model.modules() if isinstance(module, (Conv1D, torch.nn.Linear))]
    sizes = [module.weight.shape[module is model.lm_head] for module in layers]  # of what goes in
    x = {n: torch.randn(B, 1, n, device=model.lm_head.weight.device) for n in sizes}

    def run():
        start = time.perf_counter()
        with torch.inference_mode():
            for _ in range(20):
                for layer, n in zip(layers, sizes):
                    y = layer(x[n])
        y.cpu()
        return 1000 * (time.perf_counter() - start) / 20, None, None
    return run


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


def load_older(folder):
    """The GPT of another version of the script, which stays apart from this one."""
    spec = importlib.util.spec_from_file_location("older", folder / "train_gpt2.py")
    module = sys.modules["older"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.GPT


def load_all(folder, args, dtype=torch.float32):
    """Our model, transformers', and that of the older version if there is one, by name."""
    classes = {"ours": GPT, "generate()": transformers.GPT2LMHeadModel}
    if args.older:
        classes["older version"] = load_older(args.older)
    return {name: cls.from_pretrained(folder).to(args.device, dtype)
            for name, cls in classes.items()}


def generation(what, models, B, length, rounds, **more):
    runs = {name: writer(model, B, length) for name, model in models.items()}
    yield from compare(what, "ms/token", rounds, runs | more)


def job(folder, args):
    def script(root):
        return lambda: cold("train_gpt2.py", "--model", folder, "--device", args.device, cwd=root)
    yield from compare("the whole job, cold process", "s", args.rounds, {
        "ours": script(ROOT),
        "transformers' pipeline": lambda: cold("-c", PIPELINE, folder, args.device),
        "a lecture's script": lambda: (*cold("-c", LECTURE, folder, args.device)[:2], None),
        "`import torch` alone": lambda: (*cold("-c", "import torch")[:2], None),
        **({"older version": script(args.older)} if args.older else {}),
    })


def load(folder, args):
    def timed(imports, call):
        return lambda: (float(cold("-c", LOAD.format(imports, call), folder)[2]), None, None)
    yield from compare("`from_pretrained`, 124M", "s", args.rounds, {
        "ours": timed("from train_gpt2 import GPT", "GPT.from_pretrained(sys.argv[1])"),
        "transformers": timed("from transformers import GPT2LMHeadModel as M",
                              "M.from_pretrained(sys.argv[1])"),
        "the file read and copied": timed(
            "from safetensors.torch import load_file",
            "{n: t.clone() for n, t in load_file(sys.argv[1] + '/model.safetensors').items()}"),
    })


def narrow(folder, args):
    models = load_all(save(random_gpt2(n_embd=96, vocab_size=1000), folder / "narrow"), args)
    for length in 256, 1024:
        yield from generation(f"width 96, batch 5, length {length}", models, 5, length, args.rounds)


def full(folder, args):
    models = load_all(folder, args)
    for B in 1, 5:
        yield from generation(f"124M, batch {B}, float32, length 128", models, B, 128, args.rounds,
                              **{"its matrix products alone": products(models["ours"], B)})


def bfloat16(folder, args):
    models = load_all(folder, args, torch.bfloat16)
    runs = {name: writer(model, 5, 128, per_second=True) for name, model in models.items()}
    wide = writer(GPT.from_pretrained(folder).to(args.device), 5, 128, per_second=True)
    yield from compare("124M, batch 5, bfloat16, length 128", "tokens/s", args.rounds, {
        **runs, "our float32": lambda: (wide()[0], None, None)})


def train(folder, args):
    ours = "from train_gpt2 import GPT", "GPT.from_pretrained(folder).train()", "model(idx[:, :-1])"
    theirs = ("from transformers import GPT2LMHeadModel as M", "M.from_pretrained(folder).eval()",
              "model(idx[:, :-1]).logits")

    def step(snippets, autocast, root=ROOT):
        def run():
            code = TRAIN.format(*snippets)
            _, mib, stdout = cold("-c", code, folder, args.device, autocast, cwd=root)
            seconds, losses = json.loads(stdout)
            return seconds, mib, losses
        return run

    for autocast in False, True:
        what = "autocast to bfloat16" if autocast else "float32"
        yield from compare(f"a step of AdamW, 124M, 4 × 128 tokens, {what}", "s", args.rounds, {
            "ours": step(ours, autocast),
            "transformers": step(theirs, autocast),
            **({"older version": step(ours, autocast, args.older)} if args.older else {}),
        })


def machine(device):
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() says little
    cpu = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    gpu = ""
    if device.startswith("cuda"):
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        driver = subprocess.getoutput(query).partition("\n")[0]
        gpu = f"; {torch.cuda.get_device_name(device)}, driver {driver}, CUDA {torch.version.cuda}"
    return (f"On {device}: {cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, "
            f"{platform.platform()}, {torch.get_num_threads()} torch threads{gpu}; "
            f"Python {platform.python_version()}, "
            f"torch {torch.__version__}, transformers {transformers.__version__}.")


def main():
    parts = {part.__name__: part for part in (job, load, narrow, full, bfloat16, train)}
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda; auto is cuda, else cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how many are counted")
    parser.add_argument("--only", nargs="+", default=parts, choices=parts, metavar="PART",
                        help=", ".join(parts))
    parser.add_argument("--older", type=Path, metavar="FOLDER",
                        help="the folder of another version, to measure it too")
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            folder = save(random_gpt2(), folder, "hub")
            if REAL_TOKENIZER.exists():  # the lecture's script reads the last two
                for name in "tokenizer.json", "vocab.json", "merges.txt":
                    shutil.copy(REAL_TOKENIZER / name, folder)
            else:
                save_vocab_json(folder)
            for name in args.only:
                rows.extend(parts[name](folder, args))
    finally:  # what an interrupted benchmark has measured is shown too
        head = ("what", "ours (median)", "peer (median)", "ratio (median)", "spread (min–max)",
                "words")
        print(machine(args.device), f"Rounds: {args.rounds}, in turns, after a warm-up.\n")
        for row in (head, ["---"] * len(head), *rows):
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

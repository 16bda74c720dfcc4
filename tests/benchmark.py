"""How long the command takes beside transformers' pipeline, and training beside transformers: a
Markdown table.

    python tests/benchmark.py [rounds]

It makes its 124M checkpoints, with random weights, which are as fast as trained ones. Both sides
run in turns, on CUDA if it is there. The table has medians, and the ratio's lowest and highest.
"""
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import checkpoints
import torch

PIPELINE = """
import sys
from transformers import pipeline, set_seed
generator = pipeline("text-generation", model=sys.argv[1], device=sys.argv[2])
set_seed(42)
for text in generator("Hello, I'm a language model,", max_length=30, max_new_tokens=None,
                      num_return_sequences=5, temperature=1.0, do_sample=True):
    print(">", text["generated_text"])
"""
TRAIN = """
import sys, torch
from transformers import GPT2LMHeadModel
from train_gpt2 import GPT
kind, folder, device = sys.argv[1:]
model = (GPT if kind == "ours" else GPT2LMHeadModel).from_pretrained(folder).eval().to(device)
optimizer = torch.optim.AdamW(model.parameters())
rows = torch.randint(50257, (4, 257), generator=torch.Generator().manual_seed(0)).to(device)
for step in range(3):
    logits = model(rows[:, :-1])
    logits = getattr(logits, "logits", logits)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
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
    done = subprocess.run(command, cwd=checkpoints.ROOT, capture_output=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else sys.exit(done.stderr.decode())


def compare(what, rounds, ours, theirs):
    """A row of the table: two commands of Python, in turns, after a warm-up."""
    runs = []
    for i in range(rounds + 1):
        print(f"{what}, round {i} of {rounds}", file=sys.stderr)
        runs.append((cold(*ours), cold(*theirs)))
    same = "equal" if all(a[2] == b[2] for a, b in runs) else "DIFFERENT"
    ratios = sorted(a[0] / b[0] for a, b in runs[1:])
    sides = [f"{statistics.median(run[0] for run in side):.3g} s, "
             f"{statistics.median(run[1] for run in side):.0f} MiB" for side in zip(*runs[1:])]
    return what, *sides, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})", same


def main(rounds=5):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = checkpoints.random_gpt2(bos_token_id=50256, eos_token_id=50256)
        today = checkpoints.save(model, Path(folder, "today"), "hub")
        old = checkpoints.save(model, Path(folder, "old"), "bin")
        checkpoints.train_bpe().save(str(today / "tokenizer.json"))
        checkpoints.save_vocab_json(old)
        if checkpoints.REAL_TOKENIZER.exists():
            shutil.copy(checkpoints.REAL_TOKENIZER / "tokenizer.json", today)
            for name in ("vocab.json", "merges.txt"):
                shutil.copy(checkpoints.REAL_TOKENIZER / name, old)
        rows = [compare(what, rounds, ["train_gpt2.py", "--model", path, "--device", device],
                        ["-c", PIPELINE, path, device]) for what, path in {
            "`model.safetensors` and `tokenizer.json`": today,
            "`pytorch_model.bin`, `vocab.json` and `merges.txt`": old}.items()]
        rows.append(compare("three steps of training on 4 x 256 tokens", rounds,
                            *(["-c", TRAIN, side, today, device] for side in ("ours", "theirs"))))
    for row in (("124M", "this file", "transformers", "ratio", "output"), ["---"] * 5, *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""How fast the whole command is, in turns with transformers' pipeline: a Markdown table.

    python tests/benchmark.py

It makes its 124M checkpoints in a temporary folder; random weights are as fast as trained ones. A
ratio is our time over the pipeline's in the same round: the table has the median of these ratios,
then the lowest and the highest.
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
from pathlib import Path

import torch
import transformers
from checkpoints import (
    REAL_TOKENIZER,
    ROOT,
    random_gpt2,
    save,
    save_tokenizer,
    save_vocab_json,
)

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


def compare(what, folder, args):
    """A row of the table: the command and the pipeline, in turns."""
    ours, theirs = [], []
    for i in range(args.rounds + 1):
        print(what, f"round {i} of {args.rounds}" if i else "warm-up", sep=", ", file=sys.stderr)
        ours.append(cold("train_gpt2.py", "--model", folder, "--device", args.device))
        theirs.append(cold("-c", PIPELINE, folder, args.device))
    ratios = [a[0] / b[0] for a, b in zip(ours[1:], theirs[1:])]

    def median(runs):
        seconds, peaks, _ = zip(*runs[1:])
        return f"{statistics.median(seconds):.3g} s, {statistics.median(peaks):.0f} MiB"

    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
    words = "equal" if all(a[2] == b[2] for a, b in zip(ours, theirs)) else "DIFFERENT"
    return what, median(ours), median(theirs), ratio, words


def machine(device):
    cpuinfo = Path("/proc/cpuinfo")  # Linux, where platform.processor() says little
    cpu = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    gpu = torch.cuda.get_device_name(device) if device.startswith("cuda") else "no GPU"
    return (f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} cores, {gpu}, "
            f"{platform.platform()}; Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how many are counted")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        today, old = Path(folder, "today"), Path(folder, "old")
        model = random_gpt2(bos_token_id=50256, eos_token_id=50256)
        save(model, today, "hub")
        save(model, old, "bin")
        if REAL_TOKENIZER.exists():
            shutil.copy(REAL_TOKENIZER / "tokenizer.json", today)
            for name in "vocab.json", "merges.txt":
                shutil.copy(REAL_TOKENIZER / name, old)
        else:
            save_tokenizer(today)
            save_vocab_json(old)
        rows = [compare("`model.safetensors` and `tokenizer.json`", today, args),
                compare("`pytorch_model.bin`, `vocab.json` and `merges.txt`", old, args)]
    print(machine(args.device), f"{args.rounds} rounds, in turns, after a warm-up.\n")
    head = ("124M, from", "this file", "the pipeline", "ratio", "words")
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

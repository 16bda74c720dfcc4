"""Promise: a damaged model.safetensors, tokenizer.json or config is refused with an InputError or
OSError that has a message, or the model answers; never another exception, never a hang, never a
crash of the process.

The damaged files are read in a process of its own, which prints each case before it reads. So a
case that hangs, or crashes in the machine code of torch, safetensors or tokenizers, is named too.
"""
import faulthandler
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
from checkpoints import ROOT, change_json, write_checkpoint

import train_gpt2

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]
VALUES = [None, True, 0, -1, 3, 10**6, 10**19, 0.5, math.inf, math.nan, "", "x", "../x", "float16",
          "\0", "\ud800", [], [0], ["x"], {}, {"content": 1}]
DTYPES = {"F4": 4, "F6_E2M3": 6, "F8_E4M3": 8, "BOOL": 8, "I32": 32, "C64": 64}  # and their bits


def damages(name, data, rng):
    """(what was done, the new contents of the file), the same ones every time."""
    yield from of_bytes(data, rng)
    if name.endswith(".json"):
        yield from of_json(data, rng, 12 if "config" in name else 4)
    else:
        yield from of_safetensors(data, rng)


def of_bytes(data, rng):
    for length in [0, 1, 7, 8, 9, len(data) - 1, *rng.choices(range(len(data)), k=5)]:
        yield f"cut to {length}", data[:length]
    for length in range(1, 200, 40):
        yield f"{length} bytes of noise", rng.randbytes(length)
    yield "nested lists", b"[" * 10**5 + b"]" * 10**5
    for _ in range(20):  # most files begin or end with what says where the rest is
        at = rng.choice([rng.randrange(16), rng.randrange(2000), -rng.randrange(300)]) % len(data)
        width, byte = rng.choice([0, 1, 1, 5]), rng.choice([rng.randrange(256), *b'"{[,:-09e'])
        yield f"{width} bytes at {at} become {byte}", data[:at] + bytes([byte]) + data[at + width:]


def of_json(data, rng, n=4):
    """Each value in turn is n other things, or is missing."""
    root = [json.loads(data)]
    for place, box, key in list(places(root, rng)):
        before = box[key]
        for value in rng.sample(VALUES, n):
            # On this, tokenizers 0.23.3 aborts the process.
            if key != "continuing_subword_prefix" or not isinstance(value, str):
                box[key] = value
                yield f"{place} is {value!r}", json.dumps(root[0]).encode()
        if isinstance(box, dict):
            del box[key]
            yield f"without {place}", json.dumps(root[0]).encode()
        box[key] = before


def places(box, rng, outer=""):
    """(path, dict or list, key in it) of every value; of many of one type, of two."""
    items = list(box.items() if isinstance(box, dict) else enumerate(box))
    if len(items) > 5 and len({type(value) for _, value in items}) == 1:
        items = rng.sample(items, 2)
    for key, value in items:
        yield f"{outer}/{key}", box, key
        if isinstance(value, dict | list):
            yield from places(value, rng, f"{outer}/{key}")


def of_safetensors(data, rng):
    """The file is the length of a JSON header, in 8 bytes, the header, and all tensors' numbers."""
    size = int.from_bytes(data[:8], "little")
    header, numbers = data[8:8 + size], data[8 + size:]
    headers = [*of_bytes(header, rng), *of_json(header, rng)]
    for dtype, bits in DTYPES.items():
        alone = {"dtype": dtype, "shape": [8 * len(numbers) // bits],
                 "data_offsets": [0, len(numbers)]}
        headers.append((f"one tensor of {dtype}", json.dumps({"wte.weight": alone}).encode()))
    for case, text in headers:
        yield f"header: {case}", len(text).to_bytes(8, "little") + text + numbers


def read_all(folder):
    """Damage each file in turn, and print how many of its cases were refused or answered."""
    torch.set_num_threads(1)
    rng, outcomes = random.Random(0), Counter()
    for path in (folder / name for name in FILES):
        good = path.read_bytes()
        for case, data in [*damages(path.name, good, rng), ("nothing", good)]:
            print(f"{path.name}: {case!a}", file=sys.stderr, flush=True)
            path.unlink()  # not written over: a model may still be mapped from it
            path.write_bytes(data)
            faulthandler.dump_traceback_later(20, exit=True)
            outcome = outcome_of(path)
            outcomes[outcome] += 1
        assert outcome == "answers"  # to no damage
    print(json.dumps(outcomes))


def outcome_of(path):
    try:
        if "token" in path.name:
            tokenizer = train_gpt2.load_tokenizer(path.parent)
            ids = tokenizer.encode("Hello <|endoftext|>\n\0é€").ids
            tokenizer.decode([*ids, *range(tokenizer.get_vocab_size())])
        else:
            train_gpt2.GPT.from_pretrained(path.parent).generate(torch.tensor([[0, 1]]), 3)
        return "answers"
    except (train_gpt2.InputError, OSError) as error:
        assert str(error), "no message"
        return "refused"


def test_every_damage_is_refused_or_answers(tmp_path):
    write_checkpoint(tmp_path, n_layer=1, pad_token_id=1)
    change_json(tmp_path / "tokenizer_config.json", add_bos_token=False, add_prefix_space=False,
                extra_special_tokens={})
    process = subprocess.run(
        [sys.executable, __file__, tmp_path], check=False, capture_output=True, encoding="utf-8",
        errors="replace", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.returncode == 0, process.stderr[-3000:]
    outcomes = json.loads(process.stdout.splitlines()[-1])
    assert outcomes["refused"] > 500 and outcomes["answers"] > 300, outcomes


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))

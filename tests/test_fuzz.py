"""Promise: a model damaged in whatever way is refused with an InputError or OSError that has a
message, or it loads and answers; never another exception, never a hang, never a crash of the
process.

The damaged models are read in a process of its own, which prints each case before and after. So a
case that hangs, or crashes in the machine code of torch, safetensors or tokenizers, is named too.
"""
import faulthandler
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch

import train_gpt2

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # what is damaged, in folders with this tokenizer and this layout of checkpoints.py
    "today saved": ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                    "tokenizer_config.json"],
    "mapped saved": ["special_tokens_map.json"],
}
NESTED = ["[" * 10**5, '{"a":' * 10**5, "[" * 10**5 + "]" * 10**5]
VALUES = ["null", "true", "0", "-1", "3", "1000000", "1" * 19, "1" * 5000, "0.5", "1e999", "NaN",
          '""', '"x"', '"../x"', '"float16"', '"\\u0000"', '"\\ud800"', "[]", "[0]", '["x"]', "{}",
          '{"content": 1}', NESTED[2]]  # as JSON spells them
DTYPES = ["F64", "F16", "BF16", "I32", "U8", "U64", "BOOL", "C64", "F8_E4M3", "F6_E2M3", "F4"]


def damages(name, data, rng):
    """(what was done, the new contents of the file; None removes it), the same ones every time."""
    yield "missing", None
    yield from of_bytes(data, rng)
    if name.endswith(".json"):
        yield from of_json(json.loads(data), rng, len(VALUES) if "config" in name else 6)
    else:
        yield from of_safetensors(data, rng)


def of_bytes(data, rng):
    for length in [0, 1, 7, 8, 9, len(data) - 1, *rng.choices(range(len(data)), k=5)]:
        yield f"cut to {length}", data[:length]
    for length in range(1, 200, 40):
        yield f"{length} bytes of noise", rng.randbytes(length)
    for text in NESTED:
        yield f"nested {text[:2]}", text.encode()
    for _ in range(30):  # most files begin or end with what says where the rest is
        at = rng.choice([rng.randrange(16), rng.randrange(2000), -rng.randrange(300)]) % len(data)
        width, byte = rng.choice([0, 1, 1, 5]), rng.choice([rng.randrange(256), *b'"{[,:-09e'])
        yield f"{width} bytes at {at} become {byte}", data[:at] + bytes([byte]) + data[at + width:]


def of_json(raw, rng, n=6):
    """Each value in turn is n other things, is a copy of one beside it, or is missing."""
    root = [raw]
    for place, box, key in list(places(root, rng)):
        value, beside = box[key], list(box.values() if isinstance(box, dict) else box)
        for text in [*rng.sample(VALUES, n), json.dumps(rng.choice(beside))]:
            # On these, tokenizers 0.23.3 aborts the process, or panics when it encodes a text.
            if (key == "continuing_subword_prefix" and text[0] == '"') or (
                    place == "/0/post_processor/single" and '"B"' in text):
                continue
            box[key] = "HERE"
            yield f"{place} is {text[:40]}", json.dumps(root[0]).replace('"HERE"', text).encode()
        if isinstance(box, dict):
            del box[key]
            yield f"without {place}", json.dumps(root[0]).encode()
        box[key] = value
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        yield encoding, json.dumps(raw, ensure_ascii=False).encode(encoding)


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
    headers = [*of_bytes(header, rng), *of_json(json.loads(header), rng)]
    for dtype, bits in itertools.product(DTYPES, (4, 6, 8, 16, 32, 64)):
        shape, offsets = [8 * len(numbers) // bits], [0, len(numbers)]
        alone = {"wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
        headers.append((f"{dtype} of {bits} bits", json.dumps(alone).encode()))
    for case, text in headers:
        yield f"header: {case}", len(text).to_bytes(8, "little") + text + numbers


def main(paths):
    """Damage each file in turn; print a line of JSON before and after each case."""
    torch.set_num_threads(1)
    rng = random.Random(0)
    for path in map(Path, paths):
        good = path.read_bytes()
        for case, data in [*damages(path.name, good, rng), ("nothing", good)]:
            print(json.dumps(["trying", f"{path}: {case}"]), flush=True)
            path.unlink(missing_ok=True)  # not written over: a model may still be mapped from it
            if data is not None:
                path.write_bytes(data)
            faulthandler.dump_traceback_later(20, exit=True)
            print(json.dumps([outcome_of(path), f"{path}: {case}"]))


def outcome_of(path):
    try:
        if "token" in path.name:
            tokenizer = train_gpt2.load_tokenizer(path.parent)
            ids = tokenizer.encode("Hello <|endoftext|>\n\0é€").ids
            tokenizer.decode([*ids, *range(tokenizer.get_vocab_size())])
        else:
            model = train_gpt2.GPT.from_pretrained(path.parent)
            model.generate(torch.tensor([[0, 1]]), 3)
        return "answers"
    except (train_gpt2.InputError, OSError) as error:
        return "refused" if str(error) else "refused without a message"
    except BaseException as error:  # noqa: BLE001 - a panic in Rust isn't an Exception
        return f"{type(error).__name__}: {error!s:.200}"


def test_every_damage_is_refused_or_answers(tmp_path):
    import checkpoints  # here, because the other process does without transformers
    paths = []
    for kind, names in FILES.items():
        tokenizer, layout = kind.split(" ", 1)
        (folder := tmp_path / kind).mkdir()
        checkpoints.write_checkpoint(folder, tokenizer, layout, n_layer=1, pad_token_id=1)
        checkpoints.change_json(folder / "tokenizer_config.json", add_bos_token=False,
                                add_prefix_space=False, extra_special_tokens={})
        paths += [Path(kind, name) for name in names]
    process = subprocess.run(
        [sys.executable, __file__, *paths], cwd=tmp_path, check=False, capture_output=True,
        encoding="utf-8", errors="replace", env=os.environ | {"PYTHONPATH": str(ROOT)})
    lines = [json.loads(line) for line in process.stdout.splitlines()
             if not line.startswith("Ignored unknown kwarg")]  # tokenizers 0.22 prints such lines
    assert process.returncode == 0, (lines[-1:], process.stderr[-3000:])
    wrong = [str(line) for line in lines if line[0] not in ("trying", "refused", "answers")]
    assert not wrong, "\n".join(wrong)
    for path in paths:  # the last case of each file
        assert ["answers", f"{path}: nothing"] in lines, path
    counts = Counter(outcome for outcome, _ in lines)
    assert counts["refused"] > 800 and counts["answers"] > 500, counts  # what is harmless answers


if __name__ == "__main__":
    main(sys.argv[1:])

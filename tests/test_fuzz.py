"""Promise: a model damaged in whatever way is refused with a ValueError or OSError that has a message,
or it loads and answers; never another exception, never a hang.

The damaged models are loaded in a process of its own, which says what it is about to try. So a case that hangs, or
that ends the process (a crash in torch's, safetensors' or tiktoken's machine code), is named too.
"""
import faulthandler
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VALUES = [None, True, False, 0, -1, 1, 2, 3, 16, 300, 10**6, 10**9, 2**31, 2**63, 10**18, 10**30, -10**30, 0.0, 1.5,
          8.0, 1e-5, 1e300, float("inf"), float("nan"), "", "x", "12", "gpt2", "\ud800", [], [1], [[]], {}, {"a": 1}]
FIELDS = ["n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "layer_norm_epsilon", "eos_token_id", "n_inner",
          "model_type", "activation_function", "scale_attn_weights", "tie_word_embeddings", "add_cross_attention",
          "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "n_ctx", "bos_token_id", "pad_token_id",
          "dtype", "torch_dtype", "unknown"]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "U16", "U64", "BOOL", "C64", "F8_E4M3", "F8_E5M2",
          "F8_E8M0", "F6_E2M3", "F4", "f32", "", "X"]
NESTED = {"lists": b"[" * 10**5, "objects": b'{"a":' * 10**5, "closed": b"[" * 10**5 + b"]" * 10**5}


def main(folder):
    """Try all cases on copies of the model in folder, and print a line before and after each."""
    import torch

    import train_gpt2
    torch.set_num_threads(1)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for number, (case, changed) in enumerate(cases(good)):
        print(f"trying {case}", flush=True)
        faulthandler.dump_traceback_later(20, exit=True)
        damaged = folder / str(number)  # a new one each time: an earlier model may still have its file mapped
        damaged.mkdir()
        for name, data in {**good, **changed}.items():
            if data is not None:
                (damaged / name).write_bytes(data)
        try:
            if {"vocab.json", "tokenizer.json", "tokenizer_config.json"} & changed.keys():
                tokenizer, readable = train_gpt2.read_tokenizer(damaged)
                text = "Hello <|endoftext|>\n\0é€"
                tokens = tokenizer.encode(text, allowed_special="all")
                assert all(0 <= token < tokenizer.n_vocab for token in tokens)
                assert tokenizer.decode(tokens) == text
                for token in readable:
                    tokenizer.decode([token])
            else:
                model = train_gpt2.GPT.from_pretrained(damaged)
                idx = torch.tensor([[0, 1, 0, 1]])
                assert model(idx).shape == (1, 4, model.config.vocab_size)
                torch.manual_seed(0)
                assert model.generate(idx, 6).shape in [(1, 5), (1, 6)]  # 5: it said the end-of-text token at once
            print("answers")
        except (ValueError, OSError) as error:
            print("refused" if str(error) else "WRONG: no message")
        except BaseException as error:  # noqa: BLE001  a panic in tiktoken's Rust is no Exception
            print(f"WRONG: {type(error).__name__}: {ascii(str(error))[:300]}")
    faulthandler.cancel_dump_traceback_later()
    print("the end")


def cases(good):
    """All cases, (what is done, the changed contents of the files it is done to; None: no such file), the same ones
    every time. A model has one file of weights, or shards; tokenizer.json, or vocab.json."""
    rng = random.Random(0)
    shards = {name: data for name, data in good.items() if "-of-" in name or "index" in name}
    whole = dict.fromkeys(shards)
    sharded = {"model.safetensors": None}
    shard = max((name for name in shards if "-of-" in name), key=lambda name: good[name].count(b"dtype"))
    for name, special, others in [
            ("model.safetensors", of_weights, whole), ("config.json", of_config, whole),
            ("generation_config.json", of_ends, whole), ("model.safetensors.index.json", of_index, sharded),
            (shard, of_weights, sharded), ("tokenizer.json", of_tokenizer, whole),
            ("tokenizer_config.json", of_settings, whole), ("vocab.json", of_vocabulary, whole | {"tokenizer.json": None})]:
        for case, data in [*of_any_file(good[name], rng), *special(good[name], rng)]:
            yield f"{name}, {case}", others | {name: data}


def of_any_file(data, rng):
    """What happens to files: cut, mangled, replaced."""
    for length in [0, 1, 7, 8, 9, len(data) - 1, *(rng.randrange(len(data)) for _ in range(10))]:
        yield f"cut to {length}", data[:length]
    for _ in range(10):
        noise = rng.randbytes(rng.randrange(1, 200))
        yield f"noise {noise[:8]}", noise
    for _ in range(30):
        text, at = bytearray(data), rng.randrange(min(len(data), 2000))
        width, byte = rng.randrange(1, 9), rng.choice([0, 255, rng.randrange(256), *b'"{}[],:-09.eE \n'])
        how, change = rng.choice([
            ("flip", [text[at] ^ 1 << width - 1]), ("replace", [byte]), ("insert", [byte, text[at]]),
            ("repeat", text[at:at + width] * 2), ("delete", []),
        ])
        text[at:at + (width if how in ("repeat", "delete") else 1)] = bytes(change)
        yield f"{how} at {at}: {bytes(change)!r}, {width}", bytes(text)
    for how, nested in NESTED.items():
        yield f"nested {how}", nested
    for value in VALUES:
        yield f"is {value!r}", json.dumps(value).encode()


def of_weights(data, rng):
    """What a safetensors file begins with: a length in 8 bytes, and so much JSON about each tensor and its place."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8:8 + size]), data[8 + size:]
    header.pop("__metadata__", None)

    def packed(header, rest=rest):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + rest

    for bit in range(64):
        yield f"bit {bit} of the length", (size ^ 1 << bit).to_bytes(8, "little") + data[8:]
    for length in [0, 1, 2, size - 1, size + 1, len(data) - 8, len(data), 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1]:
        yield f"length {length}", length.to_bytes(8, "little") + data[8:]
    for how, nested in NESTED.items():
        yield f"header of nested {how}", packed(nested)
    for value in VALUES:
        yield f"header is {value!r}", packed(json.dumps(value).encode())
        for key in ("dtype", "shape", "data_offsets"):
            name = rng.choice(list(header))
            yield f"{key} of {name} is {value!r}", packed({**header, name: {**header[name], key: value}})
        yield f"entry of wte.weight is {value!r}", packed({**header, "wte.weight": value})
    for dtype in DTYPES:  # a lone tensor, so that only its dtype is wrong, not its place among the others
        for count in (1, 2, 4, 8, 16):
            entry = {"dtype": dtype, "shape": [16, 8], "data_offsets": [0, 16 * count]}
            yield f"wte.weight alone, of {dtype}, {count} bytes a row", packed({"wte.weight": entry}, rest[:16 * count])
    for _ in range(60):
        one, other = rng.sample(list(header), 2)
        how, changed = rng.choice([
            ("swap the entries of", {**header, one: header[other], other: header[one]}),
            ("give away the name of", {(other if name == one else name): entry for name, entry in header.items()}),
            ("prefix", {("transformer." if name == one else "") + name: entry for name, entry in header.items()}),
            ("drop", {name: entry for name, entry in header.items() if name != one}),
            ("reshape", {**header, one: {**header[one], "shape": [1, *header[one]["shape"]]}}),
            ("rename to h.", {("h." if name == one else name): entry for name, entry in header.items()}),
            ("rename to nothing", {("" if name == one else name): entry for name, entry in header.items()}),
        ])
        yield f"{how} {one}, {other}", packed(changed)
    for _ in range(20):
        at = rng.randrange(len(rest))
        yield f"numbers from {at} on are -1, nan", packed(header, rest[:at] + b"\xff" * (len(rest) - at))


def of_config(data, rng):
    config = json.loads(data)
    for field in FIELDS:
        for value in VALUES:
            yield f"{field} is {value!r}", json.dumps({**config, field: value}).encode()
    for field in config:
        yield f"without {field}", json.dumps({key: value for key, value in config.items() if key != field}).encode()
    for encoding in ("utf-8-sig", "utf-16", "utf-16-be", "utf-32"):
        yield encoding, data.decode().encode(encoding)
    yield "a number of 5000 digits", data.replace(b'"n_layer": 2', b'"n_layer": ' + b"2" * 5000)
    yield "every field twice", data.rstrip()[:-1] + b"," + data.lstrip()[1:]


def of_ends(data, rng):
    ids = json.loads(data)
    for field in ("eos_token_id", "bos_token_id", "pad_token_id"):
        for value in VALUES:
            yield f"{field} is {value!r}", json.dumps({**ids, field: value}).encode()
            yield f"{field} is [0, {value!r}]", json.dumps({**ids, field: [0, value]}).encode()
    yield "no ids", b"{}"


def of_settings(data, rng):
    for value in VALUES:
        yield f"add_prefix_space is {value!r}", json.dumps({**json.loads(data), "add_prefix_space": value}).encode()


def of_index(data, rng):
    index = json.loads(data)
    places = index["weight_map"]
    for value in [*VALUES, "..", "/", "config.json", "../x", "model.safetensors", "model-00001-of-00002"]:
        name = rng.choice(list(places))
        yield f"weight_map is {value!r}", json.dumps({**index, "weight_map": value}).encode()
        yield f"{name} is in {value!r}", json.dumps({**index, "weight_map": {**places, name: value}}).encode()
        yield f"all are in {value!r}", json.dumps({**index, "weight_map": dict.fromkeys(places, value)}).encode()
        yield f"new is in {value!r}", json.dumps({**index, "weight_map": {**places, "new": value}}).encode()
    for _ in range(30):
        name, shard = rng.choice(list(places)), rng.choice(list(places.values()))
        yield f"{name} is in {shard}", json.dumps({**index, "weight_map": {**places, name: shard}}).encode()
        less = {other: shard for other, shard in places.items() if other != name}
        yield f"without {name}", json.dumps({**index, "weight_map": less}).encode()


def of_vocabulary(data, rng):
    vocabulary = json.loads(data)
    for value in VALUES:
        token = rng.choice(list(vocabulary))
        yield f"{token!r} is {value!r}", json.dumps({**vocabulary, token: value}).encode()
        yield f"<|endoftext|> is {value!r}", json.dumps({**vocabulary, "<|endoftext|>": value}).encode()
    for token in ("", " ", "\0", "é", "€", "<|startoftext|>", "<|im_end|>", "\ud800"):
        yield f"{token!r} is new", json.dumps({**vocabulary, token: len(vocabulary)}).encode()
    for _ in range(20):
        one, other = rng.sample(list(vocabulary), 2)
        swapped = {**vocabulary, one: vocabulary[other], other: vocabulary[one]}
        yield f"{one!r} and {other!r} exchanged", json.dumps(swapped).encode()
        less = {token: id for token, id in vocabulary.items() if token != one}
        yield f"without {one!r}", json.dumps(less).encode()


def of_tokenizer(data, rng):
    """Every part of it of another kind; its vocabulary, its merges and its added tokens in disorder."""
    raw = json.loads(data)
    model, added = raw["model"], raw["added_tokens"][0]

    def packed(**parts):
        return json.dumps({**raw, **parts}).encode()

    for case, vocabulary in of_vocabulary(json.dumps(model["vocab"]).encode(), rng):
        yield case, packed(model={**model, "vocab": json.loads(vocabulary)})
    for value in VALUES:
        for part in raw:
            yield f"{part} is {value!r}", packed(**{part: value})
        for key in model:
            yield f"model.{key} is {value!r}", packed(model={**model, key: value})
        for key in raw["pre_tokenizer"]:
            yield f"pre_tokenizer.{key} is {value!r}", packed(pre_tokenizer={**raw["pre_tokenizer"], key: value})
        for key in added:
            yield f"added_tokens[0].{key} is {value!r}", packed(added_tokens=[{**added, key: value}])
            more = {**added, "content": "x" * 20, "id": added["id"] + len(model["vocab"]), key: value}
            yield f"added_tokens[1].{key} is {value!r}", packed(added_tokens=[added, more])
        merges = [*model["merges"], value]
        yield f"the last merge is {value!r}", packed(model={**model, "merges": merges})
        yield f"there are merges of {value!r}", packed(model={**model, "merges": [*model["merges"], [value, value]]})
    for _ in range(40):
        merges, at = list(model["merges"]), rng.randrange(len(model["merges"]))
        how, changed = rng.choice([
            ("repeat", [*merges, merges[at]]), ("drop", merges[:at] + merges[at + 1:]), ("cut", merges[:at]),
            ("move", merges[:at] + merges[at + 1:] + [merges[at]]), ("turn", merges[::-1]),
            ("add", [*merges, rng.sample(list(model["vocab"]), 2)]), ("join", [" ".join(merge) for merge in merges]),
        ])
        yield f"merges: {how} {at}", packed(model={**model, "merges": changed})


def test_every_damage_is_refused_or_answers(tmp_path):
    import checkpoints as make  # not at the top: the other process does without transformers
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 300}
    model = make.random_gpt2(**sizes, bos_token_id=0, eos_token_id=0)
    make.save_tokenizer(tmp_path, make.train_bpe(vocab_size=300))
    make.save_vocabulary(tmp_path, 300)
    (tmp_path / "merges.txt").unlink()
    model.save_pretrained(tmp_path, max_shard_size="6KB")
    make.save(model, tmp_path / "whole", "hub")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / name).replace(tmp_path / name)
    (tmp_path / "whole" / "generation_config.json").unlink()
    (tmp_path / "whole").rmdir()
    process = subprocess.run([sys.executable, __file__, tmp_path], env=os.environ | {"PYTHONPATH": str(ROOT)},
                             check=False, capture_output=True, text=True, encoding="utf-8", errors="replace")
    lines = process.stdout.splitlines()
    assert process.returncode == 0 and lines[-1] == "the end", (lines[-1:], process.stderr[-3000:])
    results = list(zip(lines[:-1:2], lines[1::2], strict=True))
    wrong = [": ".join(result) for result in results if result[1] not in ("answers", "refused")]
    assert not wrong, "\n".join(wrong)
    counts = Counter(result for _, result in results)
    assert counts["refused"] > 1500 and counts["answers"] > 300, counts  # what is harmless must not be refused


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    main(Path(sys.argv[1]))

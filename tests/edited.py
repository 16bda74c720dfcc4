"""Tells an edit of train_gpt2.py from a bug: does the file still compute what GPT-2 computes?

    python tests/edited.py [folder or Hub name]

compares it with transformers, in float32 and eval mode, on that checkpoint or, without an argument,
on a tiny random one. Each line shows a difference from transformers, beside the rounding error that
transformers has itself: how far its float32 is from its float64. Both are relative to the largest
value; up to ten rounding errors are fine. The last line compares generate() with itself without the
cache. If the checkpoint doesn't fit the edited model, only that line is left, with random weights.
The exit status is 1 if a line is LARGE. With gpt2, this takes minutes and 7 GB of memory. Only
pytest looks at sampling and at starting weights.
"""
import sys
import tempfile

import torch
from checkpoints import ROOT, random_gpt2, random_idx, randomize, save
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 48, "vocab_size": 97}
EQUAL, FINE = "equal", "fine: rounding"
LARGE, CACHE = "LARGE: not GPT-2", "LARGE: the cache changes the text"
MEANING = {
    LARGE: "The file computes something else: a bug, unless you meant to change what it computes.",
    CACHE: "generate() gives other tokens with its cache than without: this is always a bug.",
    FINE: "The file still computes GPT-2 and only rounds differently, so pytest fails.",
    EQUAL: "The logits and gradients are exactly transformers'. For sampling, run pytest.",
}


def compute(what, model, idx):
    """{"logits": them}, or {parameter: its gradient} of the next-token loss."""
    with torch.set_grad_enabled(what == "gradients"):
        out = model(idx)
    logits = out if torch.is_tensor(out) else out[0]  # transformers' and the lecture's give more
    if what == "logits":
        return {what: logits}
    model.zero_grad()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters() if p.requires_grad}


def difference(tensors, others):
    """The largest one, relative to the largest value of its tensor, or of the transposed one, as
    nn.Linear has it. NaN stays NaN."""
    apart = []
    for name, b in others.items():
        a = tensors.get(name, b)
        off = [(each - b).abs().max() / (b.abs().max() or 1)
               for each in (a, a.mT if a.ndim > 1 else a) if each.shape == b.shape]
        apart.append(min(off, default=torch.tensor(torch.inf)))
    return torch.stack(apart).max().item()


def compare(ours, name):
    """The lines about the model, one by one: (what, difference, rounding error, verdict)."""
    theirs, exact = (GPT2LMHeadModel.from_pretrained(name, dtype=dtype)
                     for dtype in (torch.float32, torch.float64))
    end = min(ours.config.block_size, theirs.config.n_positions)
    for what, B, T in [("logits", 1, 1), ("logits", 3, 7), ("logits", 2, 33), ("logits", 1, end),
                       ("gradients", 3, 7), ("gradients", 2, 33)]:
        idx = random_idx(theirs, B, min(T, end))
        a, b, c = (compute(what, model, idx) for model in (ours, theirs, exact))
        off, rounding = difference(a, b), difference(b, c)
        verdict = EQUAL if off == 0 else FINE if off <= 10 * rounding else LARGE
        yield f"{what} of {B} x {idx.shape[1]} tokens", off, rounding, verdict


def look_at_the_cache(ours, error):
    """The line about generate(), which raises `error` for NaN. Without the cache, the model runs on
    the whole text at each step."""
    def whole(new, caches, **options):
        seen.append(new)
        return plain(torch.cat(seen, dim=1), **options)

    ours.config.eos_token_id = None  # so that no text ends
    prompt, length = random_idx(ours, 8, 5), min(ours.config.block_size, 40)
    plain, seen, outs = ours.forward, [], []
    for each in (plain, whole):
        ours.forward = each
        try:
            outs.append(ours.generate(prompt, length, temperature=0))
        except error:
            outs.append(prompt.new_full((8, length), -1))
    off = (outs[0] != outs[1]).sum().item()
    return "tokens that the cache changes", off, 0, CACHE if off else EQUAL


def main(train_gpt2, name=None):
    """Print the table and what it means; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        name, rows = name or save(random_gpt2(**TINY, n_positions=64), folder), []
        try:
            ours = train_gpt2.GPT.from_pretrained(name).float()
        except (train_gpt2.InputError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "size mismatch" not in str(error):
                raise  # a bug, and not that the checkpoint doesn't fit the model
            print(f"{error}\nSo the weights are random here, and only the cache is checked.\n")
            ours = randomize(train_gpt2.GPT(train_gpt2.GPTConfig(**TINY)))
        else:
            rows += compare(ours, name)
    rows.append(look_at_the_cache(ours, train_gpt2.InputError))
    print(f"{'':30}difference  rounding  verdict")
    for what, off, rounding, verdict in rows:
        print(f"{what:30}{off:10.2g}{rounding:10.2g}  {verdict}")
    seen = {verdict for *_, verdict in rows}
    bad = [MEANING[verdict] for verdict in (LARGE, CACHE) if verdict in seen]
    fine = [MEANING[FINE if FINE in seen else EQUAL]] if rows[1:] else []
    print("", *(bad or fine), sep="\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train_gpt2
    sys.exit(main(train_gpt2, *sys.argv[1:]))

"""Tells an edit of train_gpt2.py from a bug: does the file still compute what GPT-2 computes?

    python tests/edited.py [folder or Hub name]

compares it with transformers, in float32 and eval mode, on that checkpoint or, without an argument,
on a tiny random one, which needs no network. Each line shows a difference from transformers, beside
the rounding error that transformers has itself: how far its float32 is from its float64. Both are
relative to the largest value. A difference of at most ten rounding errors is fine. The exit status
is 0 if all lines are equal or fine, else 1. With gpt2, it takes minutes and 7 GB of memory.
"""
import copy
import sys
import tempfile

import torch
from checkpoints import ROOT, random_gpt2, random_idx, save
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

TINY = {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": 64, "vocab_size": 97}
EQUAL, FINE, LARGE = "equal", "fine: rounding", "LARGE: this isn't GPT-2's any more"
CACHE = "LARGE: the cache changes the text"
MEANING = {  # from the worst to the best
    LARGE: "The file computes something other than GPT-2: expected if you meant to change what the "
           "model\ncomputes, and a bug if you only meant to write it differently.",
    CACHE: "generate() gives other tokens with its cache than the model gives without: this is a "
           "bug,\nwhatever the model computes.",
    FINE: "The file still computes GPT-2 and only rounds differently, so tests that compare with "
          "torch.equal\nfail.",
    EQUAL: "The file computes exactly what transformers computes.",
}


def forward(model, idx):
    out = model(idx)
    out = out[0] if isinstance(out, tuple) else out  # the lecture's is (logits, loss)
    return getattr(out, "logits", out)  # transformers wraps its own


@torch.no_grad()
def logits(model, idx):
    return {"logits": forward(model, idx)}


def gradients(model, idx):
    """{parameter: its gradient} of the next-token loss."""
    model.zero_grad()
    F.cross_entropy(forward(model, idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters() if p.requires_grad}


def difference(tensors, others):
    """The largest one, relative to the largest value of its tensor. NaN stays NaN."""
    both = [(tensors[name], other) for name, other in others.items() if name in tensors]
    if any(a.shape != b.shape for a, b in both):
        return float("inf")
    return torch.stack([(a - b).abs().max() / (b.abs().max() or 1) for a, b in both]).max().item()


def compare(ours, name):
    """The lines of the table, one by one: (what, difference, rounding error, verdict)."""
    theirs = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32).eval()
    exact = copy.deepcopy(theirs).double()
    end = min(ours.config.block_size, theirs.config.n_positions)
    looks = [(logits, (B, T)) for B, T in [(1, 1), (3, 7), (2, 33), (1, end)]]
    for look, (B, T) in [*looks, (gradients, (3, 7)), (gradients, (2, 33))]:
        idx = random_idx(theirs, B, min(T, end))
        a, b, c = (look(model, idx) for model in (ours, theirs, exact))
        off, rounding = difference(a, b), difference(b, c)
        verdict = EQUAL if off == 0 else FINE if off <= 10 * rounding else LARGE
        yield f"{look.__name__} of {B} x {idx.shape[1]} tokens", off, rounding, verdict
    ours.config.eos_token_id = None  # so that no text ends
    steps = prompt = random_idx(theirs, 8, 5)
    while steps.shape[1] < min(end, 40):
        step = logits(ours, steps)["logits"][:, -1:].argmax(dim=-1)
        steps = torch.cat((steps, step), dim=1)
    off = (ours.generate(prompt, steps.shape[1], temperature=0) != steps).sum().item()
    yield "tokens that the cache changes", off, 0, CACHE if off else EQUAL


def main(train_gpt2, name=None):
    """Print the table and what it means; return the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        name = name or save(random_gpt2(**TINY), folder)
        try:
            ours = train_gpt2.GPT.from_pretrained(name).float()
        except (train_gpt2.InputError, OSError) as error:
            print(*str(error).split())
            return 1
        print(f"{'':30}difference  rounding  verdict")
        seen = set()
        for what, off, rounding, verdict in compare(ours, name):
            print(f"{what:30}{off:10.2g}{rounding:10.2g}  {verdict}", flush=True)
            seen.add(verdict)
    worst = next(verdict for verdict in MEANING if verdict in seen)
    print(f"\n{MEANING[worst]}")
    return int(worst in (LARGE, CACHE))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import train_gpt2
    sys.exit(main(train_gpt2, *sys.argv[1:]))

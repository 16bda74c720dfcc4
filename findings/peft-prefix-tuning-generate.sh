#!/usr/bin/env bash
# peft: after prefix tuning, generate() ignores the trained prefix.
#
# What happens: a GPT-2 with a prefix (PrefixTuningConfig) gives the right logits when you call it,
# and it trains. But model.generate() writes what the base model would write if its text began at
# position 5, the length of the prefix: the prefix itself has no effect. With use_cache=False,
# generate() does use it. All that shows is a FutureWarning about a deprecated argument.
#
# Why it surprises: training and evaluation are right, and only the text is wrong. transformers
# 5.24.0 renamed the argument `past_key_values` to `cache`. Its generate() passes an empty `cache`,
# peft adds the prefix as `past_key_values`, and where both are given, transformers takes `cache`.
# With transformers 5.23.0, generate() uses the prefix.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11, Linux, CPU.
#
# Output seen:
#   peft 0.21.2, transformers 5.24.0, torch 2.13.0
#   logits for the next token, largest difference:
#     generate() to calling the model:                                  1.9
#     generate() to the base model, positions from 5, without a prefix: 0.0
#     generate(use_cache=False) to calling the model:                   0.0
#   seen again: generate() ignores the prefix
#
# Exits with 0 if it happens again, with 1 if the behaviour has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
cat > prefix.py <<'PYTHON'
import peft
import torch
import transformers
from peft import PrefixTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

print(f"peft {peft.__version__}, transformers {transformers.__version__}, "
      f"torch {torch.__version__.split('+')[0]}")
torch.manual_seed(0)
config = GPT2Config(vocab_size=100, n_layer=2, n_head=2, n_embd=32, n_positions=64,
                    bos_token_id=0, eos_token_id=0)
base = GPT2LMHeadModel(config).eval()
for p in base.parameters():  # larger than at the start of training, so that a difference shows
    torch.nn.init.normal_(p, std=0.3)
idx = torch.randint(1, 100, (2, 8))
with torch.no_grad():
    shifted = base(idx, position_ids=torch.arange(5, 13)[None]).logits[:, -1]

model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
for p in model.parameters():
    if p.requires_grad:  # the prefix, as if it were trained
        torch.nn.init.normal_(p, std=3)
how = {"input_ids": idx, "attention_mask": torch.ones_like(idx), "max_new_tokens": 1,
       "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
with torch.no_grad():
    called = model(idx).logits[:, -1]
generated = model.generate(**how).logits[0]
uncached = model.generate(**how, use_cache=False).logits[0]


def difference(a, b):
    return (a - b).abs().max().item()


print("logits for the next token, largest difference:")
print(f"  generate() to calling the model:                                  "
      f"{difference(generated, called):.1f}")
print(f"  generate() to the base model, positions from 5, without a prefix: "
      f"{difference(generated, shifted):.1f}")
print(f"  generate(use_cache=False) to calling the model:                   "
      f"{difference(uncached, called):.1f}")
ignored = difference(generated, called) > 1 and difference(generated, shifted) < 1e-3
if not (ignored and difference(uncached, called) < 1e-3):
    raise SystemExit("the behaviour has changed")
print("seen again: generate() ignores the prefix")
PYTHON
"$folder/venv/bin/python" -W ignore::FutureWarning prefix.py

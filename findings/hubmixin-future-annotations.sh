#!/usr/bin/env bash
# huggingface_hub: with `from __future__ import annotations`, PyTorchModelHubMixin saves a model
# and then can't load it.
#
# What happens: a model takes its settings as a dataclass, `def __init__(self, config: Config)`, as
# in the mixin's documentation. Saving writes config.json and weights. Loading makes a Config from
# config.json. But if the file begins with `from __future__ import annotations`, loading passes
# a plain dict to __init__ instead, which fails at the first `config.width`.
#
# Why it surprises: that import is common, and is meant to change no behaviour. The folder is the
# same, bit for bit, so the failure comes later and elsewhere, with an error that names neither the
# import nor the annotation. (The mixin compares the annotation, now a string, with classes.)
#
# Versions: huggingface_hub 2.4.0, torch 2.13.0, safetensors 0.8.0, Python 3.11, Linux, CPU.
#
# Output seen:
#   huggingface_hub 2.4.0, torch 2.13.0
#   Loading weights from local directory
#   without the import: saved config.json {"width": 5}; loading calls __init__ with a Config: loaded
#   with the import:    saved config.json {"width": 5}; loading calls __init__ with a dict:
#     AttributeError: 'dict' object has no attribute 'width'
#   seen again: the import breaks loading
#
# Exits with 0 if it happens again, with 1 if the behaviour has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet torch==2.13.0 huggingface_hub==2.4.0 safetensors==0.8.0
cd "$folder"
cat > model.py <<'PYTHON'
from dataclasses import dataclass

from huggingface_hub import PyTorchModelHubMixin
from torch import nn


@dataclass
class Config:
    width: int = 3


class Model(nn.Module, PyTorchModelHubMixin):
    def __init__(self, config: Config):
        super().__init__()
        Model.got = type(config).__name__
        self.layer = nn.Linear(config.width, config.width)
PYTHON
(echo "from __future__ import annotations"; cat model.py) > model_future.py
cat > hub.py <<'PYTHON'
import json
from importlib.metadata import version

import model
import model_future

print(f"huggingface_hub {version('huggingface_hub')}, torch {version('torch').split('+')[0]}")
seen = []
for label, module in ("without the import:", model), ("with the import:   ", model_future):
    module.Model(module.Config(width=5)).save_pretrained(module.__name__ + "_saved")
    with open(module.__name__ + "_saved/config.json") as file:
        saved = json.dumps(json.load(file))
    try:
        module.Model.from_pretrained(module.__name__ + "_saved")
        result = "loaded"
    except AttributeError as error:
        result = f"AttributeError: {error}"
    got = module.Model.got
    print(f"{label} saved config.json {saved}; loading calls __init__ with a {got}: {result}")
    seen.append((got, result.split(":")[0]))
if seen != [("Config", "loaded"), ("dict", "AttributeError")]:
    raise SystemExit("the behaviour has changed")
print("seen again: the import breaks loading")
PYTHON
"$folder/venv/bin/python" hub.py

"""The options of the model."""

from __future__ import annotations

import torch

# peft's and transformers' classes are typed Any here: the command line resolves the annotations of this file, and
# importing both would cost every --help seconds.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Instead of an adapter: every weight of the model is trained.
FULL = "none"
ADAPTERS = ("lora", "rslora", "dora", "pissa", "loftq", FULL)
SCHEDULES = ("cosine", "linear", "constant")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(message)

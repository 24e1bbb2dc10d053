"""Rows of very different lengths, packed."""

from __future__ import annotations

from seedlora.datamodules.sampler import ReplicaSampler
from tests.helpers.models import SEEDS, make_data

#: Rows of 50 to 110 tokens.
TASK = {"task": "chain_sum", "task_options": {"min_terms": 2, "max_terms": 12}}
PACKED = {**TASK, "max_length": 128, "pack_tokens": 256, "batch_size": 4}


def prepared(module, **options):
    """Set up such rows with the tokenizer of a module."""
    data = make_data(**{**PACKED, **options})
    data.tokenizer = module.tokenizer
    data.setup("fit")
    return data


def sampler_of(data, **options):
    """Return the sampler of three seeds over the training rows."""
    defaults = {"seeds": SEEDS, "batch_size": data.batch_size, "pack_tokens": data.pack_tokens}
    return ReplicaSampler(data.rows["train"], **{**defaults, **options})

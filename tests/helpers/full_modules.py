"""Modules that are trained in full."""

from __future__ import annotations

from seedlora.adapters.writing import write_adapter

ENDS = ["embed_tokens", "lm_head"]


def save_replica(module, name, folder):
    """Write one replica of a module, with what it trained in full, as PEFT reads it."""
    stack = module.stack
    write_adapter(folder, stack.stored_factors(name), module.options.saved_config(), modules=stack.full_weights(name))

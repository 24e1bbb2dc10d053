"""Selective recomputation: the same numbers, no further product with a frozen weight, less memory."""

from __future__ import annotations

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.live_bytes import LiveBytes
from seedlora.model.recomputation import RECOMPUTATIONS, recomputation
from tests.helpers.models import ROWS, SEEDS, moved
from tests.helpers.precision import relative
from tests.helpers.training import largest_difference, trained_updates

NAMES = [f"seed_{seed}" for seed in SEEDS]
KINDS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.1},
    "dora": {"adapter": "dora"},
    "dora with dropout": {"adapter": "dora", "lora_dropout": 0.1},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "full": {"adapter": "full"},
}


def in_training(base_model, which, **options):
    module = moved(base_model, *SEEDS, gradient_checkpointing=which, **options)
    module.model.train()
    return module


def step(module):
    """Losses and gradients of a step."""
    module.zero_grad()
    keys = [(1, 2)] * len(NAMES) if module.options.lora_dropout else None
    module.stack.route(NAMES, dropout_keys=keys)
    losses, *_ = module.token_losses(ROWS, ROWS)
    losses.sum().backward()
    return [losses.detach(), *(p.grad for name in NAMES for p in module.stack.parameters(name))]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_without(tiny_llama, kind):
    expected, found = (step(in_training(tiny_llama, which, **KINDS[kind])) for which in ("none", "selective"))
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


@pytest.mark.usefixtures("float64")
def test_a_run_with_accumulation_ends_as_without(tiny_llama, tmp_path):
    options = {"dropout": 0.1, "accumulate_grad_batches": 2}

    def updates(which):
        chosen = {"gradient_checkpointing": which}
        return trained_updates(tiny_llama, tmp_path / which, SEEDS, module_options=chosen, **options)

    plain, selective = updates("none"), updates("selective")
    assert max(largest_difference(plain[seed], selective[seed]) for seed in SEEDS) < 1e-6


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}], ids=str)
def test_no_product_with_a_frozen_weight_is_done_again(tiny_llama, options):
    """Only what the adapters add is computed again: their second product."""
    operations = {}
    for which in RECOMPUTATIONS:
        module = in_training(tiny_llama, which, **options)
        step(module)  # the first looks at the head besides
        with FlopCounterMode(display=False) as counter:
            step(module)
        operations[which] = counter.get_total_flops()
    outline, tokens = module.options.outline, ROWS.numel()
    added = 2 * tokens * len(SEEDS) * module.options.r * sum(d for d, _ in outline.linear.values())
    frozen = 2 * tokens * sum(d * k for d, k in outline.linear.values())
    # Where they are added in place, the counter does not see them at all.
    assert 0 < operations["selective"] - operations["none"] <= 2 * added
    assert operations["full"] - operations["none"] > frozen


def test_memory_is_between_none_and_all(tiny_llama):
    peaks = {}
    for which in RECOMPUTATIONS:
        module = in_training(tiny_llama, which)
        step(module)
        with LiveBytes(module.parameters()) as live:
            step(module)
        peaks[which] = live.peak
    assert peaks["full"] < peaks["selective"] < peaks["none"]


def test_what_older_files_say_is_understood():
    assert [recomputation(value) for value in (True, False, "selective")] == ["full", "none", "selective"]

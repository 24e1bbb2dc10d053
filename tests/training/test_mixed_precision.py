"""A base model in float32 under ``trainer.precision bf16-mixed``, which 16-mixed is on a CPU: as in float32, nearly."""

from __future__ import annotations

import pytest

from tests.helpers.training import largest_difference, trained_updates

#: Adapter, how the base model is stored, and options of the data: rows one by one, and joined without padding.
KINDS = [
    ("lora", "none", {}),
    ("lora", "none", {"pack_tokens": 512}),
    ("pissa", "none", {}),
    ("lora", "int8", {}),
]


@pytest.mark.parametrize(("adapter", "quantization", "data"), KINDS)
def test_mixed_precision_trains_what_float32_trains(tiny_llama, tmp_path, adapter, quantization, data):
    options = {"adapter": adapter, "quantization": quantization, "learning_rate": 2e-3}
    found, wanted = (
        trained_updates(
            tiny_llama, tmp_path / name, [1, 2], module_options=options, data_options=data, max_steps=3, precision=name
        )
        for name in ("bf16-mixed", "32-true")
    )
    for seed in (1, 2):
        assert 0 < largest_difference(found[seed], wanted[seed]) < 0.2

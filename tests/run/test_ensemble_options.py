"""The options of an ensemble."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.run.ensemble_options import EnsembleOptions


def test_the_callback_has_the_options_and_their_defaults():
    given = inspect.signature(SeedEnsembleCallback).parameters
    fields = {field.name: field.default for field in dataclasses.fields(EnsembleOptions)}
    assert {name: option.default for name, option in given.items()} == fields
    callback = SeedEnsembleCallback([5, 6], **{name: fields[name] for name in fields if name != "seeds"})
    assert callback.ensemble.options == EnsembleOptions((5, 6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": ()}, r"seeds is empty; give at least one seed, for example \[11, 42, 202\]"),
        ({"seeds": (1, -1)}, r"seeds must be from 0 to 2\*\*63 - 1, got -1"),
        ({"seeds": (7, 42, 7)}, "seeds must differ, but 7 is given more than once"),
        ({"vary": "none"}, "Unknown vary 'none'; choose one of both, init, order"),
        ({"stack_size": 0}, "stack_size must be at least 1, or 'auto', got 0"),
        ({"keep": "first"}, "Unknown keep 'first'; choose one of last, best"),
        ({"on_divergence": "pray"}, "Unknown on_divergence 'pray'; choose one of stop, exclude"),
        ({"patience": 0}, "patience must be at least 1 validation, got 0"),
        ({"checkpoint_every_n_steps": 0}, "checkpoint_every_n_steps must be at least 1, got 0"),
        ({"budget": "half"}, "Unknown budget 'half'; choose one of equal, full"),
        ({"merge": "tie"}, "Unknown merge method 'tie'; choose one of"),
        ({"compare": "ties, tie"}, "Unknown merge method 'tie'; choose one of"),
        ({"controls": "some"}, "Unknown controls 'some'; choose one of none, untrained, all"),
        ({"merge": "soup", "merge_options": {"weights": [1, 2]}}, r"merge_options weights must be 3 numbers"),
    ],
)
def test_wrong_options_are_known_when_they_are_made(options, message):
    with pytest.raises(ValueError, match=message):
        EnsembleOptions(**options)


def test_weights_are_one_per_seed():
    with pytest.raises(ValueError, match=r"weights must be 2 numbers, one per seed, got \[1, 2, 3\]"):
        SeedEnsembleCallback([1, 2], merge="soup", merge_options={"weights": [1, 2, 3]})
    with pytest.raises(ValueError, match=r"compare_options weights must be 2 numbers, one per seed, got \[1, 2, 3\]"):
        SeedEnsembleCallback(
            [1, 2], merge="soup", compare="seedlora", compare_options={"seedlora": {"weights": [1, 2, 3]}}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "first"}, "Unknown keep 'first'; choose one of last, best"),
        ({"on_divergence": "pray"}, "Unknown on_divergence 'pray'; choose one of stop, exclude"),
        ({"patience": 0}, "patience must be at least 1 validation, got 0"),
        ({"stack_size": "most"}, "stack_size must be at least 1, or 'auto', got 'most'"),
    ],
)
def test_the_callback_refuses_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        SeedEnsembleCallback(**options)

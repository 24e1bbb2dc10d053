"""The optimizer as an option: what is found and refused, and that a replica learns in a stack what it learns alone."""

from __future__ import annotations

import sys

import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.model_options import ModelOptions
from seedlora.training.optimizer_choice import optimizer_choice
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import SAME
from tests.helpers.training import OPTIONS, largest_difference, make_trainer, saved, train

SHARED_NORM = "tests.helpers.optimizers.SharedNorm"
#: Each with a rate at which it moves as far as AdamW does at its own.
STACKED = [
    ({"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "nesterov": True}}, 0.5),
    ({"class_path": "torch.optim.RMSprop", "init_args": {"momentum": 0.5, "centered": True}}, 1e-3),
    ("adam", 2e-3),
    ("adamw", 2e-3),
    ("NAdam", 2e-3),
    ({"class_path": "torch.optim.AdamW", "init_args": {"amsgrad": True, "betas": [0.8, 0.9], "fused": False}}, 2e-3),
    ("torch.optim.Adafactor", 1e-2),
    ("muon", 2e-2),
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("optimizer", "rate"), STACKED, ids=[str(o)[:40] for o, _ in STACKED])
def test_each_replica_of_a_stack_equals_its_standalone_run(tiny_llama, tmp_path, optimizer, rate):
    options = {"optimizer": optimizer, "learning_rate": rate, "lora_plus_ratio": 2.0}
    stack = train(tiny_llama, tmp_path / "stack", [1, 2, 3], **options)
    alone = train(tiny_llama, tmp_path / "alone", [2], **options)
    start = make_module(tiny_llama)
    found, wanted = (read_adapter(run.adapter_path(2)).layers for run in (stack, alone))
    assert largest_difference(found, wanted) < SAME
    assert all(factors.B.any() for factors in wanted.values()), start


@pytest.mark.usefixtures("float64")
def test_the_options_of_a_class_count(tiny_llama, tmp_path):
    """Another momentum is another run, and plain AdamW is torch's."""
    runs = {}
    for momentum in (0.0, 0.9):
        optimizer = {"class_path": "torch.optim.SGD", "init_args": {"momentum": momentum}}
        runs[momentum] = train(tiny_llama, tmp_path / str(momentum), [1], optimizer=optimizer).adapter_path(1)
    first, second = (read_adapter(folder).layers for folder in runs.values())
    assert largest_difference(first, second) > 0.01


def test_the_states_of_eight_bits_are_each_replicas_own(tiny_llama, tmp_path):
    """bitsandbytes counts in float32 whatever it is given, so this is no matter of float64."""
    pytest.importorskip("bitsandbytes")
    # Rank 128: states of 4096 numbers and more are kept in eight bits.
    options = {"optimizer": "adamw8bit", "r": 128, "lora_alpha": 128}
    stack = train(tiny_llama, tmp_path / "stack", [1, 2], max_steps=3, **options)
    alone = train(tiny_llama, tmp_path / "alone", [2], max_steps=3, **options)
    found, wanted = (saved(run.adapter_path(2)) for run in (stack, alone))
    for key, tensor in wanted.items():
        assert (found[key] - tensor).abs().max() <= 0.05 * tensor.abs().max(), key


@pytest.mark.usefixtures("float64")
def test_replicas_of_an_optimizer_that_mixes_tensors_are_trained_one_by_one(tiny_llama, tmp_path):
    options = {"optimizer": SHARED_NORM, "learning_rate": 0.5}
    run = train(tiny_llama, tmp_path / "run", [1, 2], **options)
    assert run.ensemble.stack_size == 1
    alone = train(tiny_llama, tmp_path / "alone", [2], **options)
    found, wanted = (read_adapter(each.adapter_path(2)).layers for each in (run, alone))
    assert largest_difference(found, wanted) < SAME


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack_size": 2}, r"optimizer='.*SharedNorm' looks at several tensors together.*leave out stack_size 2"),
        ({"scheme": "branch"}, r"looks at several tensors together.* and scheme='branch' trains them"),
    ],
)
def test_a_stack_of_replicas_that_would_learn_of_each_other_is_refused(tiny_llama, tmp_path, options, message):
    callback = SeedEnsembleCallback([1, 2], dirpath=tmp_path / "run", budget="full", **options)
    with pytest.raises(ValueError, match=message):
        make_trainer(callback, **OPTIONS).fit(make_module(tiny_llama, optimizer=SHARED_NORM), datamodule=make_data())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("asked", "per_tensor", "elementwise", "state_bytes"),
    [
        ("adamw", True, True, 8),
        ("sgd", True, True, 0),
        ("rmsprop", True, True, 4),
        ("adafactor", True, False, 0),
        ("muon", True, False, 4),
        (SHARED_NORM, False, False, 0),
    ],
)
def test_what_an_optimizer_does_is_seen(asked, per_tensor, elementwise, state_bytes):
    before = torch.get_rng_state()
    assert optimizer_choice(asked).traits == (per_tensor, elementwise, state_bytes)
    assert torch.equal(torch.get_rng_state(), before)


def test_eight_bits_of_state():
    pytest.importorskip("bitsandbytes")
    assert optimizer_choice("adamw_8bit").traits == (True, False, 2)
    assert optimizer_choice("lamb").traits[:2] == (True, False)
    assert optimizer_choice("lion").traits[:2] == (True, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamx"}, r"unknown optimizer 'adamx'; did you mean adam"),
        ({"optimizer": "torch.optim.Lion9"}, r"optimizer='torch.optim.Lion9' cannot be imported: .*no attribute"),
        ({"optimizer": "no_such_package.Lion"}, r"cannot be imported: No module named 'no_such_package'"),
        ({"optimizer": "torch.nn.Linear"}, r"is no class of optimizers"),
        ({"optimizer": "lbfgs"}, r"optimizer='lbfgs' does not take a step here: .*closure"),
        ({"optimizer": "sparseadam"}, r"does not take a step here: .*dense gradients"),
        ({"optimizer": "tests.helpers.optimizers.NoRate"}, r"has no learning rate 'lr'"),
        (
            {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}},
            r"lr is no option.*set learning_rate",
        ),
        ({"optimizer": {"class_path": "torch.optim.SGD", "momentun": 1}}, r"has no option 'momentun'; it has momentum"),
        ({"optimizer": {"class_path": "torch.optim.SGD", "momentum": -1}}, r"Invalid momentum value: -1"),
        ({"optimizer": {"momentum": 0.9}}, r"optimizer as a mapping has class_path, and init_args"),
        ({"optimizer": torch.optim.SGD}, r"optimizer takes a name, a class path, or class_path and init_args"),
        (
            {"optimizer": "rprop", "weight_decay": 0.1},
            r"optimizer='rprop' has no weight decay, and weight_decay is 0.1",
        ),
        ({"optimizer": "muon", "adapter": "dora"}, r"optimizer='muon' does not take a step here: .*2D"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        ModelOptions(**options)


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"unknown optimizer 'paged_lion_8bit'.*need it: pip install bitsandbytes"):
        ModelOptions(optimizer="paged_lion_8bit")

"""Which replicas a run trains, and what they are called."""

from __future__ import annotations

import pytest

from seedlora.names import is_replica, replica_name, seed_of
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.sweep import planned_replicas
from seedlora.training.model_options import ModelOptions
from seedlora.training.replicas import Replica, ReplicaOptions


def test_without_a_sweep_there_is_one_replica_per_seed():
    assert planned_replicas((3, 1)) == (Replica("seed_3", 3, 3), Replica("seed_1", 1, 1))


def test_swept_options_are_crossed_with_the_seeds_those_of_one_set_side_by_side():
    found = planned_replicas((3, 1), sweep={"r": [8, 16], "learning_rate": ["1e-3"]})
    assert [replica.name for replica in found] == [
        "seed_3_lr0p001_r8",
        "seed_1_lr0p001_r8",
        "seed_3_lr0p001_r16",
        "seed_1_lr0p001_r16",
    ]
    assert found[2] == Replica("seed_3_lr0p001_r16", 3, 3, ReplicaOptions(learning_rate=1e-3, r=16))
    # what a seed decides is as without a sweep
    shared = planned_replicas((3, 1), vary="init", sweep={"r": [8, 16]})
    assert [(replica.init_seed, replica.order_seed) for replica in shared] == [(3, 3), (1, 3)] * 2


def test_swept_options_are_zipped_with_the_seeds():
    found = planned_replicas((3, 1), sweep={"weight_decay": [0, 0.1], "lr_scheduler": ["linear"] * 2}, mode="zip")
    assert [replica.name for replica in found] == ["seed_3_decay0_linear", "seed_1_decay0p1_linear"]


@pytest.mark.parametrize("values", [{"learning_rate": 2e-5}, {"r": 16, "lora_alpha": 0.5}, {"lr_scheduler": "cosine"}])
def test_a_name_is_known_for_a_replica_of_its_seed(values):
    name = replica_name(42, values)
    assert is_replica(name)
    assert seed_of(name) == 42
    assert not is_replica(f"{name}_ema")
    assert not any(character in name for character in ".-+ /")


@pytest.mark.parametrize(
    ("sweep", "mode", "message"),
    [
        ({"dtype": ["float32"]}, "cross", "sweep dtype cannot be swept; choose from learning_rate, r, lora_a"),
        ({"r": 8}, "cross", "sweep r must be a list of values, got 8"),
        ({"r": []}, "cross", r"sweep r must be a list of values, got \[\]"),
        ({"r": [8, 8.5]}, "cross", "sweep r must be whole numbers, got 8.5"),
        ({"learning_rate": ["fast"]}, "cross", "sweep learning_rate must be numbers, got 'fast'"),
        (
            {"lr_scheduler": ["step"]},
            "cross",
            "sweep lr_scheduler must be of cosine, linear, constant, got",
        ),
        ({"learning_rate": ["1e-3", 0.001]}, "cross", "sweep learning_rate has 0.001 more than once"),
        ({"r": [4, 8]}, "zip", "gives each of the 3 seeds its own value: sweep r must have 3 values, got 2"),
        ({"r": [4]}, "product", "Unknown sweep_mode 'product'; choose one of cross, zip"),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep, mode, message):
    with pytest.raises(ValueError, match=message):
        EnsembleOptions(sweep=sweep, sweep_mode=mode)


def test_the_budget_and_the_weights_of_a_rule_are_of_all_replicas():
    options = {"merge": "soup", "sweep": {"r": [4, 8]}}
    with pytest.raises(ValueError, match="weights must be 6 numbers, one per replica, got"):
        EnsembleOptions(merge_options={"weights": [1, 2, 3]}, **options)
    run = Ensemble(EnsembleOptions(merge_options={"weights": [1, 2, 3, 4, 5, 6]}, controls="all", **options))
    assert len(run.pending) == 6
    assert run.control_limits(max_epochs=1, max_steps=-1) == {}


def test_a_replica_has_the_options_of_the_module_but_for_its_own():
    module = ModelOptions(r=8, lora_alpha=16, rank_pattern={"q_proj": 4}, learning_rate=1e-3)
    assert module.of_replica(ReplicaOptions()) == module
    own = module.of_replica(ReplicaOptions(learning_rate=2e-3, r=16, rate_factor=3.0))
    assert (own.learning_rate, own.r, own.lora_alpha, own.rank_pattern) == (6e-3, 16, 16, {"q_proj": 4})
    wide = module.of_replica(ReplicaOptions(rank_factor=3))
    assert (wide.r, wide.lora_alpha, wide.rank_pattern) == (24, 48, {"q_proj": 12})
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        module.of_replica(ReplicaOptions(r=0))

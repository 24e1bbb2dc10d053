"""Who of the replicas trains."""

from __future__ import annotations

import pytest

from seedlora.training.replicas import DivergedError, FitSettings, ReplicaStates
from tests.helpers.models import replicas


def test_a_stopped_replica_and_one_that_diverged_are_idle():
    states = ReplicaStates(FitSettings(replicas(1, 2, 3), on_divergence="exclude"))
    assert len(states) == 3
    states.stop("seed_1")
    states.exclude(["seed_3"], "loss not finite in step 2")
    assert states.idle == {"seed_1", "seed_3"}
    assert states.active == replicas(2)
    assert states.active_positions == [1]
    assert states.left_out == {"seed_3": "loss not finite in step 2"}
    again = ReplicaStates(FitSettings(replicas(1, 2, 3)))
    again.restore(idle=sorted(states.idle), left_out=states.left_out)
    assert (again.idle, again.left_out, tuple(again)) == (states.idle, states.left_out, tuple(states))


def test_a_replica_that_diverges_ends_the_run_unless_it_is_excluded():
    states = ReplicaStates(FitSettings(replicas(1, 2)))
    with pytest.raises(DivergedError, match="^seed_2: why; lower learning_rate, or go on without it by on_diver"):
        states.exclude(["seed_2"], "why")
    assert not states.idle

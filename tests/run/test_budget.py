"""How long each replica trains."""

from __future__ import annotations

import pytest

from seedlora.run.budget import ReplicaBudget, limited_batches, replica_budget


def test_the_share_of_a_replica():
    assert replica_budget("equal", n=3, max_epochs=6, max_steps=-1) == ReplicaBudget(2, None)
    assert replica_budget("full", n=3, max_epochs=-1, max_steps=7) == ReplicaBudget(None, 7)
    share = replica_budget("equal", n=2, max_epochs=4, max_steps=6)
    assert (share.total_steps(1), share.total_steps(2)) == (2, 3)
    assert [share.has_all_steps(steps) for steps in (2, 3, 4)] == [False, True, True]
    assert [share.has_all_epochs(epochs) for epochs in (1, 2)] == [False, True]
    assert not ReplicaBudget().has_all_steps(10**9)
    assert not ReplicaBudget().has_all_epochs(10**9)
    with pytest.raises(ValueError, match="among 3 seeds, which does not divide evenly"):
        replica_budget("equal", n=3, max_epochs=4, max_steps=-1)
    with pytest.raises(ValueError, match="max_epochs 0 leaves nothing to train"):
        replica_budget("equal", n=3, max_epochs=0, max_steps=-1)
    with pytest.raises(ValueError, match="the run has no end"):
        replica_budget("full", n=3, max_epochs=None, max_steps=-1)


@pytest.mark.parametrize(("limit", "taken"), [(1.0, 7), (0.5, 3), (5, 5), (9, 7), (0, 0), (0.0, 0)])
def test_the_batches_that_a_trainer_takes(limit, taken):
    assert limited_batches(7, limit) == taken

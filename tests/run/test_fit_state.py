"""What a fit remembers."""

from __future__ import annotations

from seedlora.run.budget import ReplicaBudget
from seedlora.run.fit_state import BestValidation, FitState


def test_a_fit_remembers_its_best_validation():
    best = BestValidation(loss=1.0, step=3)
    assert [best.is_beaten_by(loss) for loss in (0.5, 1.0, float("nan"))] == [True, False, False]
    assert BestValidation(loss=float("nan"), step=3).is_beaten_by(9.0)
    state = FitState(best={"seed_1": best}, terminated=True)
    state.begin("long_seed", ReplicaBudget(1, None))
    assert (state.control, state.share.epochs, state.best, state.terminated) == ("long_seed", 1, {}, True)

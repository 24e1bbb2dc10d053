"""The operations of a step."""

from __future__ import annotations

import math

from seedlora.run.operations import Work


def test_the_work_of_a_head_that_is_trained():
    frozen, trained = Work(10, 5, 2), Work(10, 5, 2, head_trained=True)
    assert math.isclose(trained.operations(tokens=7, scored=3) - frozen.operations(tokens=7, scored=3), 3 * 2 * 5)

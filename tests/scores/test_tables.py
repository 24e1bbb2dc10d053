"""The verdict on a test."""

from __future__ import annotations

import numpy as np

from seedlora.scores.results import results
from seedlora.scores.tables import verdict


def test_a_difference_whose_interval_covers_0_is_not_claimed():
    correct = np.array([[i % 2, i % 2, i % 3 == 0] for i in range(40)], dtype=bool)
    found = results(correct, ["seed_1", "seed_2", "soup"], ["seed_1", "seed_2"], metric="x")
    assert verdict(found).splitlines()[0] == "Soup: no difference from mean seed shown."

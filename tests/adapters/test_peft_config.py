"""PEFT's configurations are as we know them."""

from __future__ import annotations

import peft
from peft import TaskType

from seedlora.adapters.peft_config import PEFT_AUTO_CLASSES


def test_our_task_types_are_those_of_peft():
    assert set(PEFT_AUTO_CLASSES) == set(TaskType)
    assert all(hasattr(peft, name) for name in PEFT_AUTO_CLASSES.values())

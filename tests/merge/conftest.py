"""An adapter that belongs on a base model in 4 bits alone."""

from __future__ import annotations

import pytest


@pytest.fixture
def loftq(edited_copy):
    """An adapter that belongs on nf4 alone; the base model that it names is the original."""
    folder = edited_copy("lora")
    (folder / "base.json").write_text('{"quantization": "nf4"}')
    return folder

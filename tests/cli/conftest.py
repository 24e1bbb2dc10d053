"""A folder of its own for each test of a command."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """What a test leaves in the working directory lies in a folder of its own."""
    monkeypatch.chdir(tmp_path)

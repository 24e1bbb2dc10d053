"""Data with the tokenizer of the tiny model."""

from __future__ import annotations

import pytest

from tests.helpers.models import make_data, make_module


@pytest.fixture
def tokenizer(tiny_llama):
    return make_module(tiny_llama).tokenizer


@pytest.fixture
def data(tokenizer):
    module = make_data()
    module.tokenizer = tokenizer
    module.setup("fit")
    return module

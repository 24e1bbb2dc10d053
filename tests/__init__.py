"""The tests mirror the tree of rooms: those of ``seedlora/merge/layers.py`` are in ``tests/merge/test_layers.py``.

What several files need is in ``tests/helpers`` or a fixture of a ``conftest.py``; no test imports another.
"""

import pytest

# An assertion of a helper that fails says by which values, like one of a test.
pytest.register_assert_rewrite("tests.helpers")

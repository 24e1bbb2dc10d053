"""What a notebook imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

import seedlora
from tests.helpers.paths import ROOT


def test_every_public_name_is_there():
    assert {*seedlora.__all__} == {*seedlora._HOMES, "__version__"}
    for name in seedlora.__all__:
        assert getattr(seedlora, name) is not None
    assert {*seedlora.__all__} <= {*dir(seedlora)}


def test_an_unknown_name_says_what_is_there():
    with pytest.raises(AttributeError, match=r"no attribute 'fuse_folder'; it has METHODS, .*merge_folders"):
        _ = seedlora.fuse_folder


def test_importing_the_package_imports_no_library():
    command = "import sys, seedlora; print({'torch', 'peft', 'lightning', 'transformers', 'rich'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

"""Read what a run has stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from seedlora.adapters.adapter import is_trained
from seedlora.updates.diagnostics import natural_sort_key

#: Plain data, as JSON has it.
Facts: TypeAlias = dict[str, Any]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file; nothing if it is not there."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return content


def config_of(run: Path) -> dict[str, Any]:
    """Read the options that a run was started with; nothing if they are not there."""
    file = run / "config.yaml"
    try:
        return (yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def seed_folders(run: Path, excluded: Mapping[str, str]) -> list[str]:
    """Return the names of the seeds that were trained or left out."""
    folders = {folder.name for folder in run.glob("seed_*") if is_trained(folder)}
    return sorted({*folders, *excluded}, key=natural_sort_key)

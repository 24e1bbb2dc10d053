"""Read plain data, JSON or YAML, of files that anybody may have written."""

from __future__ import annotations

import json
from typing import Any


def from_json(text: str | bytes) -> Any:
    """Return what a JSON text holds.

    Raises:
        ValueError: if it is no JSON, or nested deeper than Python can go.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_yaml(text: str) -> Any:
    """Return what a YAML text holds, by the safe loader.

    Raises:
        ValueError: if it is no YAML, or nested deeper than Python can go.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None

"""Tell whoever runs a program something, on stderr: results alone go to stdout."""

from __future__ import annotations

from rich.console import Console


def say(sentence: str) -> None:
    """Print a sentence as it is, on a line of its own."""
    Console(stderr=True, soft_wrap=True).print(sentence, highlight=False, markup=False)

"""Tell whoever runs a program something, on stderr: results alone go to stdout."""

from __future__ import annotations

from seedlora.utils.progress import plain_console


def say(sentence: str) -> None:
    """Print a sentence as it is, on a line of its own."""
    plain_console(stderr=True, soft_wrap=True).print(sentence, highlight=False)

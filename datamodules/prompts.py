"""Prompt styles: how a request becomes the text that the response follows directly."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: ``{prompt}`` is the request. The response and the end token follow the last character.
STYLES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "{prompt}\n",
        "alpaca": (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\n{prompt}\n\n### Response:"
        ),
    }
)


def render(style: str, prompt: str) -> str:
    """The text before the response.

    Raises:
        ValueError: for an unknown style.
    """
    if style not in STYLES:
        raise ValueError(f"Unknown prompt style '{style}'; choose one of {', '.join(sorted(STYLES))}")
    return STYLES[style].replace("{prompt}", prompt)

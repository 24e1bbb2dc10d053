"""``samples.jsonl``: the rows of a test, with what each adapter takes for the answer."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from seedlora.names import SAMPLES_NAME
from seedlora.utils.plain_data import from_json


class Sample(TypedDict):
    """Hold a test row, and what each adapter takes for its answer.

    Attributes:
        item: number of the row.
        prompt: the text before the answer.
        expected: the answer.
        right: by adapter, whether greedy decoding gives the answer exactly.
        forced: by adapter, the most likely token after the true ones before it, at each place of the answer, as text.
            It is the adapter's own answer where it is right, and up to its first wrong token elsewhere.
    """

    item: int
    prompt: str
    expected: str
    right: dict[str, bool]
    forced: dict[str, str]


def read_samples(folder: Path) -> list[Sample]:
    """Read the tested rows of a run; none where they are not stored.

    Raises:
        ValueError: naming the file, if a line of it is no such row.
    """
    file = folder / SAMPLES_NAME
    if not file.is_file():
        return []
    lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line]
    try:
        samples: list[Sample] = [from_json(line) for line in lines]
        if all(set(Sample.__annotations__) <= set(sample) for sample in samples):
            return samples
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    raise ValueError(f"{file} cannot be read: a line lacks one of {', '.join(Sample.__annotations__)}")

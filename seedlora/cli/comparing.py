"""Compare adapters with a bar that counts layers, for ``inspect`` and ``compare``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from seedlora.cli.terminal import counting_bar, layer_counter
from seedlora.merge.adapter_comparison import SHOWN_RANK, AdapterComparison, compare


def compare_with_bar(sources: Sequence[str], *, method: str | None, base: str | None) -> AdapterComparison:
    """Compare adapters, with a bar that counts layers: PiSSA's starts take an SVD of every weight."""
    with counting_bar() as progress:
        on_layer = layer_counter(progress, progress.add_task("layers", total=None))
        return compare(sources, method=method, base=base, on_layer=on_layer)


def print_rank_note(console: Console, error: float | None) -> None:
    """Print how far updates of full rank are from what is shown of them, if there are any."""
    if error is not None:
        sentence = f"DoRA's updates have full rank; shown is the best rank {SHOWN_RANK} of each, relative error"
        console.print(f"{sentence} {error:.3g} at most")

"""The command ``preview``: show rows as the model will see them, how long they are, and what was left out."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from seedlora.datamodules import InstructionDataModule, all_data_modules
from seedlora.datamodules.packing import AUTO
from seedlora.datamodules.prompts import asked_of_a_server
from seedlora.datamodules.rows import Counts
from seedlora.datamodules.sampler import ReplicaSampler
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser
    from transformers import PreTrainedTokenizerBase

#: Characters of the longest bar of the histogram.
_BAR = 30
_SEEDS = (11, 42, 202)
#: More padding than this is worth a word.
_MUCH_PADDING = 0.3


@dataclass(frozen=True)
class Preview:
    """Facts about what training on a data module will see.

    Args:
        data: its name.
        style: its prompt style.
        prompt: how a server must be asked.
        splits: rows of each split.
        counts: per source, what became of its rows.
        rows: the first training rows: pieces of text, each with whether it is supervised; end tokens are pieces.
        tokens: of the training rows.
        supervised: of these, scored.
        lengths: shortest, median, 95th percentile and longest training row.
        histogram: per bucket its first and last length and its rows.
        padding: part of the tokens of a forward that is padding, for three seeds; ``None`` if the rows fill no batch.
        packing: how the rows of a forward share it, and why; ``None`` likewise.
        advice: what an option would mend, a sentence each.
    """

    data: str
    style: str
    prompt: str
    splits: dict[str, int]
    counts: dict[str, Counts]
    rows: list[list[tuple[str, bool]]]
    tokens: int
    supervised: int
    lengths: tuple[int, int, int, int]
    histogram: list[tuple[int, int, int]]
    padding: float | None
    packing: str | None
    advice: list[str]


def preview(
    data: InstructionDataModule,
    *,
    rows: int = 3,
    problems: Callable[[InstructionDataModule], Sequence[str]] = lambda _data: (),
) -> Preview:
    """Collect the facts of a data module that has its tokenizer.

    Args:
        data: whose rows are shown.
        rows: how many of them.
        problems: says why a model would not be trained on rows that are set up.

    Raises:
        ValueError: as :meth:`~seedlora.datamodules.base.InstructionDataModule.setup`.
    """
    data.setup()
    train = data.rows["train"]
    shortest, median, high, longest = (int(np.percentile(train.lengths, p)) for p in (0, 50, 95, 100))
    edges = np.unique(np.linspace(shortest, longest + 1, 11).astype(int))
    heights, _ = np.histogram(train.lengths, edges)
    data.seeds = _SEEDS
    record = data.prompt_record()
    fills = len(train) >= data.batch_size
    padding = data.train_dataloader().sampler.padding() if fills else None
    advice = [sentence] if padding is not None and (sentence := packing_advice(data, padding)) else []
    advice += problems(data)
    return Preview(
        data=type(data).__name__,
        style=record.get("style", "of its own"),
        prompt=asked_of_a_server(record),
        splits={split: len(part) for split, part in data.rows.items()},
        counts=data.counts,
        rows=[_pieces(data, row) for row in range(min(rows, len(train)))],
        tokens=int(train.lengths.sum()),
        supervised=int(train.num_items.sum()),
        lengths=(shortest, median, high, longest),
        histogram=[(int(a), int(b) - 1, int(n)) for a, b, n in zip(edges, edges[1:], heights, strict=False)],
        padding=padding,
        packing=data.packing.why if fills else None,
        advice=advice,
    )


def packing_advice(data: InstructionDataModule, padding: float) -> str | None:
    """Say which option would save padding, measured on the training rows; None if none would save much.

    Args:
        data: whose rows are set up.
        padding: part of the tokens of a forward that is padding now.
    """
    rows = data.rows["train"]
    if isinstance(data.pack_tokens, int) or padding < _MUCH_PADDING:
        return None
    if data.reason_not_to_pack is None:
        return f"{padding:.0%} of a forward is padding; {name_option('data.pack_tokens', AUTO)} would leave none"
    tokens = max(data.max_length, 2 * int(rows.lengths.max()))
    packed = ReplicaSampler(rows, seeds=_SEEDS, batch_size=data.batch_size, pack_tokens=tokens).padding()
    if packed > padding / 2:
        return None
    return f"{padding:.0%} of a forward is padding; {name_option('data.pack_tokens', tokens)} would leave {packed:.0%}"


def _pieces(data: InstructionDataModule, row: int) -> list[tuple[str, bool]]:
    ids, supervised = data.rows["train"].row(row)
    tokenizer = data.tokenizer
    assert tokenizer is not None
    ends = ids == tokenizer.eos_token_id
    changes = np.flatnonzero((np.diff(supervised) != 0) | ends[1:] | ends[:-1]) + 1
    parts = zip(np.split(ids, changes), np.split(supervised, changes), strict=True)
    return [(tokenizer.decode(part.tolist()), bool(said[0])) for part, said in parts]


def render_preview(facts: Preview, *, eos: str, colours: bool = True) -> Group:
    """Lay out the facts for a terminal: prompts dim, what is trained on bright, end tokens reversed.

    Args:
        facts: to be shown.
        eos: the end token.
        colours: whether there are any; what is trained on stands between guillemets otherwise.
    """
    left, right = ("", "") if colours else ("«", "»")
    panels = []
    for number, row in enumerate(facts.rows, start=1):
        text = Text()
        before = False
        for piece, said in [*row, ("", False)]:
            text.append("" if said == before else left if said else right)
            text.append(piece, "dim" if not said else "bold reverse" if piece == eos else "bold green")
            before = said
        panels.append(Panel(text, title=f"training row {number}", title_align="left"))
    table = Table(title=f"{facts.data}, style {facts.style}", title_justify="left", show_header=False)
    shortest, median, high, longest = facts.lengths
    table.add_row("rows", ", ".join(f"{rows:,} {split}" for split, rows in facts.splits.items()))
    for name, counts in facts.counts.items():
        found = f"{counts.read:,} rows; {counts.sentence() or 'all are used as they are'}"
        table.add_row(f"source {name}".rstrip(), found)
    share = facts.supervised / facts.tokens
    table.add_row("tokens", f"{facts.tokens:,} for training, {share:.0%} of them supervised")
    table.add_row("lengths", f"{shortest} to {longest}, median {median}, 95 % up to {high}")
    table.add_row("prompt", facts.prompt)
    for sentence in facts.advice:
        table.add_row("advice", sentence)
    if facts.padding is not None:
        table.add_row("padding", f"{facts.padding:.1%} of the tokens of a forward of three seeds; {facts.packing}")
    most = max(rows for _, _, rows in facts.histogram)
    width = len(str(longest))
    lines = []
    for first, last, rows in facts.histogram:
        bar = "█" * max(1, round(_BAR * rows / most)) if rows else ""
        lines.append(f"{first:>{width}} to {last:>{width}} {bar:<{_BAR}} {rows:,}")
    trained = f"{left}trained on{right}"
    legend = Text.assemble(("prompt", "dim"), ", ", (trained, "bold green"), ", ", (eos, "bold reverse"))
    return Group(*panels, legend, table, Text("tokens of a row\n" + "\n".join(lines)))


def main(
    argv: Sequence[str],
    *,
    load_tokenizer: Callable[[str], PreTrainedTokenizerBase],
    default_model: str,
    problems_of: Callable[[str, InstructionDataModule], Sequence[str]] = lambda _model, _data: (),
    reason_not_to_pack: Callable[[str], str | None] = lambda _model: "nothing is known of the model",
) -> int:
    """Run ``preview --data NAME --data.OPTION VALUE ... [--model.base_model MODEL] [--rows N] [--json]``.

    Args:
        argv: the words after ``preview``.
        load_tokenizer: gives the tokenizer of a model.
        default_model: the model if none is named.
        problems_of: says why a model would not be trained on rows that are set up.
        reason_not_to_pack: says why rows must not be joined for a model, None if they may.

    Returns:
        0, or 2 if the input is bad: a sentence on stderr then says what was asked, given and allowed.
    """
    try:
        parser = make_parser(default_model)
        options = parser.parse_args(list(argv))
        data = parser.instantiate(options).data
        model = options["model.base_model"]
        data.tokenizer, data.reason_not_to_pack = load_tokenizer(model), reason_not_to_pack(model)
        facts = preview(data, rows=options.rows, problems=partial(problems_of, model))
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split())
        if cause := re.search(r"Errors: - (.*) - Expected a <class 'NoneType'>", message):
            message = cause[1]  # without jsonargparse's page about types
        print(f"error: {message}", file=sys.stderr)  # noqa: T201 - stderr is this command's
        return 2
    if options.json:
        print(json.dumps(asdict(facts), indent=2))  # noqa: T201 - what --json asks for
    else:
        console = Console(markup=False, emoji=False)
        colours = console.color_system is not None
        console.print(render_preview(facts, eos=data.tokenizer.eos_token, colours=colours))
    return 0


def make_parser(default_model: str) -> ArgumentParser:
    """Make the parser of the command."""
    from jsonargparse import ArgumentParser

    known = all_data_modules()  # --data takes those that are imported

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if unknown := re.search(r"Option '(.*?)' is not accepted", message):
                message = f"unknown option --data.{unknown[1]}"
            elif unknown := re.search(r"Expected a dot import path string: (\S+)", message):
                kinds = [kind.__name__ for kind in known if not inspect.isabstract(kind)]
                message = f"unknown data module '{unknown[1]}'; choose one of {', '.join(sorted(kinds))}"
            raise ValueError(f"{message} (see python -m seedlora preview --help)") from ex

    parser = Parser(prog="python -m seedlora preview", description="Show rows as a model will see them.")
    parser.add_subclass_arguments(InstructionDataModule, "data", help="as in train.py", required=True)
    parser.add_argument("--model.base_model", type=str, default=default_model, help="whose tokenizer to use")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to show")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    return parser

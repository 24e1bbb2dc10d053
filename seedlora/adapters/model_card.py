"""Write the model card of a fused adapter: ``README.md`` in its folder, made of the records beside it."""

from __future__ import annotations

import errno
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from seedlora.adapters.public_base import public_base
from seedlora.names import BASE, FULL, SOUP
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.records.json_file import Content, JSONFile
from seedlora.records.results import RESULTS, RunResults
from seedlora.records.selection import SELECTION
from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.records.training import TRAINED, TrainedRow, unfinished_text
from seedlora.scores.advice import advise
from seedlora.scores.intervals import CONFIDENCE_PERCENT
from seedlora.scores.results import stored_results
from seedlora.scores.wording import PERCENT
from seedlora.utils.files import write_text
from seedlora.utils.places import without_home

CARD_NAME = "README.md"
#: The settings of a run that say how the seeds were trained, and the names under which the card tells them.
_TRAINING = {
    "data": "data",
    "data.task": "task",
    "data.path": "rows",
    "model.adapter": "adapter",
    "model.quantization": "quantization of the base in training",
    "model.r": "rank of a seed",
    "model.lora_alpha": "lora_alpha of a seed",
    "model.learning_rate": "learning rate",
    "model.lora_plus_ratio": "LoRA+ ratio",
    "epochs per seed": "epochs per seed",
    "steps per seed": "steps per seed",
}
_OF_ADAPTERS = {"model.r", "model.lora_alpha", "model.lora_plus_ratio"}
#: The front matter of an adapter and of a whole model.
_HEADS = (
    ("library_name: peft", "tags: [lora, seedlora]"),
    ("library_name: transformers", "tags: [seedlora]"),
)


def model_card(record: FusionRecord, rank: int | None, *, out: str, run: Path | None, name: str | None = None) -> str:
    """Return the card's text.

    Args:
        record: what ``fusion.json`` says.
        rank: of the adapter; ``None`` for a whole model.
        out: the name of the folder that the card is for.
        run: the folder around it, if all inputs lie there. What its ``run.json`` says about the training, and its
            ``results.json`` about the scores, is told if they are there.
        name: the label under which the adapter itself was scored; without it only its inputs' scores are told.
    """
    settings = (None if run is None else _read(SETTINGS, run)) or {}
    results = None if run is None else _read(RESULTS, run)
    trained = (None if run is None else _read(TRAINED, run)) or {}
    inputs = [entry["name"] for entry in record["inputs"]]
    lines = [
        "---",
        *_base_entry(record["base_model"]),
        *_HEADS[rank is None],
        "---",
        *_title(record, rank),
        *_unfinished(trained, inputs),
        *([] if results is None or run is None else _advised(results, run, record, inputs, name)),
        *_notes(record, rank, settings),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(record, settings).items()),
        *([] if results is None else _scores(results, inputs, name, this="model" if rank is None else "adapter")),
        "",
        "Made by" if run is None else "Made in the folder around this one by",
        "",
        "```sh",
        merge_command(record, out),
        "```",
        "",
    ]
    return without_home("\n".join(lines))


def _base_entry(base_model: str) -> list[str]:
    """Return the line of a card's head that names the base model: none, unless it has an id of the hub."""
    base = public_base(base_model)
    return [f"base_model: {base.name}"] if base.is_hub_id else []


def _base_fact(base_model: str) -> str:
    """Name the base model in a card's text: a folder by its name, without where it lies on this machine."""
    base = public_base(base_model)
    return base.name if base.is_hub_id else f"the folder {base.name}" if base.name else "not named by the inputs"


def seed_card(*, base_model: str, adapter: str, note: str, whole: bool = False, unfinished: str | None = None) -> str:
    """Return the card of one seed's adapter, or of its whole model.

    Args:
        base_model: name or path of its base model.
        adapter: what was trained, for people.
        note: as :func:`base_note` gives it.
        whole: whether it is a whole model.
        unfinished: of how many of how many steps it is, if it is not of all.
    """
    told = f"Trained as {adapter}, from {_base_fact(base_model)}" + (
        f", not to the end: {unfinished}." if unfinished else "."
    )
    lines = ["---", *_base_entry(base_model), *_HEADS[whole], "---", "# One seed of an ensemble", ""]
    return without_home("\n".join([*lines, told, *(["", note] if note else []), ""]))


def base_note(adapter: str, quantization: str) -> str:
    """Say what to know of the base model that adapters of this kind belong to; empty if there is nothing.

    Args:
        adapter: ``model.adapter`` of the run.
        quantization: ``model.quantization`` of it.
    """
    if adapter == "loftq":
        return (
            "It makes up for what 4 bits lose, so it belongs on the base model in nf4, not on the original: load that "
            'with `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)`.'
        )
    if adapter == "pissa":
        return "PiSSA's start is subtracted, at twice the rank: this is plain LoRA on the original base model."
    if quantization != "none":
        return f"Trained over the base model in {quantization}; it goes on the original base model too."
    return ""


def base_record(adapter: str, quantization: str) -> dict[str, str]:
    """Say the same for programs, where adapters of this kind belong on no other base model; empty for other kinds."""
    return {"quantization": quantization} if adapter == "loftq" else {}


def refresh_card(folder: Path) -> None:
    """Write the card of a fused adapter again, now that it is scored.

    Raises:
        ValueError: if ``fusion.json`` cannot be read.
        OSError: if it is not there, or the card cannot be written.
    """
    record = FUSION.read(folder)
    if record is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / FUSION.name))
    write_text(
        folder / CARD_NAME, model_card(record, _rank(folder), out=folder.name, run=folder.parent, name=folder.name)
    )


def merge_command(record: FusionRecord, out: str) -> str:
    """Return the command that makes the adapter again, in a folder of this name.

    It is to be run where the inputs were given, or for a run's own adapters in the run's folder.
    """
    words = ["python", "-m", "seedlora", "merge", *(entry["name"] for entry in record["inputs"])]
    words += ["--method", record["method"]]
    options = {**_options(record), **_given(record)}
    for key, value in options.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        words += [f"--{key}", text]
    return shlex.join([*words, "--out", out])


def _options(record: FusionRecord) -> dict[str, object]:
    """Return the options of the method, and those that every method has if they are not as they are by default."""
    plain = {("layers", "all"), ("svd", "auto"), ("seed", 0)}
    use = {key: value for key, value in record.get("use", {}).items() if (key, value) not in plain}
    return {**record["options"], **use}


def _given(record: FusionRecord) -> dict[str, str]:
    """Return what else the command was given."""
    given = {}
    if "dtype" in record:
        given["dtype"] = record["dtype"]
    if "base" in record:
        given["base"] = record["base"]
    if "into_base" in record:
        given["into_base"] = record["into_base"]
    return given


def _title(record: FusionRecord, rank: int | None) -> list[str]:
    """Say what it is."""
    full, n = _is_of_whole_models(record), len(record["inputs"])
    what = f"Rank {rank}, `lora_alpha` {rank}: all scaling is in the weights."
    if rank is None:
        what = "What training added to each matrix of the base model is merged, and added to it."
    return [
        f"# {n} {'models' if full else 'LoRA adapters'} merged with `{record['method']}`",
        "",
        what,
        "`fusion.json` has the inputs' checksums.",
    ]


def _unfinished(trained: Mapping[str, TrainedRow], inputs: Sequence[str]) -> list[str]:
    """Say which inputs were not trained to the end, in a paragraph, if some were not."""
    texts = {name: text for name in inputs if name in trained and (text := unfinished_text(trained[name]))}
    if not texts:
        return []
    return ["", f"**Not trained to the end:** {'; '.join(f'{name}: {text}' for name, text in texts.items())}."]


def _advised(
    results: RunResults, run: Path, record: FusionRecord, inputs: Sequence[str], name: str | None
) -> list[str]:
    """Say whether training helped and which adapter of the run is advised, in a paragraph."""
    found = stored_results(results, inputs)
    if found is None or name is None:
        return []
    merged = name if name in found.items else SOUP
    advised = advise(_read(SELECTION, run), found, inputs, method=record["method"], merged=merged)
    return ["", " ".join(advised["headline"])]


def _notes(record: FusionRecord, rank: int | None, settings: RunSettings) -> list[str]:
    """Say what has to be known of it, a paragraph each, with the empty line before."""
    notes = []
    kinds, averaged = record.get("kinds"), record.get("averaged")
    if kinds and not _is_of_whole_models(record):
        plain = rank is not None and not averaged
        result = "; this is plain LoRA on the base model below" if plain else ""
        notes.append(f"Kinds of the inputs: {', '.join(kinds)}{result}.")
    adapter = settings.get("model.adapter", "")
    note = base_note(adapter, settings.get("model.quantization", "none"))
    if note and adapter != "pissa" and rank is not None:
        notes.append(note)
    if "compression" in record:
        errors = record["compression"]
        mean, largest = errors["relative_error_mean"], errors["relative_error_max"]
        notes.append(f"Compressed to this rank: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most.")
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        notes.append(f"The method works on factors, so each input was compressed first: error {largest:.3g} at most.")
    if averaged:
        notes.append(f"Not merged by the method but averaged: {', '.join(f'`{key}`' for key in averaged)}.")
    if gain := record.get("gain"):
        notes.append(
            f"The fused update is {gain['mean']:.3g} times as long as the mean of the inputs, "
            f"{gain['min']:.3g} to {gain['max']:.3g} over the layers."
        )
    return [line for note in notes for line in ("", note)]


def _facts(record: FusionRecord, settings: RunSettings) -> dict[str, str]:
    """Return the table of what it is made of, by which method, and how the seeds were trained."""
    source = record.get("source")
    facts = {
        "base model": _base_fact(record["base_model"]),
        "inputs": ", ".join(entry["name"] for entry in record["inputs"]),
        "method": f"{record['method']} ({source})" if source else record["method"],
        **{key: f"{value}" for key, value in _options(record).items()},
    }
    full = settings.get("model.adapter") == FULL
    told: Mapping[str, object] = {key: value for key, value in settings.items() if value not in (None, "none")}
    for key, name in _TRAINING.items():
        if key in told and not (full and key in _OF_ADAPTERS):
            facts[name] = str(told[key])
    return facts


def _is_of_whole_models(record: FusionRecord) -> bool:
    return record.get("kinds") == ["whole models"]


def _scores(results: RunResults, inputs: Sequence[str], name: str | None, *, this: str) -> list[str]:
    """Return the table of scores, if the adapter or one of its inputs has one."""
    scores = {label: row for label, row in results["scores"].items() if label in (BASE, SOUP, name, *inputs)}
    if not set(scores) & {name, *inputs}:
        return []
    n = next(iter(scores.values()))["n"]
    rows = [
        f"| {f'**this {this}**' if label == name else label} | {PERCENT(row['value'])} "
        f"| {PERCENT.between(row['low'], row['high'])} |"
        for label, row in scores.items()
    ]
    return [
        "",
        f"Scores: {results['metric']}, n = {n}, {CONFIDENCE_PERCENT} % intervals.",
        "",
        "| adapter | score | interval |",
        "|---|---|---|",
        *rows,
    ]


def _read(file: JSONFile[Content], folder: Path) -> Content | None:
    """Return what a file says, or nothing if it cannot be read: a card is written without it."""
    try:
        return file.read(folder)
    except (OSError, ValueError):
        return None


def _rank(folder: Path) -> int | None:
    """Return the rank of an adapter; ``None`` for a whole model."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("r") if isinstance(config, dict) else None

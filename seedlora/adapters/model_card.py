"""The model card of a fused adapter: ``README.md`` in its folder, made of the records beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seedlora.utils.files import write_text

CARD_NAME = "README.md"
#: What of a run's settings says how the seeds were trained, and under which name.
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


def model_card(record: Mapping[str, Any], rank: int | None, *, run: Path | None, name: str | None = None) -> str:
    """The card's text.

    Args:
        record: what ``fusion.json`` says.
        rank: of the adapter; None for a whole model.
        run: the folder around it, if all inputs lie there. What its ``run.json`` says about the training, and its
            ``results.json`` about the scores, is told if they are there.
        name: the label under which the adapter itself was scored; without it only its inputs' scores are told.
    """
    inputs = [entry["name"] for entry in record["inputs"]]
    base = record["base_model"]
    full = record.get("kinds") == ["whole models"]
    what = f"Rank {rank}, `lora_alpha` {rank}: all scaling is in the weights."
    if rank is None:
        what = "What training added to each matrix of the base model is fused, and added to it."
    lines = [
        "---",
        f"base_model: {base}",
        *_HEADS[rank is None],
        "---",
        f"# {len(inputs)} {'models' if full else 'LoRA adapters'} fused with `{record['method']}`",
        "",
        what,
        "`fusion.json` has the inputs' checksums.",
    ]
    if (kinds := record.get("kinds")) and not full:
        plain = rank is not None and not record.get("averaged")
        result = "; this is plain LoRA on the base model below" if plain else ""
        lines += ["", f"Kinds of the inputs: {', '.join(kinds)}{result}."]
    settings = {} if run is None else _read(run / "run.json")
    adapter = settings.get("model.adapter", "")
    note = base_note(adapter, settings.get("model.quantization", "none"))
    if note and adapter != "pissa" and rank is not None:
        lines += ["", note]
    if "compression" in record:
        mean, largest = (record["compression"][f"relative_error_{key}"] for key in ("mean", "max"))
        lines += [
            "",
            f"Compressed to this rank: relative Frobenius error {mean:.3g} on average, {largest:.3g} at most.",
        ]
    if "inputs_compressed" in record:
        largest = record["inputs_compressed"]["relative_error_max"]
        lines += ["", f"The method works on factors, so each input was compressed first: error {largest:.3g} at most."]
    if averaged := record.get("averaged"):
        lines += ["", f"Not fused by the method but averaged: {', '.join(f'`{key}`' for key in averaged)}."]
    if gain := record.get("gain"):
        lines += [
            "",
            f"The fused update is {gain['mean']:.3g} times as long as the mean of the inputs, "
            f"{gain['min']:.3g} to {gain['max']:.3g} over the layers.",
        ]
    method = [record["method"], *([f"({record['source']})"] if record.get("source") else [])]
    facts = {"base model": base, "inputs": ", ".join(inputs), "method": " ".join(method)}
    facts |= {key: f"{value}" for key, value in {**record["options"], **_said(record.get("use", {}))}.items()}
    told = [key for key in _TRAINING if not (adapter == "none" and key in _OF_ADAPTERS)]
    facts |= {_TRAINING[key]: str(settings[key]) for key in told if settings.get(key) not in (None, "none")}
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
    lines += [] if run is None else _scores(run, inputs, name, this="this model" if rank is None else "this adapter")
    lines += [
        "",
        "Made by" if run is None else "Made in the folder around this one by",
        "",
        "```sh",
        merge_command(record),
        "```",
        "",
    ]
    return "\n".join(lines)


def seed_card(*, base_model: str, adapter: str, note: str, whole: bool = False) -> str:
    """The card of one seed's adapter, or of its whole model.

    Args:
        base_model: name or path of its base model.
        adapter: what was trained, for people.
        note: as :func:`base_note` gives it.
        whole: whether it is a whole model.
    """
    lines = ["---", f"base_model: {base_model}", *_HEADS[whole], "---"]
    return "\n".join(
        [*lines, "# One seed of an ensemble", "", f"Trained as {adapter}.", *(["", note] if note else []), ""]
    )


def base_note(adapter: str, quantization: str) -> str:
    """What to know of the base model that adapters of this kind belong to; empty if there is nothing.

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
    """The same for programs, where adapters of this kind belong on no other base model; empty for all other kinds."""
    return {"quantization": quantization} if adapter == "loftq" else {}


def refresh_card(folder: Path) -> None:
    """Write the card of a fused adapter again, now that it is scored.

    Raises:
        OSError: if its records cannot be read or the card cannot be written.
    """
    record = json.loads((folder / "fusion.json").read_text(encoding="utf-8"))
    rank = _read(folder / "adapter_config.json").get("r")
    write_text(folder / CARD_NAME, model_card(record, rank, run=folder.parent, name=folder.name))


def merge_command(record: Mapping[str, Any]) -> str:
    """The command that makes the adapter again: where it was given, or for a run's own adapters in the run's folder."""
    words = ["python", "-m", "seedlora", "merge", *(entry["name"] for entry in record["inputs"])]
    words += ["--method", record["method"]]
    for key, value in {**record["options"], **_said(record.get("use", {}))}.items():
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        words += [f"--{key.replace('_', '-')}", text]
    for key in ("dtype", "base", "into_base"):
        if key in record:
            words += [f"--{key.replace('_', '-')}", record[key]]
    return shlex.join([*words, "--out", "fused"])


def _said(use: Mapping[str, Any]) -> dict[str, Any]:
    """The options that every method has, without those that are as they are by default."""
    return {
        key: value
        for key, value in use.items()
        if (key, value) not in {("layers", "all"), ("svd", "auto"), ("seed", 0)}
    }


def _scores(run: Path, inputs: list[str], name: str | None, *, this: str) -> list[str]:
    found = _read(run / "results.json")
    scores = {
        label: score for label, score in found.get("scores", {}).items() if label in ("base", "soup", name, *inputs)
    }
    if not set(scores) & {name, *inputs}:
        return []
    n = next(iter(scores.values()))["n"]
    rows = [
        f"| {f'**{this}**' if label == name else label} | {100 * s['value']:.1f} "
        f"| {100 * s['low']:.1f} to {100 * s['high']:.1f} |"
        for label, s in scores.items()
    ]
    return [
        "",
        f"Scores: {found['metric']}, n = {n}, 95 % intervals.",
        "",
        "| adapter | score | interval |",
        "|---|---|---|",
        *rows,
    ]


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file holds, or nothing if it is not there or not an object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

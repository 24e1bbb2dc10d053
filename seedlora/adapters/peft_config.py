"""Read and check the configuration of a PEFT adapter folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import CONFIG_NAME, WEIGHTS_NAME, AdapterError, is_model
from seedlora.adapters.config_keys import REPEATED_INITS, check_keys, init_kind
from seedlora.adapters.targets import Targets
from seedlora.updates.diagnostics import natural_sort_key
from seedlora.utils.patterns import check_pattern, pattern_key
from seedlora.utils.plain_data import from_json

#: PEFT's task types, and its class that loads adapter and base model of each.
PEFT_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


@dataclass(frozen=True)
class AdapterConfig:
    """The entries of an ``adapter_config.json`` that decide what its tensors are; :func:`read_config` checked them.

    Args:
        rank: of the layers that ``rank_pattern`` leaves out: PEFT's ``r``.
        alpha: ``lora_alpha`` of the layers that ``alpha_pattern`` leaves out.
        rank_pattern: ranks by a regular expression for the end of a layer's path.
        alpha_pattern: likewise ``lora_alpha``.
        use_rslora: the scaling is ``lora_alpha / sqrt(r)``.
        use_dora: the layers have magnitudes.
        lora_bias: the layers have biases.
        modules_to_save: names of the modules whose full weights are in the folder.
        init: how the factors were initialised, in lower case; empty for the plain way.
        base_model: ``base_model_name_or_path``; empty if it names none.
        revision: of the base model on the hub.
        fan_in_fan_out: the base model stores its weights as ``(K, D)``.
        task_type: PEFT's, one of :data:`PEFT_AUTO_CLASSES`.
        auto_mapping: the class of the base model, which PEFT says where it knows no task.
        targets: the layers that are adapted.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    init: str
    base_model: str
    revision: str | None
    fan_in_fan_out: bool
    task_type: str | None
    auto_mapping: Mapping[str, str] | None
    targets: Targets

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return what the adapter is besides plain LoRA, for people: ``DoRA``, ``rsLoRA``, ``PiSSA``."""
        flags = {
            "rsLoRA": self.use_rslora,
            "DoRA": self.use_dora,
            REPEATED_INITS.get(self.init, ""): self.init in REPEATED_INITS,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "lora_bias": self.lora_bias,
            "modules_to_save": self.modules_to_save,
        }
        return tuple(kind for kind, applies in flags.items() if applies)

    def scaling(self, folder: Path, path: str, rank: int) -> float:
        """Return what PEFT multiplies ``B @ A`` with in a layer, after checking that the layer has the right rank.

        Args:
            folder: of the adapter, for messages.
            path: of the layer.
            rank: that its factors have.

        Raises:
            AdapterError: if the configuration gives the layer another rank.
        """
        expected = self.rank_pattern.get(pattern_key(self.rank_pattern, path), self.rank)
        alpha = self.alpha_pattern.get(pattern_key(self.alpha_pattern, path), self.alpha)
        if expected != rank:
            raise AdapterError(
                f"{folder / WEIGHTS_NAME}: '{path}' has rank {rank}, but {CONFIG_NAME} says {expected}; they must agree"
            )
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(folder: Path, *, allow_more: bool = False) -> AdapterConfig:
    """Read and check the configuration of an adapter folder.

    Args:
        folder: of the adapter.
        allow_more: take adapters that are more than factors, too: DoRA, PiSSA, OLoRA, ``lora_bias`` and
            ``modules_to_save``.

    Raises:
        AdapterError: if it is missing or broken, an entry is of a wrong type, a key is set that is not known, or the
            adapter cannot be merged.
    """
    file = folder / CONFIG_NAME
    entries = _read_entries(folder)
    check_keys(file, entries, allow_more=allow_more)
    _check_types(file, entries)
    auto_mapping, revision = entries.get("auto_mapping"), entries.get("revision")
    return AdapterConfig(
        rank=entries["r"],
        alpha=entries["lora_alpha"],
        rank_pattern=entries.get("rank_pattern") or {},
        alpha_pattern=entries.get("alpha_pattern") or {},
        use_rslora=bool(entries.get("use_rslora")),
        use_dora=bool(entries.get("use_dora")),
        lora_bias=bool(entries.get("lora_bias")),
        modules_to_save=tuple(entries.get("modules_to_save") or ()),
        init=init_kind(entries),
        base_model=entries.get("base_model_name_or_path") or "",
        revision=None if revision == "main" else revision,
        fan_in_fan_out=bool(entries.get("fan_in_fan_out")),
        task_type=entries.get("task_type"),
        auto_mapping=auto_mapping if isinstance(auto_mapping, dict) else None,
        targets=Targets.read(file, entries),
    )


def _read_entries(folder: Path) -> dict[str, Any]:
    """Read the file, which must hold an object of the type ``LORA``."""
    file = folder / CONFIG_NAME
    try:
        entries = from_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if is_model(folder):
            raise AdapterError(
                f"{folder} is a whole model and no adapter; python -m seedlora merge merges such models by --into_base "
                "MODEL, the one that they were trained from"
            ) from None
        raise AdapterError(
            f"{folder} is no PEFT adapter folder: it has no {CONFIG_NAME}{_others_below(folder)}"
        ) from None
    except (ValueError, OSError) as error:
        raise AdapterError(f"{file} cannot be read: {error}") from None
    if not isinstance(entries, dict) or entries.get("peft_type") != "LORA":
        kind = entries.get("peft_type") if isinstance(entries, dict) else type(entries).__name__
        raise AdapterError(f"{file}: peft_type is {kind!r}, only 'LORA' can be read")
    return entries


def _others_below(folder: Path) -> str:
    """Name the adapters of a folder that holds checkpoints, the newest first; the end of a sentence."""
    found = [file.parent for file in folder.glob(f"*/{CONFIG_NAME}")]
    if not found:
        return ""
    newest_first = sorted(found, key=lambda path: natural_sort_key(path.name), reverse=True)
    names = [str(path) for path in newest_first[:4]]
    return f"; give one of those in it: {', '.join(names)}{', ...' if len(found) > 4 else ''}"


def _check_types(file: Path, entries: Mapping[str, Any]) -> None:
    """Check the types of the entries that are read, and that the task is one of PEFT's."""
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(entries.get(key), str | None):
            raise AdapterError(f"{file}: {key} is {str(entries[key])[:80]!r}, text is needed")
    if entries.get("task_type") not in (None, *PEFT_AUTO_CLASSES):
        raise AdapterError(
            f"{file}: task_type is {str(entries['task_type'])[:80]!r}, one of {', '.join(PEFT_AUTO_CLASSES)} is needed"
        )
    _check_number(file, "lora_alpha", entries.get("lora_alpha"))
    _check_rank(file, "r", entries.get("r"))
    for key, check in (("rank_pattern", _check_rank), ("alpha_pattern", _check_number)):
        pattern = entries.get(key) or {}
        if not isinstance(pattern, dict):
            raise AdapterError(f"{file}: {key} is {pattern!r}, a mapping is needed")
        for name, value in pattern.items():
            check(file, f"{key}[{name!r}]", value)
            try:
                check_pattern(name)
            except ValueError as error:
                raise AdapterError(f"{file}: of {key}, the key {name[:80]!r} cannot be used: {error}") from None
    names = entries.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{file}: modules_to_save is {str(names)[:80]!r}, a list of names is needed")


def _check_number(file: Path, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise AdapterError(f"{file}: {key} is {str(value)[:80]!r}, a number is needed")


def _check_rank(file: Path, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise AdapterError(f"{file}: {key} is {str(value)[:80]!r}, a positive whole number is needed")

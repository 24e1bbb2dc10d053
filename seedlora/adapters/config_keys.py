"""Name the keys of ``adapter_config.json`` that are known, and what each means for a merge.

What is not known is not ignored: a key that this file does not list, and that is set, may be what makes an adapter more
than factors. Such an adapter is refused by the key's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import AdapterError

#: Keys that decide what the tensors are, or what PEFT adds to which layer; :func:`read_config` reads them.
READ_KEYS = frozenset(
    {
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
        *("bias", "fan_in_fan_out"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    }
)
#: What PEFT's ``LoraConfig`` writes where nothing is said, without its version: PEFT takes seconds to import.
LORA_DEFAULTS: Mapping[str, Any] = {
    "peft_type": "LORA",
    **dict.fromkeys(("task_type", "auto_mapping", "base_model_name_or_path", "revision")),
    **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True},
    **dict.fromkeys(("target_modules", "exclude_modules", "modules_to_save", "target_parameters")),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "layer_replication", "trainable_token_indices")),
    **{"rank_pattern": {}, "alpha_pattern": {}},
    **dict.fromkeys(("inference_mode", "fan_in_fan_out", "use_rslora", "use_dora", "lora_bias"), False),
    **{"use_qalora": False, "qalora_group_size": 16, "use_bdlora": None, "ensure_weight_tying": False},
    **{"megatron_config": None, "megatron_core": "megatron.core", "loftq_config": {}},
    **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config")),
    **dict.fromkeys(("arrow_config", "kasa_config", "alora_invocation_tokens")),
}
#: Keys that change nothing of what a trained adapter adds to its base model, and why.
HARMLESS_KEYS: Mapping[str, str] = {
    "peft_version": "names the writer",
    "inference_mode": "says whether the factors take a gradient",
    "lora_dropout": "acts in training alone",
    "megatron_core": "is a module's name, read with megatron_config alone",
    "qalora_group_size": "is read with use_qalora alone",
    "loftq_config": "is read with init_lora_weights loftq alone",
    "eva_config": "describes how the factors were started, with the base left alone",
    "corda_config": "is read with init_lora_weights corda alone",
    "lora_ga_config": "is read with init_lora_weights lora_ga alone",
    "runtime_config": "is of one process, and ignored by PEFT",
    "merge_weights": "of PEFT before 0.3: said when the update was added, not what it is",
    "lorap_lr_ratio": "of ms-swift: LoRA+'s learning rates",
    "lorap_emb_lr": "of ms-swift: LoRA+'s learning rate of embeddings",
    "lora_dtype": "of ms-swift: the dtype in training",
}
#: Keys of adapters that are more than factors: read where the caller can take what else they hold.
MORE_THAN_FACTORS: Mapping[str, str] = {
    "use_dora": "DoRA is not plain LoRA: its update depends on the base weights; python -m seedlora merge merges it, "
    "and makes plain LoRA of a single one (--method soup --rank 64)",
    "lora_bias": "lora_bias adds a vector that factors do not hold; python -m seedlora merge averages it",
    "modules_to_save": "modules_to_save holds full weights besides the factors; python -m seedlora merge averages them",
}
#: Keys of adapters that cannot be merged, and what to do about each.
REFUSED_KEYS: Mapping[str, str] = {
    "use_qalora": "QALoRA pools its inputs; train with use_qalora: false",
    "use_bdlora": "BD-LoRA has block-diagonal factors; train without use_bdlora",
    "arrow_config": "an arrow router is no single update; give its adapters one by one",
    "alora_invocation_tokens": "an activated LoRA applies to part of the text only; it cannot be merged",
    "trainable_token_indices": "trainable_token_indices holds full rows besides the factors; train without it",
    "target_parameters": "target_parameters adapts parameters that are no layers; target modules instead",
    "layer_replication": "layer_replication changes the base model; it cannot be merged",
    "megatron_config": "Megatron's parallel layers are not read; export the adapter for transformers",
    "kasa_config": "KaSA's update is not B @ A; train plain LoRA",
    "monteclora_config": "MonteCLoRA's update is random; train plain LoRA",
    "velora_config": "VeLoRA adapters are not read; train plain LoRA",
}
#: Ways to initialise a LoRA that leave the base weights alone; true, false and null are others.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
#: Ways that take the start out of the base weights, and can be done again from these alone; with their proper names.
REPEATED_INITS: Mapping[str, str] = {"pissa": "PiSSA", "olora": "OLoRA"}
#: Beginnings of the ways that change the base weights, with their proper names.
_CHANGING_INITS: Mapping[str, str] = {
    **REPEATED_INITS,
    "loftq": "LoftQ",
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
}
_CONVERT = "PEFT's save_pretrained with path_initial_model_for_weight_conversion"


def init_kind(entries: Mapping[str, Any]) -> str:
    """Return how the factors were initialised, in lower case; empty for the plain way."""
    init = entries.get("init_lora_weights", True)
    return init.lower() if isinstance(init, str) else ""


def base_changing_init(entries: Mapping[str, Any]) -> str | None:
    """Return the proper name of the initialisation, if it changed the base weights; None if it left them alone.

    Such an adapter belongs on the changed weights: on the original ones, which every server loads, it adds something
    else. PEFT sets ``init_lora_weights`` to true when it converts one to the original weights.
    """
    init = init_kind(entries)
    return next((name for start, name in _CHANGING_INITS.items() if init.startswith(start)), None)


def unknown_key(entries: Mapping[str, Any]) -> str | None:
    """Return the first key that is set and not known here; None if there is none."""
    known = {*READ_KEYS, *HARMLESS_KEYS, *MORE_THAN_FACTORS, *REFUSED_KEYS}
    return next((key for key in sorted(entries) if entries[key] and key not in known), None)


def refused_key(entries: Mapping[str, Any]) -> str | None:
    """Return the first key that is set and stands for what no merge and no server takes; None if there is none."""
    return next((key for key in REFUSED_KEYS if entries.get(key)), None)


def check_keys(file: Path, entries: Mapping[str, Any], *, allow_more: bool) -> None:
    """Refuse adapters that cannot be merged, or not by a caller that reads factors alone.

    Args:
        file: for messages.
        entries: of the file.
        allow_more: take adapters that are more than factors.

    Raises:
        AdapterError: naming the key.
    """
    if (key := unknown_key(entries)) is not None:
        raise AdapterError(
            f"{file}: {key} is {str(entries[key])[:80]!r}, and what that changes is not known here, so that a merge "
            f"could be wrong in silence; if it changes nothing of what the adapter adds, take it out of the file"
        )
    for key, reason in REFUSED_KEYS.items() if allow_more else {**MORE_THAN_FACTORS, **REFUSED_KEYS}.items():
        if entries.get(key):
            raise AdapterError(f"{file}: {key} is set; {reason}")
    if entries.get("bias", "none") != "none":
        raise AdapterError(f"{file}: bias is {str(entries['bias'])[:80]!r}; only 'none' can be merged")
    _check_init(file, entries, allow_more=allow_more)
    for together, reason in (
        (
            entries.get("lora_bias") and (entries.get("use_dora") or init_kind(entries)),
            "lora_bias goes with no use_dora and no init_lora_weights but true and false",
        ),
        (
            isinstance(entries.get("target_modules"), str) and entries.get("layers_to_transform") is not None,
            "layers_to_transform goes with a list of target_modules alone",
        ),
    ):
        if together:
            raise AdapterError(f"{file}: {reason}; PEFT would not load this adapter")


def _check_init(file: Path, entries: Mapping[str, Any], *, allow_more: bool) -> None:
    """Refuse adapters whose start was taken out of the base weights, unless it can be computed again."""
    given = entries.get("init_lora_weights", True)
    if not isinstance(given, str | bool | None):
        raise AdapterError(f"{file}: init_lora_weights is {str(given)[:80]!r}, true, false or a name is needed")
    init, name = init_kind(entries), base_changing_init(entries)
    if name == "LoftQ":
        raise AdapterError(
            f"{file}: init_lora_weights is 'loftq', which changes the base weights to those that it quantised; save "
            "that base model, name it as base_model_name_or_path, and set init_lora_weights to true"
        )
    if init in REPEATED_INITS and not allow_more:
        raise AdapterError(
            f"{file}: init_lora_weights is {init!r}, which changes the base weights; python -m seedlora merge computes "
            "what was taken out of them again"
        )
    if name is not None and init not in REPEATED_INITS:
        raise AdapterError(
            f"{file}: init_lora_weights is {init[:80]!r}, which changes the base weights; what was taken out of them "
            f"cannot be computed again: convert the adapter after training ({_CONVERT})"
        )
    if init and name is None and init not in PLAIN_INITS:
        raise AdapterError(
            f"{file}: init_lora_weights is {init[:80]!r}, and whether that changes the base weights is not known; "
            f"known are true, false, {', '.join(sorted(PLAIN_INITS))}, {', '.join(REPEATED_INITS)}"
        )

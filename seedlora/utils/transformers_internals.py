"""All that is used of transformers beyond what its documentation promises, one function for each use.

``tests/utils/test_transformers_internals.py`` fails by the function's name when a release takes one of these
away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the attention kernel that a model uses: ``sdpa``, ``eager`` or one of the family's own.

    ``PreTrainedModel.set_attn_implementation`` sets it; only ``config._attn_implementation`` says which it is.
    """
    return config._attn_implementation


def supports_attention(config: PretrainedConfig, name: str) -> bool:
    """Tell whether the causal language model of a configuration has an attention kernel, by its name.

    ``_supports_sdpa``, ``_supports_flash_attn`` and ``_supports_flex_attn`` of the class say so; it need not be built.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    flags = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    flag = "_supports_flash_attn" if name.startswith("flash") else flags.get(name)
    return flag is None or bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], flag, False))


def set_model_name(config: PretrainedConfig, name: str) -> None:
    """Set the name that is written into a saved configuration, in place of the folder that the model was read from.

    ``config._name_or_path`` is what ``name_or_path`` reads.
    """
    config._name_or_path = name


def hub_commit(config: PretrainedConfig) -> str | None:
    """Return the commit of the hub repository that a configuration was read from; None for a folder.

    ``config._commit_hash`` is filled in by ``from_pretrained``.
    """
    return getattr(config, "_commit_hash", None)


def unit_layer_classes(model: PreTrainedModel) -> set[str]:
    """Return the class names of the layers that a model's family never divides among devices: its decoder layers.

    ``PreTrainedModel._no_split_modules`` is what ``device_map="auto"`` goes by.
    """
    return set(model._no_split_modules or ())


def mark_quantized(model: PreTrainedModel, *, four_bits: bool, eight_bits: bool) -> None:
    """Mark a model whose layers bitsandbytes quantised, as transformers marks those that it loads so.

    PEFT reads ``is_loaded_in_4bit`` and ``is_loaded_in_8bit`` to choose the class of its layers.
    """
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four_bits, eight_bits

"""All that is used of PEFT beyond what its documentation promises, one function for each use.

``tests/model/test_peft_internals.py`` fails by the function's name when a release of PEFT takes one of these away. What
:mod:`seedlora.adapters.stacked_forward` reads of PEFT's layers is named in :data:`LORA_LAYER_ATTRIBUTES` and
:data:`FULL_MODULE_ATTRIBUTES`, for the same test.
"""

from __future__ import annotations

from torch import Tensor, nn

#: Attributes of ``peft.tuners.lora.LoraLayer`` by which a stack reads and replaces what a layer computes.
LORA_LAYER_ATTRIBUTES = (
    "base_layer",
    "fan_in_fan_out",
    "get_base_layer",
    "lora_A",
    "lora_B",
    "lora_bias",
    "lora_dropout",
    "lora_embedding_A",
    "lora_magnitude_vector",
    "pissa_init",
    "r",
    "scaling",
)
#: Attributes of ``peft.utils.ModulesToSaveWrapper``, which holds a module that is trained in full.
FULL_MODULE_ATTRIBUTES = ("modules_to_save", "original_module", "set_adapter")


def no_target_modules() -> str:
    """Return the word that ``target_modules`` takes where no layer is to get factors."""
    from peft.utils.constants import DUMMY_TARGET_MODULES

    return DUMMY_TARGET_MODULES


def dequantize_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight, dequantised if bitsandbytes stores it in few bits.

    ``dequantize_module_weight`` of ``peft.utils.integrations`` is what DoRA's layers use.
    """
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)

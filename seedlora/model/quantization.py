"""Keep the frozen base model in 4 or 8 bits, by bitsandbytes.

A layer's weights are kept in few bits and made whole, one layer at a time, where they are multiplied. Inputs are not
quantised: an input's rounding would turn the smallest differences into larger ones, and outliers, which LLM.int8()
looks for over the whole batch, would make a replica's result depend on the other replicas' rows.

Shape legend: ``M`` rows, ``D`` output features, ``K`` input features.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seedlora.model.peft_internals import dequantize_weight
from seedlora.utils.options import name_option
from seedlora.utils.transformers_internals import mark_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

#: Name to bytes per weight: 4 bits, a byte per 64 of them and 4 bytes per 16,384; or a byte, and 4 per row.
QUANTIZATIONS = {"none": None, "nf4": 0.5 + 1 / 64 + 4 / 16384, "int8": 1.0}


def check_quantization(kind: str) -> None:
    """Check that a base model can be quantised so, without loading anything.

    Raises:
        ValueError: for an unknown kind, or if bitsandbytes is not installed.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(
            f"Unknown {name_option('model.quantization')} '{kind}'; choose one of {', '.join(QUANTIZATIONS)}"
        )
    if kind != "none" and find_spec("bitsandbytes") is None:
        raise ValueError(f"{name_option('model.quantization')} {kind} needs bitsandbytes: pip install bitsandbytes")


def quantize(model: PreTrainedModel, kind: str) -> None:
    """Quantise the linear layers of a model in place, except the head and those that are quantised already.

    The weights are those that transformers' ``BitsAndBytesConfig`` gives: ``nf4`` with double quantisation (Dettmers et
    al., arXiv 2305.14314), ``int8`` with one scale per row (Dettmers et al., arXiv 2208.07339).

    Args:
        model: of transformers, on the CPU.
        kind: of :data:`QUANTIZATIONS`.
    """
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            linear = isinstance(layer, nn.Linear | Conv1D) and layer.weight.is_floating_point()
            if linear and layer is not model.get_output_embeddings():
                setattr(parent, name, quantize_layer(layer, kind))
    # The rest is copied out of the weights' files, which stay in memory as long as one tensor of theirs is in use.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    # So that PEFT knows what the layers are.
    mark_quantized(model, four_bits=kind == "nf4", eight_bits=kind == "int8")


def quantize_layer(layer: nn.Linear | Conv1D, kind: str) -> nn.Linear:
    """Return a linear layer (a ``Conv1D`` becomes one) with its weights quantised; the bias stays as it is."""
    bnb: Any = import_module("bitsandbytes")
    w_DK = layer.weight.data if isinstance(layer, nn.Linear) else layer.weight.data.T
    d, k = w_DK.shape
    if kind == "nf4":
        new = bnb.nn.Linear4bit(k, d, bias=False, compute_dtype=w_DK.dtype, quant_type="nf4", device="meta")
        new.weight = bnb.nn.Params4bit(w_DK.contiguous(), requires_grad=False, quant_type="nf4", module=new).to("cpu")
        # Or a validation would repack the weights for inference, and training could not go on with them.
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(k, d, bias=False, has_fp16_weights=False, device="meta")
        new.weight = bnb.nn.Int8Params(w_DK.contiguous(), requires_grad=False).to("cpu")
        new.register_buffer("weight_scale", new.weight.SCB / 127, persistent=False)
        new.forward = MethodType(_int8_forward, new)
    new.bias = layer.bias
    return new


def dequantized_weight(layer: nn.Module) -> Tensor:
    """Return the weights of a linear layer as they are multiplied: shape (D, K), or (K, D) for a ``Conv1D``."""
    return dequantize_weight(layer).detach()


def _int8_forward(self: nn.Linear, x: Tensor) -> Tensor:
    y = _Int8Product.apply(x, self.weight.data, self.weight_scale)
    return y if self.bias is None else y + self.bias


class _Int8Product(torch.autograd.Function):
    """Computes ``x W^T`` with W in int8, made whole here and once more in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_DK: Tensor, scale_D: Tensor) -> Tensor:
        ctx.save_for_backward(w_DK, scale_D)
        return x @ _dequantize_int8(w_DK, scale_D, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        w_DK, scale_D = ctx.saved_tensors
        return grad @ _dequantize_int8(w_DK, scale_D, grad.dtype), None, None


def _dequantize_int8(w_DK: Tensor, scale_D: Tensor, dtype: torch.dtype) -> Tensor:
    return w_DK.to(dtype).mul_(scale_D[:, None])

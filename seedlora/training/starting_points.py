"""Adapters that start at factors of the base weights: PiSSA's and LoftQ's, the same for every seed.

Shape legend: ``D`` output features, ``K`` input features, ``r`` rank.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch import Tensor

from seedlora.adapters.stacked_forward import StartFactors
from seedlora.model.quantization import dequantized_weight, quantize, quantize_layer
from seedlora.training.model_options import STARTING_AT_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

#: Power iterations of the truncated SVD: seconds a layer, where the whole one takes minutes.
_ITERATIONS = 16


class FrozenBase(NamedTuple):
    """Holds a base model without adapters.

    Attributes:
        model: of transformers, quantised if that was asked for.
        starts: the factors at which adapters start on it, by layer path; empty where they start at nothing.
    """

    model: PreTrainedModel
    starts: Mapping[str, StartFactors]


def prepare_base(model: PreTrainedModel, config: LoraConfig, *, adapter: str, quantization: str) -> FrozenBase:
    r"""Quantise a base model that has no adapters yet, and find where adapters of this kind start on it.

    ``pissa`` (Meng et al., arXiv 2404.02948): :math:`s B_0 A_0` is the best rank-r approximation of W, by PEFT's own
    initialisation. With ``nf4``, the residual :math:`W - s B_0 A_0` is what is quantised; otherwise the model keeps W.

    ``loftq`` (Li et al., arXiv 2310.08659): :math:`s B_0 A_0` is the best rank-r approximation of what ``nf4`` loses,
    :math:`W - Q`. One step of the paper's alternation, PEFT's default: Q is then the 4-bit model that everybody gets
    from W, and an adapter is plain LoRA on it. PEFT leaves out the scaling, which makes its start another one unless
    ``lora_alpha`` is r.

    Costs a truncated SVD per layer. Its random projections have a seed of their own; the global state is untouched.

    Args:
        model: of transformers, on the CPU, in floating point.
        config: of the adapters.
        adapter: ``lora``, ``rslora``, ``dora``, ``pissa`` or ``loftq``.
        quantization: ``none``, ``nf4`` or ``int8``.
    """
    base = FrozenBase(model, {})
    if adapter in STARTING_AT_WEIGHTS:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            base = _find_starts(model, config, adapter, quantization)
    if quantization != "none":
        quantize(base.model, quantization)
    return base


def _find_starts(model: PreTrainedModel, config: LoraConfig, adapter: str, quantization: str) -> FrozenBase:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    # PEFT resolves names, ranks and scalings of the layers; its adapter is gone afterwards.
    config = copy.deepcopy(config)
    config.modules_to_save = None
    names = [name for name, _ in model.named_modules()]
    wrapped = get_peft_model(model, config, adapter_name="start")
    layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), LoraLayer)}
    find = _pissa_start if adapter == "pissa" else _loftq_start
    quiet = rank_zero_only.rank != 0 or len(layers) < 20
    shown = track(layers.items(), f"Starting points of {adapter}", transient=True, disable=quiet)
    starts = {name: find(layer, quantization) for name, layer in shown}
    return FrozenBase(wrapped.unload(), starts)


def _pissa_start(layer: LoraLayer, quantization: str) -> StartFactors:
    """Find the best approximation of a layer's weight; take it out if the layer is quantised, which it then is."""
    base = layer.base_layer
    kept = base.weight.data
    layer.pissa_init("start", f"pissa_niter_{_ITERATIONS}")
    a, b = layer.lora_A["start"].weight, layer.lora_B["start"].weight
    if quantization == "none":
        base.weight.data = kept
    else:
        layer.base_layer = quantize_layer(base, quantization)
    return _start(a, b, "own" if quantization == "none" else "others")


def _loftq_start(layer: LoraLayer, quantization: str) -> StartFactors:
    """Quantise a layer, and find the best approximation of what that loses."""
    kept = layer.base_layer.weight.data
    layer.base_layer = quantize_layer(layer.base_layer, quantization)
    w_DK = kept.T if layer.fan_in_fan_out else kept
    lost_DK = w_DK.float() - dequantized_weight(layer.base_layer).float()
    u, s, v = torch.svd_lowrank(lost_DK, q=layer.r["start"], niter=_ITERATIONS)
    root = (s / layer.scaling["start"]).sqrt()
    return _start(root[:, None] * v.T, u * root, "none")


def _start(a: Tensor, b: Tensor, beside: str) -> StartFactors:
    return StartFactors(a.detach().float().clone(), b.detach().float().clone(), beside)

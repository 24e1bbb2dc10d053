"""Adapters that start at factors of the base weights: PiSSA's and LoftQ's, the same for every seed.

Shape legend: ``D`` output features, ``K`` input features, ``r`` rank.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track

from seedlora.adapters.stacked_forward import StartFactors
from seedlora.model.quantization import dequantized_weight, quantize, quantize_layer

if TYPE_CHECKING:
    from peft import LoraConfig

#: Power iterations of the truncated SVD: seconds a layer, where the whole one takes minutes.
_ITERATIONS = 16


def prepare_base(
    model: Any, config: LoraConfig, *, adapter: str, quantization: str
) -> tuple[Any, dict[str, StartFactors]]:
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

    Returns:
        The model, and the factors by layer path; none where adapters start at nothing.
    """
    starts: dict[str, StartFactors] = {}
    if adapter in ("pissa", "loftq"):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(0)
            model, starts = _starts(model, config, adapter, quantization)
    if quantization != "none":
        quantize(model, quantization)
    return model, starts


def _starts(model: Any, config: LoraConfig, adapter: str, quantization: str) -> tuple[Any, dict[str, StartFactors]]:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    # PEFT resolves names, ranks and scalings of the layers; its adapter is gone afterwards.
    config = copy.deepcopy(config)
    config.modules_to_save = None
    names = [name for name, _ in model.named_modules()]
    wrapped = get_peft_model(model, config, adapter_name="start")
    layers = {name: layer for name in names if isinstance(layer := model.get_submodule(name), LoraLayer)}
    starts = {}
    quiet = rank_zero_only.rank != 0 or len(layers) < 20
    for name, layer in track(layers.items(), f"Starting points of {adapter}", transient=True, disable=quiet):
        base, r, scale = layer.base_layer, layer.r["start"], layer.scaling["start"]
        kept = base.weight.data
        if adapter == "pissa":
            layer.pissa_init("start", f"pissa_niter_{_ITERATIONS}")
            a, b = layer.lora_A["start"].weight, layer.lora_B["start"].weight
            if quantization == "none":
                base.weight.data = kept
            else:
                layer.base_layer = quantize_layer(base, quantization)
        else:
            layer.base_layer = quantize_layer(base, quantization)
            w_DK = kept.T if layer.fan_in_fan_out else kept
            u, s, v = torch.svd_lowrank(
                w_DK.float() - dequantized_weight(layer.base_layer).float(), q=r, niter=_ITERATIONS
            )
            root = (s / scale).sqrt()
            a, b = root[:, None] * v.T, u * root
        beside = "none" if adapter == "loftq" else "own" if quantization == "none" else "others"
        starts[name] = StartFactors(a.detach().float().clone(), b.detach().float().clone(), beside)
    return wrapped.unload(), starts

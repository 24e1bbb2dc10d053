"""Two ways of computing that are the same: shown in float64, or bounded in float32 by the steps taken and their rate.

AdamW divides a gradient by its own size. Where the gradient of an entry is nothing but rounding, the entry takes a step
of the whole rate all the same, in a direction that another processor, another number of threads or another order of a
sum turns round. So two float32 trainings that are the same in exact arithmetic differ in a few entries by as much as
they have moved, and a tolerance that was met on one processor is luck. In float64 the rounding of a gradient, some
1e-16 of it, is far below the 1e-8 that AdamW adds to the size it divides by, and moves nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from seedlora.merge.steps import sparsify
from seedlora.training import building
from seedlora.training.starting_points import FrozenBase

#: What two ways of computing the same may differ by in float64, on whatever machine, relative or of numbers near 1.
SAME = 1e-10
#: What two forwards, or two backwards, of a few layers may differ by in float32: a hundred roundings, of 6e-8 each, of
#: numbers near 1.
ROUNDED = 1e-5


@contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what would be computed in float32 is computed in float64, on base models whose weights are float32's.

    Of a quantised base bitsandbytes' weights are taken, and multiplied in float64, which its kernels do not know.
    """
    mode, prepare_base = _Float64(), building.prepare_base
    run_backward = torch.autograd._engine_run_backward

    def prepare(*args: Any, **kwargs: Any) -> Any:
        with _in_float32():
            model, starts = prepare_base(*args, **kwargs)
        starts = {path: start._replace(A=start.A.double(), B=start.B.double()) for path, start in starts.items()}
        return FrozenBase(_in_double(model), starts)

    def backward(*args: Any, **kwargs: Any) -> Any:
        with mode:  # which torch leaves before, and would recompute a forward without
            return run_backward(*args, **kwargs)

    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_model", _by_float32(building.load_model))
        patch.setattr(building, "prepare_base", prepare)
        patch.setattr(sparsify, "_rounded", _by_float32(sparsify._rounded))
        patch.setattr(torch.autograd, "_engine_run_backward", backward)
        if find_spec("bitsandbytes") is not None:
            import bitsandbytes as bnb

            quantize = bnb.functional.quantize_4bit
            of_float32 = _by_float32(lambda w, *args, **kwargs: quantize(w.float(), *args, **kwargs))
            patch.setattr(bnb.functional, "quantize_4bit", of_float32)
            patch.setattr(bnb.functional, "dequantize_4bit", _by_float32(bnb.functional.dequantize_4bit))
            patch.setattr(bnb, "matmul_4bit", _matmul_4bit)
        torch.set_default_dtype(torch.float64)
        try:
            with mode:
                yield
        finally:
            torch.set_default_dtype(before)


def plain_model(base_model: Any, **options: Any) -> Any:
    """A model as transformers loads it, in the precision of the test."""
    model = _by_float32(AutoModelForCausalLM.from_pretrained)(base_model, dtype=torch.float32, **options)
    return _in_double(model) if torch.get_default_dtype() == torch.float64 else model


def assert_trained_alike(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, steps: int, rate: float, noise: float = 1e-5
) -> None:
    """See that two trainings of an adapter, in float32 or less, are the same but for rounding.

    AdamW moves an entry by at most about the rate in a step, so two runs part by at most twice the rate there; and they
    do so only where the gradient of the entry is no larger than what rounding makes of it. That is a share of ``noise``
    of all ``n`` entries and steps, because gradients are spread evenly about zero; or, by chance, a single one::

        |found - wanted| <= 2 rate sqrt(1 + noise n steps)

    Runs that are not the same part everywhere, by some ``rate steps sqrt(n)``.

    Args:
        found: the tensors of one.
        wanted: those of the other.
        steps: of the optimizer.
        rate: the largest learning rate.
        noise: the rounding of a gradient over its usual size: a hundred of float32's 6e-8, or two of bfloat16's 4e-3.
    """
    assert found.keys() == wanted.keys()
    apart = torch.cat([(found[key].double() - wanted[key].double()).flatten() for key in wanted])
    assert apart.norm() <= 2 * rate * (1 + noise * apart.numel() * steps) ** 0.5


class _Float64(TorchFunctionMode):
    """Gives float64 where float32 is asked for: by us, by PEFT, and by the norms and positions of transformers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Tensor.view with a dtype reads the bits of a file.
        if torch.get_default_dtype() == torch.float64 and func is not Tensor.view:
            func = Tensor.double if func is Tensor.float else func
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Float32 is float32 again, as bitsandbytes and PEFT's PiSSA want it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _by_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def in_float32(*args: Any, **kwargs: Any) -> Any:
        with _in_float32():
            return function(*args, **kwargs)

    return in_float32


def _matmul_4bit(x: Tensor, weight: Tensor, quant_state: Any, bias: Tensor | None = None) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return linear(x, dequantize_4bit(weight.view(-1, 1), quant_state).to(x.dtype), bias)


def _in_double(model: Any) -> Any:
    """A model with float64 for float32; a base in bfloat16 stays so."""
    if next(p for p in model.parameters() if p.is_floating_point()).dtype != torch.float32:
        return model
    for layer in model.modules():
        if (scales := getattr(getattr(layer, "weight", None), "SCB", None)) is not None:  # int8: no parameter
            layer.weight.SCB = scales.double()
            if hasattr(layer, "weight_scale"):
                layer.weight_scale = layer.weight.SCB / 127
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32:
            tensor.data = tensor.data.double()
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the relative distance of two tensors."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))

"""A second device on a machine that has none: tensors that say they are on ``gpu:0`` and keep their values on the CPU.

Every operation is the CPU's, so a run gives the CPU's values. What a GPU would refuse is refused: an operation whose
tensors are on two devices, a generator of one device for tensors of another, ``numpy`` of a tensor that is not on the
CPU. What a GPU's host would have to wait for is counted.

Torch's own fake tensors have no values, which choices between merge rules and losses that are not finite need; and
without a CUDA build they take no backward pass. Not possible here: gradient checkpointing, in whose backward pass torch
ends the process.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.helpers.paths import ROOT

aten = torch.ops.aten
#: What moves values between devices.
_COPIES = {aten._to_copy.default, aten.copy_.default}
#: Whose indices may be on the CPU.
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
#: Whose result, or the shape of it, is known to the host only when the device is done.
_WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}


class _Module:
    """``torch.gpu``; there is no such device outside of :func:`second_device`."""

    there = False

    def is_initialized(self) -> bool:
        return self.there

    def is_available(self) -> bool:
        return self.there

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Nothing draws from a global stream of the device."""

    def device_count(self) -> int:
        return int(self.there)

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        """Nothing draws from it."""


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _Module.there

    def has_primary_context(self, device: int) -> bool:
        return _Module.there

    def is_built(self) -> bool:
        return True


_setup_privateuseone_for_python_backend("gpu", _Module(), _Hook())
DEVICE, CPU = torch.device("gpu", 0), torch.device("cpu")


class OnDevice(Tensor):
    """A tensor of the second device."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        return Tensor._make_wrapper_subclass(cls, values.size(), device=DEVICE, **layout)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.values})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(None, func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it is on, the device is there."""

    def __init__(self) -> None:
        super().__init__()
        #: How often the host waited for the device, by operation and the function of ours that asked for it.
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self, func, args, kwargs or {})

    def wait(self, what: str) -> None:
        """Count one."""
        root, frame = str(ROOT), sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith((f"{root}/seedlora", f"{root}/callbacks")):
            frame = frame.f_back
        place = "elsewhere" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        self.waits[f"{what} in {place}"] += 1


def _run(mode: SecondDevice | None, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # In inference mode operations come whole that are made of others.
    if mode is not None and torch.is_inference_mode_enabled() and func._can_decompose():
        with mode:
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if not any(isinstance(tensor, OnDevice) for tensor in tensors) and (target is None or target == CPU):
        return func(*args, **kwargs)
    _check(func, args, kwargs, tensors)
    if mode is not None:
        _count(mode, func, args, target)
    values = lambda leaf: leaf.values if isinstance(leaf, OnDevice) else leaf  # noqa: E731
    inner_args, inner = tree_map(values, (args, kwargs))
    if target is not None:
        inner["device"] = CPU
    inner.pop("pin_memory", None)
    found = func(*inner_args, **inner)
    if target == CPU:
        return found
    if func is aten.copy_.default:
        return args[0]
    wrapped = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _count(mode: SecondDevice, func: Any, args: Any, target: torch.device | None) -> None:
    if func is aten._to_copy.default:
        to_cpu = isinstance(args[0], OnDevice) and target == CPU
    else:
        to_cpu = func is aten.copy_.default and isinstance(args[1], OnDevice) and not isinstance(args[0], OnDevice)
    masks = func in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    if to_cpu:
        mode.wait("copy")
    elif func in _WAITS or masks:
        mode.wait(str(func))


def _check(func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
    """Refuse what a GPU refuses."""
    generator = kwargs.get("generator")
    if generator is not None and generator._cdata not in _generators:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu' ({func})")
    if func in _COPIES:
        return
    if func in _INDEXING:
        tensors = [t for t in (args[0], *args[2:]) if isinstance(t, Tensor)]
    if any(isinstance(t, OnDevice) for t in tensors) and any(not isinstance(t, OnDevice) and t.ndim for t in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and {DEVICE} ({func})")


class _Generator(torch.Generator):
    """A generator that says it is the second device's. An operation gets another object around the same ``_cdata``."""

    device = DEVICE


_real_generator, _generators = torch.Generator, set[int]()


def _generator(device: Any = "cpu") -> torch.Generator:
    if torch.device(device) == CPU:
        made = _real_generator()
        _generators.discard(made._cdata)
        return made
    made = _Generator()
    _generators.add(made._cdata)
    return made


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Another device is no mistake here."""


def on_second_device() -> SingleDeviceStrategy:
    """A Trainer's strategy: one process, on the second device."""
    return SingleDeviceStrategy(device=DEVICE, accelerator=_Accelerator())


@contextmanager
def second_device() -> Iterator[SecondDevice]:
    """Inside, ``gpu:0`` can be used."""
    swap, lift = torch.__future__.get_swap_module_params_on_conversion(), torch._C._only_lift_cpu_tensors()
    with pytest.MonkeyPatch.context() as patch, SecondDevice() as mode:
        patch.setattr(torch, "Generator", _generator)
        patch.setattr(_Module, "there", True)
        # A frozen matrix is one of this class here, and as plain as on a GPU.
        plain = lambda head: type(head) is nn.Linear and not head.weight.requires_grad  # noqa: E731
        patch.setattr("seedlora.training.losses.is_frozen_matrix", plain)
        # Parameters stay the same objects when a module moves, as they do from a CPU to a GPU.
        torch.__future__.set_swap_module_params_on_conversion(True)
        # torch.tensor(..., device=...) makes a CPU tensor, and moves it by an operation that the mode sees.
        torch._C._set_only_lift_cpu_tensors(True)
        try:
            yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(lift)
            torch.__future__.set_swap_module_params_on_conversion(swap)

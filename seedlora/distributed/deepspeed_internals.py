"""All that is used of DeepSpeed beyond what its documentation promises, one function for each use.

``tests/distributed/test_deepspeed_internals.py`` fails by the function's name when a release takes one of
these away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch.strategies import DeepSpeedStrategy


def skip_shared_memory_extension() -> None:
    """Tell DeepSpeed not to build the extension for processes that share memory: gloo does its work.

    Building it takes over a minute. ``deepspeed.ops.__compatible_ops__`` lists what may be built.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_partitioned_parameter(parameter: Tensor) -> bool:
    """Return whether ZeRO-3 has dealt a parameter's values out to the ranks.

    DeepSpeed gives each such parameter a number, ``ds_id``.
    """
    return hasattr(parameter, "ds_id")


def is_last_micro_batch(strategy: DeepSpeedStrategy) -> bool:
    """Return whether the micro-batch at hand is the last of an optimizer step, after which gradients are whole.

    Asks the engine behind Lightning's ``DeepSpeedStrategy``, which counts the micro-batches itself.
    """
    return bool(strategy.deepspeed_engine.is_gradient_accumulation_boundary())


def local_gradient(parameter: Any) -> Tensor | None:
    """Return the part of a gradient, averaged over ranks and micro-batches, that this rank's optimizer will use.

    It is a view: what is written to it is what the optimizer sees. None if the parameter is another rank's alone.

    ``deepspeed.utils.safe_get_full_grad`` gathers whole gradients, with one collective for each parameter. The parts
    are reached by the attributes that it uses itself: ``_z3_optimizer`` under ZeRO-3, ``_hp_mapping`` and
    ``_index_in_param_group`` under ZeRO-1 and 2.
    """
    if is_partitioned_parameter(parameter):
        gradient, _ = parameter._z3_optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return gradient
    if parameter._hp_mapping is None:
        return None
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)


def destroy_engine(model: nn.Module | None) -> None:
    """Take DeepSpeed's hooks and buffers off a module, if it is wrapped in an engine.

    ``DeepSpeedEngine.destroy`` is not documented; without it a second engine finds the hooks of the first.
    """
    if (destroy := getattr(model, "destroy", None)) is not None:
        destroy()

"""Make Lightning's strategies fit a stack of adapters: what they do not do by themselves.

DDP needs nothing. DeepSpeed clips by one norm over all parameters, which would couple the replicas, and keeps weights
and gradients in parts; FSDP2 leaves the sharding to the module. Both are handled here, and nowhere else.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)

from seedlora.distributed.deepspeed_internals import skip_shared_memory_extension
from seedlora.distributed.lightning_internals import registered_options, set_up_without_gpu, share_data_alone
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

#: Strategies that start processes out of a running one: what such a process learns is lost with it.
_FORKED = ("ddp_spawn", "ddp_fork", "ddp_notebook")


class CPUDeepSpeedStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy on the CPU, over gloo: for tests, and to try a launch line before renting GPUs.

    Lightning refuses DeepSpeed without a GPU. On a GPU its own class is used, with the same words.
    """

    def setup_environment(self) -> None:
        """Tell DeepSpeed that the CPU is the accelerator, then start up as DDP does."""
        os.environ["DS_ACCELERATOR"] = "cpu"
        skip_shared_memory_extension()
        self.parallel_devices = [torch.device("cpu", i) for i in range(self.num_processes)]
        set_up_without_gpu(self)


class _DtypesAsLoaded(DeepSpeedPrecision):
    """Leaves the module's dtypes as they are: Lightning's own class makes a base model in bfloat16 one in float32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """Return the module unchanged."""
        return module


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2 through Lightning's ``ModelParallelStrategy``: each rank holds a part of the base model, without DeepSpeed.

    The module shards itself, see :func:`shard`. A checkpoint is one file, as of one process: whole adapters and whole
    optimizer state, which are small, and nothing of the base model.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """Let all processes share the data, and none a layer's work."""
        share_data_alone(self)
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the trained weights, whole, on the first rank."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def choose_strategy(strategy: str | Strategy, *, accelerator: str) -> str | Strategy:
    """Return what to give the trainer for the strategy that the user named.

    Args:
        strategy: a name in Lightning's registry or a strategy.
        accelerator: as the trainer takes it.

    Returns:
        The same, except that DeepSpeed on a CPU is :class:`CPUDeepSpeedStrategy`. A strategy object is copied, since
        one object serves one trainer.

    Raises:
        ValueError: for a strategy that cannot train a stack.
    """
    if not isinstance(strategy, str):
        return copy.deepcopy(strategy)
    if strategy.startswith(_FORKED):
        raise ValueError(
            f"{name_option('trainer.strategy', strategy)} starts its processes out of this one, which then has no "
            "results; use ddp"
        )
    if strategy == "fsdp2":
        return FSDP2Strategy()
    if strategy.startswith("fsdp"):
        raise ValueError(
            f"{name_option('trainer.strategy', strategy)} flattens frozen and trained weights together; use fsdp2 or "
            "deepspeed_stage_3"
        )
    cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if cpu and strategy.startswith("deepspeed") and strategy in StrategyRegistry.available_strategies():
        return CPUDeepSpeedStrategy(**registered_options(strategy))
    return strategy


def prepare_strategy(
    trainer: pl.Trainer, *, quantization: str = "none", backend: str | None = None, full: str | None = None
) -> None:
    """Check that the trainer's strategy can train a stack, and set what it must leave to us.

    Called before the strategy sets up the model; a second call changes nothing.

    Args:
        trainer: whose strategy it is.
        quantization: of the base model.
        backend: that compiles its layers.
        full: the option by which weights are trained in full.

    Raises:
        ValueError: naming the option that cannot be right.
    """
    strategy = trainer.strategy
    if isinstance(strategy, FSDPStrategy) or (
        isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2Strategy)
    ):
        raise ValueError(f"{type(strategy).__name__} cannot train a stack; use FSDP2Strategy (fsdp2)")
    if "true" in str(trainer.precision) and trainer.precision != "32-true":
        raise ValueError(
            f"{name_option('trainer.precision', trainer.precision)} would keep the adapters in it too; "
            f"leave it at 32-true and set {name_option('model.dtype')} for the base model"
        )
    if not holds_whole_adapters(trainer) and trainer.precision != "32-true":
        raise ValueError(
            f"{name_option('trainer.precision', trainer.precision)} under {type(strategy).__name__} would round the "
            "adapters "
            f"to it; leave it at 32-true and set {name_option('model.dtype')} for the base model"
        )
    chosen = {"quantization": quantization if quantization != "none" else None, "compile": backend}
    asked = [f"{option} {value}" for option, value in chosen.items() if value is not None]
    for option in [*asked, *([] if full is None else [full])]:
        if splits_base(trainer):
            raise ValueError(
                f"{name_option(f'model.{option}')} and {type(strategy).__name__}, which splits the base model over the "
                "processes, do not go together; use ddp or deepspeed_stage_2"
            )
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ValueError(
            f"{name_option('trainer.gradient_clip_algorithm', 'value')} does not exist under DeepSpeed; choose norm, "
            "or ddp"
        )
    config = strategy.config
    assert isinstance(config, dict)
    for section in ("optimizer", "scheduler", "fp16", "bf16"):
        if section in config:
            raise ValueError(
                f"the DeepSpeed configuration must not have a section '{section}': the module's options set it"
            )
    # Each replica is clipped on its own norm, by the module.
    config["gradient_clipping"] = 0.0
    # For DeepSpeed's own throughput figures, which are not shown; Lightning would look for a batch sampler.
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    # One that goes by elements is right on parts of tensors, and check_optimizer lets no other through.
    config.setdefault("zero_allow_untested_optimizer", True)
    # The optimizer is torch's, on the CPU too.
    config["zero_force_ds_cpu_optimizer"] = False
    strategy.exclude_frozen_parameters = True
    strategy.precision_plugin = _DtypesAsLoaded()


@dataclass(frozen=True)
class Sharding:
    """States how much of a run each of its processes holds a part of, as a ZeRO stage.

    Args:
        stage: 0 for nothing, 1 for the optimizer's state, 2 for the gradients too, 3 for the weights too.
        processes: that share.
    """

    stage: int = 0
    processes: int = 1


ONE_PROCESS = Sharding()


def sharding_of(trainer: pl.Trainer) -> Sharding:
    """Return how the trainer's strategy shares what a run holds; FSDP2 counts as stage 3."""
    strategy, stage = trainer.strategy, 0
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        stage = int(strategy.config.get("zero_optimization", {}).get("stage", 0))
    elif isinstance(strategy, FSDP2Strategy):
        stage = 3
    return Sharding(stage, trainer.world_size)


def splits_base(trainer: pl.Trainer) -> bool:
    """Return whether each rank holds only a part of the base model, as under ZeRO-3 and FSDP2."""
    return sharding_of(trainer).stage == 3


def holds_whole_adapters(trainer: pl.Trainer) -> bool:
    """Return whether each rank's parameters are the adapters, so that writing to them changes what is trained."""
    return not isinstance(trainer.strategy, DeepSpeedStrategy | FSDP2Strategy)


def saves_checkpoint_folders(trainer: pl.Trainer) -> bool:
    """Return whether a checkpoint is a folder with a file of each rank, and not one file."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def step_scale(trainer: pl.Trainer) -> int:
    """Return the factor for a loss that is already normalised over all micro-batches and ranks of an optimizer step.

    The strategies average gradients over the ranks, and Lightning divides the loss by ``accumulate_grad_batches``.
    DeepSpeed's engine divides by it once more; AdamW hides a wrong scale, except where its epsilon or the clip counts.
    """
    accumulate = trainer.accumulate_grad_batches
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        accumulate *= accumulate
    return accumulate * trainer.world_size


def check_batches(trainer: pl.Trainer, batches: int) -> None:
    """Refuse an epoch whose last optimizer step has fewer micro-batches, where the strategy cannot count it.

    Raises:
        ValueError: under DeepSpeed, which steps after every ``accumulate_grad_batches`` micro-batches, while Lightning
            also steps at the end of an epoch.
    """
    accumulate = trainer.accumulate_grad_batches
    if isinstance(trainer.strategy, DeepSpeedStrategy) and batches % accumulate:
        raise ValueError(
            f"{name_option('trainer.limit_train_batches')} leaves {batches} micro-batches per epoch, which "
            "accumulate_grad_batches "
            f"{accumulate} does not divide; DeepSpeed needs a multiple of it"
        )

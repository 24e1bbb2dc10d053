"""How the processes of a run share a stack of adapters: what Lightning's strategies do not do by themselves.

DDP needs nothing. DeepSpeed clips by one norm over all parameters, which would couple the replicas, and keeps weights
and gradients in parts; FSDP2 leaves the sharding to the module. Both are handled here, and nowhere else.
"""

from __future__ import annotations

import copy
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

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
        import deepspeed

        # An extension for processes that share memory; building it takes over a minute, and gloo does its work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.parallel_devices = [torch.device("cpu", i) for i in range(self.num_processes)]
        # Past DeepSpeedStrategy's own method, which only refuses.
        DDPStrategy.setup_environment(self)


class _DtypesAsLoaded(DeepSpeedPrecision):
    """Leaves the module's dtypes as they are: Lightning's own makes a base model in bfloat16 one in float32."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_module(self, module: torch.nn.Module) -> torch.nn.Module:
        """As it is."""
        return module


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2, through Lightning's ``ModelParallelStrategy``: the base model in parts on all ranks, without DeepSpeed.

    The module shards itself, see :func:`shard`. A checkpoint is one file, as of one process: whole adapters and whole
    optimizer state, which are small, and nothing of the base model.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **options)

    def setup_environment(self) -> None:
        """All processes share the data; none shares a layer's work."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The trained weights, whole, on the first rank."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(self.model, options=options)


def shard(model: Any, trainer: pl.Trainer) -> None:
    """Under FSDP2, split a PEFT model's weights over the ranks, one decoder layer at a time; else do nothing.

    A layer's weights, the adapters among them, are whole while it computes. A model is split once.
    """
    if not isinstance(trainer.strategy, FSDP2Strategy) or is_sharded(model):
        return
    from torch.distributed.fsdp import fully_shard

    mesh = trainer.strategy.device_mesh["data_parallel"]
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The layers of a PEFT model that its family names as units, in their order."""
    names = set(model.get_base_model()._no_split_modules or ())
    return [layer for layer in model.modules() if type(layer).__name__ in names]


def is_sharded(model: Any) -> bool:
    """Whether :func:`shard` has split the model: its layers can then not be split anew for other adapters."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def is_partitioned(model: Any) -> bool:
    """Whether ZeRO-3 has dealt the model's weights out: other adapters can be put on it, if they need no weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def choose_strategy(strategy: str | Strategy, *, accelerator: str) -> str | Strategy:
    """What to give the trainer for the strategy that the user named.

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
            f"trainer.strategy {strategy} starts its processes out of this one, which then has no results; use ddp"
        )
    if strategy == "fsdp2":
        return FSDP2Strategy()
    if strategy.startswith("fsdp"):
        raise ValueError(
            f"trainer.strategy {strategy} flattens frozen and trained weights together; use fsdp2 or deepspeed_stage_3"
        )
    cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    if cpu and strategy.startswith("deepspeed") and strategy in StrategyRegistry.available_strategies():
        return CPUDeepSpeedStrategy(**StrategyRegistry[strategy]["init_params"])
    return strategy


def prepare(
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
        raise ValueError(f"trainer.strategy {type(strategy).__name__} cannot train a stack; use FSDP2Strategy (fsdp2)")
    if "true" in str(trainer.precision) and trainer.precision != "32-true":
        raise ValueError(
            f"trainer.precision {trainer.precision} would keep the adapters in it too; "
            "leave it at 32-true and set --model.dtype for the base model"
        )
    if not holds_whole_adapters(trainer) and trainer.precision != "32-true":
        raise ValueError(
            f"trainer.precision {trainer.precision} under {type(strategy).__name__} would round the adapters to it; "
            "leave it at 32-true and set --model.dtype for the base model"
        )
    chosen = {"quantization": quantization if quantization != "none" else None, "compile": backend}
    asked = [f"{option} {value}" for option, value in chosen.items() if value is not None]
    for option in [*asked, *([] if full is None else [full])]:
        if splits_base(trainer):
            raise ValueError(
                f"model.{option} and {type(strategy).__name__}, which splits the base model over the "
                "processes, do not go together; use ddp or deepspeed_stage_2"
            )
    if not isinstance(strategy, DeepSpeedStrategy):
        return
    if trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value":
        raise ValueError("trainer.gradient_clip_algorithm value does not exist under DeepSpeed; choose norm, or ddp")
    config = strategy.config
    assert isinstance(config, dict)
    for section in ("optimizer", "scheduler", "fp16", "bf16"):
        if section in config:
            raise ValueError(f"the DeepSpeed configuration must not have a section '{section}': --model options set it")
    # Each replica is clipped on its own norm, by the module.
    config["gradient_clipping"] = 0.0
    # For DeepSpeed's own throughput figures, which are not shown; Lightning would look for a batch sampler.
    config.setdefault("train_micro_batch_size_per_gpu", 1)
    # The optimizer is torch's, on the CPU too.
    config["zero_force_ds_cpu_optimizer"] = False
    strategy.exclude_frozen_parameters = True
    strategy.precision_plugin = _DtypesAsLoaded()


@dataclass(frozen=True)
class Sharding:
    """What each of the processes holds a part of, in ZeRO's words.

    Args:
        stage: 0 for nothing, 1 for the optimizer's state, 2 for the gradients too, 3 for the weights too.
        processes: that share.
    """

    stage: int = 0
    processes: int = 1


ONE_PROCESS = Sharding()


def sharding(trainer: pl.Trainer) -> Sharding:
    """How the trainer's strategy shares what a run holds; FSDP2 is stage 3."""
    strategy, stage = trainer.strategy, 0
    if isinstance(strategy, DeepSpeedStrategy):
        assert isinstance(strategy.config, dict)
        stage = int(strategy.config.get("zero_optimization", {}).get("stage", 0))
    elif isinstance(strategy, FSDP2Strategy):
        stage = 3
    return Sharding(stage, trainer.world_size)


def splits_base(trainer: pl.Trainer) -> bool:
    """Whether each rank holds a part of the base model only: ZeRO-3 and FSDP2."""
    return sharding(trainer).stage == 3


def holds_whole_adapters(trainer: pl.Trainer) -> bool:
    """Whether each rank's parameters are the adapters, so that writing to them changes what is trained."""
    return not isinstance(trainer.strategy, DeepSpeedStrategy | FSDP2Strategy)


def saves_folders(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint is a folder with a file of each rank, and not one file."""
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def step_scale(trainer: pl.Trainer) -> int:
    """What multiplies a loss that is already normalised over the whole optimizer step, all micro-batches, all ranks.

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
            f"trainer.limit_train_batches leaves {batches} micro-batches per epoch, which accumulate_grad_batches "
            f"{accumulate} does not divide; DeepSpeed needs a multiple of it"
        )


def clip_gradients(
    groups: Iterable[Sequence[torch.nn.Parameter]], *, max_norm: float, algorithm: str | None, strategy: Strategy | None
) -> None:
    """Clip each group of parameters on its own norm, over all ranks, before an optimizer step.

    Under DDP every rank has the whole gradient. Under ZeRO it has a part, and the groups' squared norms are summed over
    the ranks in one collective of as many numbers as there are groups.

    Args:
        groups: the parameters of one replica each.
        max_norm: what a larger norm is scaled to; or the largest absolute value, if ``algorithm`` is ``value``.
        algorithm: ``value``, or ``norm`` and ``None``.
        strategy: which holds the gradients; ``None`` is one process.
    """
    if not isinstance(strategy, DeepSpeedStrategy):
        clip: Any = torch.nn.utils.clip_grad_value_ if algorithm == "value" else torch.nn.utils.clip_grad_norm_
        for group in groups:
            clip(group, max_norm)
        return
    # Lightning calls this after every micro-batch; there are gradients after the last one of a step.
    if not strategy.deepspeed_engine.is_gradient_accumulation_boundary():
        return
    parts = [[_local_gradient(parameter) for parameter in group] for group in groups]
    squares = torch.stack([_sum_of_squares(part, strategy.root_device) for part in parts])
    if strategy.world_size > 1:
        torch.distributed.all_reduce(squares)
    for part, norm in zip(parts, squares.sqrt(), strict=True):
        # As torch.nn.utils.clip_grad_norm_ does it.
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in part:
            if gradient is not None:
                gradient.mul_(factor.to(gradient.device))


class ProcessWatch:
    """Stops this process when another of the run is gone, wherever it waits for it.

    A process that waits in a collective may wait for the rest of the process group's timeout, half an hour by default;
    Lightning's own observer, every five seconds, ends the first process without a word. This one looks often enough to
    be first: the first process of a machine at those that Lightning's launcher started, the others at the
    process that started them. Processes of another machine are not seen; there the connection or the timeout tells.

    Args:
        trainer: whose launcher starts the processes.
        on_lost: called once, with what happened, before the process exits with code 1.
    """

    def __init__(self, trainer: pl.Trainer, on_lost: Callable[[str], None]) -> None:
        self._trainer, self._on_lost, self._parent = trainer, on_lost, os.getppid()

    def start(self) -> None:
        """Look, beside the main thread, until that ends."""
        threading.Thread(target=self._watch, name="process-watch", daemon=True).start()

    def finish(self) -> None:
        """At the end of the run: the first process outlives the others, or they would find it gone."""
        for process in self._processes:
            process.wait()

    def _watch(self) -> None:
        while not (lost := self._lost()):
            time.sleep(0.02)
        self._on_lost(lost)
        for process in self._processes:
            process.kill()
        os._exit(1)

    @property
    def _processes(self) -> Sequence[subprocess.Popen[bytes]]:
        return getattr(self._trainer.strategy.launcher, "procs", ())

    def _lost(self) -> str | None:
        if self._trainer.global_rank and os.getppid() != self._parent:
            return "the process that started this one is gone"
        for rank, process in enumerate(self._processes, start=1):
            if code := process.poll():
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                return f"process {rank} of {len(self._processes) + 1} {how}"
        return None


def lost_connection(error: BaseException) -> bool:
    """Whether an error says that the other processes cannot be reached, as when one of them ended."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def release(trainer: pl.Trainer) -> None:
    """Take DeepSpeed's hooks and buffers off the module after a fit: the next one makes an engine of its own."""
    engine: Any = trainer.model
    if isinstance(trainer.strategy, DeepSpeedStrategy) and engine is not None and hasattr(engine, "destroy"):
        engine.destroy()


def from_first(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    """The first rank's tensor on all ranks, where others give one of its shape and dtype. All ranks must call it."""
    if trainer.world_size == 1:
        return tensor
    shared = tensor.to(trainer.strategy.root_device)
    torch.distributed.broadcast(shared, src=0)
    return shared.to(tensor.device)


def whole(parameter: Tensor) -> Tensor:
    """All values of a parameter, also where each rank holds a part: a detached copy. All ranks must call it."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    if isinstance(parameter, DTensor):
        full: Tensor = parameter.full_tensor()
        return full.detach()
    return parameter.detach().clone()


def _local_gradient(parameter: Any) -> Tensor | None:
    """The part of a gradient, averaged over ranks and micro-batches, that this rank's optimizer will use: a view.

    ``deepspeed.utils.safe_get_full_grad`` gathers whole gradients, with one collective for each parameter.
    """
    if hasattr(parameter, "ds_id"):
        gradient, _ = parameter._z3_optimizer._get_fp32_grad_state_partition(parameter, release_swap_buffers=False)
        return gradient
    if parameter._hp_mapping is None:
        return None  # another rank's
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)


def _sum_of_squares(part: Iterable[Tensor | None], device: torch.device) -> Tensor:
    squares = [gradient.float().square().sum().to(device) for gradient in part if gradient is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), device=device)

"""Every option of Lightning's Trainer: passed on, refused by name, or given a meaning here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seedlora.distributed.lightning_internals import is_barebones, uses_distributed_sampler
from seedlora.run.budget import ReplicaBudget, limited_batches, steps_per_epoch
from seedlora.run.stack_data import StackDataModule
from seedlora.utils.options import name_option, name_options

if TYPE_CHECKING:
    import lightning.pytorch as pl

PASSED, MEANING, REFUSED = "passed on", "has a meaning here", "refused"


@dataclass(frozen=True)
class Fit:
    """Hold what the options of a Trainer are checked against.

    Args:
        trainer: that has them.
        data: the data module, set up.
        share: each replica's part of the Trainer's epochs or steps.
        labels: of the adapters in training, and of what they are merged to at a validation.
    """

    trainer: pl.Trainer
    data: StackDataModule
    share: ReplicaBudget
    labels: tuple[str, ...]

    @property
    def batches(self) -> int:
        """Return the training batches of an epoch."""
        return limited_batches(len(self.data.train_dataloader()), self.trainer.limit_train_batches)

    @property
    def val_batches(self) -> int:
        """Return the batches of a validation."""
        return limited_batches(len(self.data.val_dataloader()), self.trainer.limit_val_batches)


@dataclass(frozen=True)
class TrainerOption:
    """Say what becomes of an option of the Trainer.

    Args:
        how: :data:`PASSED`, :data:`MEANING` or :data:`REFUSED`.
        says: in a few words, for ``docs/trainer.md``.
        refusal: returns why a value of it cannot be; None if it can.
    """

    how: str
    says: str
    refusal: Callable[[Fit], str | None] = lambda _: None


def check_trainer(fit: Fit) -> None:
    """Raise ValueError for the first option of a Trainer that cannot be, before anything is trained."""
    for option in TRAINER_OPTIONS.values():
        if (reason := option.refusal(fit)) is not None:
            raise ValueError(reason)


def ended_by(trainer: pl.Trainer) -> str:
    """Return what ended a fit before its replicas had their steps, under the name that it was asked for by."""
    from lightning.pytorch.callbacks import EarlyStopping, Timer

    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "trainer.max_time"
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping on {callback.monitor}"
    return "a callback that stopped the Trainer" if trainer.should_stop else "the Trainer"


def _no_batches(fit: Fit) -> str | None:
    limit, there = fit.trainer.limit_train_batches, len(fit.data.train_dataloader())
    if fit.batches:
        return None
    if not there:
        return "there are no training batches: the data has fewer rows than one batch of every seed takes"
    return (
        f"{name_option('trainer.limit_train_batches', limit)} leaves none of the {there} training batches of an epoch"
    )


def _no_val_batches(fit: Fit) -> str | None:
    limit, there = fit.trainer.limit_val_batches, len(fit.data.val_dataloader())
    if not limit or not there or fit.val_batches:
        return None
    return (
        f"{name_option('trainer.limit_val_batches', limit)} leaves none of the {there} validation batches; 0 switches "
        "validation off"
    )


def _min_epochs(fit: Fit) -> str | None:
    least, share = fit.trainer.min_epochs, fit.share.epochs
    if least is None or share is None or least <= share:
        return None
    return f"{name_option('trainer.min_epochs', least)} is more than a seed is trained, which is {share}; leave it out"


def _min_steps(fit: Fit) -> str | None:
    least, total = (
        fit.trainer.min_steps,
        fit.share.total_steps(steps_per_epoch(fit.trainer, fit.data.train_dataloader())),
    )
    if least is None or least <= total:
        return None
    return (
        f"{name_option('trainer.min_steps', least)} is more than a seed is trained, which is {total:,} steps; leave "
        "it out"
    )


def _val_check_interval(fit: Fit) -> str | None:
    every = fit.trainer.val_check_interval
    if isinstance(every, int | float) and every <= 0:
        return f"{name_option('trainer.val_check_interval', every)} is no interval; {_no_validation()}"
    within_epoch = isinstance(every, int) and fit.trainer.check_val_every_n_epoch is not None
    if not within_epoch or every <= fit.batches or not fit.val_batches:
        return None
    return (
        f"{name_option('trainer.val_check_interval', every)} is more than the {fit.batches} batches of an epoch; take "
        "a number up to "
        f"that, a part of an epoch such as 0.5, or {name_option('trainer.check_val_every_n_epoch', None)} to count "
        "batches "
        "over all epochs"
    )


def _distributed_sampler(fit: Fit) -> str | None:
    if fit.trainer.world_size == 1 or not uses_distributed_sampler(fit.trainer):
        return None
    sampler = name_option("trainer.use_distributed_sampler", False)
    return f"the data module deals rows to ranks itself: set {sampler}"


def _overfit_batches(fit: Fit) -> str | None:
    if not fit.trainer.overfit_batches:
        return None
    return (
        f"{name_option('trainer.overfit_batches')} would replace the order in which rows are dealt to the seeds; use "
        f"{name_option('trainer.limit_train_batches')} for a few batches of each epoch, or fewer rows of data"
    )


def _barebones(fit: Fit) -> str | None:
    if not is_barebones(fit.trainer):
        return None
    return f"{name_option('trainer.barebones', True)} logs nothing, so no validation could be read; leave it out"


def _clip(fit: Fit) -> str | None:
    value = fit.trainer.gradient_clip_val
    if value is None or value >= 0:
        return None
    return f"{name_option('trainer.gradient_clip_val', value)} would turn every gradient round; give 0 or more"


def _check_val(fit: Fit) -> str | None:
    every = fit.trainer.check_val_every_n_epoch
    if every is None or every >= 1:
        return None
    return f"{name_option('trainer.check_val_every_n_epoch', every)}: give at least 1; {_no_validation()}"


def _callbacks(fit: Fit) -> str | None:
    """Return why a callback cannot be there: it changes what replicas share, or watches what is never logged."""
    for callback in fit.trainer.callbacks:
        # Lightning's own, or one made from it; by name, as some are not in every release.
        kinds = {kind.__name__ for kind in type(callback).__mro__ if kind.__module__.startswith("lightning.")}
        if reason := next((why for name, why in _REFUSED_CALLBACKS.items() if name in kinds), None):
            return f"{type(callback).__name__} {name_options(reason)}"
    return _monitors(fit)


def _monitors(fit: Fit) -> str | None:
    """Return what a callback watches that is never logged: Lightning would say so after the first epoch."""
    logged = [f"train/loss_{label}" for label in fit.labels if label.startswith("seed_") or label.endswith("_seed")]
    logged += [f"val/{kind}_{label}" for kind in ("loss", "match") for label in fit.labels] if fit.val_batches else []
    for callback in fit.trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith(("train/", "val/", "test/")) and monitor not in logged:
            rows = "" if fit.val_batches else "; there are no validation batches"
            return (
                f"{type(callback).__name__} watches '{monitor}', which is not logged; choose one of "
                f"{', '.join(logged)}{rows}"
            )
    return None


def _no_validation() -> str:
    return f"{name_option('trainer.limit_val_batches', 0)} switches validation off"


_OF_ALL = "changes what all replicas of a stack share, so that none would be as it is alone"
#: Callbacks of Lightning's that do not go with replicas, and what to do, for `name_options`.
_REFUSED_CALLBACKS: Mapping[str, str] = {
    "GradientAccumulationScheduler": "changes how many batches a step takes, from which the steps of each seed were "
    "counted; set {trainer.accumulate_grad_batches}",
    "BatchSizeFinder": f"{_OF_ALL}; set {{data.batch_size}} (--plan shows the memory)",
    "LearningRateFinder": f"{_OF_ALL}; {{ensemble.sweep}} tries several learning rates at once",
    "StochasticWeightAveraging": f"{_OF_ALL}; {{ensemble.ema}} averages the weights of each replica",
    "WeightAveraging": f"{_OF_ALL}; {{ensemble.ema}} averages the weights of each replica",
    "ModelPruning": f"{_OF_ALL}; merge methods such as dare and ties make updates sparse",
    "BaseFinetuning": f"{_OF_ALL}; {{model.target_modules}} and {{model.modules_to_save}} say what is trained",
}
_PASSED = TrainerOption(PASSED, "")
#: By name, in the order of Trainer's signature.
TRAINER_OPTIONS: Mapping[str, TrainerOption] = {
    "accelerator": _PASSED,
    "strategy": TrainerOption(
        MEANING, "`ddp`, `deepspeed_stage_1` to `_3` and `fsdp2`; others are refused by name: [scale.md](scale.md)"
    ),
    "devices": TrainerOption(PASSED, "`train.py` takes one unless told otherwise"),
    "num_nodes": _PASSED,
    "precision": TrainerOption(
        MEANING, "`32-true` or mixed; `model.dtype` is that of the base model, so all others are refused"
    ),
    "logger": TrainerOption(MEANING, "`metrics.jsonl` is written into the run's folder beside it"),
    "callbacks": TrainerOption(
        MEANING,
        "called beside ours; what they watch must be logged; what one of them ends early is merged as it is and said "
        "to be of so many of so many steps; those that change batches, learning rates or weights for all replicas "
        "(finders, weight averaging, pruning, finetuning, accumulation by a schedule) are refused",
        _callbacks,
    ),
    "fast_dev_run": TrainerOption(MEANING, "so many batches of each seed; nothing is written"),
    "max_epochs": TrainerOption(MEANING, "shared among the seeds, or given to each: `ensemble.budget`; 0 is refused"),
    "min_epochs": TrainerOption(MEANING, "refused where it is more than a seed's share", _min_epochs),
    "max_steps": TrainerOption(MEANING, "as `max_epochs`"),
    "min_steps": TrainerOption(MEANING, "as `min_epochs`", _min_steps),
    "max_time": TrainerOption(
        MEANING,
        "of each fit, parts before a `--resume` counted; what is trained by then is merged, and terminal, "
        "`trained.json`, report and cards say of how many of how many steps it is",
    ),
    "limit_train_batches": TrainerOption(MEANING, "an epoch has so many batches; none is refused", _no_batches),
    "limit_val_batches": TrainerOption(
        MEANING, "0 is no validation: what has to be chosen on one is refused then", _no_val_batches
    ),
    "limit_test_batches": TrainerOption(MEANING, "0 is no test, and said"),
    "limit_predict_batches": _PASSED,
    "overfit_batches": TrainerOption(REFUSED, "it replaces the order of the rows", _overfit_batches),
    "val_check_interval": TrainerOption(
        MEANING, "a number of batches beyond an epoch's is refused, unless epochs are not counted", _val_check_interval
    ),
    "check_val_every_n_epoch": TrainerOption(PASSED, "at least 1", _check_val),
    "num_sanity_val_steps": TrainerOption(PASSED, "`train.py` takes 0"),
    "log_every_n_steps": TrainerOption(PASSED, "`train.py` takes 1"),
    "enable_checkpointing": TrainerOption(
        PASSED, "for a `ModelCheckpoint`, beside the checkpoints of the run, which are kept anyway"
    ),
    "enable_progress_bar": _PASSED,
    "enable_model_summary": _PASSED,
    "accumulate_grad_batches": TrainerOption(PASSED, "at least 1, or the data module refuses it"),
    "gradient_clip_val": TrainerOption(MEANING, "of each seed on its own, 0 or more; `train.py` takes 1.0", _clip),
    "gradient_clip_algorithm": TrainerOption(PASSED, "`value` is refused under DeepSpeed"),
    "deterministic": _PASSED,
    "benchmark": _PASSED,
    "inference_mode": TrainerOption(PASSED, "`train.py` takes false"),
    "use_distributed_sampler": TrainerOption(
        MEANING, "refused for several processes: the data module deals the rows", _distributed_sampler
    ),
    "profiler": _PASSED,
    "detect_anomaly": _PASSED,
    "barebones": TrainerOption(REFUSED, "it logs nothing", _barebones),
    "plugins": _PASSED,
    "sync_batchnorm": TrainerOption(PASSED, "no model here has batch norms"),
    "reload_dataloaders_every_n_epochs": _PASSED,
    "default_root_dir": TrainerOption(PASSED, "the run's folder is `ensemble.dirpath`"),
    "enable_autolog_hparams": _PASSED,
    "model_registry": _PASSED,
}

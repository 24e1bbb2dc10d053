"""``config.yaml`` of a run from Python: its options as far as they are known."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import seedlora.datamodules
from seedlora.datamodules import InstructionDataModule
from seedlora.names import FROM_PYTHON
from seedlora.run.ensemble import Ensemble
from seedlora.run.stack_data import StackDataModule
from seedlora.utils.places import without_home

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from seedlora.training.module import SeedLoRAModule

#: Arguments that a Trainer still knows, beside ``devices``.
_KNOWN = (
    "max_epochs",
    "max_steps",
    "min_epochs",
    "min_steps",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "log_every_n_steps",
    "precision",
    "num_nodes",
)


def python_config(
    trainer: pl.Trainer,
    module: SeedLoRAModule,
    data: StackDataModule,
    ensemble: Ensemble,
    *,
    besides: Iterable[object] = (),
) -> str:
    """Return the options of a run from Python as YAML.

    Where the command line can start the same run, ``train.py --config`` takes it as it is. Elsewhere the key
    :data:`seedlora.names.FROM_PYTHON` says why it cannot, and ``train.py`` refuses the file by these words.

    Args:
        trainer: of the run.
        module: to be trained.
        data: the data module.
        ensemble: the run.
        besides: callbacks and loggers of the user's own, which are named in a comment and not written.
    """
    options = {field.name: getattr(ensemble.options, field.name) for field in fields(ensemble.options)}
    sections: dict[str, Any] = {
        "data": {"class_path": _import_path(type(data)), "init_args": dict(data.hparams)},
        "model": dict(module.hparams),
        "ensemble": {**options, "dirpath": ensemble.dirpath, "resume": False},
        "trainer": {name: getattr(trainer, name) for name in _KNOWN} | _devices(trainer),
    }
    objects: list[str] = []
    plain = json.loads(json.dumps(sections, default=lambda value: _as_text(value, objects)))
    reasons = [*_only_in_python(module, data), *(f"{name} is no plain value" for name in objects)]
    lines = ["# Of a run from Python: python -m seedlora train --config with this file starts the same one."]
    if reasons:
        lines = ["# A record of a run from Python, which python -m seedlora train --config cannot start."]
        plain = {FROM_PYTHON: "; ".join(reasons), **plain}
    if names := ", ".join(dict.fromkeys(type(each).__name__ for each in besides)):
        lines.append(f"# Not in it: {names}.")
    return without_home("\n".join([*lines, yaml.safe_dump(plain, sort_keys=False)]), below=True)


def _as_text(value: object, objects: list[str]) -> str:
    """Return a path as text; of what YAML cannot hold the name, and remember it."""
    if not isinstance(value, Path):
        objects.append(str(getattr(value, "__name__", type(value).__name__)))
        return objects[-1]
    return str(value)


def _import_path(kind: type) -> str:
    """Return where a class is imported from, in short where the package has it."""
    short = getattr(seedlora.datamodules, kind.__name__, None) is kind
    return f"seedlora.datamodules.{kind.__name__}" if short else f"{kind.__module__}.{kind.__qualname__}"


def _only_in_python(module: SeedLoRAModule, data: StackDataModule) -> list[str]:
    """Say which objects the command line cannot make."""
    from seedlora.training.module import SeedLoRAModule

    reasons = []
    if type(module) is not SeedLoRAModule:
        reasons.append(f"{type(module).__name__} is not SeedLoRAModule itself")
    kind = type(data)
    given: Mapping[str, Any] = data.hparams
    needed = [name for name, each in inspect.signature(kind).parameters.items() if each.default is each.empty]
    if not isinstance(data, InstructionDataModule):
        reasons.append(f"{kind.__name__} is no InstructionDataModule")
    elif kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        reasons.append(f"{kind.__name__} cannot be imported")
    elif lacking := [name for name in needed if name not in given]:
        reasons.append(f"{kind.__name__} holds objects of Python: {', '.join(lacking)}")
    return reasons


def _devices(trainer: pl.Trainer) -> dict[str, object]:
    """Return on what the run trains, and by which strategy where there are several processes."""
    found: dict[str, object] = {"devices": trainer.num_devices}
    if trainer.world_size > 1:
        name = type(trainer.strategy).__name__
        found |= {"strategy": {"DDPStrategy": "ddp", "FSDP2Strategy": "fsdp2"}.get(name, name)}
        found |= {"use_distributed_sampler": False}
    return found

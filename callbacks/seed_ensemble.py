"""The callback that trains several seeds as one stack and fuses them."""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from seedlora.adapters.adapter import BASE_NAME, PROMPT_NAME, Adapter, is_model, is_trained
from seedlora.adapters.model_card import CARD_NAME, base_record, refresh_card, seed_card
from seedlora.adapters.reading import read_adapter
from seedlora.distributed.strategies import check_batches, holds_whole_adapters, saves_folders
from seedlora.merge.adapter_folders import fuse_folders
from seedlora.merge.bound_rule import COMMON, BoundRule, MergeRule
from seedlora.merge.inputs import stack_adapters, stack_updates, weight_files_of
from seedlora.merge.layers import fuse
from seedlora.merge.methods.soup import soup
from seedlora.merge.record import rule_record
from seedlora.merge.registry import make_rule
from seedlora.merge.whole_models import check_dense, fuse_into_base
from seedlora.model.loading import resolve
from seedlora.model.weight_files import WeightFiles
from seedlora.names import (
    ALL_CONTROLS,
    BASE,
    FUSED,
    LOGITS,
    LONG_SEED,
    NO_CONTROLS,
    RESULTS_NAME,
    SELECTION_NAME,
    SOUP,
    WIDE_SEED,
    seed_name,
)
from seedlora.records.results import RESULTS
from seedlora.records.selection import SELECTION
from seedlora.records.settings import RunSettings
from seedlora.records.training import CONTROL, TrainedRow
from seedlora.run.budget import ReplicaBudget, replica_budget
from seedlora.run.ensemble_options import KEEP, ON_DIVERGENCE, VARY
from seedlora.run.folder import RunFolder, step_of
from seedlora.run.memory import device_memory, fitting_stack, memory_of
from seedlora.scores.intervals import sample_losses
from seedlora.scores.results import Results, results
from seedlora.scores.row_scores import RowScores
from seedlora.selection.choice import Score, score_lazily
from seedlora.selection.comparison import NO_MERGE, TRAIN_ROWS, Comparison, rule_of_seeds
from seedlora.selection.settling import adapters_beside, adapters_to_score, settle
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import DivergedError, Replica, StoppedError
from seedlora.training.scoring import ADAPTERS_PER_FORWARD
from seedlora.updates.stacks import Layers, joined, members
from seedlora.utils.files import remove_folder

AUTO = "auto"
#: In the order in which they are trained.
TRAINED_CONTROLS = (LONG_SEED, WIDE_SEED)
_TERMINATED = "terminated by SIGTERM after training; the adapters are written"


class SeedEnsembleCallback(pl.Callback):
    """Train one LoRA replica per seed, all in one fit, and fuse them when it ends.

    Its life:

    - *setup*: the module gets one replica per seed and the data module their data orders; each replica's share of the
      trainer's epochs or steps is fixed.
    - *every validation*: the seeds trained so far are fused as they are, and the module scores seeds and fused adapter
      side by side (``val/loss_seed_42``, ``val/loss_fused``). Nothing random is drawn and no weight is changed. Seeds
      whose updates have full rank (DoRA, whole models) are scored alone.
      With ``patience``, a seed whose own validation loss has not improved that many times in a row is stopped: its rows
      are left out from then on, and the others go on; the fit ends when all are stopped.
    - *every* ``checkpoint_every_n_steps``: a checkpoint of adapters, optimizer, schedule and position, without base
      weights; the one before it is removed once it is whole. A SIGTERM, as a preempted job gets it, is answered by one
      after the step at hand, and the run ends; when training is over, at once.
    - *train end*: each seed's PEFT folder, or its whole model's, is written, with the data module's prompt in
      ``prompt.json``, and the checkpoints are removed; after the last one, seeds, soup and fused adapter are scored on
      the validation rows, with what is to be chosen on them, and ``selection.json``, ``soup`` and ``fused`` are
      written. ``Trainer.validate`` does the same for seeds that are all trained.
    - *test*: base, seeds, soup and fused adapter, read back from their folders, are scored on the same items, then
      what else is compared, :data:`seedlora.training.scoring.ADAPTERS_PER_FORWARD` adapters at a time, whole models one
      by one. Nothing is chosen any more. All of them are also scored on the same few training rows, as many as there
      are test items and at most :data:`seedlora.selection.comparison.TRAIN_ROWS`: their training losses, beside the
      test's scores.

    The folder is the state of the ensemble: a seed is finished when its adapter is there. With ``stack_size`` one fit
    trains the next ``stack_size`` unfinished seeds; while :attr:`pending` is not empty, call ``fit`` again with a new
    Trainer (and the same callback); the last one fuses all. Controls that are trained follow in the same way, one fit
    each, while :attr:`pending_controls` is not empty.

    Args:
        seeds: one replica each.
        merge: a method of :data:`seedlora.merge.registry.METHODS`, any rule, or ``none`` to fuse nothing. On the
            validation rows, ``auto`` chooses the method, ``seedlora_gain`` without an option ``p`` its gain, on all
            layers or on attention or FFN alone, and ``greedy_soup`` its members.
        merge_options: keyword options of the method.
        compare: further methods, as a list or separated by commas, that are scored on the same test items.
        compare_options: keyword options of these, by method.
        controls: ``untrained`` scores, on the same test items, the best seed times the gain of the fused adapter, soup
            times the factor that is best on validation rows, the greedy soup, and the mean of the seeds' probabilities
            (a mixture, no adapter). ``all`` also trains the first seed for as many tokens as all seeds had, and once
            more with the rank of all of them for as many as one had: ``n + 1`` times the tokens of a seed.
        select_by: what is best on validation rows: the lowest ``loss``, or the most exact matches (``match``).
        dirpath: the folder of the run; default: a new one under ``runs``, named by the time.
        budget: ``equal`` divides the trainer's ``max_epochs`` (or ``max_steps``) among the seeds, so that the ensemble
            costs what one seed would; ``full`` gives each seed all of it.
        vary: what a seed decides: ``both``, ``init`` (all see the first seed's data order) or ``order`` (all start from
            the first seed's weights and drop out what it does).
        stack_size: seeds trained at once; default all, or one where every weight is trained. ``auto`` takes as many as
            the memory estimate allows in 80 % of the machine's memory.
        keep: the weights of each seed that are kept: those of its ``last`` step, or of the validation at which its own
            loss was ``best``. A seed keeps what it would alone, whenever the others stop.
        patience: validations without a new best loss after which a seed is stopped; default never.
        on_divergence: what happens when a seed's training loss, or a weight of it, is not finite: ``stop`` ends the
            run, its checkpoints untouched; ``exclude`` goes on without that seed, whose rows and gradients reach no
            other, and the rest are fused.
        checkpoint_every_n_steps: optimizer steps between checkpoints.
        resume: go on with the run in ``dirpath``; without it a folder that holds a run is refused. Pass
            :attr:`ckpt_path` to ``fit``.

    Raises:
        ValueError: for seeds that are not distinct and non-negative, an unknown method, option, budget or ``vary``.
    """

    def __init__(
        self,
        seeds: Sequence[int] = (11, 42, 202),
        *,
        merge: str | MergeRule = "seedlora",
        merge_options: Mapping[str, Any] | None = None,
        compare: Sequence[str] | str | None = None,
        compare_options: Mapping[str, Mapping[str, Any]] | None = None,
        controls: str = NO_CONTROLS,
        select_by: str = "loss",
        dirpath: str | Path | None = None,
        budget: str = "equal",
        vary: str = "both",
        stack_size: int | str | None = None,
        keep: str = "last",
        patience: int | None = None,
        on_divergence: str = "stop",
        checkpoint_every_n_steps: int = 25,
        resume: bool = False,
    ) -> None:
        self.seeds = tuple(seeds)
        if not self.seeds:
            raise ValueError("ensemble.seeds is empty; give at least one seed, for example [11, 42, 202]")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**63]:
            raise ValueError(f"ensemble.seeds must be from 0 to 2**63 - 1, got {wrong[0]}")
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(f"ensemble.seeds must differ, but {repeated[0]} is given more than once")
        if vary not in VARY:
            raise ValueError(f"Unknown ensemble.vary '{vary}'; choose one of {', '.join(VARY)}")
        if not (stack_size in (None, AUTO) or (isinstance(stack_size, int) and stack_size >= 1)):
            raise ValueError(f"ensemble.stack_size must be at least 1, or '{AUTO}', got {stack_size!r}")
        for name, value, allowed in (("keep", keep, KEEP), ("on_divergence", on_divergence, ON_DIVERGENCE)):
            if value not in allowed:
                raise ValueError(f"Unknown ensemble.{name} '{value}'; choose one of {', '.join(allowed)}")
        if patience is not None and patience < 1:
            raise ValueError(f"ensemble.patience must be at least 1 validation, got {patience}")
        if checkpoint_every_n_steps < 1:
            raise ValueError(f"ensemble.checkpoint_every_n_steps must be at least 1, got {checkpoint_every_n_steps}")
        replica_budget(budget, n=1, max_epochs=1, max_steps=-1)
        names = compare.split(",") if isinstance(compare, str) else compare or ()
        # Bound now, so that a wrong name or option is known before training and not after it.
        self.comparison = Comparison(
            merge,
            merge_options,
            compare=[name.strip() for name in names if name.strip()],
            compare_options=compare_options,
            controls=controls,
            select_by=select_by,
        )
        rules = [
            ("merge_options", self.rule),
            *(("compare_options", rule) for rule in self.comparison.compare.values()),
        ]
        for option, rule in rules:
            weights = None if rule is None else rule.options.get("weights")
            if weights is not None and len(weights) != len(self.seeds):
                raise ValueError(
                    f"ensemble.{option} weights must be {len(self.seeds)} numbers, one per seed, got {weights}"
                )
        #: What is trained, and what is still to do.
        self.folder = RunFolder(
            dirpath or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"),
            self.seeds,
            controls=TRAINED_CONTROLS if controls == ALL_CONTROLS and len(self.seeds) > 1 else (),
        )
        self.budget, self.vary, self.stack_size = budget, vary, stack_size
        self.keep, self.patience, self.on_divergence = keep, patience, on_divergence
        self.checkpoint_every_n_steps, self.resume = checkpoint_every_n_steps, resume
        self.results: Results | None = None
        self._opened = False
        #: The control in training.
        self._control: str | None = None
        self._share = ReplicaBudget(None, None)
        #: Of each seed in training: best validation loss, validations since, and the weights if they are kept.
        self._best: dict[str, dict[str, Any]] = {}
        self._restored: dict[str, Any] = {}
        self._module: SeedLoRAModule | None = None
        self._terminated = False
        #: Of a checkpoint that waits for a validation: whether the run ends with it.
        self._due: bool | None = None
        self._handler: Any = None

    @property
    def rule(self) -> BoundRule | None:
        """What the seeds are fused by; soup where that is still to be chosen; None if nothing is fused."""
        return self.comparison.rule

    @property
    def method_name(self) -> str:
        """The merge method, for people, and what was chosen."""
        selection, name = self.folder.selection, self.comparison.method_name
        chosen = None if selection is None else selection["chosen"]
        return name if chosen is None or not self.comparison.chooses else f"{name}: {chosen['name']}"

    # The folder

    @property
    def dirpath(self) -> Path:
        """The folder of the run."""
        return self.folder.path

    def adapter_path(self, seed: int) -> Path:
        """Where the adapter of a seed is, once it is trained."""
        return self.folder.adapter(seed)

    @property
    def fused_path(self) -> Path:
        """Where the fused adapter is, once all seeds are trained."""
        return self.dirpath / FUSED

    @property
    def trained(self) -> tuple[int, ...]:
        """The seeds whose adapters, or whole models, are there."""
        return self.folder.trained

    @property
    def excluded(self) -> dict[int, str]:
        """The seeds that were left out, and why."""
        reasons = self.folder.left_out
        return {seed: reasons[label] for seed in self.seeds if (label := seed_name(seed)) in reasons}

    @property
    def pending(self) -> tuple[int, ...]:
        """The seeds that are still to be trained."""
        return self.folder.pending

    @property
    def pending_controls(self) -> tuple[str, ...]:
        """The controls that are still to be trained, once the seeds are."""
        return self.folder.pending_controls

    @property
    def next_names(self) -> tuple[str, ...]:
        """The adapters that the next fit trains: seeds, then one control after the other."""
        return tuple(map(seed_name, self._next_stack)) or self.pending_controls[:1]

    @property
    def _next_stack(self) -> tuple[int, ...]:
        """All seeds, as long as ``auto`` has not become a number."""
        return self.folder.next_stack(None if isinstance(self.stack_size, str) else self.stack_size)

    @property
    def metrics_path(self) -> Path:
        """Where the metrics of the next fit belong."""
        return self.folder.metrics(self.next_names)

    @property
    def ckpt_path(self) -> Path | None:
        """The newest whole checkpoint of what the next fit trains; ValueError if all that are there are damaged."""
        return self.folder.checkpoint(self.next_names)

    @property
    def ckpt_step(self) -> int:
        """The optimizer steps that are in :attr:`ckpt_path`; 0 without a checkpoint."""
        return step_of(self.ckpt_path) if self.ckpt_path else 0

    @property
    def fused_otherwise(self) -> tuple[str, str] | None:
        """What the fused adapter was made by, and the rule that is given now, if it is another and not to be chosen."""
        if self.comparison.chooses:
            return None
        nothing: dict[str, Any] = {"method": "nothing", "options": {}, "use": {}}
        made = nothing | (self.folder.fusion or {})
        rule = self._compared.rule
        asked = nothing if rule is None else json.loads(json.dumps(rule_record(rule), default=str))
        if all(made[key] == asked[key] for key in nothing):
            return None
        return _said(made), _said(asked)

    @property
    def folders(self) -> dict[str, Path]:
        """The adapters that a test reads, as far as they are there, by label: plain soup is what ``fused`` holds."""
        found = {seed_name(seed): self.adapter_path(seed) for seed in self.trained}
        found |= {name: self.dirpath / name for name in self.folder.trained_controls}
        if self.rule is not None and len(self.trained) > 1:
            found[SOUP] = self.fused_path if self.comparison.is_soup else self.dirpath / SOUP
        if self.rule is not None and not self.comparison.is_soup:
            found[FUSED] = self.fused_path
        return {label: folder for label, folder in found.items() if is_trained(folder)}

    # Training

    @property
    def trains_controls(self) -> bool:
        """Whether controls are trained beside the seeds."""
        return bool(self.folder.controls)

    def choose_stack_size(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> None:
        """Turn ``auto`` into a number, by the memory estimate of the data as it is set up; whole models go one by one.

        A stack of them would take their memory together and no less time: they share no product.
        """
        if self.stack_size is None and module.is_full_finetuning:
            self.stack_size = 1
        if self.stack_size == AUTO:
            self.stack_size = fitting_stack(len(self.seeds), memory_of(trainer, module, data), device_memory(trainer))

    def control_limits(self, *, max_epochs: int | None, max_steps: int) -> dict[str, int]:
        """What the Trainer of the next control needs besides the run's own options.

        With the equal budget the run's limits are what all seeds had together; with the full one they are a seed's.
        """
        if self.pending_controls[:1] != (LONG_SEED,) or self.budget == "equal":
            return {}
        limits = {"max_epochs": max_epochs, "max_steps": max_steps}
        return {name: len(self.seeds) * limit for name, limit in limits.items() if limit not in (None, -1)}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give module and data module the seeds of this fit.

        Raises:
            ValueError: if the trainer, the data module or the folder do not fit the ensemble.
        """
        module = _ours(pl_module)
        self.folder.path = trainer.strategy.broadcast(self.dirpath)
        if stage != "fit":
            return
        data = trainer.datamodule
        if not hasattr(data, "seeds"):
            raise ValueError(
                "SeedEnsembleCallback needs a LightningDataModule with an attribute `seeds`, which says whose data "
                f"orders its training batches hold; got {type(data).__name__}"
            )
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("the data module deals rows to ranks itself: set Trainer(use_distributed_sampler=False)")
        self.check_validation(trainer, data)
        self._control = self.pending_controls[0] if self.pending_controls else None
        self._share = self.share(trainer)
        module.rank_factor = len(self.trained) if self._control == WIDE_SEED else 1
        if self._control is None:
            self.choose_stack_size(trainer, module, data)
            self.open(trainer, module, data)
            if not self.pending:
                raise ValueError(f"{self.dirpath}: all seeds are trained; call Trainer.validate to fuse them again")
            module.replicas = tuple(map(self._replica, self._next_stack))
        else:
            module.replicas = (replace(self._replica(self.trained[0]), name=self._control),)
        module.exclude_diverged = self.on_divergence == "exclude"
        self._best, self._restored, self._due = {}, {}, None
        data.seeds = tuple(replica.order_seed for replica in module.replicas)
        module.total_steps = self.replica_steps(trainer, data)
        module.scored = self._validated(module)
        self._module = module

    def check_validation(self, trainer: pl.Trainer, data: Any) -> None:
        """Raise ValueError if validation decides and cannot: no rows, adapters in parts. The data must be set up."""
        if (self.keep == "best" or self.patience) and not holds_whole_adapters(trainer):
            raise ValueError(
                "ensemble.keep best and ensemble.patience write to the adapters, which DeepSpeed and fsdp2 keep in "
                "parts; use ddp, or ensemble.keep last without patience"
            )
        needed = "ensemble.keep best and ensemble.patience need" if self.keep == "best" or self.patience else None
        if (reason := self.comparison.validated_for) is not None:
            needed = f"{reason} chooses on"
        if needed and not trainer.fast_dev_run and not _limited(len(data.val_dataloader()), trainer.limit_val_batches):
            raise ValueError(f"{needed} validation rows, and there are none")

    def open(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> None:
        """Make the folder ours, or check that it is: the same settings, and ``resume`` asked for.

        Raises:
            ValueError: if it holds a run and ``resume`` was not asked for, or that run was started differently, or what
                it has saved cannot be read.
        """
        self._check_adapter(module)
        if self._opened or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        self.folder.open(self._settings(trainer, module, data), resume=self.resume)
        saved = self.folder.checkpoint(self.next_names)
        if saved is not None and saved.is_dir() != saves_folders(trainer):
            how = "without DeepSpeed" if saved.is_file() else "under DeepSpeed"
            raise ValueError(
                f"{saved} was saved {how}; resume by the --trainer.strategy with which the run was started"
            )
        self._opened = True

    def _check_adapter(self, module: SeedLoRAModule) -> None:
        """Raise ValueError if this kind of adapter cannot do what was asked of the ensemble."""
        adapter = module.hparams["adapter"]
        if module.adds_dense and (reason := self.comparison.validated_for) is not None:
            raise ValueError(
                f"{reason} chooses among fusions of the seeds' factors, and what model.adapter {adapter} adds to the "
                "weights is not their factors; name a method with its options, and compare others by ensemble.compare"
            )
        if module.is_full_finetuning:
            for rule in filter(None, (self.rule, *self.comparison.compare.values())):
                check_dense(rule)
        if not (module.starts_at_weights or module.is_full_finetuning) or len(self.seeds) == 1:
            return
        if self.trains_controls:
            raise ValueError(
                f"ensemble.controls {ALL_CONTROLS} trains an adapter of another rank, for which {adapter} would start "
                "at other factors, over another base; use untrained"
            )
        if self.vary == "init" and not module.hparams["lora_dropout"]:
            raise ValueError(
                f"ensemble.vary init: with model.adapter {adapter} all seeds start at the same weights, and without "
                "dropout they end at the same; use ensemble.vary order, or both"
            )

    def share(self, trainer: pl.Trainer) -> ReplicaBudget:
        """Each replica's part of the trainer's epochs or steps; raises as :func:`seedlora.run.budget.replica_budget`.

        A trainer's ``fast_dev_run`` is one step, which cannot be shared: there every replica gets it. The control that
        trains as long as all seeds together has its trainer for itself.
        """
        return replica_budget(
            "full" if trainer.fast_dev_run or self._control == LONG_SEED else self.budget,
            n=len(self.seeds),
            max_epochs=trainer.max_epochs,
            max_steps=trainer.max_steps,
        )

    def replica_steps(self, trainer: pl.Trainer, data: Any) -> int:
        """Optimizer steps of each replica under this trainer with this data module."""
        batches = _limited(len(data.train_dataloader()), trainer.limit_train_batches)
        check_batches(trainer, batches)
        return self.share(trainer).total_steps(-(-batches // trainer.accumulate_grad_batches))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back who was stopped in the checkpoint, and listen for SIGTERM in Lightning's place.

        Lightning would leave in the middle of an optimizer step, where no checkpoint can be taken.
        """
        module = _ours(pl_module)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self.folder.begin([replica.name for replica in module.replicas])
        module.idle |= set(self._restored.get("idle", ()))
        module.diverged |= self._restored.get("diverged", {})
        self._terminated = False
        self._listen(self._terminate)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop when the replicas have had their steps; otherwise save a checkpoint when one is due.

        Raises:
            StoppedError: after a SIGTERM, when the checkpoint is written.
        """
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch:
            return
        terminated = trainer.strategy.reduce_boolean_decision(self._terminated, all=False)
        if self._share.steps is not None and step >= self._share.steps:
            trainer.should_stop = True
        elif not trainer.fast_dev_run and (terminated or step % self.checkpoint_every_n_steps == 0):
            # A validation or an end of an epoch that is due now would not be made up for by a resume: they belong into
            # the checkpoint.
            if trainer.is_last_batch or _validates_now(trainer):
                self._due = terminated
            else:
                self._checkpoint(trainer, terminated)

    def _checkpoint(self, trainer: pl.Trainer, terminated: bool) -> None:
        """Save a checkpoint, and leave if that was asked for."""
        self._due = None
        self._save_checkpoint(trainer)
        if terminated:
            raise StoppedError(f"terminated by SIGTERM; step {trainer.global_step} is saved")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop when the replicas have had their epochs; otherwise save the checkpoint that was due.

        Raises:
            StoppedError: after a SIGTERM, when the checkpoint is written.
        """
        if self._share.epochs is not None and trainer.current_epoch + 1 >= self._share.epochs:
            trainer.should_stop = True
        elif self._due is not None:
            self._checkpoint(trainer, self._due)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember each seed's best weights, stop the seeds that no longer improve, save the checkpoint that was due.

        Raises:
            StoppedError: after a SIGTERM, when the checkpoint is written.
        """
        module = _ours(pl_module)
        if trainer.state.fn == "validate":
            self._settle(trainer, module)
            self._listen_no_more()
            return
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.keep == "best" or self.patience:
            self._watch(trainer, module)
        if self._due is not None and not trainer.is_last_batch:
            self._checkpoint(trainer, self._due)

    def _watch(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """After a validation: keep the best weights, stop who has no patience left."""
        for replica in module.replicas:
            if replica.name in module.idle:
                continue
            loss = float(trainer.callback_metrics[f"val/loss_{replica.name}"])
            best = self._best.get(replica.name)
            # Nothing would ever be less than NaN.
            if best is None or loss < best["loss"] or math.isnan(best["loss"]):
                parameters = module.stack.parameters(replica.name) if self.keep == "best" else []
                kept = [parameter.detach().cpu().clone() for parameter in parameters]
                self._best[replica.name] = {"loss": loss, "step": trainer.global_step, "stale": 0, "weights": kept}
                continue
            best["stale"] += 1
            if self.patience and best["stale"] >= self.patience:
                module.idle.add(replica.name)
                best["stopped"] = trainer.global_step
                self._take_best(module, replica.name)
        if len(module.idle) == len(module.replicas):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of the seeds' validations."""
        idle, diverged = (set(), {}) if self._module is None else (self._module.idle, self._module.diverged)
        return {"best": self._best, "idle": sorted(idle), "diverged": diverged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the validations where they were."""
        self._best, self._restored = state_dict["best"], state_dict

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fuse the seeds as they are now, beside those already finished; leave out those that the last step spoiled."""
        module = _ours(pl_module)
        if trainer.state.fn == "validate":
            self._listen(_leave)
            if module.is_full_finetuning:
                module.scored = {BASE: None}
            else:
                self._load(module, self._read_seeds())
            return
        module.check_weights()
        module.scored = self._validated(module)
        if self._live not in module.scored:
            return
        names = [r.name for r in module.replicas]
        current = [name for name in names if name not in module.diverged]
        stacks = module.current(current)
        finished = [seed_name(seed) for seed in self.trained if seed_name(seed) not in names]
        if finished:
            stacks = joined(stack_adapters({name: self._read(self.dirpath / name) for name in finished}), stacks)
        there = [*finished, *current]
        seeds = [seed for seed in self.seeds if seed_name(seed) in there]
        rule = rule_of_seeds(self.rule, [self.seeds.index(seed) for seed in seeds])
        assert rule is not None
        module.load(
            self._live,
            fuse(members(stacks, [there.index(s) for s in map(seed_name, seeds)]), rule),
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapters of this stack and, if they are the last, fuse all.

        Raises:
            DivergedError: if no seed is left.
            StoppedError: after a SIGTERM that came too late for a checkpoint, when the adapters are written. One that
                comes later raises SystemExit at once: choosing and fusing may take longer than a job is given to end.
        """
        module = _ours(pl_module)
        if trainer.fast_dev_run:
            self._listen_no_more()
            return
        record = getattr(trainer.datamodule, "prompt_record", None)
        files = {} if record is None else {PROMPT_NAME: json.dumps(record(), indent=2) + "\n"}
        if base := base_record(module.hparams["adapter"], module.hparams["quantization"]):
            files[BASE_NAME] = json.dumps(base) + "\n"
        about = {"base_model": module.base_path, "adapter": module.display_text, "note": module.base_note}
        files[CARD_NAME] = seed_card(**about, whole=module.is_full_finetuning)
        if self._control is not None:
            files[CONTROL.name] = CONTROL.text({"seeds": len(self.seeds)})
        names = [replica.name for replica in module.replicas]
        for name in names:
            if name not in module.idle:
                self._take_best(module, name)
        module.check_weights()
        if not self.trained and set(map(seed_name, self.pending)) <= set(module.diverged):
            raise DivergedError("the training loss of every seed is not finite; lower model.learning_rate")
        # Before the folders, and who is left out after them: until then the stack is not finished.
        if trainer.is_global_zero:
            self.folder.add_trained(self._trained_on(trainer, module))
        for name in names:
            if name not in module.diverged:
                module.write(self.dirpath / name, name, files, writer=trainer.is_global_zero)
        if trainer.is_global_zero and module.diverged:
            self.folder.leave_out(module.diverged)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            self.folder.forget_checkpoints(names)
        self._listen(_leave)
        if trainer.strategy.reduce_boolean_decision(self._terminated, all=False):
            raise StoppedError(_TERMINATED)
        if self._control is None:
            self._settle(trainer, module)
        trainer.strategy.barrier()
        # Before the end of the fit, where Lightning gives it back itself.
        self._listen_no_more()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give SIGTERM back."""
        self._listen_no_more()

    def fuse(self, rule: BoundRule | None = None) -> Path | None:
        """Fuse the seeds' folders, if all that were not excluded are there and a method was asked for.

        Their soup is written beside, unless it is what was asked for. With ``none`` an older fusion is removed.

        Args:
            rule: what was chosen. Default: the rule of the run.

        Raises:
            ValueError: if the rule is still to be chosen.
        """
        if self.pending or not self.trained:
            return None
        if not self.pending_controls:
            # Of a run that was killed after its last adapter was written.
            self.folder.forget_checkpoints(())
        if self.rule is None:
            otherwise = self.fused_otherwise
            if removed := self.folder.forget_fusion():
                made = otherwise[0] if otherwise else "another run"
                said = f"--merge {NO_MERGE} fuses nothing: removed {' and '.join(removed)}, which were made by {made}"
                Console(stderr=True, soft_wrap=True).print(said, highlight=False, markup=False)
            return None
        if rule is None and self.comparison.chooses:
            raise ValueError(f"{self.comparison.validated_for} chooses on validation rows: call Trainer.validate")
        if rule is None:
            # What validation said of an earlier choice is not said of this one.
            (self.dirpath / SELECTION_NAME).unlink(missing_ok=True)
        # Nor what a test said of an earlier fusion.
        (self.dirpath / RESULTS_NAME).unlink(missing_ok=True)
        folders = [self.adapter_path(seed) for seed in self.trained]
        write: Callable[..., Path] = fuse_folders
        if is_model(folders[0]):
            settings = self.folder.settings or {}
            write = partial(_fuse_models, base=resolve(settings["model.base_model"]))
        if self.comparison.is_soup or len(folders) == 1:
            remove_folder(self.dirpath / SOUP)
        else:
            write(folders, self.dirpath / SOUP, method=SOUP)
        return write(folders, self.fused_path, method=rule or self._compared.rule)

    # Testing

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the adapters back from their folders, so that what is scored is what was written."""
        module = _ours(pl_module)
        self._listen(_leave)
        if module.is_full_finetuning:  # the others one by one, after the base model
            module.scored, module.mixtures = {BASE: None}, {}
            return
        scored = {label: self._read(folder) for label, folder in self.folders.items()}
        seeds = {label: scored[label] for label in map(seed_name, self.trained)}
        if len(seeds) > 1 and SOUP not in scored and (self.rule is not None or self.comparison.compare):
            fused = fuse(stack_updates(seeds, self._base, device=module.device), soup)
            modules = {key: each[0] for key, each in fused.modules.items()}
            scored[SOUP] = replace(next(iter(seeds.values())), magnitudes={}, layers=fused, modules=modules)
        self._load(module, scored)
        module.scored = {BASE: None, **module.scored}
        module.mixtures = {LOGITS: tuple(seeds)} if self.comparison.has_controls and len(seeds) > 1 else {}

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score what else is compared, and all on some training rows; compare and write ``results.json``."""
        module = _ours(pl_module)
        columns = dict(zip((*module.scored, *module.mixtures), module.test_matrix().cpu().numpy().T, strict=True))
        tested = module.tested_items()
        sample = self._train_sample(trainer, len(tested))
        trained_on = self._scored_on(trainer, module, sample) if sample else {}
        module.mixtures = {}
        after = int(tested[-1]) + 1
        sample = [{**batch, "items": batch["items"] + after * (batch["items"] >= 0)} for batch in sample]
        for label, scored in self._scored_beside(trainer, module, sample).items():
            columns[label] = scored[: len(tested)].correct.numpy()
            trained_on[label] = scored[len(tested) :]
        # The fused adapter last, for whoever reads the table.
        columns |= {FUSED: columns.pop(FUSED)} if FUSED in columns else {}
        seeds = [seed_name(seed) for seed in self.trained]
        correct = np.stack(list(columns.values()), axis=1)
        self.results = results(correct, list(columns), seeds, metric="exact match, greedy")
        domains, items = getattr(trainer.datamodule, "domains", None), tested.tolist()
        if trainer.is_global_zero:
            kinds = domains("test") if domains else {}
            stored = self.results.to_record()
            stored["domains"] = {k: [v[i] for i in items] for k, v in kinds.items()}
            if rows := getattr(trainer.datamodule, "rows", None):
                stored["items_sha256"] = rows["test"].take(np.array(items)).sha256()
            if sample:
                stored["train_sample"] = sample_losses({label: trained_on[label] for label in columns})
            RESULTS.write(self.dirpath, stored)
            if FUSED in self.results.scores:
                refresh_card(self.fused_path)
        self._listen_no_more()

    def beside(self, device: torch.device) -> dict[str, Callable[[], Layers]]:
        """What is compared beside base, seeds, soup, fused and trained controls, by label; made when called, there."""
        adapters = self._read_seeds()
        if len(adapters) < 2 or not (self.comparison.compare or self.comparison.has_controls):
            return {}
        fused = None
        if self.rule is not None:
            fused = {path: factors.to(device) for path, factors in self._read(self.fused_path).layers.items()}
        stacks = stack_updates(adapters, self._base, device=device)
        return adapters_beside(self._compared, stacks, list(adapters), fused, self.folder.selection)

    def _models(self, module: SeedLoRAModule) -> dict[str, Callable[[], Layers]]:
        """The whole models to be scored: seeds, soup, what is compared, and the fused one; read when it is called."""
        made: dict[str, Callable[[], Layers]] = {}
        made |= {label: partial(module.read_model, folder) for label, folder in self.folders.items()}
        fused = partial(module.fused_model, [self.adapter_path(seed) for seed in self.trained])
        if len(self.trained) > 1:
            if SOUP not in made and (self.rule is not None or self.comparison.compare):
                made[SOUP] = partial(fused, make_rule(SOUP))
            made |= {name: partial(fused, rule) for name, rule in self._compared.compare.items() if rule is not None}
        return made

    # Inside

    @property
    def _compared(self) -> Comparison:
        """What is compared among the seeds that are trained."""
        return self.comparison.of_seeds([self.seeds.index(seed) for seed in self.trained])

    def _replica(self, seed: int) -> Replica:
        first = self.seeds[0]
        return Replica(
            seed_name(seed),
            init_seed=first if self.vary == "order" else seed,
            order_seed=first if self.vary == "init" else seed,
        )

    def _read(self, folder: Path) -> Adapter:
        return read_adapter(folder, base=self._base)

    def _read_seeds(self) -> dict[str, Adapter]:
        return {seed_name(seed): self._read(self.adapter_path(seed)) for seed in self.trained}

    @property
    def _base(self) -> WeightFiles:
        """The base weights that DoRA's updates need; opened when they are read."""
        return weight_files_of([self.adapter_path(seed) for seed in self.trained])

    def _load(self, module: SeedLoRAModule, adapters: Mapping[str, Adapter]) -> None:
        for label, adapter in adapters.items():
            module.stack.load(label, adapter.layers, magnitudes=adapter.magnitudes, modules=adapter.modules)
        module.scored = {label: label for label in adapters}

    @property
    def _live(self) -> str | None:
        """What is fused at each validation: as long as a rule is not chosen, soup stands for it under its own name."""
        if self.rule is None or self._control is not None:
            return None
        return SOUP if self.comparison.chooses else FUSED

    def _validated(self, module: SeedLoRAModule) -> dict[str, str | None]:
        names = [replica.name for replica in module.replicas if replica.name not in module.diverged]
        # What DoRA and whole models add to a weight has full rank: fusing it each time would take longer than training.
        live = [self._live] if self._live and names and not module.adds_dense else []
        return {name: name for name in (*names, *live)}

    def _validation_batches(self, trainer: pl.Trainer, data: Any) -> list[Any]:
        """The validation batches of this rank, as many as the trainer validates on."""
        batches = list(data.val_dataloader())
        return batches[: _limited(len(batches), trainer.limit_val_batches)]

    def _settle(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Once all seeds are there: choose what is to be chosen, and fuse."""
        if self.pending or not self.trained or trainer.fast_dev_run:
            return
        rule, comparison = None, self._compared
        batches = [] if self.rule is None else self._validation_batches(trainer, trainer.datamodule)
        if batches and not module.adds_dense:
            adapters = self._read_seeds()
            stacks = stack_adapters(adapters, device=module.device)
            total = len(batches) * adapters_to_score(comparison, list(stacks), len(adapters))
            with self._scorer(trainer, module, batches, "Scoring on validation rows", total) as score:
                settled = settle(comparison, stacks, list(adapters), score)
            rule = settled.rule
            if trainer.is_global_zero:
                SELECTION.write(self.dirpath, settled.selection)
        if trainer.is_global_zero:
            self.fuse(rule)

    def _train_sample(self, trainer: pl.Trainer, n: int) -> list[Any]:
        """This rank's batches of some training rows, no more than test items; none if the data module gives none."""
        given = getattr(trainer.datamodule, "train_sample", None)
        return [] if given is None else list(given(min(n, TRAIN_ROWS)))

    def _scored_on(self, trainer: pl.Trainer, module: SeedLoRAModule, batches: Sequence[Any]) -> dict[str, RowScores]:
        """What the test's own pass has scored, on further batches."""
        with _bar(hidden=not trainer.is_global_zero) as progress:
            task = progress.add_task("Scoring on training rows", total=len(batches))
            return module.score_batches(batches, on_batch=lambda: progress.advance(task))

    def _scored_beside(self, trainer: pl.Trainer, module: SeedLoRAModule, more: Sequence[Any]) -> dict[str, RowScores]:
        """The methods and controls that are not in the test's own pass, on its batches and then on ``more``."""
        beside, loader = (
            self._models(module) if module.is_full_finetuning else self.beside(module.device),
            trainer.test_dataloaders,
        )
        if not beside:
            return {}
        batches = [*list(loader)[: _limited(len(loader), trainer.limit_test_batches)], *more]
        with self._scorer(trainer, module, batches, "Scoring what is compared", len(batches) * len(beside)) as score:
            return score_lazily(beside, score, at_once=1 if module.is_full_finetuning else ADAPTERS_PER_FORWARD)

    @contextmanager
    def _scorer(
        self, trainer: pl.Trainer, module: SeedLoRAModule, batches: Sequence[Any], what: str, total: int
    ) -> Iterator[Score]:
        """A score on these batches, with a bar that counts them for every adapter."""
        with _bar(hidden=not trainer.is_global_zero) as progress:
            task = progress.add_task(what, total=total)
            yield lambda adapters: module.score_rows(
                adapters, batches, on_batch=lambda: progress.advance(task, len(adapters))
            )

    def _take_best(self, module: SeedLoRAModule, name: str) -> None:
        """Put a seed's best weights in the place of its last ones, if they are kept."""
        weights = self._best.get(name, {}).get("weights") or ()
        with torch.no_grad():
            for parameter, best in zip(module.stack.parameters(name), weights, strict=False):
                parameter.copy_(best)

    def _trained_on(self, trainer: pl.Trainer, module: SeedLoRAModule) -> dict[str, TrainedRow]:
        """How long each adapter of this fit was trained, on how many tokens if that is known, which step is kept."""
        loader = trainer.datamodule.train_dataloader()
        batches = _limited(len(loader), trainer.limit_train_batches)
        found = {}
        for replica in module.replicas:
            if replica.name in module.diverged:
                continue
            best = self._best.get(replica.name, {})
            steps = best.get("stopped", trainer.global_step)
            kept_step = best.get("step") if self.keep == "best" else None
            row: TrainedRow = {"steps": steps, "stopped": "stopped" in best, "kept_step": kept_step}
            if seen := getattr(loader.sampler, "seen", None):
                per_epoch = -(-batches // trainer.accumulate_grad_batches)
                row["tokens"], row["scored"] = seen(replica.order_seed, steps, steps_per_epoch=per_epoch)
            found[replica.name] = row
        return found

    def _terminate(self, signum: int, frame: Any) -> None:
        self._terminated = True

    def _listen(self, handler: Callable[[int, Any], None]) -> None:
        """Answer SIGTERM in Lightning's place, which gets it back."""
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, handler)
            self._handler = before if self._handler is None else self._handler

    def _listen_no_more(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _settings(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> RunSettings:
        """What decides a replica's training, as plain data; the seeds and the merge method may change."""
        share = self.share(trainer)
        settings = {
            **{f"model.{key}": value for key, value in module.hparams.items()},
            **{f"data.{key}": value for key, value in getattr(data, "hparams", {}).items()},
            "data": type(data).__name__,
            "ensemble.vary": self.vary,
            "ensemble.keep": self.keep,
            "ensemble.patience": self.patience,
            "first seed": self.seeds[0] if self.vary != "both" else None,
            "epochs per seed": share.epochs,
            "steps per seed": share.steps,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.gradient_clip_val": trainer.gradient_clip_val,
            "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            "trainer.limit_train_batches": trainer.limit_train_batches,
            "processes": trainer.world_size,
        }
        # The same path may hold other rows by now.
        rows = getattr(data, "rows", {})
        settings |= {f"sha256 of the {part} rows": rows[part].sha256() for part in ("train", "val") if part in rows}
        plain: RunSettings = json.loads(json.dumps(settings, default=str))
        return plain

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        """Save beside the checkpoint before, then take its place. All ranks must call it."""
        names = [replica.name for replica in _ours(trainer.lightning_module).replicas]
        with self.folder.new_checkpoint(names, trainer.global_step) as temporary:
            trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            self.folder.keep(temporary)
        trainer.strategy.barrier()


def _leave(*_: object) -> None:
    """No error of the kinds that are caught on the way, as a file that cannot be read would be."""
    raise SystemExit(_TERMINATED)


def _ours(module: pl.LightningModule) -> SeedLoRAModule:
    if not isinstance(module, SeedLoRAModule):
        raise ValueError(f"SeedEnsembleCallback trains a SeedLoRAModule, got {type(module).__name__}")
    return module


def _fuse_models(folders: Sequence[Path], out: Path, *, base: str, method: str | MergeRule) -> Path:
    """Fuse whole models with a bar: it takes minutes where they are large."""
    weights = WeightFiles(base)
    matrices = sum(len(weights.shape(key)) == 2 for key in weights.files)
    with _bar(hidden=False) as progress:
        task = progress.add_task(f"Fusing whole models by {getattr(method, 'name', method)}", total=matrices)
        return fuse_into_base(folders, base, out, method=method, on_layer=lambda _: progress.advance(task))


def _bar(*, hidden: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal)


def _validates_now(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch at hand."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher) if trainer.enable_validation else False


def _said(record: Mapping[str, Any]) -> str:
    """A rule of a record, with the options that are set."""
    options = record["options"] | {key: value for key, value in record["use"].items() if value != COMMON.get(key)}
    return " ".join([record["method"], *([json.dumps(options)] if options else [])])


def _limited(batches: int, limit: int | float) -> int:
    """How many batches a trainer takes: a number of them, or a part."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

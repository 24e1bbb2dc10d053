"""The callback that trains several seeds as one stack and fuses them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from seedlora.adapter import CONFIG_NAME, PROMPT_NAME, read_adapter, write_adapter
from seedlora.atomic import sync, write_text
from seedlora.card import CARD_NAME, refresh_card, seed_card
from seedlora.factors import LoRAFactors
from seedlora.fuse import base_of, fuse, fuse_folders, stack_adapters, stack_updates
from seedlora.merge import MergeRule, bind, soup
from seedlora.module import Replica, SeedLoRAModule, StoppedError
from seedlora.plan import ReplicaBudget, device_memory, fitting_stack, memory_of, replica_budget
from seedlora.report import Results, results
from seedlora.report.results import FUSED, SOUP
from seedlora.strategies import check_batches, holds_whole_adapters

VARY = ("both", "init", "order")
KEEP = ("last", "best")
ON_DIVERGENCE = ("stop", "exclude")
AUTO = "auto"
BASE, NO_MERGE = "base", "none"


class SeedEnsembleCallback(pl.Callback):
    """Train one LoRA replica per seed, all in one fit, and fuse them when it ends.

    Its life:

    - *setup*: the module gets one replica per seed and the data module their data orders; each replica's share of the
      trainer's epochs or steps is fixed.
    - *every validation*: the seeds trained so far are fused as they are, and the module scores seeds and fused adapter
      side by side (``val/loss_seed_42``, ``val/loss_fused``). Nothing random is drawn and no weight is changed. DoRA's
      seeds, whose updates have full rank, are scored alone.
      With ``patience``, a seed whose own validation loss has not improved that many times in a row is stopped: its rows
      are left out from then on, and the others go on; the fit ends when all are stopped.
    - *every* ``checkpoint_every_n_steps``: a checkpoint of adapters, optimizer, schedule and position, without base
      weights; the one before it is removed once it is whole. A SIGTERM, as a preempted job gets it, is answered by one
      after the step at hand, and the run ends.
    - *train end*: each seed's PEFT folder is written, with the data module's prompt in ``prompt.json``, then the fused
      one, then the checkpoints are removed.
    - *test*: base, seeds, soup and fused adapter, read back from their folders, are scored on the same items.

    The folder is the state of the ensemble: a seed is finished when its adapter is there. With ``stack_size`` one fit
    trains the next ``stack_size`` unfinished seeds; while :attr:`pending` is not empty, call ``fit`` again with a new
    Trainer (and the same callback); the last one fuses all.

    Args:
        seeds: one replica each.
        merge: a method of :data:`seedlora.merge.METHODS`, any rule, or ``none`` to fuse nothing.
        merge_options: keyword options of the method.
        dirpath: the folder of the run; default: a new one under ``runs``, named by the time.
        budget: ``equal`` divides the trainer's ``max_epochs`` (or ``max_steps``) among the seeds, so that the ensemble
            costs what one seed would; ``full`` gives each seed all of it.
        vary: what a seed decides: ``both``, ``init`` (all see the first seed's data order) or ``order`` (all start from
            the first seed's weights and drop out what it does).
        stack_size: seeds trained at once; default all. ``auto`` takes as many as the memory estimate allows in 80 % of
            the machine's memory.
        keep: the weights of each seed that are kept: those of its ``last`` step, or of the validation at which its own
            loss was ``best``. A seed keeps what it would alone, whenever the others stop.
        patience: validations without a new best loss after which a seed is stopped; default never.
        on_divergence: what happens when a seed's training loss is not finite: ``stop`` ends the run, its checkpoints
            untouched; ``exclude`` goes on without that seed, whose rows and gradients reach no other, and the rest are
            fused.
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
        if negative := [seed for seed in self.seeds if seed < 0]:
            raise ValueError(f"ensemble.seeds must not be negative, got {negative[0]}")
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
        self.method, self.options = merge, dict(merge_options or {})
        # Bound now, so that a wrong name or option is known before training and not after it.
        try:
            self.rule = None if merge == NO_MERGE else bind(merge, self.options)
        except ValueError as error:
            raise ValueError(f"{error} ('{NO_MERGE}' fuses nothing)") from None
        self.dirpath = Path(dirpath) if dirpath else Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        self.budget, self.vary, self.stack_size = budget, vary, stack_size
        self.keep, self.patience, self.on_divergence = keep, patience, on_divergence
        self.checkpoint_every_n_steps, self.resume = checkpoint_every_n_steps, resume
        self.results: Results | None = None
        self._opened = False
        self._stack: tuple[int, ...] = ()
        self._share = ReplicaBudget(None, None)
        #: Of each seed in training: best validation loss, validations since, and the weights if they are kept.
        self._best: dict[str, dict[str, Any]] = {}
        self._restored: dict[str, Any] = {}
        self._module: SeedLoRAModule | None = None
        self._terminated = False
        self._handler: Any = None

    @property
    def method_name(self) -> str:
        """The merge method, for people."""
        return self.method if isinstance(self.method, str) else getattr(self.method, "__name__", repr(self.method))

    # The folder

    def adapter_path(self, seed: int) -> Path:
        """Where the adapter of a seed is, once it is trained."""
        return self.dirpath / self._label(seed)

    @property
    def fused_path(self) -> Path:
        """Where the fused adapter is, once all seeds are trained."""
        return self.dirpath / FUSED

    @property
    def trained(self) -> tuple[int, ...]:
        """The seeds whose adapters are there."""
        return tuple(seed for seed in self.seeds if (self.adapter_path(seed) / CONFIG_NAME).is_file())

    @property
    def excluded(self) -> dict[int, str]:
        """The seeds that were left out, and why."""
        file = self.dirpath / "excluded.json"
        reasons = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {seed: reasons[self._label(seed)] for seed in self.seeds if self._label(seed) in reasons}

    @property
    def pending(self) -> tuple[int, ...]:
        """The seeds that are still to be trained."""
        done = {*self.trained, *self.excluded}
        return tuple(seed for seed in self.seeds if seed not in done)

    @property
    def next_stack(self) -> tuple[int, ...]:
        """The seeds that the next fit trains."""
        assert not isinstance(self.stack_size, str), "choose_stack_size comes first"
        return self.pending[: self.stack_size]

    def choose_stack_size(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> None:
        """Turn ``auto`` into a number, by the memory estimate of the data as it is set up."""
        if self.stack_size == AUTO:
            self.stack_size = fitting_stack(len(self.seeds), memory_of(module, data), device_memory(trainer))

    @property
    def metrics_path(self) -> Path:
        """Where the metrics of the next fit belong: one file per stack of seeds."""
        stack = "" if len(self.next_stack) in (0, len(self.seeds)) else "-" + "-".join(map(str, self.next_stack))
        return self.dirpath / f"metrics{stack}.jsonl"

    @property
    def ckpt_path(self) -> Path | None:
        """The newest checkpoint of the seeds that the next fit trains."""
        found = self._checkpoints(self.next_stack)
        return found[-1] if found else None

    @property
    def ckpt_step(self) -> int:
        """The optimizer steps that are in :attr:`ckpt_path`; 0 without a checkpoint."""
        return _step(self.ckpt_path) if self.ckpt_path else 0

    # Training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give module and data module the seeds of this fit.

        Raises:
            ValueError: if the trainer, the data module or the folder do not fit the ensemble.
        """
        module = _ours(pl_module)
        self.dirpath = trainer.strategy.broadcast(self.dirpath)
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
        if (self.keep == "best" or self.patience) and not holds_whole_adapters(trainer):
            raise ValueError(
                "ensemble.keep best and ensemble.patience write to the adapters, which DeepSpeed and fsdp2 keep in "
                "parts; use ddp, or ensemble.keep last without patience"
            )
        self._share = self.share(trainer)
        self.choose_stack_size(trainer, module, data)
        self.open(trainer, module, data)
        self._stack = self.next_stack
        if not self._stack:
            raise ValueError(f"{self.dirpath}: all seeds are trained; call `fuse` to fuse them again")
        module.replicas = tuple(self._replica(seed) for seed in self._stack)
        module.exclude_diverged = self.on_divergence == "exclude"
        self._best, self._restored = {}, {}
        data.seeds = tuple(replica.order_seed for replica in module.replicas)
        module.total_steps = self.replica_steps(trainer, data)
        module.scored = self._validated(module)
        self._module = module

    def open(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> None:
        """Make the folder ours, or check that it is: the same settings, and ``resume`` asked for.

        Raises:
            ValueError: if it holds a run and ``resume`` was not asked for, or that run was started differently.
        """
        same = self.vary == "init" and len(self.seeds) > 1 and module.starts_at_weights
        if same and not module.hparams["lora_dropout"]:
            raise ValueError(
                f"ensemble.vary init: with model.adapter {module.hparams['adapter']} all seeds start at the same "
                "weights, and without dropout they end at the same; use ensemble.vary order, or both"
            )
        if self._opened or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        file, settings = self.dirpath / "run.json", self._settings(trainer, module, data)
        if not file.is_file():
            write_text(file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        elif not self.resume:
            raise ValueError(
                f"{self.dirpath} already holds a run; go on with it by --resume, or choose another --ensemble.dirpath"
            )
        else:
            before = json.loads(file.read_text(encoding="utf-8"))
            for key in sorted(set(before) | set(settings)):
                if before.get(key) != settings.get(key):
                    raise ValueError(
                        f"{self.dirpath} was started with {key} = {before.get(key)!r}, now it is "
                        f"{settings.get(key)!r}; resume with the same settings, or choose another --ensemble.dirpath"
                    )
        self._opened = True

    def share(self, trainer: pl.Trainer) -> ReplicaBudget:
        """Each replica's part of the trainer's epochs or steps; raises as :func:`seedlora.plan.replica_budget`.

        A trainer's ``fast_dev_run`` is one step, which cannot be shared: there every replica gets it.
        """
        return replica_budget(
            "full" if trainer.fast_dev_run else self.budget,
            n=len(self.seeds),
            max_epochs=trainer.max_epochs,
            max_steps=trainer.max_steps,
        )

    def replica_steps(self, trainer: pl.Trainer, data: Any) -> int:
        """Optimizer steps of each replica under this trainer with this data module."""
        batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        check_batches(trainer, batches)
        return self.share(trainer).total_steps(-(-batches // trainer.accumulate_grad_batches))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put back who was stopped in the checkpoint, and listen for SIGTERM in Lightning's place.

        Lightning would leave in the middle of an optimizer step, where no checkpoint can be taken.

        Raises:
            ValueError: if best weights are asked for and nothing is validated.
        """
        module = _ours(pl_module)
        if (self.keep == "best" or self.patience) and not sum(trainer.num_val_batches):
            raise ValueError("ensemble.keep best and ensemble.patience need validation rows, and there are none")
        module.idle |= set(self._restored.get("idle", ()))
        module.diverged |= self._restored.get("diverged", {})
        self._terminated = False
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._terminate)

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
        elif not trainer.is_last_batch and (terminated or step % self.checkpoint_every_n_steps == 0):
            self._save_checkpoint(trainer)
            if terminated:
                raise StoppedError(f"terminated by SIGTERM; step {step} is saved")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop when the replicas have had their epochs."""
        if self._share.epochs is not None and trainer.current_epoch + 1 >= self._share.epochs:
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember each seed's best weights, and stop the seeds that no longer improve."""
        module = _ours(pl_module)
        if not (self.keep == "best" or self.patience) or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        for replica in module.replicas:
            if replica.name in module.idle:
                continue
            loss = float(trainer.callback_metrics[f"val/loss_{replica.name}"])
            best = self._best.get(replica.name)
            if best is None or loss < best["loss"]:
                parameters = module.stack.parameters(replica.name) if self.keep == "best" else []
                kept = [parameter.detach().cpu().clone() for parameter in parameters]
                self._best[replica.name] = {"loss": loss, "step": trainer.global_step, "stale": 0, "weights": kept}
                continue
            best["stale"] += 1
            if self.patience and best["stale"] >= self.patience:
                module.idle.add(replica.name)
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
        """Fuse the seeds as they are now, beside those already finished."""
        module = _ours(pl_module)
        if trainer.state.fn != "fit":
            return
        module.scored = self._validated(module)
        if FUSED not in module.scored:
            return
        current = module.stack.factors([r.name for r in module.replicas if r.name not in module.diverged])
        finished = [seed for seed in self.trained if seed not in self._stack]
        if finished:
            before = stack_adapters({self._label(seed): read_adapter(self.adapter_path(seed)) for seed in finished})
            current = {path: LoRAFactors.stack([before[path], current[path]]) for path in current}
        assert self.rule is not None
        module.stack.load(FUSED, fuse(current, self.rule))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the adapters of this stack and, if they are the last, fuse all."""
        module = _ours(pl_module)
        if trainer.fast_dev_run:
            return
        record = getattr(trainer.datamodule, "prompt_record", None)
        files = {} if record is None else {PROMPT_NAME: json.dumps(record(), indent=2) + "\n"}
        files[CARD_NAME] = seed_card(base_model=module.base_path, adapter=module.adapter_words, note=module.base_note)
        for replica, seed in zip(module.replicas, self._stack, strict=True):
            if replica.name in module.diverged:
                continue
            if replica.name not in module.idle:
                self._take_best(module, replica.name)
            layers, magnitudes = module.stack.stored(replica.name), module.stack.magnitudes(replica.name)
            if trainer.is_global_zero:
                path, config = self.adapter_path(seed), module.saved_config
                write_adapter(path, layers, config, files=files, magnitudes=magnitudes)
        if trainer.is_global_zero:
            if module.diverged:
                reasons = {n: f"training loss not finite in step {step}" for n, step in module.diverged.items()}
                before = {self._label(seed): reason for seed, reason in self.excluded.items()}
                write_text(self.dirpath / "excluded.json", json.dumps({**before, **reasons}, indent=2) + "\n")
            self.fuse()
            shutil.rmtree(self._checkpoint_folder(self._stack), ignore_errors=True)
        trainer.strategy.barrier()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give SIGTERM back, and answer one that came too late for a checkpoint.

        Raises:
            StoppedError: if there was one; the adapters of this stack are written.
        """
        self._listen_no_more()
        if trainer.strategy.reduce_boolean_decision(self._terminated, all=False):
            raise StoppedError("terminated by SIGTERM at the end of training; the adapters are written")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give SIGTERM back."""
        self._listen_no_more()

    def fuse(self) -> Path | None:
        """Fuse the seeds' folders, if all that were not excluded are there and a method was asked for."""
        if self.rule is None or self.pending or not self.trained:
            return None
        folders = [self.adapter_path(seed) for seed in self.trained]
        return fuse_folders(folders, self.fused_path, method=self.method, options=self.options)

    # Testing

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the adapters back from their folders, so that what is scored is what was written."""
        module = _ours(pl_module)
        folders = {self._label(seed): self.adapter_path(seed) for seed in self.trained}
        base = base_of(list(folders.values()))
        scored = {label: read_adapter(folder, base=base) for label, folder in folders.items()}
        for label, adapter in scored.items():
            module.stack.load(label, adapter.layers, magnitudes=adapter.magnitudes)
        fused: dict[str, Mapping[str, LoRAFactors]] = {}
        if self.rule is not None and len(scored) > 1:
            fused[SOUP] = fuse(stack_updates(scored, base), soup)
        if self.rule is not None and (self.method != SOUP or self.options):
            fused[FUSED] = read_adapter(self.fused_path).layers
        for label, layers in fused.items():
            module.stack.load(label, layers)
        module.scored = {BASE: None, **{label: label for label in (*scored, *fused)}}

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the adapters and write ``results.json``."""
        module = _ours(pl_module)
        labels = list(module.scored)
        correct = module.test_matrix().cpu().numpy()
        seeds = [self._label(seed) for seed in self.trained]
        self.results = results(correct, labels, seeds, metric="exact match, greedy")
        if trainer.is_global_zero:
            write_text(self.dirpath / "results.json", json.dumps(self.results.to_dict(), indent=2) + "\n")
            if FUSED in self.results.scores:
                refresh_card(self.fused_path)

    # Inside

    @staticmethod
    def _label(seed: int) -> str:
        return f"seed_{seed}"

    def _replica(self, seed: int) -> Replica:
        first = self.seeds[0]
        return Replica(
            self._label(seed),
            init_seed=first if self.vary == "order" else seed,
            order_seed=first if self.vary == "init" else seed,
        )

    def _validated(self, module: SeedLoRAModule) -> dict[str, str | None]:
        names = [replica.name for replica in module.replicas if replica.name not in module.diverged]
        scored: dict[str, str | None] = {name: name for name in names}
        # What DoRA adds to a weight has its full rank: fusing it at every validation would take longer than training.
        fusible = self.rule is not None and module.hparams["adapter"] != "dora"
        return {**scored, FUSED: FUSED} if fusible else scored

    def _take_best(self, module: SeedLoRAModule, name: str) -> None:
        """Put a seed's best weights in the place of its last ones, if they are kept."""
        weights = self._best.get(name, {}).get("weights") or ()
        with torch.no_grad():
            for parameter, best in zip(module.stack.parameters(name), weights, strict=False):
                parameter.copy_(best)

    def _terminate(self, signum: int, frame: Any) -> None:
        self._terminated = True

    def _listen_no_more(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _settings(self, trainer: pl.Trainer, module: SeedLoRAModule, data: Any) -> dict[str, Any]:
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
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    def _checkpoint_folder(self, stack: Sequence[int]) -> Path:
        return self.dirpath / "checkpoints" / "-".join(map(self._label, stack))

    def _checkpoints(self, stack: Sequence[int]) -> list[Path]:
        found = self._checkpoint_folder(stack).glob("step=*.ckpt")
        return sorted(found, key=_step)

    def _save_checkpoint(self, trainer: pl.Trainer) -> None:
        """Save beside, flush, rename, then remove the one before; at any moment one whole checkpoint is there."""
        path = self._checkpoint_folder(self._stack) / f"step={trainer.global_step}.ckpt"
        temporary = path.with_suffix(".tmp")
        try:
            trainer.save_checkpoint(temporary)
        except BaseException:
            _remove(temporary)
            raise
        if trainer.is_global_zero:
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
            for older in self._checkpoints(self._stack)[:-1]:
                _remove(older)
        trainer.strategy.barrier()


def _ours(module: pl.LightningModule) -> SeedLoRAModule:
    if not isinstance(module, SeedLoRAModule):
        raise ValueError(f"SeedEnsembleCallback trains a SeedLoRAModule, got {type(module).__name__}")
    return module


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def _remove(path: Path) -> None:
    """Remove a checkpoint: a file, or a folder under DeepSpeed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

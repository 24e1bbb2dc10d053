"""The callback that trains several seeds as one stack and merges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from seedlora.callbacks.adapter_writer import AdapterWriter
from seedlora.callbacks.assignment import Assignment
from seedlora.callbacks.branch import Branch
from seedlora.callbacks.callback_of_parts import CallbackOfParts
from seedlora.callbacks.checkpoints import Checkpoints
from seedlora.callbacks.checks import Checks
from seedlora.callbacks.comparison import ComparisonOnTest
from seedlora.callbacks.early_stopping import SeedEarlyStopping
from seedlora.callbacks.exponential_mean import ExponentialMeans
from seedlora.callbacks.final_merge import FinalMerge
from seedlora.callbacks.halving import Halving
from seedlora.callbacks.live_merge import LiveMerge
from seedlora.callbacks.local_averaging import LocalAveraging
from seedlora.callbacks.predictions import Predictions
from seedlora.callbacks.python_run import RunEnd, RunStart
from seedlora.callbacks.termination import Termination, TerminationEnd
from seedlora.callbacks.tested_rows import TestedRows
from seedlora.merge.bound_rule import MergeRule
from seedlora.names import NO_CONTROLS
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import INDEPENDENT, EnsembleOptions
from seedlora.run.fit_state import FitState
from seedlora.run.stack_data import StackDataModule
from seedlora.scores.results import Results
from seedlora.training.live_updates import load_updates
from seedlora.training.module import SeedLoRAModule
from seedlora.training.scoring import ScoredLabels


class SeedEnsembleCallback(CallbackOfParts):
    """Train one LoRA replica per seed, all in one fit, and merge them when it ends.

    Its life:

    - *setup*: the module gets one replica per seed and the data module their data orders; each replica's share of the
      trainer's epochs or steps is fixed. Before the first fit the plan is printed, and ``config.yaml`` and
      ``cost.json`` are written, by ``train.py`` itself where it runs the Trainer.
    - *every validation*: the seeds trained so far are merged as they are, and the module scores seeds and fused adapter
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
      test's scores. Then it is said which adapter to use, and the report is written.
    - *predict*: the adapter that is advised, or ``predictions.adapter``, answers the test rows greedily; the answers
      are returned and kept in ``predictions.jsonl``.

    The folder is the state of the ensemble: a seed is finished when its adapter is there. With ``stack_size`` one fit
    trains the next ``stack_size`` unfinished seeds; while :attr:`pending` is not empty, call ``fit`` again with a new
    Trainer (and the same callback); the last one merges all. Controls that are trained follow in the same way, one fit
    each, while :attr:`pending_controls` is not empty.

    Args:
        seeds: one replica each.
        merge: a method of :data:`seedlora.merge.registry.METHODS`, any rule, or ``none`` to merge nothing. On the
            validation rows, ``auto`` chooses the method, ``auto_gain`` the gain of ``seedlora_gain``, on all
            layers or on attention or FFN alone, and ``greedy_soup`` its members.
        merge_options: keyword options of the method.
        compare: further methods, as a list or separated by commas, that are scored on the same test items.
        compare_options: keyword options of these, by method.
        controls: ``untrained`` scores, on the same test items, the best seed times the gain of the fused adapter, soup
            times the factor that is best on validation rows, the greedy soup, and the mean of the seeds' probabilities
            (a mixture, no adapter). ``all`` also trains the first seed for as many tokens as all seeds had, and once
            more with the rank of all of them for as many as one had: ``n + 1`` times the tokens of a seed.
            ``equal_tokens`` trains what costs as many as all seeds: the first seed for so many, also at its best
            validation, and one seed with the rows of all in each step, at three rates: four times these tokens.
        select_by: what is best on validation rows: the lowest ``loss``, or the most exact matches (``match``).
        dirpath: the folder of the run; default: a new one under ``runs``, named by the time.
        budget: ``equal`` divides the trainer's ``max_epochs`` (or ``max_steps``) among the seeds, so that the ensemble
            costs what one seed would; ``full`` gives each seed all of it.
        vary: what a seed decides: ``both``, ``init`` (all see the first seed's data order) or ``order`` (all start from
            the first seed's weights and drop out what it does).
        stack_size: seeds trained at once; default all, or one where every weight is trained. ``auto`` takes as many as
            the memory estimate allows in 80 % of the machine's memory.
        keep: the weights of each seed that are kept: those of its ``last`` step, of the validation at which its own
            loss was ``best``, or, for all of them, of the one at which the loss of the fused adapter was lowest
            (``best_fused``, which trains all seeds at once). With ``best`` a seed keeps what it would alone, whenever
            the others stop.
        patience: validations without a new best loss after which a seed is stopped; default never.
        on_divergence: what happens when a seed's training loss, or a weight of it, is not finite: ``stop`` ends the
            run, its checkpoints untouched; ``exclude`` goes on without that seed, whose rows and gradients reach no
            other, and the rest are merged.
        checkpoint_every_n_steps: optimizer steps between checkpoints.
        resume: go on with the run in ``dirpath``; without it a folder that holds a run is refused. Pass
            :attr:`ckpt_path` to ``fit``.
        sweep: values to try of ``learning_rate``, ``r``, ``lora_alpha``, ``lora_plus_ratio``, ``weight_decay``,
            ``lr_scheduler`` and ``warmup_ratio``, a list for each: a replica of the stack per seed and set of values.
        sweep_mode: ``cross`` gives each seed all sets of values, ``zip`` gives each seed one value of each option, in
            their order.
        scheme: ``independent``; ``branch``: all start as one replica, which sees the rows of all in each step;
            ``local``: they start alike, and get the mean of their weights from time to time.
        trunk: part of the steps in which all are one, with ``branch``; default half.
        ema: decay of an exponential mean of each replica's weights, 0.99 for example, which is an adapter beside it
            (``seed_11_ema``); default none.
        average_every: optimizer steps between two averages, with ``local``; default 20.
        average_growth: with it ``(average_growth / learning rate)**2`` steps, where that is more.
        outer_learning_rate: of SGD with Nesterov's momentum 0.9, which takes the mean for a step; 0.7 in DiLoCo.
        halving: parts of the steps, ``[0.25, 0.5]`` for example, after each of which the half of the replicas with the
            higher validation losses is dropped. Default: none is.
        ema_part: part of the steps, 0.1 for example, that an exponential mean of the weights reaches back: ``ema`` by
            the length of the run, 1 - 1 / (ema_part * steps).
        halved_rows: what becomes of the rows that dropped replicas would have seen: ``saved``, or ``shared``: those
            that go on have so many more rows of their own in each step.

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
        sweep: Mapping[str, Sequence[float | str]] | None = None,
        sweep_mode: str = "cross",
        scheme: str = INDEPENDENT,
        trunk: float | None = None,
        ema: float | None = None,
        average_every: int | None = None,
        average_growth: float | None = None,
        outer_learning_rate: float | None = None,
        halving: Sequence[float] | None = None,
        ema_part: float | None = None,
        halved_rows: str = "saved",
    ) -> None:
        self.ensemble = Ensemble(
            EnsembleOptions(
                seeds=tuple(seeds),
                merge=merge,
                merge_options=merge_options,
                compare=compare,
                compare_options=compare_options,
                controls=controls,
                select_by=select_by,
                dirpath=dirpath,
                budget=budget,
                vary=vary,
                stack_size=stack_size,
                keep=keep,
                patience=patience,
                on_divergence=on_divergence,
                checkpoint_every_n_steps=checkpoint_every_n_steps,
                resume=resume,
                sweep=sweep,
                sweep_mode=sweep_mode,
                scheme=scheme,
                trunk=trunk,
                ema=ema,
                average_every=average_every,
                average_growth=average_growth,
                outer_learning_rate=outer_learning_rate,
                halving=None if halving is None else tuple(halving),
                ema_part=ema_part,
                halved_rows=halved_rows,
            )
        )
        #: What the parts share about the fit at hand.
        self.fit_state = FitState()
        ensemble, state = self.ensemble, self.fit_state
        self._checks = Checks(ensemble)
        self._halving, self._early_stopping = Halving(ensemble, state), SeedEarlyStopping(ensemble, state)
        self._means, self._averaging = ExponentialMeans(ensemble), LocalAveraging(ensemble, state)
        self._termination = Termination(state)
        tested_rows = TestedRows(ensemble)
        self._comparison = ComparisonOnTest(ensemble, tested_rows)
        #: Who answers in ``Trainer.predict``, and how long: its attributes ``adapter`` and ``max_new_tokens``.
        self.predictions = Predictions(ensemble)
        # Each hook of Lightning goes to them in this order. At the end of a fit, for example: the best weights are put
        # back, the adapters are written, the checkpoints removed, a SIGTERM is answered, and the seeds are merged.
        self.parts: tuple[pl.Callback, ...] = (
            self._checks,
            RunStart(ensemble),
            Assignment(ensemble, state),
            Branch(),
            self._averaging,
            self._means,
            self._halving,
            self._early_stopping,
            AdapterWriter(ensemble, state, self._means),
            Checkpoints(ensemble, state),
            self._termination,
            LiveMerge(ensemble, state),
            FinalMerge(ensemble, state),
            self._comparison,
            tested_rows,
            RunEnd(ensemble),
            self.predictions,
            TerminationEnd(self._termination),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: the seeds' validations, who is stopped, and the means of the weights."""
        return {key: value for part in self._stateful for key, value in part.state_dict().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the validations and the means where they were."""
        for part in self._stateful:
            part.load_state_dict(state_dict)

    @property
    def _stateful(self) -> Sequence[pl.Callback]:
        """Return the parts whose state belongs into a checkpoint; their keys differ."""
        return (self._early_stopping, self._halving, self._means, self._averaging)

    # For whoever runs the Trainer

    def check_fit(self, trainer: pl.Trainer, module: SeedLoRAModule, data: StackDataModule) -> None:
        """Raise ValueError for what :meth:`Checks.check_fit` finds; the data must be set up."""
        self._checks.check_fit(trainer, module, data)

    def open(self, trainer: pl.Trainer, module: SeedLoRAModule, data: StackDataModule) -> None:
        """Make the run's folder ours before the fit does; raises ValueError as :meth:`Checks.open` does."""
        self._checks.open(trainer, module, data)

    def leave_plan_and_report(self) -> None:
        """Leave to whoever runs the Trainer what is printed and written around its fits: plan, options, report."""
        self.parts = tuple(part for part in self.parts if not isinstance(part, RunStart | RunEnd))

    @contextmanager
    def holding_tested(self, module: SeedLoRAModule) -> Iterator[None]:
        """Have the module hold and score, inside, all that a test scores, and what is compared beside it.

        A SIGTERM ends the run at once there.
        """
        with self._termination.leaving_at_once():
            self._comparison.load(module)
            adapters = dict(module.scored.adapters)
            for label, make in self.ensemble.beside(module.device).items():
                load_updates(module.stack, label, make())
                adapters[label] = label
            module.scored = ScoredLabels(adapters, module.scored.mixtures)
            yield

    # The ensemble's own, under the names that a user's code has for them

    @property
    def dirpath(self) -> Path:
        """Return the folder of the run."""
        return self.ensemble.dirpath

    @property
    def fused_path(self) -> Path:
        """Return where the fused adapter is, once all seeds are trained."""
        return self.ensemble.fused_path

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds; a sweep trains several replicas of each."""
        return self.ensemble.options.seeds

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the replicas, by name, whose adapters, or whole models, are there."""
        return self.ensemble.trained

    @property
    def pending(self) -> tuple[str, ...]:
        """Return the replicas, by name, that are still to be trained."""
        return self.ensemble.pending

    @property
    def pending_controls(self) -> tuple[str, ...]:
        """Return the controls that are still to be trained, once the seeds are."""
        return self.ensemble.pending_controls

    @property
    def ckpt_path(self) -> Path | None:
        """Return the newest whole checkpoint of what the next fit trains; ValueError if all there are damaged."""
        return self.ensemble.ckpt_path

    @property
    def results(self) -> Results | None:
        """Return the scores of the last test, also those of another process; None without one."""
        return self.ensemble.tested

    def adapter_path(self, replica: int | str) -> Path:
        """Return where the adapter of a seed, or of a replica by its name, is, once it is trained."""
        return self.ensemble.adapter_path(replica)

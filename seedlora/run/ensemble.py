"""An ensemble of seeds without a Trainer: what was asked, what is done, what is next, and what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from seedlora.adapters.adapter import Adapter, is_trained
from seedlora.adapters.reading import read_adapter
from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.common_options import COMMON_DEFAULTS
from seedlora.merge.inputs import stack_adapters, stack_updates, weight_files_of
from seedlora.merge.layers import Fused, merge_stacks
from seedlora.merge.methods.soup import soup
from seedlora.merge.record import applied_rule, rule_as_stored
from seedlora.model.weight_files import WeightFiles
from seedlora.names import (
    EMA_SOUP,
    EQUAL_TOKENS,
    FUSED,
    LONG,
    LONG_SEED,
    LONG_SEED_BEST,
    SOUP,
    WIDE_BATCH,
    WIDE_BATCHES,
    ema_name,
    seed_name,
)
from seedlora.records.fusion import AppliedRule
from seedlora.records.report import Advice
from seedlora.records.results import RESULTS
from seedlora.run.controls import best_of, control_replicas, trained_controls
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.folder import RunFolder, step_of
from seedlora.scores.advice import advise
from seedlora.scores.results import Results, stored_results
from seedlora.selection.comparison import Comparison, rule_of_seeds
from seedlora.selection.settling import adapters_beside
from seedlora.training.replicas import Replica
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, join_stacks, select_adapters
from seedlora.utils.options import name_option
from seedlora.utils.places import expanded


class MergedOtherwise(NamedTuple):
    """Name the rule that a fused adapter was made by, and another one that is asked for now."""

    made: str
    asked: str


class Ensemble:
    """Tell what a run trains, merges and compares, from its options and its folder.

    The folder is the state: a seed is finished when its adapter is there. Nothing here needs a Trainer or a model.

    Args:
        options: of the run.
    """

    def __init__(self, options: EnsembleOptions) -> None:
        self.options = options
        #: The merge rule and what it is compared with.
        self.comparison = options.comparison
        #: All that are trained, in their order.
        self.replicas = options.replicas
        #: What is trained, and what is still to do.
        self.folder = RunFolder(
            expanded(options.dirpath or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")),
            self.names,
            controls=trained_controls(options.controls, outer=options.outer_learning_rate is not None)
            if len(self.replicas) > 1
            else (),
            is_new=options.dirpath is None,
        )
        #: Replicas trained at once; None is all of them, as long as the memory estimate has not decided.
        self.stack_size: int | None = options.stack_size if isinstance(options.stack_size, int) else None
        #: What the last test said.
        self.results: Results | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the replicas."""
        return tuple(replica.name for replica in self.replicas)

    @property
    def rule(self) -> BoundRule | None:
        """Return what the seeds are merged by; soup where that is still to be chosen; None if nothing is merged."""
        return self.comparison.rule

    @property
    def live_label(self) -> str | None:
        """Return the label of what is merged in training: soup, as long as a rule is still to be chosen."""
        if self.rule is None:
            return None
        return SOUP if self.comparison.chooses else FUSED

    @property
    def method_name(self) -> str:
        """Return the merge method, for people, and what was chosen."""
        selection, name = self.folder.selection, self.comparison.method_name
        chosen = None if selection is None else selection["chosen"]
        return name if chosen is None or not self.comparison.chooses else f"{name}: {chosen['name']}"

    # The folder

    @property
    def dirpath(self) -> Path:
        """Return the folder of the run."""
        return self.folder.path

    @property
    def fused_path(self) -> Path:
        """Return where the fused adapter is, once all seeds are trained."""
        return self.dirpath / FUSED

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the replicas whose adapters, or whole models, are there."""
        return self.folder.trained

    @property
    def pending(self) -> tuple[str, ...]:
        """Return the replicas that are still to be trained."""
        return self.folder.pending

    @property
    def pending_controls(self) -> tuple[str, ...]:
        """Return the controls that are still to be trained, once the replicas are."""
        return self.folder.pending_controls

    @property
    def excluded(self) -> dict[str, str]:
        """Return the replicas that were left out, and why."""
        reasons = self.folder.left_out
        return {name: reasons[name] for name in self.names if name in reasons}

    @property
    def folders(self) -> dict[str, Path]:
        """Return the adapters that a test reads and that are there, by label: plain soup is what ``fused`` holds."""
        found = {name: self.adapter_path(name) for name in self.trained}
        found |= self._control_folders()
        found |= {ema_name(label): folder.with_name(ema_name(folder.name)) for label, folder in found.items()}
        if self.rule is not None and len(self.trained) > 1:
            found[SOUP] = self.fused_path if self.comparison.is_soup else self.dirpath / SOUP
        if self.rule is not None and not self.comparison.is_soup:
            found[FUSED] = self.fused_path
        return {label: folder for label, folder in found.items() if is_trained(folder)}

    def _control_folders(self) -> dict[str, Path]:
        """Return the trained controls by label; of the wide batches the one that is best on the validation rows."""
        trained = self.folder.trained_controls
        found = {name: self.dirpath / name for name in trained if name not in WIDE_BATCHES}
        if LONG_SEED in found:
            found[LONG_SEED_BEST] = self.dirpath / LONG_SEED_BEST
        if (best := best_of([name for name in trained if name in WIDE_BATCHES], self.folder.trained_on)) is not None:
            found[WIDE_BATCH] = self.dirpath / best
        return found

    @property
    def merged_otherwise(self) -> MergedOtherwise | None:
        """Return how the fused adapter was made and is asked for now, if that is another rule and not to be chosen."""
        if self.comparison.chooses:
            return None
        made: AppliedRule = {"method": "nothing", "options": {}, "use": {}}
        asked = made
        if (fusion := self.folder.fusion) is not None:
            made = applied_rule(fusion)
        if (rule := self.compared.rule) is not None:
            asked = rule_as_stored(rule)
        return None if made == asked else MergedOtherwise(_rule_text(made), _rule_text(asked))

    def adapter_path(self, replica: int | str) -> Path:
        """Return where the adapter of a seed, or of a replica by its name, is, once it is trained."""
        return self.dirpath / (replica if isinstance(replica, str) else seed_name(replica))

    @property
    def tested(self) -> Results | None:
        """Return what the last test said, also that of another process; None without one."""
        if self.results is not None:
            return self.results
        record = RESULTS.read(self.dirpath)
        return None if record is None else stored_results(record, self.trained)

    @property
    def advice(self) -> Advice:
        """Return which adapter to use, by the validation rows and the last test."""
        merged = None
        if self.rule is not None and is_trained(self.fused_path):
            merged = SOUP if self.comparison.is_soup else FUSED
        return advise(self.folder.selection, self.tested, list(self.trained), method=self.method_name, merged=merged)

    # The next fit

    @property
    def trains_controls(self) -> bool:
        """Return whether controls are trained beside the seeds."""
        return bool(self.folder.controls)

    @property
    def next_control(self) -> str | None:
        """Return the control that the next fit trains; None as long as it trains seeds."""
        return next(iter(self.pending_controls), None)

    @property
    def next_names(self) -> tuple[str, ...]:
        """Return the names of what the next fit trains: replicas, then one control after the other."""
        return tuple(replica.name for replica in self.next_replicas)

    @property
    def next_replicas(self) -> tuple[Replica, ...]:
        """Return the replicas that the next fit trains."""
        if (control := self.next_control) is not None:
            like = self.replicas[self.names.index(self._typical)]
            return control_replicas(control, like, seeds=self.options.seeds, trained=len(self.trained))
        return tuple(self.replicas[self.names.index(name)] for name in self.folder.next_stack(self.stack_size))

    @property
    def _typical(self) -> str:
        """Return the replica that controls are like: the first one, of a sweep the best on the validation rows."""
        selection = self.folder.selection
        if self.options.sweep and selection is not None and selection["best_seed"] in self.trained:
            return selection["best_seed"]
        return self.trained[0]

    @property
    def metrics_path(self) -> Path:
        """Return where the metrics of the next fit belong."""
        return self.folder.metrics((self.next_control,) if self.next_control else self.next_names)

    @property
    def ckpt_path(self) -> Path | None:
        """Return the newest whole checkpoint of what the next fit trains; ValueError if all there are damaged."""
        return self.folder.checkpoint(self.next_names)

    @property
    def ckpt_step(self) -> int:
        """Return the optimizer steps that are in :attr:`ckpt_path`; 0 without a checkpoint."""
        return step_of(self.ckpt_path) if self.ckpt_path else 0

    def writes_best_beside(self, control: str | None) -> bool:
        """Return whether the weights of a control's best validation are written beside its last ones."""
        return control == LONG_SEED and self.options.controls == EQUAL_TOKENS and not self.options.keeps_best

    def control_limits(self, *, max_epochs: int | None, max_steps: int) -> dict[str, int]:
        """Return what the Trainer of the next control needs besides the run's own options.

        With the equal budget the run's limits are what all replicas had together; with the full one they are one's.

        Args:
            max_epochs: of the run; ``None`` is no limit.
            max_steps: of the run; -1 is no limit.
        """
        if self.next_control not in LONG or self.options.budget == "equal":
            return {}
        limits = {"max_epochs": max_epochs, "max_steps": max_steps}
        return {name: len(self.replicas) * limit for name, limit in limits.items() if limit not in (None, -1)}

    def check_stack(self) -> None:
        """Raise ValueError if all replicas must be trained at once and are not."""
        if (reason := self.options.one_stack) is not None and (self.stack_size or len(self.names)) < len(self.names):
            raise ValueError(
                f"{reason} trains all {len(self.names)} replicas at once, and "
                f"{name_option('ensemble.stack_size')} is {self.stack_size}; leave it out"
            )

    # What was trained

    @property
    def compared(self) -> Comparison:
        """Return the merge rule and what it is compared with, among the replicas that are trained."""
        return self.comparison.of_seeds([self.names.index(name) for name in self.trained])

    def read_seeds(self) -> dict[str, Adapter]:
        """Read the adapters of the trained replicas."""
        return {name: self.read(self.adapter_path(name)) for name in self.trained}

    def merge_live(self, stacks: Stacks[LoRAFactors], names: Sequence[str], *, stack: Sequence[str]) -> Fused:
        """Merge replicas in training, as they are, with the finished ones, in the order of all.

        Args:
            stacks: the adapters in training of every layer by path.
            names: whose they are.
            stack: all replicas of the fit: where one was written before the run was killed, it trains again.
        """
        finished = [name for name in self.trained if name not in stack]
        if finished:
            stacks = join_stacks(stack_adapters({name: self.read(self.dirpath / name) for name in finished}), stacks)
        there = [*finished, *names]
        merged = [name for name in self.names if name in there]
        rule = rule_of_seeds(self.rule, [self.names.index(name) for name in merged])
        assert rule is not None
        return merge_stacks(select_adapters(stacks, [there.index(name) for name in merged]), rule)

    def read_tested(self, device: torch.device) -> dict[str, Adapter]:
        """Read the adapters that a test scores, back from their folders, so that what is scored is what was written.

        Soup is made anew where others are compared and it has no folder.

        Args:
            device: where that is done.
        """
        read = {label: self.read(folder) for label, folder in self.folders.items()}
        seeds = {label: read[label] for label in self.trained}
        if len(seeds) > 1 and SOUP not in read and (self.rule is not None or self.comparison.compare):
            fused = merge_stacks(stack_updates(seeds, self._base, device=device), soup)
            modules = {key: each[0] for key, each in fused.modules.items()}
            read[SOUP] = replace(next(iter(seeds.values())), magnitudes={}, layers=fused, modules=modules)
        return read

    def beside(self, device: torch.device) -> dict[str, Callable[[], Layers]]:
        """Return what is compared beside base, seeds, soup, fused and trained controls, by label; made when called.

        Args:
            device: where that is done.
        """
        adapters = self.read_seeds()
        if len(adapters) < 2:
            return {}
        made = {label: make for label, make in self.means(device).items() if label == EMA_SOUP}
        if not (self.comparison.compare or self.comparison.compares_greedy):
            return made
        fused = None
        if self.rule is not None:
            fused = {path: factors.to(device) for path, factors in self.read(self.fused_path).layers.items()}
        stacks = stack_updates(adapters, self._base, device=device)
        return made | adapters_beside(self.compared, stacks, list(adapters), fused, self.folder.selection)

    def means(self, device: torch.device) -> dict[str, Callable[[], Layers]]:
        """Return the exponential means of the replicas, and the soup of several, by label; made when they are called.

        Args:
            device: where that is done.
        """
        folders = [self.dirpath / ema_name(name) for name in self.trained]
        read = {folder.name: self.read(folder) for folder in folders if is_trained(folder)}
        made: dict[str, Callable[[], Layers]] = {
            label: partial(stack_updates, {label: adapter}, self._base, device=device)
            for label, adapter in read.items()
        }
        if 1 < len(read) == len(folders):
            made[EMA_SOUP] = lambda: merge_stacks(stack_updates(read, self._base, device=device), soup)
        return made

    def read(self, folder: Path) -> Adapter:
        """Read an adapter of the run from its folder."""
        return read_adapter(folder, base=self._base)

    @property
    def _base(self) -> WeightFiles:
        """Return the base weights that DoRA's updates need; opened when they are read."""
        return weight_files_of([self.adapter_path(name) for name in self.trained])


def _rule_text(record: AppliedRule) -> str:
    """Describe the rule of a record, with the options that are set."""
    common = {key: value for key, value in record["use"].items() if value != COMMON_DEFAULTS.get(key)}
    options = {**record["options"], **common}
    return " ".join([record["method"], *([json.dumps(options)] if options else [])])

"""An ensemble of seeds without a Trainer: what was asked, what is done, what is next, and what was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
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
from seedlora.names import ALL_CONTROLS, FUSED, LONG_SEED, SOUP, TRAINED_CONTROLS, WIDE_SEED, seed_name
from seedlora.records.fusion import AppliedRule
from seedlora.records.report import Advice
from seedlora.run.ensemble_options import EnsembleOptions
from seedlora.run.folder import RunFolder, step_of
from seedlora.scores.advice import advise
from seedlora.scores.results import Results
from seedlora.selection.comparison import Comparison, rule_of_seeds
from seedlora.selection.settling import adapters_beside
from seedlora.training.replicas import Replica
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Layers, Stacks, join_stacks, select_adapters
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
        trains_controls = options.controls == ALL_CONTROLS and len(options.seeds) > 1
        #: What is trained, and what is still to do.
        self.folder = RunFolder(
            expanded(options.dirpath or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")),
            options.seeds,
            controls=TRAINED_CONTROLS if trains_controls else (),
            is_new=options.dirpath is None,
        )
        #: Seeds trained at once; None is all of them, as long as the memory estimate has not decided.
        self.stack_size: int | None = options.stack_size if isinstance(options.stack_size, int) else None
        #: What the last test said.
        self.results: Results | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds, one replica each."""
        return self.options.seeds

    @property
    def rule(self) -> BoundRule | None:
        """Return what the seeds are merged by; soup where that is still to be chosen; None if nothing is merged."""
        return self.comparison.rule

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
    def trained(self) -> tuple[int, ...]:
        """Return the seeds whose adapters, or whole models, are there."""
        return self.folder.trained

    @property
    def pending(self) -> tuple[int, ...]:
        """Return the seeds that are still to be trained."""
        return self.folder.pending

    @property
    def pending_controls(self) -> tuple[str, ...]:
        """Return the controls that are still to be trained, once the seeds are."""
        return self.folder.pending_controls

    @property
    def excluded(self) -> dict[int, str]:
        """Return the seeds that were left out, and why."""
        reasons = self.folder.left_out
        return {seed: reasons[label] for seed in self.seeds if (label := seed_name(seed)) in reasons}

    @property
    def folders(self) -> dict[str, Path]:
        """Return the adapters that a test reads and that are there, by label: plain soup is what ``fused`` holds."""
        found = {seed_name(seed): self.adapter_path(seed) for seed in self.trained}
        found |= {name: self.dirpath / name for name in self.folder.trained_controls}
        if self.rule is not None and len(self.trained) > 1:
            found[SOUP] = self.fused_path if self.comparison.is_soup else self.dirpath / SOUP
        if self.rule is not None and not self.comparison.is_soup:
            found[FUSED] = self.fused_path
        return {label: folder for label, folder in found.items() if is_trained(folder)}

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

    def adapter_path(self, seed: int) -> Path:
        """Return where the adapter of a seed is, once it is trained."""
        return self.folder.adapter(seed)

    @property
    def advice(self) -> Advice:
        """Return which adapter to use, by the validation rows and the last test."""
        merged = None
        if self.rule is not None and is_trained(self.fused_path):
            merged = SOUP if self.comparison.is_soup else FUSED
        seeds = list(map(seed_name, self.trained))
        return advise(self.folder.selection, self.results, seeds, method=self.method_name, merged=merged)

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
        """Return the adapters that the next fit trains: seeds, then one control after the other."""
        return tuple(map(seed_name, self.folder.next_stack(self.stack_size))) or self.pending_controls[:1]

    @property
    def next_replicas(self) -> tuple[Replica, ...]:
        """Return the replicas that the next fit trains; a control starts and sees its rows as the first seed does."""
        if (control := self.next_control) is not None:
            return (replace(self.replica(self.trained[0]), name=control),)
        return tuple(map(self.replica, self.folder.next_stack(self.stack_size)))

    @property
    def next_rank_factor(self) -> int:
        """Return the rank of the next replicas in units of a seed's."""
        return len(self.trained) if self.next_control == WIDE_SEED else 1

    @property
    def metrics_path(self) -> Path:
        """Return where the metrics of the next fit belong."""
        return self.folder.metrics(self.next_names)

    @property
    def ckpt_path(self) -> Path | None:
        """Return the newest whole checkpoint of what the next fit trains; ValueError if all there are damaged."""
        return self.folder.checkpoint(self.next_names)

    @property
    def ckpt_step(self) -> int:
        """Return the optimizer steps that are in :attr:`ckpt_path`; 0 without a checkpoint."""
        return step_of(self.ckpt_path) if self.ckpt_path else 0

    def replica(self, seed: int) -> Replica:
        """Return the replica of a seed: what its seed decides, as the option ``vary`` says."""
        first, vary = self.seeds[0], self.options.vary
        return Replica(
            seed_name(seed),
            init_seed=first if vary == "order" else seed,
            order_seed=first if vary == "init" else seed,
        )

    def control_limits(self, *, max_epochs: int | None, max_steps: int) -> dict[str, int]:
        """Return what the Trainer of the next control needs besides the run's own options.

        With the equal budget the run's limits are what all seeds had together; with the full one they are a seed's.

        Args:
            max_epochs: of the run; ``None`` is no limit.
            max_steps: of the run; -1 is no limit.
        """
        if self.next_control != LONG_SEED or self.options.budget == "equal":
            return {}
        limits = {"max_epochs": max_epochs, "max_steps": max_steps}
        return {name: len(self.seeds) * limit for name, limit in limits.items() if limit not in (None, -1)}

    # What was trained

    @property
    def compared(self) -> Comparison:
        """Return the merge rule and what it is compared with, among the seeds that are trained."""
        return self.comparison.of_seeds([self.seeds.index(seed) for seed in self.trained])

    def read_seeds(self) -> dict[str, Adapter]:
        """Read the adapters of the trained seeds."""
        return {seed_name(seed): self._read(self.adapter_path(seed)) for seed in self.trained}

    def merge_live(self, stacks: Stacks[LoRAFactors], names: Sequence[str], *, stack: Sequence[str]) -> Fused:
        """Merge seeds in training, as they are, with the finished ones, in the order of the seeds.

        Args:
            stacks: the adapters in training of every layer by path.
            names: whose they are.
            stack: all replicas of the fit: where one was written before the run was killed, it trains again.
        """
        finished = [seed_name(seed) for seed in self.trained if seed_name(seed) not in stack]
        if finished:
            stacks = join_stacks(stack_adapters({name: self._read(self.dirpath / name) for name in finished}), stacks)
        there = [*finished, *names]
        seeds = [seed for seed in self.seeds if seed_name(seed) in there]
        rule = rule_of_seeds(self.rule, [self.seeds.index(seed) for seed in seeds])
        assert rule is not None
        return merge_stacks(select_adapters(stacks, [there.index(seed_name(seed)) for seed in seeds]), rule)

    def read_tested(self, device: torch.device) -> dict[str, Adapter]:
        """Read the adapters that a test scores, back from their folders, so that what is scored is what was written.

        Soup is made anew where others are compared and it has no folder.

        Args:
            device: where that is done.
        """
        read = {label: self._read(folder) for label, folder in self.folders.items()}
        seeds = {label: read[label] for label in map(seed_name, self.trained)}
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
        if len(adapters) < 2 or not (self.comparison.compare or self.comparison.has_controls):
            return {}
        fused = None
        if self.rule is not None:
            fused = {path: factors.to(device) for path, factors in self._read(self.fused_path).layers.items()}
        stacks = stack_updates(adapters, self._base, device=device)
        return adapters_beside(self.compared, stacks, list(adapters), fused, self.folder.selection)

    def _read(self, folder: Path) -> Adapter:
        return read_adapter(folder, base=self._base)

    @property
    def _base(self) -> WeightFiles:
        """Return the base weights that DoRA's updates need; opened when they are read."""
        return weight_files_of([self.adapter_path(seed) for seed in self.trained])


def _rule_text(record: AppliedRule) -> str:
    """Describe the rule of a record, with the options that are set."""
    common = {key: value for key, value in record["use"].items() if value != COMMON_DEFAULTS.get(key)}
    options = {**record["options"], **common}
    return " ".join([record["method"], *([json.dumps(options)] if options else [])])

"""Whole models like the base model: what full fine-tuning starts at, writes and fuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seedlora.distributed.sharded import broadcast_from_rank0
from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.model_folders import write_trained
from seedlora.merge.whole_models import make_weight_merger
from seedlora.model.weight_files import WeightFiles
from seedlora.updates.factors import LoRAFactors
from seedlora.updates.stacks import Stacks

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from seedlora.adapters.stack import AdapterStack
    from seedlora.training.model_options import ModelOptions


class WholeModels:
    """Reads, merges and writes whole models, by the names that the stack gives to what is trained in full.

    Args:
        stack: of replicas that train every weight.
        options: of the model.
    """

    def __init__(self, stack: AdapterStack, options: ModelOptions) -> None:
        self._stack, self._options = stack, options

    def read(self, folder: Path) -> Stacks[LoRAFactors]:
        """Read a whole model like the base, to be scored."""
        weights = WeightFiles(folder)
        return Stacks({}, {own: [weights.tensor(key)] for own, key in self._keys(weights).items()})

    def merge(self, trainer: pl.Trainer, folders: Sequence[Path], rule: BoundRule) -> Stacks[LoRAFactors]:
        """Merge whole models, to be scored; all of the result is in memory.

        The first rank merges; all ranks must call it.
        """
        base, fused, new = WeightFiles(self._options.base_path), None, {}
        if trainer.global_rank == 0:
            fused = make_weight_merger([WeightFiles(folder) for folder in folders], base, rule)
        for key in base.files:
            weight = base.weight(key)
            made = torch.empty_like(weight) if fused is None else fused(key, weight)
            new[key] = broadcast_from_rank0(trainer, made)
        return Stacks({}, {own: [new[key]] for own, key in self._keys(base).items()})

    def write(self, path: Path, trained: Mapping[str, Tensor], files: Mapping[str, str | bytes]) -> None:
        """Write the whole model of a replica.

        Args:
            path: of the folder.
            trained: its weights, by the names of the stack.
            files: further files, by name.
        """
        base = WeightFiles(self._options.base_path)
        write_trained(path, base, {key: trained[own] for own, key in self._keys(base).items()}, files=files)

    def start_at_files(self, names: Iterable[str]) -> None:
        """Give replicas the weights of the files, which may be finer than the base's dtype.

        What training adds is measured from the files.
        """
        weights = WeightFiles(self._options.base_path)
        keys = self._keys(weights)
        for name in names:
            for own, parameter in self._stack.full_weights(name).items():
                parameter.copy_(weights.tensor(keys[own]))

    def _keys(self, weights: WeightFiles) -> dict[str, str]:
        """Return where a folder of the base model, or of one like it, has what is trained: its key by our name."""
        found, tied = {}, self._options.outline.tied
        for path, wrapper in self._stack.modules.items():
            for parameter, _ in wrapper.original_module.named_parameters():
                try:
                    found[f"{path}.{parameter}"] = weights.key(path, parameter)
                except ValueError:
                    if path not in tied:
                        raise
                    # Files hold the one matrix under the embedding's name.
                    found[f"{path}.{parameter}"] = weights.key(tied[0], parameter)
        return found

"""Refuse, before anything is trained, what an ensemble cannot do."""

from __future__ import annotations

import lightning.pytorch as pl

from seedlora.distributed.strategies import holds_whole_adapters, saves_checkpoint_folders
from seedlora.merge.whole_models import check_dense
from seedlora.model.loading import check_token_ids, positions_of
from seedlora.names import ALL_CONTROLS, FUSED, SOUP
from seedlora.run.budget import limited_batches, replica_share, replica_steps
from seedlora.run.ensemble import Ensemble
from seedlora.run.ensemble_options import BEST_FUSED
from seedlora.run.fingerprint import run_settings
from seedlora.run.memory import choose_stack_size
from seedlora.run.stack_data import GrowsRows, HasTokens, JoinsRows, StackDataModule
from seedlora.run.trainer_options import Fit, check_trainer
from seedlora.training.model_options import ModelOptions
from seedlora.training.module import SeedLoRAModule
from seedlora.training.optimizer_choice import OptimizerChoice
from seedlora.utils.options import name_option


class Checks(pl.Callback):
    """Check that trainer, module, data and folder fit the ensemble, and open its folder.

    Args:
        ensemble: the run.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self._ensemble = ensemble
        self._is_open = self._is_taken = False

    def setup(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Check everything, and take the first rank's folder.

        Raises:
            ValueError: naming what does not fit.
        """
        if not isinstance(module, SeedLoRAModule):
            raise ValueError(f"SeedEnsembleCallback trains a SeedLoRAModule, got {type(module).__name__}")
        ensemble, data = self._ensemble, trainer.datamodule
        ensemble.folder.path = trainer.strategy.broadcast(ensemble.dirpath)
        if stage != "fit":
            if ensemble.dirpath.is_dir():
                self._take(trainer)
            return
        if not isinstance(data, StackDataModule):
            got, own = ("loaders alone", "my_datamodule") if data is None else (type(data).__name__, "it")
            raise ValueError(
                f"SeedEnsembleCallback needs a data module that deals rows to seeds, and got {got}; wrap any "
                f"LightningDataModule: datamodule=StackData({own}), by `from seedlora.datamodules import StackData`"
            )
        self.check_fit(trainer, module, data)
        if ensemble.next_control is None:
            choose_stack_size(ensemble, trainer, module.options, data)
            ensemble.check_stack()
            self._take(trainer, resume=ensemble.options.resume)
            # It may have another name now.
            ensemble.folder.path = trainer.strategy.broadcast(ensemble.dirpath)
            self.open(trainer, module, data)
            if not ensemble.pending:
                raise ValueError(f"{ensemble.dirpath}: all seeds are trained; Trainer.validate merges them again")
        else:
            self._take(trainer)

    def teardown(self, trainer: pl.Trainer, module: SeedLoRAModule, stage: str) -> None:
        """Give the folder up, unless whoever runs the Trainer has taken it."""
        self._leave()

    def on_exception(self, trainer: pl.Trainer, module: SeedLoRAModule, exception: BaseException) -> None:
        """Give the folder up, likewise."""
        self._leave()

    def _take(self, trainer: pl.Trainer, *, resume: bool = False) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._is_taken = self._ensemble.folder.take(resume=resume and not self._is_open) or self._is_taken

    def _leave(self) -> None:
        if self._is_taken:
            self._ensemble.folder.leave()
            self._is_taken = False

    def check_fit(self, trainer: pl.Trainer, module: SeedLoRAModule, data: StackDataModule) -> None:
        """Tell the data whether the model takes joined rows, and raise ValueError if an option of trainer or module
        cannot be, if validation decides and cannot, or if the base model has no place for a row's tokens.

        Args:
            trainer: whose options are checked.
            module: whose kind of adapter may not do what was asked of the ensemble.
            data: that is set up.
        """
        ensemble = self._ensemble
        if isinstance(data, JoinsRows):
            data.reason_not_to_pack = module.options.reason_not_to_pack
        check_adapter(ensemble, module)
        check_optimizer(ensemble, trainer, module.options.optimizer_choice)
        share = replica_share(ensemble.options, trainer, control=ensemble.next_control)
        merged = [] if ensemble.rule is None else [SOUP if ensemble.comparison.chooses else FUSED]
        if not trainer.fast_dev_run:
            # Of a replica that may be dropped nothing is logged to the end.
            lasting = ensemble.next_names if ensemble.options.halving is None else ()
            check_trainer(Fit(trainer, data, share, (*lasting, *merged)))
            steps = replica_steps(share, trainer, data)
            if ensemble.next_control is None:
                ensemble.options.halving_rounds(steps)
            ensemble.options.ema_decay(steps)
        if ensemble.options.halved_rows == "shared" and not isinstance(data, GrowsRows):
            raise ValueError(
                f"{name_option('ensemble.halved_rows', 'shared')} gives a step more rows, and {type(data).__name__} "
                "has no attribute growth, which says so; take saved, or wrap the data module in StackData"
            )
        self._check_validation(trainer, data)
        if isinstance(data, HasTokens):
            check_token_ids(data.largest_token(), module.options.outline.vocabulary, module.options.base_model)
            data.check_positions(positions_of(module.options.outline.config))

    def _check_validation(self, trainer: pl.Trainer, data: StackDataModule) -> None:
        """Raise ValueError if validation decides and cannot: no rows, adapters in parts."""
        options = self._ensemble.options
        if (reason := options.whole_adapters) is not None and not holds_whole_adapters(trainer):
            raise ValueError(
                f"{reason}: that reads and writes the adapters in training, which DeepSpeed and fsdp2 keep in parts; "
                "use ddp, or leave it out"
            )
        needed = None
        if options.watches_validation:
            needed = f"{name_option('ensemble.keep', 'best')} and {name_option('ensemble.patience')} need"
        if options.halving is not None:
            needed = f"{name_option('ensemble.halving')} drops the replicas with the higher losses on"
        if (reason := self._ensemble.comparison.validated_for) is not None:
            needed = f"{reason} chooses on"
        if not needed or trainer.fast_dev_run:
            return
        if not limited_batches(len(data.val_dataloader()), trainer.limit_val_batches):
            raise ValueError(f"{needed} validation rows, and there are none")

    def open(self, trainer: pl.Trainer, module: SeedLoRAModule, data: StackDataModule) -> None:
        """Make the folder ours, or check that it is: the same settings, and ``resume`` asked for.

        Raises:
            ValueError: if it holds a run and ``resume`` was not asked for, or that run was started differently, or what
                it has saved cannot be read.
        """
        if self._is_open or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        options, folder = self._ensemble.options, self._ensemble.folder
        share = replica_share(options, trainer)
        folder.open(run_settings(options, share, trainer, module, data), resume=options.resume)
        saved = self._ensemble.ckpt_path
        if saved is not None and saved.is_dir() != saves_checkpoint_folders(trainer):
            how = "without DeepSpeed" if saved.is_file() else "under DeepSpeed"
            raise ValueError(
                f"{saved} was saved {how}; resume by the {name_option('trainer.strategy')} with which the run was "
                "started"
            )
        self._is_open = True


def check_optimizer(ensemble: Ensemble, trainer: pl.Trainer, choice: OptimizerChoice) -> None:
    """Raise ValueError if an optimizer would let replicas learn of each other, or gets parts of what it needs whole."""
    asked, options = name_option("model.optimizer", choice.name), ensemble.options
    if not choice.traits.is_elementwise and not holds_whole_adapters(trainer):
        raise ValueError(
            f"{asked} looks at whole tensors, which DeepSpeed and fsdp2 cut into parts; use ddp, or an optimizer that "
            "goes by elements, such as adamw"
        )
    if choice.traits.is_per_tensor or len(ensemble.replicas) == 1:
        return
    mixes = f"{asked} looks at several tensors together, so replicas of one stack would learn of each other"
    if (reason := options.one_stack) is not None:
        raise ValueError(f"{mixes}, and {reason} trains them at once; use another optimizer")
    if isinstance(options.stack_size, int) and options.stack_size > 1:
        stack = name_option("ensemble.stack_size")
        raise ValueError(f"{mixes}; leave out {stack} {options.stack_size}, and they are trained one after the other")


def check_adapter(ensemble: Ensemble, module: SeedLoRAModule) -> None:
    """Raise ValueError if this kind of adapter cannot do what was asked of the ensemble."""
    options, comparison = module.options, ensemble.comparison
    adapter = options.adapter
    _check_sweep(ensemble, options)
    if options.is_full_finetuning and ensemble.options.takes_means:
        full = name_option("model.adapter", adapter)
        raise ValueError(f"{name_option('ensemble.ema')} writes an adapter, and {full} has none; leave it out")
    if options.adds_dense and ensemble.options.keep == BEST_FUSED:
        raise ValueError(
            f"{name_option('ensemble.keep', BEST_FUSED)}: the fused adapter is not validated in training with "
            f"{name_option('model.adapter', adapter)}, whose updates have full rank; use "
            f"{name_option('ensemble.keep', 'best')}"
        )
    if options.adds_dense and (reason := comparison.validated_for) is not None:
        raise ValueError(
            f"{reason} chooses among merges of the seeds' factors, and what {name_option('model.adapter', adapter)} "
            "adds to the "
            "weights is not their factors; name a method with its options, and others in "
            f"{name_option('ensemble.compare')}"
        )
    if options.is_full_finetuning:
        for rule in filter(None, (ensemble.rule, *comparison.compare.values())):
            check_dense(rule)
    if not (options.starts_at_weights or options.is_full_finetuning) or len(ensemble.replicas) == 1:
        return
    if ensemble.trains_controls and ensemble.options.controls == ALL_CONTROLS:
        raise ValueError(
            f"{name_option('ensemble.controls', ALL_CONTROLS)} trains an adapter of another rank, for which {adapter} "
            "would "
            "start at other factors, over another base; use untrained"
        )
    if ensemble.options.vary == "init" and not options.lora_dropout and len(ensemble.options.seeds) > 1:
        raise ValueError(
            f"{name_option('ensemble.vary', 'init')}: with {name_option('model.adapter', adapter)} all seeds start at "
            "the same "
            f"weights, and without dropout they end at the same; use {name_option('ensemble.vary', 'order')}, or both"
        )


def _check_sweep(ensemble: Ensemble, options: ModelOptions) -> None:
    """Raise ValueError if a replica cannot have the options that are swept for it, or they would do nothing."""
    swept = ensemble.options.sweep or {}
    if "warmup_ratio" in swept and options.warmup_steps is not None:
        raise ValueError(
            f"{name_option('ensemble.sweep')} warmup_ratio does nothing with "
            f"{name_option('model.warmup_steps', options.warmup_steps)}, which overrides it; leave out one of them"
        )
    if options.starts_at_weights and (ranks := [option for option in ("r", "lora_alpha") if option in swept]):
        raise ValueError(
            f"{name_option('ensemble.sweep')} {ranks[0]}: with {name_option('model.adapter', options.adapter)} all "
            "replicas start at the same factors of the weights, which are of one r and one lora_alpha; sweep another "
            "option, or train lora"
        )
    for replica in ensemble.replicas:
        try:
            options.of_replica(replica.options)
        except ValueError as error:
            raise ValueError(f"{name_option('ensemble.sweep')}, for {replica.name}: {error}") from None

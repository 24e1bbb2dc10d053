"""Write the adapters of a fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial

import lightning.pytorch as pl

from seedlora.adapters.adapter import BASE_NAME, PROMPT_NAME
from seedlora.adapters.model_card import CARD_NAME, base_record, seed_card
from seedlora.callbacks.exponential_mean import ExponentialMeans
from seedlora.datamodules.style_templates import chat_template
from seedlora.model.tokenizer_files import tokenizer_files
from seedlora.names import LONG_SEED_BEST, ema_name
from seedlora.records.training import CONTROL, TrainedRow, unfinished_text
from seedlora.run.budget import steps_per_epoch
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.run.stack_data import CountsTokens, HasPrompt
from seedlora.run.trainer_options import ended_by
from seedlora.training.model_options import ModelOptions
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import DivergedError, Replica
from seedlora.training.stack_operations import holding
from seedlora.training.writing import write_replica
from seedlora.utils.options import name_option
from seedlora.utils.say import say


class AdapterWriter(pl.Callback):
    """Write each replica's PEFT folder, or its whole model's, when the fit ends, of all that count.

    Args:
        ensemble: the run.
        state: of the fit.
        means: the exponential means of the replicas' weights.
    """

    def __init__(self, ensemble: Ensemble, state: FitState, means: ExponentialMeans) -> None:
        self._ensemble, self._state, self._means = ensemble, state, means

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write the adapters of this stack.

        Raises:
            DivergedError: if no seed is left.
        """
        if trainer.fast_dev_run:
            return
        ensemble, folder, writes = self._ensemble, self._ensemble.folder, trainer.is_global_zero
        files = self._files(trainer.datamodule, module) if writes else {}
        module.check_weights()
        if not ensemble.trained and set(ensemble.pending) <= set(module.replicas.left_out):
            dropped = " that was not dropped" if self._state.dropped else ""
            raise DivergedError(
                f"the training loss of every seed{dropped} is not finite; lower {name_option('model.learning_rate')}"
            )
        trained = self._trained_on(trainer, module)
        # Before the folders, and who is left out after them: until then the stack is not finished.
        if writes:
            folder.add_trained(trained)
            _say_unfinished(trained)
        for replica in (replica for replica in module.replicas if not replica.helps):
            name, options = replica.name, module.options.of_replica(replica.options)
            if name not in module.replicas.left_out:
                files[CARD_NAME] = self._card(options, trained[name])
                write = partial(
                    write_replica, name=name, stack=module.stack, options=options, files=files, writer=writes
                )
                # Before the replica, which is finished when its own folder is there.
                with self._means.in_place(module, name) as has_mean:
                    if has_mean:
                        write(ensemble.dirpath / ema_name(name))
                if ensemble.writes_best_beside(self._state.control) and name in self._state.best:
                    with holding(module.stack.parameters(name), self._state.best[name].weights):
                        write(ensemble.dirpath / LONG_SEED_BEST)
                write(ensemble.dirpath / name)
        helpers = {replica.name for replica in module.replicas if replica.helps}
        left_out = {name: why for name, why in module.replicas.left_out.items() if name not in helpers}
        if writes and left_out:
            folder.leave_out(left_out)

    def _files(self, data: object, module: SeedLoRAModule) -> dict[str, str | bytes]:
        """Return the files that go with each adapter, by name.

        With the tokenizer, its template renders the prompts of the training, so that a server's chat asks in them.
        """
        options, template = module.options, None
        files: dict[str, str | bytes] = {}
        # Rows that a data module words itself have no record.
        if isinstance(data, HasPrompt) and (prompt := data.prompt_record()):
            files[PROMPT_NAME] = json.dumps(prompt, indent=2) + "\n"
            template = chat_template(prompt, module.tokenizer)
        if base := base_record(options.adapter, options.quantization):
            files[BASE_NAME] = json.dumps(base) + "\n"
        files |= tokenizer_files(module.tokenizer, chat_template=template)
        if self._state.control is not None:
            files[CONTROL.name] = CONTROL.text(self._ensemble.folder.control_record)
        return files

    def _card(self, options: ModelOptions, trained: TrainedRow) -> str:
        """Return the model card of an adapter with these options."""
        return seed_card(
            base_model=options.base_path,
            adapter=options.display_text,
            note=options.base_note,
            whole=options.is_full_finetuning,
            unfinished=unfinished_text(trained),
        )

    def _trained_on(self, trainer: pl.Trainer, module: SeedLoRAModule) -> dict[str, TrainedRow]:
        """Return how long each adapter was trained, also one that was dropped; one that diverged has no row."""
        diverged = module.replicas.left_out.keys() - self._state.dropped.keys()
        counted = (replica for replica in module.replicas if not replica.helps and replica.name not in diverged)
        return {replica.name: self._trained_row(trainer, module, replica) for replica in counted}

    def _trained_row(self, trainer: pl.Trainer, module: SeedLoRAModule, replica: Replica) -> TrainedRow:
        """Return how long a replica was trained, on how many tokens if that is known, and which step is kept."""
        best, drop = self._state.best.get(replica.name), self._state.dropped.get(replica.name)
        stopped = None if best is None else best.stopped
        ended = [step for step in (stopped, None if drop is None else drop.step) if step is not None]
        steps = min(ended, default=trainer.global_step)
        kept_step = best.step if best is not None and self._ensemble.options.keeps_best and drop is None else None
        row: TrainedRow = {
            "steps": steps,
            "stopped": stopped is not None,
            "kept_step": kept_step,
            "planned": module.fit_settings.total_steps or steps,
        }
        if drop is not None:
            row["dropped"] = drop.step
        if steps < row["planned"] and not ended:
            row["ended_by"] = ended_by(trainer)
        loader = trainer.datamodule.train_dataloader()
        if isinstance(loader.sampler, CountsTokens):
            per_epoch = steps_per_epoch(trainer, loader)
            # Those of its helpers were its own.
            seeds = [other.order_seed for other in module.replicas if other == replica or other.helps]
            seen = [loader.sampler.seen(seed, steps, steps_per_epoch=per_epoch) for seed in seeds]
            row["tokens"], row["scored"] = map(sum, zip(*seen, strict=True))
        if drop is not None:
            row["validation_loss"] = drop.loss
        elif best is not None and kept_step is not None:
            row["validation_loss"] = best.loss
        elif (loss := trainer.callback_metrics.get(f"val/loss_{replica.name}")) is not None:
            row["validation_loss"] = float(loss)
        return row


def _say_unfinished(trained: Mapping[str, TrainedRow]) -> None:
    """Say what was trained for less than it was to be; seeds of one stack end together."""
    names: dict[str, list[str]] = {}
    for name, row in trained.items():
        if (text := unfinished_text(row)) is not None:
            names.setdefault(text, []).append(name)
    for text, those in names.items():
        say(f"Not trained to the end: {', '.join(those)}: {text}. What is merged and scored is of these steps.")

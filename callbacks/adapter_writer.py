"""Write the adapters of a fit."""

from __future__ import annotations

import json
from collections.abc import Mapping

import lightning.pytorch as pl

from seedlora.adapters.adapter import BASE_NAME, PROMPT_NAME
from seedlora.adapters.model_card import CARD_NAME, base_record, seed_card
from seedlora.datamodules.style_templates import chat_template
from seedlora.model.tokenizer_files import tokenizer_files
from seedlora.names import seed_name
from seedlora.records.training import CONTROL, TrainedRow, unfinished_text
from seedlora.run.budget import steps_per_epoch
from seedlora.run.ensemble import Ensemble
from seedlora.run.fit_state import FitState
from seedlora.run.stack_data import CountsTokens, HasPrompt
from seedlora.run.trainer_options import ended_by
from seedlora.training.module import SeedLoRAModule
from seedlora.training.replicas import DivergedError
from seedlora.training.writing import write_replica
from seedlora.utils.say import say


class AdapterWriter(pl.Callback):
    """Write each replica's PEFT folder, or its whole model's, when the fit ends; who diverged is left out.

    Args:
        ensemble: the run.
        state: of the fit.
    """

    def __init__(self, ensemble: Ensemble, state: FitState) -> None:
        self._ensemble, self._state = ensemble, state

    def on_train_end(self, trainer: pl.Trainer, module: SeedLoRAModule) -> None:
        """Write the adapters of this stack.

        Raises:
            DivergedError: if no seed is left.
        """
        if trainer.fast_dev_run:
            return
        ensemble, folder, writes = self._ensemble, self._ensemble.folder, trainer.is_global_zero
        files = self._files(trainer.datamodule, module)
        module.check_weights()
        if not ensemble.trained and set(map(seed_name, ensemble.pending)) <= set(module.replicas.diverged):
            raise DivergedError("the training loss of every seed is not finite; lower model.learning_rate")
        trained = self._trained_on(trainer, module)
        # Before the folders, and who is left out after them: until then the stack is not finished.
        if writes:
            folder.add_trained(trained)
            _say_unfinished(trained)
        for name in (replica.name for replica in module.replicas):
            if name not in module.replicas.diverged:
                write_replica(
                    ensemble.dirpath / name,
                    name,
                    module.stack,
                    module.options,
                    rank_factor=module.fit_settings.rank_factor,
                    files={**files, CARD_NAME: self._card(module, trained[name])},
                    writer=writes,
                )
        if writes and module.replicas.diverged:
            folder.leave_out(module.replicas.diverged)

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

    def _card(self, module: SeedLoRAModule, trained: TrainedRow) -> str:
        """Return the model card of one adapter."""
        options = module.options
        return seed_card(
            base_model=options.base_path,
            adapter=options.display_text,
            note=options.base_note,
            whole=options.is_full_finetuning,
            unfinished=unfinished_text(trained),
        )

    def _trained_on(self, trainer: pl.Trainer, module: SeedLoRAModule) -> dict[str, TrainedRow]:
        """Return how long each adapter was trained, on how many tokens if that is known, and which step is kept."""
        loader = trainer.datamodule.train_dataloader()
        found = {}
        for replica in module.replicas:
            if replica.name in module.replicas.diverged:
                continue
            best = self._state.best.get(replica.name)
            stopped = None if best is None else best.stopped
            steps = trainer.global_step if stopped is None else stopped
            kept_step = best.step if best is not None and self._ensemble.options.keep == "best" else None
            planned = module.fit_settings.total_steps or steps
            row: TrainedRow = {
                "steps": steps,
                "stopped": stopped is not None,
                "kept_step": kept_step,
                "planned": planned,
            }
            if steps < planned and stopped is None:
                row["ended_by"] = ended_by(trainer)
            if isinstance(loader.sampler, CountsTokens):
                per_epoch = steps_per_epoch(trainer, loader)
                row["tokens"], row["scored"] = loader.sampler.seen(replica.order_seed, steps, steps_per_epoch=per_epoch)
            found[replica.name] = row
        return found


def _say_unfinished(trained: Mapping[str, TrainedRow]) -> None:
    """Say what was trained for less than it was to be; seeds of one stack end together."""
    names: dict[str, list[str]] = {}
    for name, row in trained.items():
        if (text := unfinished_text(row)) is not None:
            names.setdefault(text, []).append(name)
    for text, those in names.items():
        say(f"Not trained to the end: {', '.join(those)}: {text}. What is merged and scored is of these steps.")

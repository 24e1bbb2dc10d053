"""``run.json``: what decides a replica's training."""

from __future__ import annotations

from typing import TypedDict

from seedlora.names import SETTINGS_NAME
from seedlora.records.json_file import JSONFile

#: The settings that a run was started with, under the names that they have on the command line where they have one. The
#: seeds and the merge method are none of them: they may change when a run goes on. Beside these keys there is one for
#: every option of the module (``model.r``) and of the data module (``data.task``).
RunSettings = TypedDict(
    "RunSettings",
    {
        "data": str,
        "ensemble.average_every": int | None,
        "ensemble.average_growth": float | None,
        "ensemble.ema": float | None,
        "ensemble.ema_part": float | None,
        "ensemble.halving": list[float] | None,
        "ensemble.halved_rows": str,
        "ensemble.keep": str,
        "ensemble.outer_learning_rate": float | None,
        "ensemble.patience": int | None,
        "ensemble.scheme": str,
        "ensemble.trunk": float | None,
        "ensemble.vary": str,
        "epochs per seed": int | None,
        "first seed": int | None,
        "model.adapter": str,
        "model.base_model": str,
        "model.quantization": str,
        "processes": int,
        "replicas of the scheme": list[str] | None,
        "sha256 of the train rows": str,
        "sha256 of the val rows": str,
        "steps per seed": int | None,
        "trainer.accumulate_grad_batches": int,
        "trainer.gradient_clip_algorithm": str | None,
        "trainer.gradient_clip_val": float | None,
        "trainer.limit_train_batches": float | None,
    },
    total=False,
)
#: What each key says, for ``docs/run_folder.md``.
KEY_MEANINGS: dict[str, str] = {
    "data": "name of the data module's class.",
    "ensemble.average_every": "steps between two averages of the replicas, with scheme `local`; null is 20, or none.",
    "ensemble.average_growth": "alpha of the rule by which these steps grow; null keeps them equal.",
    "ensemble.ema": "decay of the exponential mean of each replica's weights; null takes none.",
    "ensemble.ema_part": "part of the steps that such a mean reaches back; null leaves it to `ensemble.ema`.",
    "ensemble.halving": "parts of the steps after which half of the replicas is dropped; null drops none.",
    "ensemble.halved_rows": "what becomes of the rows of dropped replicas: `saved`, or `shared` by those that go on.",
    "ensemble.keep": "which weights of a seed are kept: of the `last` step, of its `best` validation, or of the fused "
    "adapter's (`best_fused`).",
    "ensemble.outer_learning_rate": "learning rate of the outer step, with scheme `local`; null takes the mean itself.",
    "ensemble.patience": "validations without a better loss after which a seed is stopped; null never stops one.",
    "ensemble.scheme": "how the replicas share the budget: `independent`, `branch` or `local`.",
    "ensemble.trunk": "part of the steps in which all replicas are one, with scheme `branch`; null is half, or none.",
    "ensemble.vary": "what a seed decides: `both`, `init` or `order`.",
    "epochs per seed": "largest number of epochs that each seed trains; null is no limit.",
    "first seed": "the seed whose data order or start all share; null where `ensemble.vary` is `both`.",
    "model.adapter": "kind of adapter; the other options of the module stand beside it as `model.NAME`.",
    "model.base_model": "folder or hub id of the base model.",
    "model.quantization": "how the frozen base model is quantised, or `none`.",
    "processes": "number of processes that train.",
    "replicas of the scheme": "names of all replicas, where each depends on the others; null elsewhere.",
    "sha256 of the train rows": "checksum of the tokens of all training rows in their order.",
    "sha256 of the val rows": "checksum of the tokens of all validation rows in their order.",
    "steps per seed": "largest number of optimizer steps that each seed trains; null is no limit.",
    "trainer.accumulate_grad_batches": "number of batches in an optimizer step.",
    "trainer.gradient_clip_algorithm": "how gradients are clipped; null is by their norm.",
    "trainer.gradient_clip_val": "where gradients are clipped; null is nowhere.",
    "trainer.limit_train_batches": "batches of an epoch that are taken, as a number or as a share.",
}

SETTINGS = JSONFile(SETTINGS_NAME, RunSettings, sort_keys=True, hides_home=True)

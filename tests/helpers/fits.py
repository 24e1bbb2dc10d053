"""One small run of the main job, on whatever device: as tests/devices compares it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.merge.layers import Fused, merge_stacks
from seedlora.merge.registry import make_rule
from seedlora.updates.factors import LoRAFactors
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import assert_trained_alike

#: Of a module that is not told another one.
RATE = 2e-3


def fit(
    base_model: str,
    dirpath: Path,
    seeds: Sequence[int] = (1, 2),
    *,
    on: Mapping[str, Any],
    ensemble: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    test: bool = True,
    **options: object,
) -> SeedEnsembleCallback:
    """Train seeds, pass by pass, merge them, and test.

    Args:
        base_model: its folder.
        dirpath: of the run.
        seeds: of the replicas.
        on: the Trainer's options that say which device, by name: what makes each, because a Trainer wants its own.
        ensemble: further options of the callback.
        data: of the data module.
        trainer: of the Trainer.
        test: whether to test.
        options: of the module.
    """
    callback = SeedEnsembleCallback(seeds, **{"budget": "full", "dirpath": dirpath, **(ensemble or {})})
    module, rows = make_module(base_model, **options), make_data(**(data or {}))
    extra = dict(trainer or {})
    callbacks = [callback, *extra.pop("callbacks", ())]
    while callback.pending:
        run = pl.Trainer(
            **{
                "max_epochs": 1,
                "gradient_clip_val": 1.0,
                "logger": False,
                "log_every_n_steps": 1,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                **{name: make() for name, make in on.items()},
                **extra,
                "callbacks": callbacks,
            }
        )
        run.fit(module, datamodule=rows, ckpt_path=callback.ckpt_path, weights_only=True)
    if test:
        run.test(module, datamodule=rows, verbose=False)
    return callback


def weights(run: SeedEnsembleCallback, name: str) -> dict[str, Tensor]:
    """Read the tensors of one adapter of a run, or of one whole model, from its folder."""
    (file,) = (run.dirpath / name).glob("*.safetensors")
    return load_file(file)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, atol: float) -> None:
    """The same keys, and values that differ by at most ``atol``."""
    assert found.keys() == wanted.keys()
    worst = {key: float((found[key].double() - wanted[key].double()).abs().max()) for key in wanted}
    assert max(worst.values()) <= atol, max(worst, key=worst.__getitem__)


def assert_alike(found: Path, wanted: Path, seed: int, *, noise: float = 1e-5) -> None:
    """See that two runs trained a seed alike, in float32 or less; their folders say in how many steps."""
    steps = json.loads((wanted / "trained.json").read_text())[f"seed_{seed}"]["steps"]
    files = (run / f"seed_{seed}" / "adapter_model.safetensors" for run in (found, wanted))
    assert_trained_alike(*map(load_file, files), steps=steps, rate=RATE, noise=noise)


def fused_on(device: torch.device | str, method: str) -> Fused:
    """What a method makes of two layers of three random adapters there."""
    generator = torch.Generator().manual_seed(0)
    stacks = {
        path: LoRAFactors(*(torch.randn(3, *shape, generator=generator) for shape in ((4, 40), (24, 4)))).to(device)
        for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    }
    options = {"score": lambda layers: float(next(iter(layers.values())).B.sum())} if method == "greedy_soup" else {}
    return merge_stacks(stacks, make_rule(method, options))

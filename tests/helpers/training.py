"""Runs of a Trainer, stacked or alone, and the plain PEFT loop that they are compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import BitsAndBytesConfig

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.training.model_options import PROJECTIONS
from seedlora.training.schedule import learning_rate_factor
from seedlora.updates.factors import LoRAFactors
from tests.helpers.interventions import StopAfter
from tests.helpers.models import make_data, make_module
from tests.helpers.precision import plain_model

OPTIONS = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
#: A Trainer that writes and shows nothing of its own.
SILENT = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
#: Gives the base model, and the PEFT configuration of the adapter on it.
Adapt = Callable[[str], tuple[Any, LoraConfig]]


def make_trainer(callback: pl.Callback, **options: object) -> pl.Trainer:
    """Return a Trainer of a user's own, for three epochs."""
    return pl.Trainer(callbacks=[callback], accelerator="cpu", **{"max_epochs": 3, **SILENT, **options})


def trained_updates(
    base_model: str,
    dirpath: Path,
    seeds: Sequence[int],
    *,
    dropout: float = 0.0,
    stack_size: int | None = None,
    epochs: int = 1,
    module_options: Mapping[str, object] | None = None,
    data_options: Mapping[str, object] | None = None,
    **trainer_options: object,
) -> dict[int, dict[str, LoRAFactors]]:
    """Train to the end, in as many fits as there are stacks; return the updates per seed."""
    callback = SeedEnsembleCallback(seeds, dirpath=dirpath, budget="full", stack_size=stack_size)
    module = make_module(base_model, lora_dropout=dropout, **(module_options or {}))
    data = make_data(**(data_options or {}))
    options = {"max_epochs": epochs, "num_sanity_val_steps": 0, **OPTIONS, **trainer_options}
    while callback.pending:
        make_trainer(callback, **options).fit(module, datamodule=data)
    return {seed: read_adapter(callback.adapter_path(seed)).layers for seed in seeds}


def largest_difference(found: Mapping[str, LoRAFactors], wanted: Mapping[str, LoRAFactors]) -> float:
    """Return the largest relative difference of any factor."""
    return max(
        ((getattr(found[path], f) - getattr(wanted[path], f)).norm() / getattr(wanted[path], f).norm()).item()
        for path in wanted
        for f in ("A", "B")
    )


def train(
    base_model: str,
    dirpath: Path,
    seeds: Sequence[int],
    *,
    stack_size: int | None = None,
    max_steps: int = -1,
    stop: int | None = None,
    resume: bool = False,
    **options: object,
) -> SeedEnsembleCallback:
    """Train to the end without merging, in as many fits as there are stacks, or end after the step ``stop``."""
    callback = SeedEnsembleCallback(
        seeds,
        dirpath=dirpath,
        merge="none",
        budget="full",
        stack_size=stack_size,
        checkpoint_every_n_steps=1,
        resume=resume,
    )
    module, data = make_module(base_model, **options), make_data()
    while callback.pending:
        trainer = make_trainer(callback, max_epochs=1, max_steps=max_steps, limit_val_batches=0, **OPTIONS)
        trainer.callbacks += [] if stop is None else [StopAfter(stop)]
        trainer.fit(module, datamodule=data, ckpt_path=callback.ckpt_path, weights_only=True)
    return callback


def saved(folder: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


def plain_lora(base_model: str) -> tuple[Any, LoraConfig]:
    """Return the base model and PEFT's configuration of LoRA on it."""
    return plain_model(base_model), LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS))


def quantized_lora(adapter: str, quantization: str) -> Adapt:
    """Return what gives the base model as transformers quantises it, and PEFT's configuration of the adapter."""

    def adapt(base_model: str) -> tuple[Any, LoraConfig]:
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
        quantised = {
            "none": lambda: None,
            "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, **double),
            "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
        }[quantization]()
        model = plain_model(base_model, quantization_config=quantised, device_map={"": "cpu"})
        flags = {"use_rslora": adapter == "rslora", "use_dora": adapter == "dora"}
        return model, LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS), **flags)

    return adapt


def plain_peft_run(
    base_model: str,
    seed: int,
    *,
    epochs: int,
    accumulate: int,
    clip: float,
    ratio: float = 1.0,
    adapt: Adapt = plain_lora,
    rows_of: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Train one seed in plain PyTorch and PEFT, each row alone in its forward; of ours is the order of the rows.

    With ``rows_of`` each step has the rows of all these seeds.
    """
    data = make_data()
    data.tokenizer = make_module(base_model).tokenizer
    data.setup("fit")
    data.seeds = tuple(rows_of) or (seed,)
    model, config = adapt(base_model)
    torch.manual_seed(seed)
    model = get_peft_model(model, config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [{"params": [p for name, p in named if ("lora_B" in name) == of_b]} for of_b in (False, True)]
    optimizer = torch.optim.AdamW(groups, lr=2e-3, weight_decay=0.0)
    sampler = data.train_dataloader().sampler
    sampler.batch_size, sampler.steps = 2 * accumulate, sampler.steps // accumulate
    total = epochs * sampler.steps
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for step, micro in enumerate(sampler):
            done = epoch * sampler.steps + step
            scale = learning_rate_factor(done, "cosine", warmup=-(-6 * total // 100), total=total)
            optimizer.param_groups[0]["lr"] = 2e-3 * scale
            optimizer.param_groups[1]["lr"] = 2e-3 * scale * ratio
            losses, tokens = [], 0
            for row in itertools.chain(*micro.rows):
                ids, labels = data.rows["train"].padded([row])
                logits = model(input_ids=ids).logits[0, :-1]
                said = labels[0, 1:] != -100
                losses.append(cross_entropy(logits[said], ids[0, 1:][said], reduction="sum"))
                tokens += int(said.sum())
            (sum(losses) / tokens).backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
    return get_peft_model_state_dict(model)

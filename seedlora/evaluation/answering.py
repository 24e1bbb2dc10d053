"""Set up what answers an evaluation: adapter folders over a model in this process, or the models of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from seedlora.evaluation.candidates import (
    Prompts,
    make_candidates,
    name_adapters,
    shared_base_model,
    shared_quantization,
)
from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.evaluation.folder_generators import OneByOneGenerator, make_folder_generator
from seedlora.evaluation.generate import Generator
from seedlora.evaluation.samples import Candidate
from seedlora.model.loading import (
    check_base,
    fast_dtype,
    load_config,
    load_model,
    load_tokenizer,
    resolve_base_model,
)
from seedlora.model.quantization import quantize
from seedlora.model.weight_files import WeightFiles
from seedlora.names import BASE
from seedlora.records.evaluation import GeneratorSettings

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class EvaluationSetup:
    """Candidates, and what answers for them.

    Args:
        generator: answers for all candidates.
        candidates: in the order of the tables.
        settings: of the generation, guarded against a mixture.
    """

    generator: Generator
    candidates: Sequence[Candidate]
    settings: GeneratorSettings


@dataclass(frozen=True)
class Participants:
    """The adapters and the base model that are scored, by the options of ``evaluate``.

    Args:
        adapters: ``NAME=DIR``, folders, hub ids, or names that a server knows.
        base_model: folder or hub id. Default: the one that the adapters name.
        with_base: score the base model too; it is scored alone if there are no adapters.
        prompt_style: for adapters that do not say how they were trained.
    """

    adapters: Sequence[str]
    base_model: str | None = None
    with_base: bool = False
    prompt_style: str | None = None


def from_endpoint(
    participants: Participants, prompts: Prompts, *, url: str, concurrency: int, timeout: float
) -> EvaluationSetup:
    """Set up an evaluation of adapters that a server has.

    Args:
        participants: who is scored.
        prompts: renders the prompts.
        url: of the server.
        concurrency: requests at once.
        timeout: seconds for one request.

    Raises:
        ValueError: for a request that cannot be carried out; ``AdapterError`` for folders that cannot be read.
        OSError: if the server does not answer.
    """
    adapters = name_adapters(participants.adapters, served=True)
    models = {adapter.name: adapter.name for adapter in adapters}
    with_base = participants.with_base or not adapters
    if with_base:
        models[BASE] = shared_base_model(adapters, participants.base_model)
    candidates = make_candidates(
        adapters,
        with_base=with_base,
        style=participants.prompt_style,
        prompts=prompts,
        tokenizer=lambda: load_tokenizer(shared_base_model(adapters, participants.base_model)),
    )
    generator = EndpointGenerator(url, models=models, concurrency=concurrency, timeout=timeout)
    return EvaluationSetup(generator, candidates, {"generator": "endpoint", "models": models})


def from_folders(
    participants: Participants, prompts: Prompts, console: Console, *, dtype: str, batch_size: int
) -> EvaluationSetup:
    """Set up an evaluation of adapter folders over one base model in this process.

    Args:
        participants: who is scored.
        prompts: renders the prompts.
        console: for people.
        dtype: of the base model, one of :data:`DTYPES`.
        batch_size: prompts of one adapter in one forward.

    Raises:
        ValueError: for a request that cannot be carried out; ``AdapterError`` for folders that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    adapters = name_adapters(participants.adapters, served=False)
    base_model = shared_base_model(adapters, participants.base_model)
    model_dtype, quantization = DTYPES[dtype] or fast_dtype(), shared_quantization(adapters)
    with console.status("Loading the base model and the adapters ..."):
        check_base(base_model, load_config(base_model))
        tokenizer, folder = load_tokenizer(base_model), resolve_base_model(base_model)
        candidates = make_candidates(
            adapters,
            with_base=participants.with_base or not adapters,
            style=participants.prompt_style,
            prompts=prompts,
            tokenizer=lambda: tokenizer,
            model=Path(folder),
        )
        model = load_model(base_model, dtype=model_dtype)
        if quantization != "none":
            quantize(model, quantization)
        if torch.cuda.is_available():
            model.to("cuda")
        generator = make_folder_generator(
            model,
            tokenizer,
            {adapter.name: adapter.folder for adapter in adapters if adapter.folder},
            base=WeightFiles(folder, cached=True),
            batch_size=batch_size,
        )
    if quantization != "none":
        console.print(f"base model in {quantization}, on which these adapters were trained and alone are right")
    if isinstance(generator, OneByOneGenerator):
        console.print(f"one adapter after the other, since they cannot be stacked: {generator.reason}", soft_wrap=True)
    settings: GeneratorSettings = {
        "generator": "transformers",
        "base_model": folder,
        "dtype": str(model_dtype).removeprefix("torch."),
        "quantization": quantization,
    }
    return EvaluationSetup(generator, candidates, settings)

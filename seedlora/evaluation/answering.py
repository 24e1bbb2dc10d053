"""Who answers: adapters in folders over a model in this process, or models of a server, with the prompts of each."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Unpack

import torch
from rich.console import Console

from seedlora.adapters.adapter import CONFIG_NAME, PROMPT_NAME, Adapter, AdapterError, adapter_sha256, locate
from seedlora.adapters.reading import quantization_of, read_adapter
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.evaluation.endpoint import EndpointGenerator
from seedlora.evaluation.generate import Generator, OnDone, Prompt, StackGenerator
from seedlora.evaluation.samples import Candidate
from seedlora.model.loading import fast_dtype, load_model, load_tokenizer, resolve
from seedlora.model.quantization import check_quantization, quantize
from seedlora.model.weight_files import WeightFiles
from seedlora.names import BASE
from seedlora.records.evaluation import GeneratorSettings, WeightSettings
from seedlora.updates.factors import LoRAFactors

if TYPE_CHECKING:
    from seedlora.adapters.stack import AdapterStack

DEFAULT_STYLE = "alpaca"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Prompts(Protocol):
    """How requests become prompts; ``seedlora.datamodules.prompts`` is one, handed over by whoever starts it."""

    def render(self, style: str | Mapping[str, Any], turns: str) -> str:
        """The text after which the model answers."""

    def prompt_record(self, style: str, tokenizer: Any) -> dict[str, Any]:
        """A style with all it takes from the tokenizer, as plain data."""


@dataclass(frozen=True)
class Scored:
    """Candidates, and what answers for them.

    Args:
        generator: answers for all candidates.
        candidates: in the order of the tables.
        settings: of the generation, guarded against a mixture.
    """

    generator: Generator
    candidates: Sequence[Candidate]
    settings: GeneratorSettings


def candidate(
    name: str, record: str | Mapping[str, Any], prompts: Prompts, **settings: Unpack[WeightSettings]
) -> Candidate:
    """Someone who answers prompts of a style.

    Args:
        name: how results call it.
        record: a style's record, or its name.
        prompts: renders it.
        settings: what else identifies it.
    """
    special = True if isinstance(record, str) else bool(record.get("add_special_tokens", True))
    return Candidate(
        name,
        lambda request, prefix: Prompt(prompts.render(record, request) + prefix, special),
        {"prompt": record if isinstance(record, str) else dict(record), **settings},
    )


@dataclass(frozen=True)
class _Named:
    """An adapter as the command line names it; without a folder if only a server has it."""

    name: str
    folder: Path | None

    @property
    def prompt(self) -> dict[str, Any] | None:
        """What it was trained with, if its folder says."""
        return self._record(PROMPT_NAME)

    @property
    def quantization(self) -> str:
        """What its base model has to be quantised to."""
        return "none" if self.folder is None else quantization_of(self.folder)

    def _record(self, name: str) -> dict[str, Any] | None:
        if self.folder is None or not (file := self.folder / name).is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{file} holds a {type(record).__name__}, not a record of the training")
        return record


def _named(words: Sequence[str], *, served: bool) -> list[_Named]:
    found: dict[str, _Named] = {}
    for word in words:
        name, equals, source = word.partition("=") if not Path(word).exists() else ("", "", word)
        source = source if equals else word
        if served and not equals and not Path(source).exists():
            adapter = _Named(word, None)
        else:
            folder = locate(source)
            adapter = _Named(name if equals else folder.resolve().name, folder)
        if adapter.name in found or adapter.name == BASE:
            why = "is the base model's own name" if adapter.name == BASE else "is given twice"
            raise ValueError(f"adapter name '{adapter.name}' {why}; name adapters by --adapter NAME=DIR")
        found[adapter.name] = adapter
    return list(found.values())


def _base_model(adapters: Sequence[_Named], given: str | None) -> str:
    if given is not None:
        return given
    names = {}
    for adapter in adapters:
        if adapter.folder is not None:
            file = adapter.folder / CONFIG_NAME
            if not file.is_file():
                raise AdapterError(f"{adapter.folder} is no PEFT adapter folder: it has no {CONFIG_NAME}")
            names[json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""] = adapter.name
    if len(names) != 1:
        told = "; ".join(f"{name}: {base or 'none'}" for base, name in names.items())
        raise ValueError(f"the adapters do not name one base model ({told or 'none'}); give --base-model")
    return next(iter(names))


def _quantization(adapters: Sequence[_Named]) -> str:
    """What the one base model of all adapters has to be quantised to."""
    by_kind: dict[str, list[str]] = {}
    for adapter in adapters:
        by_kind.setdefault(adapter.quantization, []).append(adapter.name)
    if len(by_kind) > 1:
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in by_kind.items())
        raise ValueError(f"the adapters belong on base models of different quantization ({told}); score them apart")
    kind = next(iter(by_kind), "none")
    check_quantization(kind)
    return kind


def _candidates(
    adapters: Sequence[_Named],
    base: bool,
    style: str | None,
    prompts: Prompts,
    tokenizer: Callable[[], Any],
    model: Path | None = None,
) -> list[Candidate]:
    """Everyone with the prompts of their training, or else of ``style``; ``model`` is the base model's folder."""
    fallback: str | dict[str, Any] = style or DEFAULT_STYLE
    if fallback == "chat":
        fallback = prompts.prompt_record(fallback, tokenizer())
    prompts.render(fallback, "")
    records = {adapter.name: adapter.prompt for adapter in adapters}
    # The base model is asked as the adapters are, if they agree.
    agreed = {json.dumps(record, sort_keys=True) for record in records.values()}
    shared = next(iter(records.values())) if len(agreed) == 1 else None
    asked = [candidate(BASE, shared or _Named(BASE, model).prompt or fallback, prompts)] if base else []
    return asked + [
        candidate(
            a.name,
            records[a.name] or fallback,
            prompts,
            weights_sha256=None if a.folder is None else adapter_sha256(a.folder),
        )
        for a in adapters
    ]


def from_endpoint(arguments: Mapping[str, Any], prompts: Prompts) -> Scored:
    """Return the adapters that a server has, by the options of ``evaluate``; raises as :func:`locate`."""
    adapters = _named(arguments["adapter"], served=True)
    models = {adapter.name: adapter.name for adapter in adapters}
    base = arguments["with_base"] or not adapters
    if base:
        models[BASE] = _base_model(adapters, arguments["base_model"])
    candidates = _candidates(
        adapters,
        base,
        arguments["prompt_style"],
        prompts,
        lambda: load_tokenizer(_base_model(adapters, arguments["base_model"])),
    )
    generator = EndpointGenerator(
        arguments["endpoint"], models=models, concurrency=arguments["concurrency"], timeout=arguments["timeout"]
    )
    return Scored(generator, candidates, {"generator": "endpoint", "models": models})


def from_folders(arguments: Mapping[str, Any], prompts: Prompts, console: Console) -> Scored:
    """Adapter folders over one base model in this process, by the options of ``evaluate``.

    Raises:
        ValueError: for a request that cannot be carried out; ``AdapterError`` for folders that cannot be read.
    """
    if arguments["batch_size"] < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments['batch_size']}")
    adapters = _named(arguments["adapter"], served=False)
    base_model = _base_model(adapters, arguments["base_model"])
    dtype, quantization = DTYPES[arguments["dtype"]] or fast_dtype(), _quantization(adapters)
    with console.status("Loading the base model and the adapters ..."):
        tokenizer = load_tokenizer(base_model)
        base = arguments["with_base"] or not adapters
        style, folder = arguments["prompt_style"], Path(resolve(base_model))
        candidates = _candidates(adapters, base, style, prompts, lambda: tokenizer, folder)
        model = load_model(base_model, dtype=dtype)
        if quantization != "none":
            quantize(model, quantization)
        if torch.cuda.is_available():
            model.to("cuda")
        generator = folder_generator(
            model,
            tokenizer,
            {a.name: a.folder for a in adapters if a.folder},
            base=WeightFiles(resolve(base_model), cached=True),
            batch_size=arguments["batch_size"],
        )
    if quantization != "none":
        console.print(f"base model in {quantization}, on which these adapters were trained and alone are right")
    if isinstance(generator, OneAfterTheOther):
        console.print(f"one adapter after the other, since they cannot be stacked: {generator.reason}", soft_wrap=True)
    settings: GeneratorSettings = {
        "generator": "transformers",
        "base_model": resolve(base_model),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization,
    }
    return Scored(generator, candidates, settings)


def folder_generator(
    model: Any, tokenizer: Any, folders: Mapping[str, Path], *, base: WeightFiles, batch_size: int = 16
) -> StackGenerator:
    """Generates with adapter folders over one loaded base model: stacked, or where that cannot be, one by one.

    Adapters that started at PiSSA or OLoRA are read relative to the original base, so that all share it.

    Args:
        model: the base, from transformers; the adapters' layers are put into it.
        tokenizer: of the model.
        folders: PEFT folders by name; the name ``base`` is the model itself.
        base: the folder of the model, read for PiSSA, OLoRA and DoRA.
        batch_size: prompts of one adapter in one forward.

    Raises:
        AdapterError: if a folder cannot be read or does not fit the model.
    """
    if not folders:
        return StackGenerator(model, tokenizer, route=lambda _: None, adapters={BASE: None}, batch_size=batch_size)
    read = {name: read_adapter(folder, base=base) for name, folder in folders.items()}
    for name, adapter in read.items():
        if more := _more_than_a_stack(adapter):
            reason = f"{name} has {', '.join(more)}"
            return OneAfterTheOther(model, tokenizer, folders, read, batch_size=batch_size, reason=reason)
    stack = stack_over(model, {name: adapter.layers for name, adapter in read.items()})
    adapters: dict[str, str | None] = {BASE: None, **{name: name for name in read}}
    return StackGenerator(
        model, tokenizer, route=stack.route, frozen=stack.frozen, adapters=adapters, batch_size=batch_size
    )


def _more_than_a_stack(adapter: Adapter) -> list[str]:
    """What of an adapter is more than factors of linear layers."""
    held = {
        "DoRA's magnitudes": adapter.magnitudes,
        "lora_bias": adapter.biases,
        "modules_to_save": adapter.modules,
        "factors of an embedding": adapter.embeddings,
    }
    return [what for what, there in held.items() if there]


def stack_over(model: Any, adapters: Mapping[str, Mapping[str, LoRAFactors]]) -> AdapterStack:
    """A stack of adapters, each with layers of its own, over a model that has none yet.

    Args:
        model: of transformers; PEFT's layers are put where an adapter has one.
        adapters: per name one adapter (``N = 1``) per layer path.

    Raises:
        AdapterError: if the model lacks a layer, or has one that cannot be stacked.
    """
    from peft import LoraConfig, get_peft_model

    from seedlora.adapters.stack import AdapterStack

    paths = sorted({path for layers in adapters.values() for path in layers})
    modules = dict(model.named_modules())
    if missing := [path for path in paths if path not in modules]:
        raise AdapterError(f"the base model has no layer {missing[0]}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # A placeholder of rank 1, never routed: it makes PEFT put its layers where ours go.
        wrapped = get_peft_model(model, LoraConfig(r=1, target_modules=paths), adapter_name="placeholder")
    try:
        stack = AdapterStack(wrapped)
    except ValueError as error:
        wrapped.unload()
        raise AdapterError(str(error)) from None
    for name, layers in adapters.items():
        stack.load(name, layers)
    return stack


class OneAfterTheOther(StackGenerator):
    """Generates with one adapter at a time through PEFT's own forward: for DoRA and what else is more than factors.

    Args:
        model: the base, from transformers.
        tokenizer: of the model.
        folders: PEFT folders by name.
        adapters: the same as read relative to the original base.
        batch_size: prompts in one forward.
        reason: why they are not stacked, for people.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        folders: Mapping[str, Path],
        adapters: Mapping[str, Adapter],
        *,
        batch_size: int,
        reason: str,
    ) -> None:
        from peft import PeftModel

        self.reason = reason
        wrapped: Any = None
        with tempfile.TemporaryDirectory() as scratch:
            for i, (name, folder) in enumerate(folders.items()):
                source = folder
                if {"PiSSA", "OLoRA"} & set(adapters[name].kinds):
                    # PEFT would take the start out of the weights that all adapters share.
                    _write_plain(source := Path(scratch, str(i)), adapters[name])
                try:
                    if wrapped is None:
                        wrapped = PeftModel.from_pretrained(model, str(source), adapter_name=name)
                    else:
                        wrapped.load_adapter(str(source), adapter_name=name)
                except Exception as error:
                    cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    raise AdapterError(f"{reason}, and PEFT cannot load {folder}: {cause}") from None

        def route(names: Sequence[str | None]) -> None:
            (name,) = names
            if name is None:
                wrapped.base_model.disable_adapter_layers()
            else:
                wrapped.base_model.enable_adapter_layers()
                wrapped.set_adapter(name)

        routes: dict[str, str | None] = {BASE: None, **{name: name for name in folders}}
        super().__init__(model, tokenizer, route=route, adapters=routes, batch_size=batch_size)

    def __call__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        on_done: OnDone,
    ) -> None:
        """See :class:`seedlora.evaluation.generate.Generator`."""
        for name, asked in prompts.items():
            super().__call__({name: asked}, max_new_tokens=max_new_tokens, stops=stops, on_done=on_done)


def _write_plain(folder: Path, adapter: Adapter) -> None:
    """An adapter as it was read, in a folder that PEFT loads without changing the base model."""
    rank = max(factors.rank for factors in adapter.layers.values())
    layers = {path: factors.padded(rank) for path, factors in adapter.layers.items()}
    config = universal_config(
        layers,
        base_model=adapter.base_model,
        fan_in_fan_out=adapter.fan_in_fan_out,
        lora_bias=bool(adapter.biases),
        modules_to_save=adapter.modules_to_save,
        task_type=adapter.task_type,
        auto_mapping=adapter.auto_mapping,
    )
    config.use_dora, config.target_modules = bool(adapter.magnitudes), set(layers)
    write_adapter(folder, layers, config, magnitudes=adapter.magnitudes, biases=adapter.biases, modules=adapter.modules)

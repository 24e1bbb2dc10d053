"""Generate with adapter folders over one base model in this process: stacked, or one after the other."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seedlora.adapters.adapter import Adapter, AdapterError
from seedlora.adapters.reading import read_adapter
from seedlora.adapters.writing import universal_config, write_adapter
from seedlora.evaluation.generate import OnDone, OnText, Prompt, StackGenerator
from seedlora.model.weight_files import WeightFiles
from seedlora.names import BASE
from seedlora.updates.factors import LoRAFactors

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from seedlora.adapters.stack import AdapterStack


def make_folder_generator(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, Path],
    *,
    base: WeightFiles,
    batch_size: int = 16,
) -> StackGenerator:
    """Make a generator of adapter folders over one loaded base model: stacked, or where that cannot be, one by one.

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
        if more := _parts_beyond_factors(adapter):
            reason = f"{name} has {', '.join(more)}"
            return OneByOneGenerator(model, tokenizer, folders, read, batch_size=batch_size, reason=reason)
    stack = stack_adapters_over(model, {name: adapter.layers for name, adapter in read.items()})
    adapters: dict[str, str | None] = {BASE: None, **{name: name for name in read}}
    return StackGenerator(
        model, tokenizer, route=stack.route, frozen=stack.frozen, adapters=adapters, batch_size=batch_size
    )


def _parts_beyond_factors(adapter: Adapter) -> list[str]:
    """Name what an adapter holds besides factors of linear layers, which cannot be stacked."""
    held = {
        "DoRA's magnitudes": adapter.magnitudes,
        "lora_bias": adapter.biases,
        "modules_to_save": adapter.modules,
        "factors of an embedding": adapter.embeddings,
    }
    return [what for what, tensors in held.items() if tensors]


def stack_adapters_over(model: PreTrainedModel, adapters: Mapping[str, Mapping[str, LoRAFactors]]) -> AdapterStack:
    """Put a stack of adapters, each with layers of its own, over a model that has none yet.

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


class OneByOneGenerator(StackGenerator):
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
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        folders: Mapping[str, Path],
        adapters: Mapping[str, Adapter],
        *,
        batch_size: int,
        reason: str,
    ) -> None:
        self.reason = reason
        wrapped = _load_with_peft(model, folders, adapters, reason)

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
        on_text: OnText | None = None,
        pick: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Answer the prompts of one adapter after the other, as :class:`StackGenerator` does those of all."""
        for name, asked in prompts.items():
            super().__call__(
                {name: asked}, max_new_tokens=max_new_tokens, stops=stops, on_done=on_done, on_text=on_text, pick=pick
            )


def _load_with_peft(
    model: PreTrainedModel, folders: Mapping[str, Path], adapters: Mapping[str, Adapter], reason: str
) -> PeftModel:
    """Load adapter folders onto a base model by PEFT; ``reason`` begins the error for one that PEFT cannot load."""
    from peft import PeftModel

    wrapped = None
    with tempfile.TemporaryDirectory() as scratch:
        for i, (name, folder) in enumerate(folders.items()):
            source = folder
            if {"PiSSA", "OLoRA"} & set(adapters[name].kinds) or adapters[name].renamed:
                # PEFT would take the start out of the weights that all share, and load nothing under other names.
                _write_plain(source := Path(scratch, str(i)), adapters[name])
            try:
                if wrapped is None:
                    wrapped = PeftModel.from_pretrained(model, str(source), adapter_name=name)
                else:
                    wrapped.load_adapter(str(source), adapter_name=name)
            except Exception as error:
                cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise AdapterError(f"{reason}, and PEFT cannot load {folder}: {cause}") from None
    return wrapped


def _write_plain(folder: Path, adapter: Adapter) -> None:
    """Write an adapter as it was read into a folder that PEFT loads without changing the base model."""
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
        use_dora=bool(adapter.magnitudes),
    )
    write_adapter(
        folder,
        layers,
        {**config, "target_modules": sorted(layers)},
        embeddings=adapter.embeddings,
        magnitudes=adapter.magnitudes,
        biases=adapter.biases,
        modules=adapter.modules,
    )

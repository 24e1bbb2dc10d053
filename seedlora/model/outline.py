"""Describe a model without its weights, from its configuration alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import torch

from seedlora.model.loading import check_causal, load_config, naming_base
from seedlora.utils.options import name_option

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: As ``target_modules``: every linear layer but the head.
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Outline:
    """A model without its weights: configuration, number of parameters, and its linear layers' shapes (D, K).

    The linear layers are those of the body, by path; the head is not among them. ``transposed`` says whether they store
    their weights as (K, D), as GPT-2 does (``Conv1D``). ``modules`` are those that hold parameters themselves, with
    their number; ``mixed`` are those of them that do not see the rows of a batch in order, the experts of a mixture for
    example; ``tied`` are the embedding and the head, if they are one matrix; ``head`` is the head; ``has_towers`` says
    that the model has linear layers outside of its language model, in a vision tower for example: those see no text,
    and are not among the linear layers; ``vocabulary`` is the number of rows of the embedding.
    """

    config: PretrainedConfig
    parameters: int
    linear: dict[str, tuple[int, int]]
    transposed: bool = False
    modules: dict[str, int] = field(default_factory=dict)
    mixed: frozenset[str] = frozenset()
    tied: tuple[str, ...] = ()
    head: str = ""
    has_towers: bool = False
    vocabulary: int = 0

    @property
    def text_config(self) -> PretrainedConfig:
        """Return the configuration of the language model, which may be a part of a larger one."""
        return self.config.get_text_config()

    def modules_trained_in_full(self, names: Sequence[str]) -> dict[str, int]:
        """Return the modules that ``modules_to_save`` trains in full, with the number of their parameters.

        Of a tied pair both are, and their one matrix counts once.

        Args:
            names: endings of their paths.

        Raises:
            ValueError: if one matches no module that holds weights itself, or one that cannot be stacked.
        """
        found: dict[str, int] = {}
        for name in names:
            matched = [path for path in self.modules if f".{path}".endswith(f".{name}")]
            if not matched:
                kinds = dict.fromkeys(path.rpartition(".")[2] for path in self.modules)
                raise ValueError(
                    f"{name_option('model.modules_to_save')} {name}: base model '{self.config.name_or_path}' has no "
                    f"such module that holds weights itself; it has {', '.join(kinds)}"
                )
            if set(matched) & set(self.tied):
                matched += self.tied
            found |= {path: self.modules[path] for path in matched}
        self.check_row_order(found, name_option("model.modules_to_save"))
        return found

    def check_row_order(self, paths: Iterable[str], option: str) -> None:
        """Raise ValueError if a module does not see the rows of a batch in order: a stack could not tell them apart."""
        if odd := [path for path in paths if path in self.mixed]:
            raise ValueError(
                f"{option}: {odd[0]} of base model '{self.config.name_or_path}' does not see whole rows in their order "
                "(experts, routers and the like do not), so its replicas cannot be stacked"
            )

    def matching_layers(self, target_modules: Sequence[str] | str) -> dict[str, tuple[int, int]]:
        """Return the linear layers that PEFT adapts for ``target_modules``, with their shapes.

        Args:
            target_modules: endings of their paths, a regular expression for the whole path, or ``all-linear``.

        Raises:
            ValueError: if an ending, or the expression, matches none.
        """
        if target_modules == ALL_LINEAR:
            return dict(self.linear)
        if isinstance(target_modules, str):
            try:
                found = {path: shape for path, shape in self.linear.items() if re.fullmatch(target_modules, path)}
            except re.error as error:
                raise ValueError(
                    f"{name_option('model.target_modules', target_modules)} is no regular expression: {error}"
                ) from None
            if not found:
                raise ValueError(
                    f"{name_option('model.target_modules', target_modules)} matches the whole path of no linear layer, "
                    f"for example {next(iter(self.linear))}; give a list of endings, {ALL_LINEAR} or another expression"
                )
            return found
        ends = tuple(target_modules)
        matched = {path: [end for end in ends if f".{path}".endswith(f".{end}")] for path in self.linear}
        if missing := set(ends) - {end for found in matched.values() for end in found}:
            kinds = sorted({path.rpartition(".")[2] for path in self.linear})
            raise ValueError(
                f"{name_option('model.target_modules')} {', '.join(sorted(missing))}: base model "
                f"'{self.config.name_or_path}' has no such linear layer; it has {', '.join(kinds)}"
            )
        return {path: shape for path, shape in self.linear.items() if matched[path]}


@cache
def outline(base_model: str) -> Outline:
    """Describe a model by its configuration alone; raises as :func:`load_config`."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = load_config(base_model)
    check_causal(config)
    with naming_base(base_model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    of_language = _language_modules(model)
    linear, transposed, has_towers, modules, mixed = {}, False, False, dict[str, int](), set()
    for name, layer in model.named_modules():
        if held := list(layer.parameters(recurse=False)):
            modules[name] = sum(p.numel() for p in held)
            by_rows = isinstance(layer, torch.nn.Linear | torch.nn.Embedding | Conv1D) or all(p.ndim == 1 for p in held)
            if not by_rows or next(layer.children(), None) is not None or ".experts." in f".{name}.":
                mixed.add(name)
        if layer is model.get_output_embeddings() or not isinstance(layer, torch.nn.Linear | Conv1D):
            continue
        if name not in of_language:
            has_towers = True
        elif isinstance(layer, torch.nn.Linear):
            linear[name] = (layer.out_features, layer.in_features)
        else:
            linear[name] = (layer.nf, layer.nx)
            transposed = True
    paths = {layer: name for name, layer in model.named_modules()}
    embedding, last = model.get_input_embeddings(), model.get_output_embeddings()
    head, tied = paths.get(last, ""), tuple[str, ...]()
    if head and embedding.weight is last.weight:
        tied = (paths[embedding], head)
        modules[head] -= last.weight.numel()
    parameters = sum(p.numel() for p in model.parameters())
    return Outline(
        config,
        parameters,
        linear,
        transposed,
        modules,
        frozenset(mixed),
        tied,
        head,
        has_towers,
        embedding.weight.shape[0],
    )


def _language_modules(model: PreTrainedModel) -> set[str]:
    """Return the names of the modules of a model's decoder, which sees the text; all, if it says of none that it is."""
    paths = {layer: name for name, layer in model.named_modules()}
    decoder = model.get_decoder()
    if decoder is None or not paths.get(decoder):
        return set(paths.values())
    return {name for name in paths.values() if name.startswith(f"{paths[decoder]}.")}

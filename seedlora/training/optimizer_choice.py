"""Find the optimizer that is asked for, and try it out on a few numbers before anything is loaded.

A replica must learn in a stack what it learns alone. Each has tensors of its own, so an optimizer that handles one
tensor at a time keeps that: SGD, Adam and all that go by elements, and Adafactor, Muon or LAMB, which look at a whole
tensor. One that looks at several tensors at once, such as D-Adaptation's estimate over all weights, would let replicas
learn of each other; its replicas are trained one after the other. Which one does what is not known from its name, so
a few steps are taken.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seedlora.utils.options import name_option
from seedlora.utils.spelling import closest

#: What Lightning's command line calls the two parts of a class with its options.
CLASS_PATH, INIT_ARGS = "class_path", "init_args"
#: Options of an optimizer that are options of the module.
_ELSEWHERE = {"params": None, "lr": "model.learning_rate", "weight_decay": "model.weight_decay"}
#: Some optimizers treat small tensors otherwise; an odd number of columns, so that no block of states ends at a half.
_SHAPE, _STEPS = (128, 131), 3


class OptimizerTraits(NamedTuple):
    """Hold what was seen of an optimizer when it was tried out.

    Args:
        is_per_tensor: what it does to a tensor depends on that tensor and its gradients alone.
        is_elementwise: what it does to an element depends on that element and its gradients alone.
        state_bytes: that it keeps of each element in float32.
    """

    is_per_tensor: bool
    is_elementwise: bool
    state_bytes: int


@dataclass(frozen=True)
class OptimizerChoice:
    """Hold a class of optimizers and the options to make one with.

    Args:
        name: as it was asked for.
        kind: the class.
        options: beside learning rate and weight decay.
    """

    name: str
    kind: type[torch.optim.Optimizer]
    options: Mapping[str, Any]

    @property
    def takes_weight_decay(self) -> bool:
        """Tell whether it has a weight decay."""
        return "weight_decay" in inspect.signature(self.kind).parameters

    @property
    def text(self) -> str:
        """Describe it, for people."""
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.kind.__name__} ({options})" if options else self.kind.__name__

    def make(self, groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer.

        Args:
            groups: with ``params``, ``lr`` and ``weight_decay`` of each.
        """
        own = [
            {key: value for key, value in group.items() if key != "weight_decay" or self.takes_weight_decay}
            for group in groups
        ]
        # Fused, AdamW takes one pass over the weights instead of several.
        fused = {"fused": True} if self.kind is torch.optim.AdamW and not {"fused", "foreach"} & {*self.options} else {}
        return self.kind(own, **{**fused, **{k: v for k, v in own[0].items() if k != "params"}, **self.options})

    @cached_property
    def traits(self) -> OptimizerTraits:
        """Return what the optimizer does, by steps on random numbers: alone, beside another tensor, and cut in two.

        Raises:
            ValueError: if it does not take a step.
        """
        one, other = _Descent(0, 1.0), _Descent(1, 100.0)
        alone, state_bytes = self._descend([one.start], [one])
        beside, _ = self._descend([one.start, other.start], [one, other])
        cut = _SHAPE[0] // 2 - 3
        upper, lower = one.rows(slice(cut)), one.rows(slice(cut, None))
        halves, _ = self._descend([upper.start, lower.start], [upper, lower])
        is_per_tensor = _same(alone[0], beside[0], one.start)
        is_elementwise = is_per_tensor and _same(alone[0], torch.cat(halves), one.start)
        return OptimizerTraits(is_per_tensor, is_elementwise, state_bytes)

    def check_vectors(self) -> None:
        """Raise ValueError if it does not take vectors, such as DoRA's magnitudes."""
        vector = _Descent(2, 1.0, shape=(_SHAPE[1],))
        self._descend([vector.start], [vector])

    def _descend(self, starts: Sequence[Tensor], descents: Sequence[_Descent]) -> tuple[list[Tensor], int]:
        """Take a few steps; return where they end, and the bytes of state of an element of the first tensor."""
        parameters = [nn.Parameter(start.clone()) for start in starts]
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            try:
                optimizer = self.make([{"params": parameters, "lr": 1e-2, "weight_decay": 1e-2}])
                for step in range(_STEPS):
                    for parameter, descent in zip(parameters, descents, strict=True):
                        parameter.grad = descent.gradients[step].clone()
                    optimizer.step()
            except Exception as error:
                raise ValueError(f"{_asked(self.name)} does not take a step here: {_reason(error)}") from None
        first = parameters[0]
        state = [value for value in optimizer.state[first].values() if isinstance(value, Tensor)]
        kept = sum(value.element_size() for value in state if value.numel() == first.numel())
        return [parameter.detach() for parameter in parameters], kept * 4 // first.element_size()


class _Descent:
    """A random tensor and its gradients in a few steps."""

    def __init__(self, seed: int, scale: float, *, shape: tuple[int, ...] = _SHAPE) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.start = torch.randn(shape, generator=generator, dtype=torch.float32)
        self.gradients = [scale * torch.randn(shape, generator=generator, dtype=torch.float32) for _ in range(_STEPS)]

    def rows(self, part: slice) -> _Descent:
        """Return some rows of it."""
        found = object.__new__(_Descent)
        found.start, found.gradients = self.start[part], [gradient[part] for gradient in self.gradients]
        return found


def _same(found: Tensor, wanted: Tensor, start: Tensor) -> bool:
    """Return whether two walks from one start end at the same place, up to rounding."""
    return bool((found - wanted).abs().max() <= 1e-4 * (wanted - start).abs().max())


def optimizer_choice(asked: str | Mapping[str, Any]) -> OptimizerChoice:
    """Find the optimizer that is asked for.

    Args:
        asked: the name of a class of ``torch.optim`` or ``bitsandbytes.optim``, or a class path, or a mapping of
            ``class_path`` and ``init_args``.

    Raises:
        ValueError: naming what there is not, or what it does not take.
    """
    try:
        return _choice(json.dumps(asked))
    except TypeError:
        raise ValueError(
            f"{name_option('model.optimizer')} takes a name, a class path, or {CLASS_PATH} and {INIT_ARGS} with plain "
            f"values, got {asked!r}"
        ) from None


@lru_cache(maxsize=32)
def _choice(asked: str) -> OptimizerChoice:
    given = json.loads(asked)
    name, options = (given, {}) if isinstance(given, str) else _parts(given)
    kind = _class_at(name) if "." in name else _class_named(name)
    known = inspect.signature(kind).parameters
    for option in options:
        if option in _ELSEWHERE:
            instead = _ELSEWHERE[option]
            use = f"set {name_option(instead)}" if instead else "the module gives it"
            raise ValueError(f"{_asked(name)}: {option} is no option here; {use}")
        if option not in known and not any(each.kind is each.VAR_KEYWORD for each in known.values()):
            there = ", ".join(key for key in known if key not in ("self", *_ELSEWHERE))
            raise ValueError(f"{_asked(name)} has no option '{option}'; it has {there}")
    if "lr" not in known:
        raise ValueError(f"{_asked(name)} has no learning rate 'lr', which the schedule sets")
    return OptimizerChoice(name, kind, options)


def _parts(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return class path and options of a mapping; the command line may put single options beside ``init_args``."""
    rest = {**given}
    path, options = rest.pop(CLASS_PATH, None), rest.pop(INIT_ARGS, None) or {}
    if not isinstance(path, str) or not isinstance(options, dict):
        raise ValueError(
            f"{name_option('model.optimizer')} as a mapping has {CLASS_PATH}, and {INIT_ARGS} as a mapping of options, "
            f"got {given}"
        )
    return path, {**options, **rest}


def _class_named(name: str) -> type[torch.optim.Optimizer]:
    """Return a class by its name alone, whatever its case: of torch, or else of bitsandbytes."""
    plain = name.lower().replace("_", "").replace("-", "")
    known = _classes(torch.optim)
    if plain in known:
        return known[plain]
    try:
        more = _classes(import_module("bitsandbytes.optim"))
    except ImportError:
        more, hint = {}, "; those of bitsandbytes, such as adamw8bit, need it: pip install bitsandbytes"
    else:
        hint = f", or of bitsandbytes: {', '.join(more)}"
    if plain in more:
        return more[plain]
    meant = closest(plain, [*known, *more])
    raise ValueError(
        f"unknown {name_option('model.optimizer')} '{name}'; {f'did you mean {meant}? ' if meant else ''}choose one of "
        f"torch: {', '.join(known)}{hint}; or the path of a class, such as torch.optim.RMSprop"
    )


def _classes(module: Any) -> dict[str, type[torch.optim.Optimizer]]:
    found = {name.lower(): value for name, value in vars(module).items() if _is_optimizer(value)}
    return {name: found[name] for name in sorted(found)}


def _class_at(path: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{_asked(path)} cannot be imported: {_reason(error)}") from None
    if not _is_optimizer(kind):
        raise ValueError(f"{_asked(path)} is no class of optimizers, which are subclasses of torch.optim.Optimizer")
    return kind


def _is_optimizer(value: object) -> bool:
    base = torch.optim.Optimizer
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _asked(name: str) -> str:
    return name_option("model.optimizer", name)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | ImportError) and text else f"{type(error).__name__}: {text}"

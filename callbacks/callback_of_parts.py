"""A callback that is made of smaller ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning.pytorch as pl

#: Every hook of a callback that Lightning calls at a moment of a run.
HOOKS = tuple(name for name in vars(pl.Callback) if name in ("setup", "teardown") or name.startswith("on_"))


class CallbackOfParts(pl.Callback):
    """Forward every hook of Lightning to the parts, in their order.

    The parts are not registered with the Trainer: their order and their keys in a checkpoint would be Lightning's. An
    error in one of them is not caught: those after it are not called.
    """

    parts: Sequence[pl.Callback] = ()


def _forwarding(hook: str) -> Callable[..., None]:
    """Return the method of :class:`CallbackOfParts` for a hook."""

    def forward(self: CallbackOfParts, *arguments: object, **named: object) -> None:
        for part in self.parts:
            getattr(part, hook)(*arguments, **named)

    forward.__name__ = hook
    return forward


for _hook in HOOKS:
    setattr(CallbackOfParts, _hook, _forwarding(_hook))

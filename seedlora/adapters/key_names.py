"""Take the names of wrappers out of the keys of an adapter's weights.

A model that was saved while ``torch.compile``, DistributedDataParallel, FSDP or a second PEFT model was around it has
their names within its keys. PEFT and servers find no layer of such a name, and load nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from seedlora.adapters.adapter import KEY_PREFIX, AdapterError

#: Names that only wrappers have, wherever they are.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
#: Wrappers around all of a model, before PEFT's own beginning or behind it, a second PEFT model among them.
_OUTER = re.compile(rf"(?:module\.)*{re.escape(KEY_PREFIX)}(?:module\.|{re.escape(KEY_PREFIX)})*")


def plain_keys(keys: Iterable[str], file: Path) -> Mapping[str, str]:
    """Return every key as PEFT writes it of a model without wrappers, by the key as it is.

    Args:
        keys: of the weights.
        file: for messages.

    Raises:
        AdapterError: if two keys become one.
    """
    inner = {key: ".".join(part for part in key.split(".") if part not in _WRAPPERS) for key in keys}
    # A model's own layer could be named so as well, but no one layer is around all others.
    common = os.path.commonprefix(list(inner.values()))  # noqa: RUF071 - of texts, and it is matched by whole parts
    if outer := _OUTER.match(common):
        inner = {key: KEY_PREFIX + plain.removeprefix(outer[0]) for key, plain in inner.items()}
    seen: dict[str, str] = {}
    for key, plain in inner.items():
        if plain in seen:
            raise AdapterError(
                f"{file}: '{seen[plain]}' and '{key}' both name {plain} once the names of wrappers are taken out; "
                "save the adapter of the model without wrappers"
            )
        seen[plain] = key
    return inner


def wrapper_of(keys: Iterable[str], file: Path) -> str | None:
    """Return a key that has the name of a wrapper in it; None if there is none."""
    return next((key for key, plain in plain_keys(keys, file).items() if plain != key), None)

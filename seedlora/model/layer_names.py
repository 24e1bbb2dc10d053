"""Find a layer by a name that another version of a model's class, or a checkpoint, gives it.

``model.language_model.layers.0.self_attn.q_proj``, ``language_model.model.layers.0.self_attn.q_proj`` and
``model.layers.0.self_attn.q_proj`` are one layer of a model that has a vision tower or had one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

#: Parts of a path that classes put around a stack of layers, leave out and exchange from one version to the next.
_AROUND = frozenset({"model", "language_model", "text_model", "vision_model", "transformer"})


def plain_path(path: str) -> str:
    """Return a path without what classes put around a stack of layers.

    >>> plain_path("model.language_model.layers.0.mlp.up_proj"), plain_path("vision_tower.vision_model.head")
    ('layers.0.mlp.up_proj', 'vision_tower.head')
    """
    parts = path.split(".")
    inner = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join([*(part for part in parts[:inner] if part not in _AROUND), *parts[inner:]])


class LayerNames:
    """Names of layers, among which one is found by itself or by the only name that means the same.

    Args:
        names: of a model's layers, or the keys of its tensors.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._by_plain: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            self._by_plain[plain_path(name)].append(name)

    def find(self, path: str) -> str | None:
        """Return the name of a layer; None if it is none of these, or could be several."""
        if path in self._names:
            return path
        same = self._by_plain.get(plain_path(path), [])
        return same[0] if len(same) == 1 else None

"""Tell which layers PEFT adapts by an adapter's configuration: what it leaves out it does not load, in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import CONFIG_NAME, AdapterError
from seedlora.utils.patterns import check_pattern

#: What PEFT takes for all linear layers but the head, when it makes an adapter.
_ALL = "all-linear"


@dataclass(frozen=True)
class Targets:
    """Hold what a configuration says of the layers that are adapted; an entry that says nothing is None.

    Args:
        modules: ``target_modules``: endings of paths, or an expression for the whole of each.
        excluded: ``exclude_modules``, likewise.
        layers: ``layers_to_transform``: numbers of decoder layers.
        patterns: ``layers_pattern``: the names behind which these numbers stand; any name if there is none.
    """

    modules: Sequence[str] | str | None = None
    excluded: Sequence[str] | str | None = None
    layers: Sequence[int] | None = None
    patterns: Sequence[str] = ()

    @classmethod
    def read(cls, file: Path, entries: Mapping[str, Any]) -> Targets:
        """Read the entries of a configuration.

        Raises:
            AdapterError: if one is of a wrong type.
        """
        modules, excluded = (_names(file, key, entries) for key in ("target_modules", "exclude_modules"))
        numbers, patterns = entries.get("layers_to_transform"), entries.get("layers_pattern") or []
        numbers = [numbers] if isinstance(numbers, int) and not isinstance(numbers, bool) else numbers or None
        if numbers is not None and not (isinstance(numbers, list) and all(type(number) is int for number in numbers)):
            raise _wrong(file, "layers_to_transform", numbers, "a whole number, or a list of such,")
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not all(isinstance(name, str) for name in patterns):
            raise _wrong(file, "layers_pattern", patterns, "a name, or a list of names,")
        return cls(modules, excluded or None, numbers, tuple(patterns))

    def key_leaving_out(self, path: str) -> str | None:
        """Return the key by which PEFT leaves a layer out; None if it adapts the layer, or if that is not known.

        This is PEFT's rule (``check_target_module_exists``), without the seconds that PEFT takes to import; its test
        compares them.

        Example:
            >>> Targets(["q_proj"], layers=[0]).key_leaving_out("model.layers.1.self_attn.q_proj")
            'layers_to_transform'
        """
        if self.excluded is not None and _matches(self.excluded, path):
            return "exclude_modules"
        if self.modules is None or self.modules == _ALL:
            return None
        if _matches(self.modules, path) is False:
            return "target_modules"
        if self.layers is None or isinstance(self.modules, str) or path in self.modules:
            return None
        names = [re.escape(name) for name in self.patterns] or [r"[^.]*"]
        # Where no name is given a number counts that has a name and something before it.
        before = r"(?:^|.*?\.)" if self.patterns else r".*?\."
        found = next((match for name in names if (match := re.match(rf"{before}{name}\.(\d+)\.", path))), None)
        return None if found is not None and int(found[1]) in self.layers else "layers_to_transform"


def check_targeted(file: Path, path: str, targets: Targets) -> None:
    """Refuse factors of a layer that the configuration leaves out.

    Args:
        file: of the weights, for messages.
        path: of the layer.
        targets: of the configuration.

    Raises:
        AdapterError: naming layer and key.
    """
    if (key := targets.key_leaving_out(path)) is not None:
        raise AdapterError(
            f"{file} holds factors of '{path}', which {key} of {CONFIG_NAME} leaves out: PEFT would not load them; "
            f"take them out of the file, or name the layer in {CONFIG_NAME}"
        )


def _names(file: Path, key: str, entries: Mapping[str, Any]) -> Sequence[str] | str | None:
    found = entries.get(key)
    if found is None or isinstance(found, str):
        return found
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _wrong(file, key, found, "text, or a list of names,")
    return found


def _wrong(file: Path, key: str, value: object, needed: str) -> AdapterError:
    return AdapterError(f"{file}: {key} is {str(value)[:80]!r}; {needed} is needed")


def _matches(names: Sequence[str] | str, path: str) -> bool | None:
    """Return whether names or an expression mean a layer; None for an expression that might take for ever."""
    if not isinstance(names, str):
        return path in names or any(path.endswith(f".{name}") for name in names)
    try:
        check_pattern(names)
    except ValueError:
        return None
    return re.fullmatch(names, path) is not None

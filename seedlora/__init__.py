"""Train LoRA replicas of one task as one stack, and merge them into one adapter.

The names below are the public face; each is imported when it is first used, so that ``import seedlora`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
#: Where each public name lives.
_HOMES = {
    "LoRAFactors": "seedlora.updates.factors",
    "METHODS": "seedlora.merge.registry",
    "SeedEnsembleCallback": "seedlora.callbacks.seed_ensemble",
    "SeedLoRAModule": "seedlora.training.module",
    "merge_folders": "seedlora.merge.adapter_folders",
    "compare": "seedlora.merge.adapter_comparison",
    "make_rule": "seedlora.merge.registry",
    "read_adapter": "seedlora.adapters.reading",
    "write_adapter": "seedlora.adapters.writing",
}
__all__ = [
    "METHODS",
    "LoRAFactors",
    "SeedEnsembleCallback",
    "SeedLoRAModule",
    "__version__",
    "compare",
    "make_rule",
    "merge_folders",
    "read_adapter",
    "write_adapter",
]

if TYPE_CHECKING:
    from seedlora.adapters.reading import read_adapter
    from seedlora.adapters.writing import write_adapter
    from seedlora.callbacks.seed_ensemble import SeedEnsembleCallback
    from seedlora.merge.adapter_comparison import compare
    from seedlora.merge.adapter_folders import merge_folders
    from seedlora.merge.registry import METHODS, make_rule
    from seedlora.training.module import SeedLoRAModule
    from seedlora.updates.factors import LoRAFactors


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'seedlora' has no attribute '{name}'; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""LightningDataModules: rows of a task, as batches for a stack of replicas.

Each is imported when it is first used: prompts and templates of this package need no Lightning, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from seedlora.datamodules.base import InstructionDataModule as InstructionDataModule
    from seedlora.datamodules.codefeedback import CodeFeedback as CodeFeedback
    from seedlora.datamodules.commonsense import Commonsense170k as Commonsense170k
    from seedlora.datamodules.gsm8k import GSM8K as GSM8K
    from seedlora.datamodules.instruction_data import InstructionData as InstructionData
    from seedlora.datamodules.metamathqa import MetaMathQA as MetaMathQA
    from seedlora.datamodules.reasoning_gym import ReasoningGym as ReasoningGym
    from seedlora.datamodules.stack_data import StackData as StackData
    from seedlora.datamodules.table import TableDataModule as TableDataModule
    from seedlora.datamodules.tulu import Tulu as Tulu

#: Where each is: the file of this folder.
_HOMES = {
    "InstructionDataModule": "base",
    "CodeFeedback": "codefeedback",
    "Commonsense170k": "commonsense",
    "GSM8K": "gsm8k",
    "InstructionData": "instruction_data",
    "MetaMathQA": "metamathqa",
    "ReasoningGym": "reasoning_gym",
    "StackData": "stack_data",
    "TableDataModule": "table",
    "Tulu": "tulu",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> type:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has {', '.join(__all__)}")
    kind: type = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = kind
    return kind


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def all_data_modules() -> list[type]:
    """Import all data modules, for who looks for subclasses."""
    return [__getattr__(name) for name in _HOMES]

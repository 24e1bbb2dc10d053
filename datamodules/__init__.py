"""LightningDataModules: rows of a task, as batches for a stack of replicas."""

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

"""LightningDataModules: rows of a task, as batches for a stack of replicas."""

from datamodules.base import InstructionDataModule as InstructionDataModule
from datamodules.codefeedback import CodeFeedback as CodeFeedback
from datamodules.commonsense import Commonsense170k as Commonsense170k
from datamodules.gsm8k import GSM8K as GSM8K
from datamodules.instruction_data import InstructionData as InstructionData
from datamodules.metamathqa import MetaMathQA as MetaMathQA
from datamodules.reasoning_gym import ReasoningGym as ReasoningGym
from datamodules.tulu import Tulu as Tulu

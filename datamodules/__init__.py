"""LightningDataModules: rows of a task, as batches for a stack of replicas."""

from datamodules.instruction import InstructionData as InstructionData
from datamodules.instruction import InstructionDataModule as InstructionDataModule
from datamodules.reasoning_gym import ReasoningGym as ReasoningGym

"""Train LoRA replicas of one task with different seeds, and merge them: ``python train.py --merge seedlora``."""

import sys

from seedlora.callbacks import EnsembleProgressBar, JSONLinesLogger, SeedEnsembleCallback, Throughput
from seedlora.cli.parser import Parts
from seedlora.cli.train import main
from seedlora.datamodules import InstructionDataModule, prompts
from seedlora.datamodules.reasoning_gym import generated_test

PARTS = Parts(
    ensemble=SeedEnsembleCallback,
    data=InstructionDataModule,
    default_data="seedlora.datamodules.ReasoningGym",
    progress=EnsembleProgressBar,
    logger=JSONLinesLogger,
    throughput=Throughput,
    prompts=prompts,
    generate=generated_test,
)

if __name__ == "__main__":
    sys.exit(main(PARTS))

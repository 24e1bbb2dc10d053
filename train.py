"""Train LoRA replicas of one task with different seeds, and fuse them: ``python train.py --merge seedlora``."""

import sys

from callbacks import EnsembleProgressBar, JSONLinesLogger, SeedEnsembleCallback, Throughput
from datamodules import InstructionDataModule, prompts
from datamodules.reasoning_gym import generated_test
from seedlora.cli import Parts, main

PARTS = Parts(
    ensemble=SeedEnsembleCallback,
    data=InstructionDataModule,
    default_data="datamodules.ReasoningGym",
    progress=EnsembleProgressBar,
    logger=JSONLinesLogger,
    throughput=Throughput,
    prompts=prompts,
    generate=generated_test,
)

if __name__ == "__main__":
    sys.exit(main(PARTS))

"""Train LoRA replicas of one task with different seeds, and merge them: ``python train.py --merge seedlora``."""

import sys

from seedlora.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

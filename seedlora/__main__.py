"""Start ``python -m seedlora COMMAND ...``."""

import sys

from seedlora.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

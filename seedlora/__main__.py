"""``python -m seedlora merge | inspect | compare | methods``."""

from seedlora.shell import main

if __name__ == "__main__":
    raise SystemExit(main())

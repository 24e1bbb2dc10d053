"""``python -m seedlora merge | inspect | compare | methods | evaluate | preview``: library and data modules joined."""

import sys

from datamodules import prompts
from seedlora.shell import main


def _preview(argv: list[str]) -> int:
    from datamodules.preview import main as preview
    from seedlora.base_model import EMBEDDED, load_tokenizer

    return preview(argv, load_tokenizer=load_tokenizer, default_model=EMBEDDED)


if __name__ == "__main__":
    raise SystemExit(_preview(sys.argv[2:]) if sys.argv[1:2] == ["preview"] else main(prompts=prompts))

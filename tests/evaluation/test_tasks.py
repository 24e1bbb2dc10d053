"""Items, prompts and judgements, against strings written by hand; the packaged tasks from their real wheels."""

from __future__ import annotations

import gzip
import json

import pytest

from seedlora.datamodules import prompts
from seedlora.evaluation.items import load_items
from seedlora.evaluation.sandbox import Sandbox
from seedlora.evaluation.tasks import TASKS, check_tasks


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def items(tmp_path, name, *rows):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(name, path=file)


def test_gsm8k_is_the_whole_test_set():
    found = load_items("gsm8k")
    assert len(found) == 1319
    assert found[0].request.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert (found[0].gold, found[-1].gold) == (18, 14)
    assert load_items("gsm8k", limit=3) == found[:3]


def test_gsm8k_prompt_to_the_letter():
    task, item = TASKS["gsm8k"], load_items("gsm8k", limit=2)[1]
    assert prompts.render("alpaca", item.request) + task.prefix == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nA robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total "
        "does it take?\n\n### Response: Let's think step by step."
    )
    assert task.max_new_tokens == 512
    assert task.judge("2 + 1 = 3\n#### 3\nThe answer is: 3", item) == (True, 3, ())
    assert task.judge("The answer is: 4", item).correct is False
    assert task.judge("3", item) == (False, None, ("no 'The answer is: '",))


def test_math_rows_of_both_kinds(tmp_path):
    hub = {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "type": "Algebra", "level": "Level 1"}
    metamath = {"instruction": "Half of 1?", "output": r"It is $\boxed{\frac{1}{2}}$."}
    first, second = items(tmp_path, "math", hub, metamath)
    assert first.gold == second.gold == r"\frac{1}{2}"
    assert (first.group, second.group) == ("Algebra, Level 1", "")
    judge = TASKS["math"].judge
    assert judge("The answer is: 1/2.\n", first).correct
    assert not judge("The answer is: 1/3", first).correct
    assert not judge("so 1/2", first).correct
    assert (TASKS["math"].max_new_tokens, TASKS["math"].prefix) == (2048, " Let's think step by step.")


def test_humaneval_is_whole_and_its_own_solutions_pass():
    found = load_items("humaneval")
    assert len(found) == 164
    task, item = TASKS["humaneval"], found[23]
    assert item.request == (
        "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
        '```\ndef strlen(string: str) -> int:\n    """ Return length of given string\n    >>> strlen(\'\')\n    0\n'
        '    >>> strlen(\'abc\')\n    3\n    """\n```\n'
    )
    assert task.prefix == (
        "Below is a Python script with a self-contained function that solves the problem and passes corresponding "
        "tests:\n```python\n"
    )
    sandbox = Sandbox(bubblewrap=False)  # the data set's own solutions, which people have read
    rows = [json.loads(line) for line in gzip.decompress(task.packaged.cached()).splitlines()]
    right = [task.program(row["prompt"] + row["canonical_solution"], found[i]) for i, row in enumerate(rows[:6])]
    wrong = [task.program(row["prompt"] + "    return None\n", found[i]) for i, row in enumerate(rows[:6])]
    assert [outcome.status for outcome in sandbox.run_all(right + wrong)] == ["passed"] * 6 + ["failed"] * 6


@pytest.mark.slow
def test_all_solutions_of_humaneval_pass():
    task, found = TASKS["humaneval"], load_items("humaneval")
    rows = [json.loads(line) for line in gzip.decompress(task.packaged.cached()).splitlines()]
    programs = [task.program(r["prompt"] + r["canonical_solution"], item) for r, item in zip(rows, found, strict=True)]
    failed = [item.id for item, o in zip(found, Sandbox().run_all(programs), strict=True) if o.status != "passed"]
    assert failed == []


def test_items_of_mbpp(tmp_path):
    row = {
        "task_id": 2,
        "prompt": "Write a function to find the shared elements.",
        "code": "def shared(a, b):\n  return tuple(set(a) & set(b))",
        "test_imports": ["import math"],
        "test_list": ["assert set(shared((3, 4), (4, 5))) == {4}", "assert shared((1,), (2,)) == ()"],
    }
    plain, full = items(tmp_path, "mbpp", row, {**row, "task_id": 3, "text": row["prompt"], "prompt": None})
    assert plain.request == full.request
    assert plain.request.endswith(
        '```\n"""\nWrite a function to find the shared elements.\nassert set(shared((3, 4), (4, 5))) == {4}\n"""\n```\n'
    )
    assert plain.gold["entry_point"] == "shared"
    sandbox, program = Sandbox(bubblewrap=False), TASKS["mbpp"].program
    assert sandbox.run(program(row["code"], plain)).status == "passed"
    assert sandbox.run(program("def shared(a, b):\n    return a", plain)).status == "failed"
    (plus,) = items(tmp_path, "mbpp_plus", {**row, "test": "assert shared((1,), (1,)) == (1,)\nassert False"})
    assert sandbox.run(program(row["code"], plus)).status == "failed"


@pytest.mark.parametrize(
    ("name", "answer", "said"),
    [
        ("boolq", "true", "the correct answer is true"),
        ("piqa", "solution2", "the correct answer is solution2"),
        ("social_i_qa", "answer3", "answer3"),
        ("hellaswag", "ending4", "the correct answer is ending4"),
        ("winogrande", "option1", "option1"),
        ("arc_challenge", "answer5", "answer5"),
        ("arc_easy", "answer1", "answer1"),
        ("openbookqa", "answer2", "answer2"),
    ],
)
def test_items_of_the_commonsense_tasks(tmp_path, name, answer, said):
    row = {"instruction": "Which?", "input": "", "output": f"the correct answer is {answer}", "answer": answer}
    (item,) = items(tmp_path, name, row)
    assert item.request == "Which?"
    assert TASKS[name].judge(said, item).correct
    assert not TASKS[name].judge("none of them", item).correct
    with pytest.raises(ValueError, match="has the answer 'answer9'; answers are"):
        items(tmp_path, name, {**row, "answer": "answer9"})


def test_mmlu_by_the_letter_in_a_folder_of_subjects(tmp_path):
    row = {"question": "What is 2 + 2?", "subject": "arithmetic", "choices": ["3", "4", "5", "A pair"], "answer": 1}
    for folder, rows in (("arithmetic", [row]), ("history", [{**row, "subject": "history", "answer": "D"}])):
        for split in ("dev", "test"):
            file = tmp_path / "mmlu" / folder / f"{split}-00000-of-00001.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = load_items("mmlu", path=tmp_path / "mmlu")
    assert first.request == "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. A pair"
    assert [(item.gold, item.group) for item in (first, second)] == [("B", "arithmetic"), ("D", "history")]
    task = TASKS["mmlu"]
    assert (task.prefix, task.stops) == (" The answer is:", ("\n",))
    assert task.judge(" B. 4", first) == (True, "B", ())
    assert not task.judge(" (A)", first).correct
    assert task.judge(" Because", first) == (False, None, ("no letter",))
    with pytest.raises(ValueError, match="line 1: has the answer 4; answers are 0 to 3 or A to D"):
        items(tmp_path, "mmlu", {**row, "answer": 4})
    with pytest.raises(ValueError, match="line 1: has 2 choices; there should be 4"):
        items(tmp_path, "mmlu", {**row, "choices": ["3", "4"]})


def test_files_of_every_kind(tmp_path):
    rows = [{"question": "a\u2028b?", "answer": "#### 1"}, {"question": "c?", "answer": "#### 2"}]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "mirror" / "main").mkdir(parents=True)
    (tmp_path / "mirror" / "main" / "test-00000.jsonl").write_text(lines)
    (tmp_path / "mirror" / "main" / "train-00000.jsonl").write_text(lines + "\n" + lines)
    for path in ("a.jsonl", "b.json", "c.jsonl.gz", "mirror"):
        assert [item.gold for item in load_items("gsm8k", path=tmp_path / path)] == [1, 2]


@pytest.mark.parametrize("name", ["test.jsonl", "data/test-00000-of-00001.jsonl", "TestSet.jsonl", "test_1/a.jsonl"])
def test_the_test_file_of_a_folder_is_named_by_a_word(tmp_path, name):
    row = json.dumps({"question": "a?", "answer": "#### 1"})
    for other in ("latest/a.jsonl", "contest.jsonl", "testimonials.jsonl", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).write_text(row if other == name else f"{row}\n{row}")
    assert len(load_items("gsm8k", path=tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"question": "a"}\n',
            "rows.jsonl, line 1: no text in field 'answer' or 'response'; its fields are question",
        ),
        (b'{"question": "a", "answer": "5"}\n', "rows.jsonl, line 1: a GSM8K answer ends in"),
        (b'{"question": "a", "answer": "#### 5"}\n{"quest', "line 2: not JSON"),
        (b"[1]\n", "row 1: a int, not an object"),
        (b"\xff\xfe\n", "rows.jsonl, line 1: not UTF-8"),
        (b'{"question": "a", "answer": 2}\n', "line 1: no text in field 'answer'"),
        (b'{"question": "\\ud83d", "answer": "#### 5"}\n', "line 1: field 'question' holds half of a character"),
        (b"", "holds no items"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_items("gsm8k", path=file)


def test_unknown_and_repeated_tasks():
    with pytest.raises(ValueError, match="Unknown task 'gsm'; choose from gsm8k, math"):
        check_tasks(["gsm"])
    with pytest.raises(ValueError, match="math is named twice"):
        check_tasks(["math", "math"])

"""Answers read out of text, against strings written by hand."""

from __future__ import annotations

import pytest

from seedlora.evaluation.extract import (
    MATH_STOPS,
    NO_ANSWER,
    NO_MARKER,
    NUMBER_CUT,
    ROUNDED,
    first_label,
    gsm8k_answer,
    gsm8k_gold,
    is_equiv,
    last_boxed,
    math_answer,
    python_solution,
)


@pytest.mark.parametrize(
    ("text", "answer", "quirks"),
    [
        ("6 * 3 = 18\n#### 18\nThe answer is: 18", 18, ()),
        ("The answer is: 18.", 18, ()),
        ("The answer is: $1,234", 1234, ()),
        ("The answer is: 1,234,567", 1234, (NUMBER_CUT,)),
        ("The answer is: 1,234.50", 1234, (NUMBER_CUT,)),
        ("The answer is: 2.5", 2, (ROUNDED,)),
        ("The answer is: 3.5", 4, (ROUNDED,)),
        ("The answer is: 2.6 dollars", 3, (ROUNDED,)),
        ("The answer is: 18.00", 18, ()),
        ("The answer is: .75", 1, (ROUNDED,)),
        ("The answer is: -7", -7, ()),
        ("The answer is: +7", 7, ()),
        ("The answer is: 12/4", 3, ()),
        ("The answer is: 1/3", 0, (ROUNDED,)),
        ("The answer is: 5/0", 5, ()),
        ("The answer is: /5", None, (NO_ANSWER,)),
        ("The answer is: 10-3", 10, ()),
        ("The answer is: eighteen", None, (NO_ANSWER,)),
        ("The answer is: ", None, (NO_ANSWER,)),
        ("The answer is: 1 no wait. The answer is: 2", 2, ()),
        ("the answer is: 18", None, (NO_MARKER,)),
        ("The answer is 18", None, (NO_MARKER,)),
        ("The answer is:18", None, (NO_MARKER,)),
        ("#### 18", None, (NO_MARKER,)),
        ("", None, (NO_MARKER,)),
        ("The answer is: " + "9" * 5000, None, (NO_ANSWER,)),
        ("The answer is: 50%", 50, ()),
        ("The answer is: 3 apples and 4 pears", 3, ()),
    ],
)
def test_answers_of_gsm8k(text, answer, quirks):
    assert gsm8k_answer(text) == (answer, quirks)


@pytest.mark.parametrize(("text", "answer"), [("-$18", 18), ("\u22125", 5), ("$-18", -18)])
def test_a_minus_that_the_expression_does_not_take_is_a_quirk(text, answer):
    quirks = ("minus sign not read",) if answer > 0 else ()
    assert gsm8k_answer(f"The answer is: {text}") == (answer, quirks)


def test_gold_answers_of_gsm8k():
    assert gsm8k_gold("She has <<2+2=4>>4.\n#### 4") == (4, ())
    assert gsm8k_gold("x\n#### 2,125") == (2125, ())
    assert gsm8k_gold("x\n#### -5 ") == (-5, ())
    assert gsm8k_gold("x\n#### $18") == (18, ("$ dropped from the right answer",))
    assert gsm8k_gold("x\n#### -$1,800") == (-1800, ("$ dropped from the right answer",))
    assert gsm8k_gold("x\n#### 2.6") == (3, ("right answer rounded to a whole number",))
    for bad in ("no mark", "#### 2 or 3", "#### many", "#### ", "#### -$-2"):
        with pytest.raises(ValueError, match="ends in '#### '"):
            gsm8k_gold(bad)


def test_all_gold_answers_read_themselves():
    """The extraction gives back every gold answer below a million; the million ones are cut, which is the quirk."""
    for gold in (0, 7, 18, 1000, 2125, 999_999):
        assert gsm8k_answer(f"The answer is: {gold:,}").answer == gold
        assert gsm8k_answer(f"The answer is: {gold}").answer == gold
    assert gsm8k_answer("The answer is: 1,450,000").answer == 1450


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So the answer is $\frac{1}{2}$. The answer is: \frac{1}{2}", r"\frac{1}{2}"),
        ("The answer is: 3.\nNext question: what", "3"),
        ("The answer is: 3.5.\n", "3.5"),
        ("The answer is: 3.14.", "3.14"),
        ("The answer is: (1, 2)\nand more", "(1, 2)\nand more"),
        ("The answer is:  x ", "x"),
        ("The answer is: .", None),
        ("no", None),
    ],
)
def test_answers_of_math(text, answer):
    assert math_answer(text).answer == answer


@pytest.mark.parametrize(
    ("solution", "boxed"),
    [
        (r"Thus \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} ends", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 5$ ok", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{open", None),
        ("nothing", None),
    ],
)
def test_the_last_boxed_answer(solution, boxed):
    assert last_boxed(solution) == boxed


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", r"\frac12", True),
        (r"\dfrac{1}{2}", r"\tfrac{1}{2}", True),
        (r"\frac1{72}", r"\frac{1}{72}", True),
        (r"\sqrt3", r"\sqrt{3}", True),
        ("x = 5", "5", True),
        ("xyz=5", "5", False),
        (r"90^\circ", "90", True),
        (r"90^{\circ}", "90", True),
        (r"\$18", "18", True),
        (r"50\%", "50", True),
        (r"5\text{ cm}", "5", True),
        (r"\left(1, 2\right)", "(1,2)", True),
        (".5", "0.5", True),
        ("10,\\!000", "10,000", True),
        ("10000", "10,000", False),
        ("0.25", "1/4", False),
        ("2/4", "1/2", False),
        ("-1/2", r"\frac{-1}{2}", True),
        ("-1/2", r"-\frac{1}{2}", False),
        ("5", "5.0", False),
        (r"\text{even}", "even", False),
        ("a\nb", "ab", True),
        (r"3\text{ m}\text{ s}", r"3\text{ m}\text{ s}", True),
        (r"3\text{ m}\text{ s}", "3", False),
        (None, None, True),
        ("5", None, False),
    ],
)
def test_answers_of_math_that_are_the_same(a, b, equal):
    assert is_equiv(a, b) is equal
    assert is_equiv(b, a) is equal


def test_the_first_label_is_the_answer():
    assert first_label("the correct answer is answer2, not answer1", ("answer1", "answer2")).answer == "answer2"
    assert first_label("True", ("true", "false")) == (None, ("no label",))
    assert first_label("it is false that it is true", ("true", "false")).answer == "false"


def test_stops_are_metamath_s():
    assert set(MATH_STOPS) == {
        "Question:", "Question", "USER:", "USER", "ASSISTANT:", "ASSISTANT",
        "Instruction:", "Instruction", "Response:", "Response",
    }  # fmt: skip


ANSWER = """\
Sure, here is the function you asked for!

```python
import math
from typing import List

LIMIT = 3
UNUSED = 4

def helper(x):
    return x * LIMIT

def shown(x):
    print(x)

def solve(xs: List[int]) -> int:
    \"\"\"Add them up.\"\"\"
    return sum(helper(x) for x in xs)

def helper(x):
    return 0

class Other:
    pass

print(solve([1, 2]))
"""


def test_the_solution_is_what_the_entry_point_needs():
    assert python_solution(ANSWER, "solve").split("\n") == [
        "import math",
        "from typing import List",
        "LIMIT = 3",
        "def helper(x):",
        "    return x * LIMIT",
        "def solve(xs: List[int]) -> int:",
        '    """Add them up."""',
        "    return sum(helper(x) for x in xs)",
    ]


@pytest.mark.parametrize(
    ("text", "solution"),
    [
        ("I cannot help with that.", ""),
        ("def f(x):\n    return x\n\nThat is all, folks!", "def f(x):\n    return x"),
        ("def f(x):\n    return x\n\ndef g(x):\n    return (", "def f(x):\n    return x"),
        ("def f(x):\n    print(x)", ""),
        ("@cache\ndef f(x):\n    return x", ""),
        ("def g(x):\n    return x", ""),
        ("def f(x):\n    return g(x)\ndef g(x):\n    return f", "def f(x):\n    return g(x)\ndef g(x):\n    return f"),
        ("class f:\n    def __call__(self):\n        return 1", "class f:\n    def __call__(self):\n        return 1"),
        ("f = lambda x: x\n", "f = lambda x: x"),
        ("(" * 500 + "\n" + "def f():\n    return 1", "def f():\n    return 1"),
        ("def f():\n    return '\0'", ""),
        ("", ""),
    ],
)
def test_solutions_of_odd_answers(text, solution):
    assert python_solution(text, "f") == solution


def test_math_verify_compares_values():
    from seedlora.evaluation import verify

    if not verify.is_available():
        pytest.skip("math-verify is not installed")
    pairs = [("0.25", "1/4"), (r"\frac{1}{2}", "2/4"), ("(1,2)", r"\left(1, 2\right)"), ("5", "6"), ("5", "five {")]
    assert verify.verify_all(pairs, workers=1) == [True, True, True, False, False]
    assert [is_equiv(*pair) for pair in pairs] == [False, False, True, False, False]
    assert verify.verify_all([]) == []

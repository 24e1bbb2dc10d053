r"""Read answers out of generated text, as protocol ``paper`` does. Pure functions of strings.

The rules of GSM8K and MATH are those of MetaMath's evaluation; a known quirk of a rule is kept, because scores are
compared with published ones, and named in the result, so that a report can count it.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Collection, Iterator
from fractions import Fraction
from typing import NamedTuple

MARKER = "The answer is: "
NO_MARKER, NO_ANSWER = "no 'The answer is: '", "nothing to read after the marker"
NUMBER_CUT, ROUNDED = "number cut at its second separator", "rounded to a whole number"
GOLD_DOLLAR, GOLD_ROUNDED = "$ dropped from the right answer", "right answer rounded to a whole number"
MINUS_LOST = "minus sign not read"
#: A minus that the expression does not take: before a currency, or one of Unicode's.
_LOST_MINUS = re.compile("[-\u2212\u2013][ $\u20ac\u00a3]*$")
_NUMBER = re.compile(r"[\-+]?\d*[\.,/]?\d+")
_NEXT_TURN_WORDS = ("Question", "USER", "ASSISTANT", "Instruction", "Response")
#: What ends a generation for GSM8K and MATH: the model starts to ask itself the next question.
MATH_STOPS = tuple(word + colon for word in _NEXT_TURN_WORDS for colon in (":", ""))


class Extraction(NamedTuple):
    """The answer that was read, ``None`` if nothing, and the quirks that took part."""

    answer: int | str | None
    quirks: tuple[str, ...] = ()


def gsm8k_answer(text: str) -> Extraction:
    r"""Read the whole number after the last ``The answer is: ``.

    The first match of ``[\-+]?\d*[\.,/]?\d+`` there; commas are dropped, a fraction is evaluated, the result is rounded
    (half to even). The expression takes one separator: ``1,234,567`` is read as 1234. Rounding makes 2 of ``2.5``.
    """
    _, marker, tail = text.rpartition(MARKER)
    if not marker:
        return Extraction(None, (NO_MARKER,))
    if (match := _NUMBER.search(tail.strip())) is None:
        return Extraction(None, (NO_ANSWER,))
    quirks = [NUMBER_CUT] if re.match(r"[.,]\d", tail.strip()[match.end() :]) else []
    if _LOST_MINUS.search(tail.strip()[: match.start()]):
        quirks.append(MINUS_LOST)
    numerator, slash, denominator = match[0].replace(",", "").partition("/")
    # Over 300 digits it is no number but a loop; the original's float is infinite then.
    if (slash and not numerator.strip("+-")) or len(match[0]) > 300:
        return Extraction(None, (NO_ANSWER,))
    # A denominator of 0 is ignored, as it is in the original.
    value = Fraction(numerator) / (Fraction(denominator or 1) or 1)
    if value.denominator != 1:
        quirks.append(ROUNDED)
    return Extraction(round(float(value)), tuple(quirks))


def gsm8k_gold(answer: str) -> Extraction:
    """Read the whole number after ``#### ``, as answers are read: a dollar sign is dropped, a fraction rounded.

    Raises:
        ValueError: if there is none, or something else beside it.

    Example:
        >>> gsm8k_gold("2 + 0.5 = 2.5 #### $2.5")
        Extraction(answer=2, quirks=('$ dropped from the right answer', 'right answer rounded to a whole number'))
    """
    _, marker, number = answer.rpartition("####")
    found = re.fullmatch(r"([+-]?)(\$?)([+-]?)(\d[\d,]*(?:\.\d+)?|\.\d+)", number.strip()) if marker else None
    if found is None or (found[1] and found[3]):
        shown = f"'#### ' is followed by '{number.strip()[:40]}'" if marker else f"it ends '{answer[-40:]}'"
        raise ValueError(f"a GSM8K answer ends in '#### ' and a whole number; {shown}")
    value = Fraction(found[1] + found[3] + found[4].replace(",", ""))
    quirks = [GOLD_DOLLAR] * bool(found[2]) + [GOLD_ROUNDED] * (value.denominator != 1)
    return Extraction(round(value), tuple(quirks))


def math_answer(text: str) -> Extraction:
    r"""Read the text between the last ``The answer is: `` and the next full stop at a line's end."""
    _, marker, tail = text.rpartition(MARKER)
    if not marker:
        return Extraction(None, (NO_MARKER,))
    answer = tail.split(".\n")[0].strip().removesuffix(".").strip()
    return Extraction(answer) if answer else Extraction(None, (NO_ANSWER,))


def last_boxed(solution: str) -> str | None:
    r"""Return what is in the last ``\boxed{...}`` or ``\fbox{...}`` of a worked solution; ``None`` without
    a whole one.
    """
    start = max(solution.rfind(r"\boxed"), solution.rfind(r"\fbox"))
    if start < 0:
        return None
    rest = solution[start:].partition("boxed" if solution.startswith(r"\boxed", start) else "fbox")[2]
    if rest.startswith(" "):  # \boxed 5 without braces, up to the end of the formula
        return rest[1:].split("$")[0]
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i] if character == "}" else None
    return None


def is_equiv(a: str | None, b: str | None) -> bool:
    r"""Return whether two answers of MATH are the same text after Hendrycks et al.'s normalisation.

    Dropped: line breaks, spaces, ``\!``, ``\left``, ``\right``, degrees, ``\$``, ``\%``, units in ``\text{ ...}`` at
    the end, and a left side of at most two characters (``x=``). Made alike: ``\tfrac``, ``\dfrac`` and ``\frac``;
    ``\sqrt3`` and ``\sqrt{3}``; ``\frac12`` and ``\frac{1}{2}``; ``1/2``, ``0.5`` and ``\frac{1}{2}``; ``.5`` and
    ``0.5``. It is text all the same: ``0.25`` and ``1/4`` differ.

    References:
        Hendrycks et al., "Measuring Mathematical Problem Solving With the MATH Dataset", arXiv 2103.03874.
    """
    if a is None or b is None:
        return a is b
    left, right = _normalised(a), _normalised(b)
    return a == b if left is None or right is None else left == right


def _normalised(text: str) -> str | None:
    """Normalise an answer; return ``None`` where the original gives up and compares the texts as they are."""
    for old, new in (("\n", ""), (r"\!", ""), ("\\\\", "\\"), ("tfrac", "frac"), ("dfrac", "frac")):
        text = text.replace(old, new)
    for dropped in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$"):
        text = text.replace(dropped, "")
    text, unit, more = text.partition(r"\text{ ")
    if unit and r"\text{ " in more:
        return None
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    if text.count("=") == 1 and len(text.partition("=")[0]) <= 2:
        text = text.partition("=")[2]
    text = re.sub(r"\\sqrt([^{])", r"\\sqrt{\1}", text).replace(" ", "")
    text = re.sub(r"\\frac([^{])(.)", _braced_fraction, text)
    if text == "0.5":
        return r"\frac{1}{2}"
    if match := re.fullmatch(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))", text):
        return rf"\frac{{{match[1]}}}{{{match[2]}}}"
    return text


def _braced_fraction(match: re.Match[str]) -> str:
    r"""Turn ``\frac12`` into ``\frac{1}{2}``, and ``\frac1{72}`` into ``\frac{1}{72}``."""
    numerator, following = match.groups()
    return rf"\frac{{{numerator}}}" + (following if following == "{" else f"{{{following}}}")


def first_label(text: str, labels: Collection[str]) -> Extraction:
    """Find the label that occurs first in the text."""
    match = re.search("|".join(map(re.escape, labels)), text)
    return Extraction(match[0]) if match else Extraction(None, ("no label",))


def first_letter(text: str, letters: Collection[str]) -> Extraction:
    """Find the first of the letters that stands alone: not within a word."""
    match = re.search(rf"\b[{''.join(letters)}]\b", text)
    return Extraction(match[0]) if match else Extraction(None, ("no letter",))


def python_solution(text: str, entry_point: str) -> str:
    """Return the part of generated text that defines ``entry_point``, by EvalPlus's rules.

    The longest run of lines that is valid Python; of it all imports, and those classes, functions with a ``return``
    and assignments to a name that ``entry_point`` needs, directly or not; the first definition of each name. Decorated
    functions are dropped, a quirk of the original.
    Text without any Python gives an empty solution.
    """
    code = _longest_python(text)
    imports, definitions = [], dict[str, ast.stmt]()
    for node in _parse_or_none(code) or ():
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        elif (name := _defined_name(node)) is not None:
            definitions.setdefault(name, node)
    needed, found = [entry_point], set[str]()
    while needed:
        if (name := needed.pop()) in definitions and name not in found:
            found.add(name)
            needed += _names_used(definitions[name])
    kept = [*imports, *(node for name, node in definitions.items() if name in found)]
    return "\n".join(ast.get_source_segment(code, node) or "" for node in kept)


def _longest_python(text: str) -> str:
    """Return the run of lines that is valid Python and has the most lines that are not blank; the first of several."""
    lines = text.split("\n")
    best, longest = "", 0
    for start in range(len(lines)):
        if not lines[start].strip():
            continue  # a run without this line has as many lines that count
        for end in range(len(lines), start, -1):
            size = sum(1 for line in lines[start:end] if line.strip())
            if size <= longest:
                break
            run = "\n".join(lines[start:end])
            if _parse_or_none(run) is not None:
                best, longest = run, size
                break
    return best


def _parse_or_none(code: str) -> list[ast.stmt] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined_name(node: ast.stmt) -> str | None:
    """Return the name that a statement defines, if the rules let it count."""
    if isinstance(node, ast.ClassDef) and not node.decorator_list:
        return node.name
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.decorator_list:
        return node.name if any(isinstance(inner, ast.Return) for inner in ast.walk(node)) else None
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return target.id if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) else None


def _names_used(node: ast.stmt) -> Iterator[str]:
    for inner in ast.walk(node):
        for name in (getattr(inner, "id", None), getattr(inner, "attr", None), getattr(inner, "arg", None)):
            if isinstance(name, str):
                yield name

"""Judge MATH answers a second time, more leniently: math-verify compares values instead of texts."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

NAME = "math-verify"


def is_available() -> bool:
    """Return whether the package math-verify, an extra of this one, is installed."""
    return find_spec("math_verify") is not None


def verify_all(pairs: Sequence[tuple[str, str]], *, workers: int = 2) -> list[bool]:
    """Return whether each answer has the value of its gold answer.

    Runs in processes of their own: math-verify limits its time by a signal, which only a main thread can take.

    Args:
        pairs: gold answer and answer, both without dollar signs.
        workers: processes.
    """
    if not pairs:
        return []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_has_equal_value, pairs, chunksize=16))


def _has_equal_value(pair: tuple[str, str]) -> bool:
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        gold, answer = (parse(f"${text}$") for text in pair)
        return bool(verify(gold, answer))
    except Exception:
        # sympy raises anything on text that is no formula; such an answer is wrong.
        return False

"""Generated questions and their splits."""

from __future__ import annotations

import pytest

from tests.helpers.models import make_data


def test_splits_are_disjoint_by_question_and_the_same_every_time(tokenizer):
    options = {"num_train": 60, "num_val": 10, "num_test": 20, "task_options": {"max_terms": 2, "max_digits": 1}}
    one, two = (make_data(**options) for _ in range(2))
    splits = one.items
    assert splits == two.items
    questions = [item["question"] for split in splits.values() for item in split]
    assert len(questions) == len(set(questions)) == 90
    assert make_data(**options, data_seed=2).items["test"] != splits["test"]


def test_too_few_questions_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="new questions in"):
        make_data(num_train=5000, task_options={"max_terms": 2, "max_digits": 1}).read("train").__next__()

"""What may be compared with what."""

from __future__ import annotations

import pytest

from seedlora.selection.comparison import Comparison


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "auto", "options": {"p": 1}}, "Merge method 'auto' chooses the options too"),
        ({"merge": "tie"}, "Unknown merge method 'tie'; choose one of .* 'auto' and 'auto_gain' choose"),
        ({"merge": "auto_gain", "options": {"cup": 1}}, "has no option 'cup'"),
        ({"merge": "seedlora_gain"}, "seedlora_gain. needs its p, .* to choose it on validation rows, take auto_gain"),
        ({"compare": ["ties", "tie"]}, "Unknown merge method 'tie'"),
        ({"compare": ["ties"], "compare_options": {"ties": {"density": 2}}}, "Merge method 'ties': density"),
        ({"compare": ["ties"], "compare_options": {"soup": {}}}, "names soup, which compare does not"),
        ({"compare": ["ties", "ties"]}, "names ties more than once"),
        ({"merge": "none", "controls": "all"}, "controls=.all. is tuned where seeds are merged"),
        ({"merge": "none", "compare": ["greedy_soup"]}, "compare=.greedy_soup. is tuned where seeds are merged"),
        ({"controls": "some"}, "Unknown controls 'some'; choose one of none, untrained, all"),
        ({"select_by": "lose"}, "Unknown select_by 'lose'"),
    ],
)
def test_what_cannot_be_compared_is_said_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**options)


def test_what_one_seed_cannot_use_is_said():
    asked = Comparison("auto", compare=["ties"], controls="untrained")
    assert asked.nothing_for(1) == (
        "With one seed merge='auto', compare, controls do nothing: there is nothing to merge or compare."
    )
    assert asked.nothing_for(2) is None
    assert Comparison("seedlora").nothing_for(1) is None

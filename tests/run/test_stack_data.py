"""What a stack and its plan use of data."""

from __future__ import annotations

from seedlora.datamodules.sampler import ReplicaSampler
from seedlora.run.stack_data import (
    CountsTokens,
    HasDomains,
    HasPrompt,
    HasRows,
    HasTrainSample,
    PlannedData,
    StackDataModule,
)
from tests.helpers.models import make_data


def test_the_data_modules_offer_all_that_a_stack_and_its_plan_can_use():
    data = make_data()
    for offer in (StackDataModule, PlannedData, HasRows, HasPrompt, HasDomains, HasTrainSample):
        assert isinstance(data, offer)
    assert not isinstance(object(), StackDataModule)
    assert issubclass(ReplicaSampler, CountsTokens)

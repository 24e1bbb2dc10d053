"""What every data module offers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.mark.parametrize(("n", "wanted"), [(7, 7), (99, 24)])
def test_the_sample_of_training_rows_is_the_same_on_one_rank_and_on_two(data, monkeypatch, n, wanted):
    def rows(ranks):
        found, shares = [], []
        for rank in range(ranks):
            monkeypatch.setattr(data, "trainer", SimpleNamespace(global_rank=rank, world_size=ranks))
            batches = list(data.train_sample(n))
            shares.append(sum(len(batch["items"]) for batch in batches))
            found += [
                tuple(ids[: int(labels.ne(-100).nonzero().max()) + 1].tolist())
                for batch in batches
                for ids, labels, item in zip(batch["input_ids"], batch["labels"], batch["items"], strict=True)
                if item >= 0
            ]
        assert len(set(shares)) == 1, "a rank with a forward more would wait"
        return sorted(found)

    assert len(alone := rows(1)) == wanted
    assert alone == rows(2)
    train = data.rows["train"]
    assert {*alone} <= {tuple(train.row(i)[0].tolist()) for i in range(len(train))}
    assert len({*alone}) > 1

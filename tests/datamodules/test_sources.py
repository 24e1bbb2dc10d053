"""What is used of the library datasets beyond its documentation is still there."""

from __future__ import annotations


def test_dataset_fingerprint():
    import datasets

    from seedlora.datamodules.sources import dataset_fingerprint

    rows = datasets.Dataset.from_dict({"a": [1, 2]})
    assert dataset_fingerprint(rows) == dataset_fingerprint(datasets.Dataset.from_dict({"a": [1, 2]}))
    assert dataset_fingerprint(rows) != dataset_fingerprint(rows.select([0]))

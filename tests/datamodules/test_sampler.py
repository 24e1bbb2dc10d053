"""The order of each seed, in steps and micro-batches."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from seedlora.datamodules.sampler import Growth, ReplicaSampler


def sets_per_step(data, seeds, seed, *, accumulate, world_size, epoch=3):
    samplers = [
        ReplicaSampler(
            data.rows["train"], seeds=seeds, batch_size=2, accumulate=accumulate, rank=rank, world_size=world_size,
            epoch=epoch,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    steps = [[] for _ in range(samplers[0].steps)]
    for sampler in samplers:
        for i, micro in enumerate(sampler):
            steps[i // accumulate].extend(micro.rows[seeds.index(seed)])
    return [sorted(step) for step in steps]


def test_the_order_of_a_seed_is_the_same_alone_stacked_and_on_two_ranks(data):
    alone = sets_per_step(data, [42], 42, accumulate=4, world_size=1)
    assert alone == sets_per_step(data, [1, 2, 42, 3, 4], 42, accumulate=4, world_size=1)
    assert alone == sets_per_step(data, [11, 42], 42, accumulate=2, world_size=2)
    assert alone != sets_per_step(data, [11, 42], 11, accumulate=4, world_size=1)
    assert alone != sets_per_step(data, [42], 42, accumulate=4, world_size=1, epoch=4)
    assert sorted(row for step in alone for row in step) == list(range(24))


def test_num_items_counts_the_supervised_tokens_of_the_whole_step(data):
    sampler = ReplicaSampler(data.rows["train"], seeds=[1, 2], batch_size=2, accumulate=3, rank=1, world_size=2)
    counts = data.rows["train"].num_items
    for i, micro in enumerate(sampler):
        step = [sampler.order(seed, i // 3) for seed in (1, 2)]
        assert micro.num_items == tuple(int(counts[rows].sum()) for rows in step)
        assert all(set(rows) <= set(all_rows) for rows, all_rows in zip(micro.rows, step, strict=True))


def test_a_loader_goes_on_where_its_state_says(data):
    data.seeds = (1, 2)
    whole = [micro["input_ids"].tolist() for micro in data.train_dataloader()]
    loader = data.train_dataloader()
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert [micro["input_ids"].tolist() for micro in resumed] == whole[5:]
    resumed.sampler.set_epoch(1)
    assert len(list(resumed)) == len(whole)


def test_lengths_are_sorted_within_a_step(data):
    lengths = data.rows["train"].lengths
    sampler = ReplicaSampler(data.rows["train"], seeds=[1], batch_size=24)
    (micro,) = sampler
    assert (np.diff(lengths[list(micro.rows[0])]) >= 0).all()


def test_tokens_seen_are_those_of_the_steps_over_the_epochs(data):
    rows = data.rows["train"]
    sampler = ReplicaSampler(rows, seeds=[1], batch_size=2, accumulate=3)
    taken = []
    for epoch, steps in ((0, 3), (1, 3), (2, 1)):
        sampler.set_epoch(epoch)
        taken += [row for step in range(steps) for micro in sampler.micro_batches(step) for row in micro.rows[0]]
    assert len(taken) == 7 * 6
    wanted = rows.lengths[taken].sum(), rows.num_items[taken].sum()
    assert sampler.seen(1, 7, steps_per_epoch=3) == wanted


@pytest.mark.parametrize("pack_tokens", [None, True])
def test_the_largest_forwards_are_the_largest_of_all_ranks(data, pack_tokens):
    rows, seeds, ranks = data.rows["train"], (1, 2, 3), 2
    pack_tokens = pack_tokens and 2 * int(rows.lengths.max())
    options = {"seeds": seeds, "batch_size": 3, "accumulate": 2, "pack_tokens": pack_tokens, "world_size": ranks}
    samplers = [ReplicaSampler(rows, rank=rank, **options) for rank in range(ranks)]
    sizes = []
    for micro in chain.from_iterable(samplers):
        tokens = [[int(rows.lengths[group].sum()) for group in groups] for groups in micro.groups()]
        sizes.append((max(map(len, tokens)), max(map(max, tokens))))
    found = samplers[1].largest_forwards(seeds)
    assert max(shape.tokens for shape in found) == max(n * length for n, length in sizes)
    assert max(shape.length for shape in found) == max(length for _, length in sizes)
    assert all(shape.masked == (pack_tokens is not None) for shape in found)


@pytest.mark.parametrize("layout", [{}, {"pack_tokens": 256}, {"joined": True}])
def test_a_step_that_grows_has_the_next_rows_of_the_seeds_order(data, layout):
    growth = Growth([3, 6], [2, 4], steps_per_epoch=12)
    plain, grown = (
        ReplicaSampler(data.rows["train"], seeds=[42], batch_size=2, growth=each, **layout) for each in (None, growth)
    )
    each, total = plain.rows_per_step, len(plain.lengths)
    first = [np.random.default_rng([42, 0, *turn]).permutation(total) for turn in ((), (1,), (2,))]
    stream = np.concatenate(first)
    counts = [1] * 3 + [2] * 3 + [4] * 6
    begins = np.cumsum([0, *counts]) * each
    # the epoch needs more rows than there are, and begins again
    assert begins[-1] > total
    for step, count in enumerate(counts):
        wanted = sorted(stream[begins[step] : begins[step + 1]])
        assert sorted(grown.order(42, step)) == wanted
        (micro,) = grown.micro_batches(step)
        assert sorted(micro.rows[0]) == wanted
        assert len(wanted) == count * each
        assert micro.num_items == (plain.num_items[wanted].sum(),)
    taken = stream[: begins[8]]
    assert grown.seen(42, 8, steps_per_epoch=12) == (plain.lengths[taken].sum(), plain.num_items[taken].sum())
    assert len(grown) == len(plain)


def test_steps_that_have_grown_in_an_epoch_before_stay_so(data):
    growth = Growth([3, 18], [2, 3], steps_per_epoch=12)
    sampler = ReplicaSampler(data.rows["train"], seeds=[42], batch_size=2, growth=growth, epoch=1)
    each, total = sampler.rows_per_step, len(sampler.lengths)
    stream = np.concatenate([np.random.default_rng([42, 1, *turn]).permutation(total) for turn in ((), (1,), (2,))])
    assert sorted(sampler.order(42, 0)) == sorted(stream[: 2 * each])
    assert sorted(sampler.order(42, 6)) == sorted(stream[12 * each : 15 * each])

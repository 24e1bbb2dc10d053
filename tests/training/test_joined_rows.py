"""Rows that follow each other without padding: training is what it is with each row on its own."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules.packing import choose_packing
from seedlora.datamodules.rows import ReplicaRows
from seedlora.training.micro_batch import micro_batch_losses
from tests.helpers.models import SEEDS, built, make_data, make_module
from tests.helpers.packing import TASK, prepared, sampler_of
from tests.helpers.precision import SAME
from tests.helpers.training import OPTIONS, make_trainer, saved

#: Rows of many lengths.
ROWS = {**TASK, "max_length": 128, "batch_size": 4}


@pytest.fixture
def module(tiny_llama):
    return built(tiny_llama, *SEEDS)


def losses_of_a_step(module, data, **options):
    """Per active replica, the loss of the first optimizer step, over all its micro-batches."""
    total = 0
    for micro in sampler_of(data, accumulate=2, pack_tokens=None, **options).micro_batches(0):
        batch = ReplicaRows(data.rows["train"])[micro]
        found = micro_batch_losses(
            batch, module.replicas, module.stack, module.token_losses, dropout_key=None, reduce=lambda each: each
        )
        total = total + found.sums.detach() / batch["num_items"][module.replicas.active_positions]
    return total


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("idle", [(), ("seed_42",)])
def test_joined_and_unpacked_losses_are_the_same(module, idle):
    data = prepared(module)
    for name in idle:
        module.replicas.stop(name)
    joined = losses_of_a_step(module, data, joined=True)
    torch.testing.assert_close(joined, losses_of_a_step(module, data), rtol=SAME, atol=0)
    assert joined.unique().numel() == len(SEEDS) - len(idle)


def trained(base_model, dirpath, seeds, rows, **options):
    """The saved weights of each seed."""
    callback = SeedEnsembleCallback(seeds, dirpath=dirpath, budget="full", merge="none")
    data = make_data(**rows)
    make_trainer(callback, max_epochs=1, **OPTIONS).fit(make_module(base_model, **options), datamodule=data)
    assert data.packing.joined == ("pack_tokens" not in rows)
    return {seed: saved(callback.adapter_path(seed)) for seed in seeds}


def difference(found, wanted):
    """The largest relative difference of any weight."""
    return max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("dropout", "options"),
    [
        (0.0, {}),
        (0.1, {}),
        (0.0, {"adapter": "dora"}),
        (0.0, {"modules_to_save": ["lm_head", "norm", "input_layernorm"]}),
        (0.0, {"gradient_checkpointing": True}),
    ],
    ids=["lora", "dropout", "dora", "in full", "checkpointing"],
)
def test_a_replica_of_a_joined_stack_equals_its_standalone_run_and_the_unpacked_one(
    tiny_llama, tmp_path, dropout, options
):
    run = partial(trained, tiny_llama, lora_dropout=dropout, **options)
    stacked = run(tmp_path / "stack", SEEDS, ROWS)
    alone = run(tmp_path / "alone", [42], ROWS)
    assert difference(stacked[42], alone[42]) < SAME
    if not dropout:
        unpacked = run(tmp_path / "unpacked", SEEDS, {**ROWS, "pack_tokens": None})
        assert all(difference(stacked[seed], unpacked[seed]) < SAME for seed in SEEDS)


@pytest.mark.parametrize("world_size", [1, 2])
def test_joined_rows_are_those_of_the_step_and_its_micro_batches_have_as_many_tokens(module, world_size):
    data = prepared(module)
    options = {"accumulate": 2, "world_size": world_size, "pack_tokens": None}
    samplers = [sampler_of(data, rank=rank, joined=True, **options) for rank in range(world_size)]
    lengths, unpacked = data.rows["train"].lengths, sampler_of(data, **options)
    (largest,) = samplers[0].largest_forwards(SEEDS)
    spread = {True: 0, False: 0}
    for step in range(samplers[0].steps):
        micros = [micro for sampler in samplers for micro in sampler.micro_batches(step)]
        for i, seed in enumerate(SEEDS):
            assert sorted(row for micro in micros for row in micro.rows[i]) == sorted(samplers[0].order(seed, step))
            tokens = [lengths[list(micro.rows[i])].sum() for micro in micros]
            assert max(tokens) <= largest.tokens
            spread[True] += max(tokens) - min(tokens)
            order = lengths[unpacked.order(seed, step)].reshape(len(micros), -1).sum(1)
            spread[False] += order.max() - order.min()
    assert spread[True] < 0.2 * spread[False]
    assert largest.joined
    assert not largest.masked
    assert {tuple(sampler.largest_forwards(SEEDS)) for sampler in samplers} == {(largest,)}


def test_a_batch_of_joined_rows_has_no_padding(module):
    data = prepared(module)
    for micro in sampler_of(data, joined=True, pack_tokens=None):
        batch = ReplicaRows(data.rows["train"])[micro]
        lengths = [length for each in batch["documents"] for length in each]
        assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (sum(lengths),)
        assert (batch["position_ids"] == 0).nonzero()[:, 0].tolist() == [sum(lengths[:i]) for i in range(len(lengths))]
    assert sampler_of(data, joined=True).padding() == 0


def test_auto_joins_rows_where_the_model_can_and_much_would_be_padding(module):
    rows = prepared(module).rows["train"]
    alike = rows.take((rows.lengths == rows.lengths[0]).nonzero()[0])
    choose = partial(choose_packing, batch_size=4, slots=1)
    assert choose(rows, "auto", refused=None).joined
    assert choose(rows, "auto", refused=None).why.startswith("rows follow each other without padding, which would be ")
    refused = choose(rows, "auto", refused="it cannot")
    assert (refused.joined, refused.why) == (False, "each row is on its own: it cannot")
    assert not choose_packing(alike, "auto", batch_size=1, slots=1, refused=None).joined
    assert choose(rows, None, refused=None)[:2] == (None, False)
    assert choose(rows, 256, refused=None)[:2] == (256, False)


def test_rows_are_joined_alone_if_they_are_in_a_stack(module):
    data = prepared(module, pack_tokens="auto")
    data.reason_not_to_pack = None
    found = set()
    for seeds in (SEEDS, [7]):
        data.seeds = tuple(seeds)
        found.add(data.train_dataloader().sampler.joined)
    assert found == {True}

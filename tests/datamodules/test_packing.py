"""Packed rows: no sample sees another, and training is what it is without packing."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, MistralConfig, Qwen2Config

from seedlora.datamodules.rows import ReplicaRows
from tests.helpers.models import SEEDS, built
from tests.helpers.packing import PACKED, prepared, sampler_of
from tests.helpers.precision import SAME
from tests.helpers.training import largest_difference, trained_updates


@pytest.fixture
def module(tiny_llama):
    return built(tiny_llama, *SEEDS)


def sizes(vocab):
    return {"vocab_size": vocab, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "config",
    [
        None,
        MistralConfig(**sizes(257), num_attention_heads=4, num_key_value_heads=2, sliding_window=512),
        Qwen2Config(**sizes(257), num_attention_heads=4, num_key_value_heads=2),
        GPT2Config(vocab_size=257, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
    ],
    ids=["llama", "mistral", "qwen2", "gpt2"],
)
def test_the_logits_of_a_packed_row_are_those_of_its_samples_alone(tiny_llama, module, config, attention):
    if config is None:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation=attention)
    else:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.double().eval()
    rows = prepared(module).rows["train"]
    ids, _, positions = rows.packed([[0, 5, 3], [2]])
    together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    for i, group in enumerate(([0, 5, 3], [2])):
        begin = 0
        for row in group:
            alone = model(input_ids=rows.padded([row])[0]).logits[0]
            torch.testing.assert_close(together[i, begin : begin + len(alone)], alone, rtol=SAME, atol=SAME)
            begin += len(alone)


def losses_of_a_step(module, data, **options):
    """Per replica, the loss of the first optimizer step, over all its micro-batches."""
    sampler = sampler_of(data, accumulate=2, **options)
    total = torch.zeros(len(SEEDS))
    for micro in sampler.micro_batches(0):
        batch = ReplicaRows(data.rows["train"])[micro]
        module.stack.route([replica.name for replica in module.replicas])
        rows = [batch[key].flatten(0, 1) for key in ("input_ids", "labels", "position_ids") if key in batch]
        losses, *_ = module.token_losses(*rows)
        total += losses.view(len(SEEDS), -1).sum(1).detach() / batch["num_items"]
    return total


@pytest.mark.usefixtures("float64")
def test_packed_and_unpacked_losses_are_the_same(module):
    data = prepared(module)
    packed = losses_of_a_step(module, data)
    torch.testing.assert_close(packed, losses_of_a_step(module, data, pack_tokens=None), rtol=SAME, atol=0)
    assert packed.unique().numel() == len(SEEDS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_replica_of_a_packed_stack_equals_its_standalone_run(tiny_llama, tmp_path, dropout):
    # packs so small that replicas differ in their number of them
    small = {**PACKED, "pack_tokens": 180}
    run = partial(trained_updates, tiny_llama, dropout=dropout)
    stacked = run(tmp_path / "stack", SEEDS, data_options=small)
    assert largest_difference(stacked[42], run(tmp_path / "alone", [42], data_options=small)[42]) < SAME
    if not dropout:
        unpacked = run(tmp_path / "unpacked", SEEDS, data_options={**small, "pack_tokens": None})
        assert all(largest_difference(stacked[seed], unpacked[seed]) < SAME for seed in SEEDS)


def test_some_replicas_have_fewer_packs_than_others(module):
    data = prepared(module, pack_tokens=180)
    counts = {
        tuple(len(each) for each in micro.packs)
        for epoch in range(20)
        for micro in sampler_of(data, epoch=epoch)
        if len({len(each) for each in micro.packs}) > 1
    }
    assert counts, (
        "no micro-batch has replicas with different numbers of packs: the test of a packed stack shows nothing"
    )


@pytest.mark.parametrize("world_size", [1, 2])
def test_packs_hold_each_row_of_the_step_once_and_fit(module, world_size):
    data = prepared(module)
    samplers = [sampler_of(data, accumulate=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    lengths = data.rows["train"].lengths
    for step in range(samplers[0].steps):
        micros = [micro for sampler in samplers for micro in sampler.micro_batches(step)]
        for i, seed in enumerate(SEEDS):
            seen = [row for micro in micros for row in micro.rows[i]]
            assert sorted(seen) == sorted(samplers[0].order(seed, step).tolist())
            tokens = [lengths[pack].sum() for micro in micros for pack in micro.groups()[i]]
            assert max(tokens) <= data.pack_tokens
            assert micros[0].num_items[i] == data.rows["train"].num_items[seen].sum()


def test_packs_of_a_replica_do_not_depend_on_its_stack(module):
    data = prepared(module)
    stacked, alone = (sampler_of(data, seeds=seeds, accumulate=2) for seeds in (SEEDS, [42]))
    for together, single in zip(stacked, alone, strict=True):
        assert (together.rows[1], together.packs[1]) == (single.rows[0], single.packs[0])


def test_packing_leaves_less_padding_and_padding_is_counted(module):
    data = prepared(module)
    found = {}
    for pack_tokens in (512, None):
        sampler = sampler_of(data, pack_tokens=pack_tokens, accumulate=2)
        batches = [ReplicaRows(data.rows["train"])[micro] for micro in sampler]
        total = sum(batch["input_ids"].numel() for batch in batches)
        real = sum(data.rows["train"].lengths[list(rows)].sum() for micro in sampler for rows in micro.rows)
        found[pack_tokens] = sampler.padding()
        assert found[pack_tokens] == pytest.approx(1 - real / total)
    assert found[512] < 0.5 * found[None]


def test_the_first_token_of_a_sample_is_never_predicted_from_another(module):
    """Also where the prompt is trained on."""
    data = prepared(module, style="llm_adapters", max_length=512, pack_tokens=1024)
    rows = data.rows["train"]
    _, labels, positions = rows.packed([[0, 1, 2]])
    assert (labels[positions == 0] == -100).all()
    assert int((labels != -100).sum()) == int(rows.num_items[:3].sum()) == int(np.sum(rows.lengths[:3] - 1))

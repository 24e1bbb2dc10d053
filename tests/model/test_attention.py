"""Attention within documents: each way of computing it equals the mask, and every family hands the documents on."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from seedlora.model import attention
from seedlora.model.attention import (
    DOCUMENTS,
    KEEPS_DOCUMENTS_APART,
    Documents,
    SharedPrefix,
    check_attention,
    choose_attention,
    reason_not_to_pack,
)
from seedlora.model.block_attention import block_attention
from seedlora.model.loading import load_model
from seedlora.utils.transformers_internals import attention_implementation
from tests.helpers.precision import SAME

LENGTHS = (3, 150, 1, 300, 17)
CPU = torch.device("cpu")


def heads():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, h, sum(LENGTHS), 8, dtype=torch.float64, generator=generator).requires_grad_() for h in (6, 2, 2)
    ]


def by_mask(query, key, value, documents, scaling, window):
    """The reference: one (T, T) mask."""
    owner = torch.arange(len(documents.lengths)).repeat_interleave(torch.tensor(documents.lengths))
    place = torch.arange(len(owner))
    seen = (owner[:, None] == owner) & (place[:, None] >= place)
    if window is not None:
        seen &= place[:, None] - place < window
    out = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2)


def in_blocks(query, key, value, documents, scaling, window):
    out = block_attention(query[0], key[0], value[0], documents.lengths, scaling=scaling, window=window)
    return out.transpose(0, 1)[None]


@pytest.mark.parametrize("window", [None, 1, 20, 200])
@pytest.mark.parametrize("way", [attention.padded, in_blocks])
def test_each_way_equals_the_mask_forward_and_backward(way, window):
    documents, found = Documents(LENGTHS, CPU), []
    for compute in (by_mask, way):
        given = heads()
        out = compute(*given, documents, 0.3, window)
        weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        (out * weight).sum().backward()
        found.append([out, *(each.grad for each in given)])
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=SAME, atol=SAME)


def test_blocks_are_no_less_precise_than_plain_products_in_bfloat16():
    documents = Documents(LENGTHS, CPU)
    wanted = by_mask(*heads(), documents, 0.3, None)
    given = [each.detach().bfloat16() for each in heads()]
    owner = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    hidden = (owner[:, None] != owner) | torch.ones(len(owner), len(owner), dtype=torch.bool).triu(1)
    query, key, value = given[0], *(each.repeat_interleave(3, 1) for each in given[1:])
    scores = (query @ key.mT * 0.3).masked_fill(hidden, float("-inf"))
    plain = (scores.softmax(-1, dtype=torch.float32).bfloat16() @ value).transpose(1, 2)
    blocks = in_blocks(*given, documents, 0.3, None)
    assert (blocks.double() - wanted).norm() < 1.1 * (plain.double() - wanted).norm()


def test_the_kernel_of_a_gpu_takes_what_it_is_given():
    from torch.nn.attention.varlen import varlen_attn

    taken = inspect.signature(varlen_attn).parameters
    assert [*taken][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size", "enable_gqa"} <= taken.keys()
    assert Documents((2, 3), CPU).edges.tolist() == [0, 2, 5]
    assert Documents((2, 3), CPU).edges.dtype == torch.int32


def small(family):
    """A model of a family with few weights, with a window where the family has one."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 257}
    given = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    config = AutoConfig.for_model(family, **sizes, **given, head_dim=8)
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = 15
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double().eval()


@pytest.mark.parametrize("family", sorted(KEEPS_DOCUMENTS_APART))
def test_the_logits_of_joined_documents_are_those_of_each_alone(family):
    model, lengths = small(family), (5, 40, 1, 23)
    ids = torch.randint(0, 257, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    alone = [model(input_ids=part, use_cache=False).logits[0] for part in ids.split(list(lengths), dim=1)]
    choose_attention(model, torch.float64, "auto")
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    documents = Documents(lengths, CPU)
    joined = model(input_ids=ids, position_ids=positions, use_cache=False, documents=documents).logits[0]
    torch.testing.assert_close(joined, torch.cat(alone), rtol=SAME, atol=SAME)
    rows = torch.cat([ids[:, :20], ids[:, 20:40], ids[:, 10:30]]).view(3, 20)
    rows[:, :9] = rows[0, :9]
    row = torch.cat([rows[0, :9], rows[:, 9:].flatten()])[None]
    places = torch.cat([torch.arange(9), torch.arange(9, 20).repeat(3)])[None]
    after = model(input_ids=row, position_ids=places, use_cache=False, documents=SharedPrefix(9, documents=3)).logits
    whole = model(input_ids=rows, use_cache=False).logits
    torch.testing.assert_close(after[0, 9:].view(3, 11, -1), whole[:, 9:], rtol=SAME, atol=SAME)
    again = model(input_ids=ids[:, :5], use_cache=False).logits[0]
    torch.testing.assert_close(again, alone[0], rtol=SAME, atol=SAME)


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("llama", "flash_attention_2", "needs the package flash-attn and a GPU"),
        ("llama", "flash_attention_3", "needs the package flash-attn and a GPU"),
        ("codegen", "flex_attention", "transformers has no such attention for models of type codegen"),
    ],
)
def test_an_attention_that_is_not_here_is_refused_by_name(family, name, message):
    with pytest.raises(ValueError, match=name) as refused:
        check_attention(name, AutoConfig.for_model(family), torch.bfloat16)
    assert message in str(refused.value)


def test_flash_attention_in_float32_is_refused_with_the_option_that_mends_it(monkeypatch):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    with pytest.raises(ValueError, match="attention='flash_attention_2' computes in 16 bits.*give dtype='bfloat16'"):
        check_attention("flash_attention_2", AutoConfig.for_model("llama"), torch.float32)


@pytest.mark.parametrize("name", ["auto", "sdpa", "eager"])
def test_a_model_has_the_attention_asked_for(tiny_llama, name):
    check_attention(name, AutoConfig.from_pretrained(tiny_llama), torch.float32)
    model = load_model(tiny_llama, dtype=torch.float32, attention=name)
    assert attention_implementation(model.config) == ("eager" if name == "eager" else "sdpa")


def test_models_and_options_that_do_not_take_joined_rows_say_why():
    llama, gemma = AutoConfig.for_model("llama"), AutoConfig.for_model("gemma2")
    assert reason_not_to_pack(llama, "auto", compiled=False) is None
    assert reason_not_to_pack(gemma, "auto", compiled=False).endswith("of type gemma2 keep packed rows apart")
    assert reason_not_to_pack(llama, "flex_attention", compiled=False).startswith("flex_attention is asked for")
    assert reason_not_to_pack(llama, "auto", compiled=True) == "compiled layers take rows of few shapes"


def test_long_rows_on_a_cpu_in_bfloat16_go_through_blocks_and_generation_does_not(tiny_llama, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    choose_attention(model, torch.bfloat16, "auto")
    ids = torch.randint(0, 257, (2, 300), generator=torch.Generator().manual_seed(0))
    used = []
    block = attention.block_attention
    monkeypatch.setattr(attention, "block_attention", lambda *given, **more: used.append(1) or block(*given, **more))
    with torch.no_grad():
        blocks = model(input_ids=ids, use_cache=False).logits
        assert used
        used.clear()
        masked = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        cached = model(input_ids=ids, use_cache=True).logits
    assert not used
    torch.testing.assert_close(blocks, masked, rtol=0.05, atol=0.05)
    torch.testing.assert_close(cached, masked, rtol=0.05, atol=0.05)
    assert model.config._attn_implementation != DOCUMENTS

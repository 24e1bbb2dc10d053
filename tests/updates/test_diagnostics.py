"""Every fact against the dense matrices."""

import numpy as np
import pytest
import torch

from seedlora.merge.methods.soup import soup
from seedlora.updates import diagnostics
from seedlora.updates.diagnostics import histogram
from seedlora.updates.factors import LoRAFactors
from tests.helpers.merge_cases import dense_list, make_stack
from tests.helpers.reference import mean

STACK = make_stack(n=3, r=2, d=20, k=30)
UPDATES = dense_list(STACK)


def test_facts_of_a_layer_are_those_of_the_dense_updates():
    facts = diagnostics.layer_facts("model.layers.0.mlp.up_proj", STACK, merged=soup(STACK), samples=20000)
    assert facts.module == "up_proj"
    for found, update in zip((*facts.updates, facts.merged), (*UPDATES, mean(UPDATES)), strict=True):
        values = torch.linalg.svdvals(update)
        values = values[values > 1e-9]
        assert found.norm == pytest.approx(float(update.norm()))
        assert found.mean == pytest.approx(float(update.mean()))
        assert found.std == pytest.approx(float(update.std(correction=0)))
        assert found.singular_values == pytest.approx(values.tolist(), rel=1e-6)
        shares = values / values.sum()
        assert found.effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-6)
    cosine = [[float((a * b).sum() / a.norm() / b.norm()) for b in UPDATES] for a in UPDATES]
    assert torch.allclose(torch.tensor(facts.cosines), torch.tensor(cosine))
    pairs = [cosine[i][j] for i in range(3) for j in range(i)]
    assert facts.mean_cosine == pytest.approx(sum(pairs) / 3)
    average = mean(UPDATES)
    assert facts.rho == pytest.approx(float(average.norm() / mean([u.norm() for u in UPDATES])))
    spread = mean([u.std(correction=0) for u in UPDATES]) / average.std(correction=0)
    assert facts.gain == pytest.approx(float(spread))
    agreement = [float((UPDATES[i].sign() == UPDATES[j].sign()).double().mean()) for i in range(3) for j in range(i)]
    assert facts.sign_agreement == pytest.approx(sum(agreement) / 3, abs=0.02)
    assert facts.samples == 20000


def test_facts_of_a_module_are_means_over_its_layers():
    paths = [f"model.layers.{i}.mlp.{m}" for i in range(2) for m in ("up_proj", "down_proj")]
    layers = [diagnostics.layer_facts(p, make_stack(seed=i), samples=64) for i, p in enumerate(paths)]
    up, down = diagnostics.module_facts(layers)
    assert (up.module, up.layers, down.module, down.merged_norm) == ("up_proj", 2, "down_proj", None)
    assert up.mean_cosine == pytest.approx((layers[0].mean_cosine + layers[2].mean_cosine) / 2)
    assert up.norm == pytest.approx(sum(u.norm for i in (0, 2) for u in layers[i].updates) / 6)


def test_cosines_of_the_model_are_those_of_all_entries():
    stacks = {"a": make_stack(seed=1), "b": make_stack(seed=2, d=5)}
    long = [torch.cat([s.dense()[i].flatten() for s in stacks.values()]) for i in range(3)]
    wanted = [[float(a @ b / a.norm() / b.norm()) for b in long] for a in long]
    assert torch.allclose(diagnostics.model_cosines(stacks), torch.tensor(wanted, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one layer"):
        diagnostics.model_cosines({})


def test_zero_updates_have_finite_facts():
    facts = diagnostics.layer_facts("a", LoRAFactors(torch.zeros(2, 1, 3), torch.zeros(2, 4, 1)))
    assert (facts.mean_cosine, facts.rho, facts.gain) == (0, 1, 1)
    assert facts.updates[0].effective_rank == 0


def test_layers_are_sorted_as_people_count():
    paths = ["model.layers.10.x", "model.layers.2.x", "model.layers.2.a"]
    assert sorted(paths, key=diagnostics.natural_sort_key) == [paths[2], paths[1], paths[0]]


def test_a_histogram_counts_every_entry(monkeypatch):
    """In blocks of rows, the last one smaller, against the dense updates."""
    monkeypatch.setattr("seedlora.updates.dense.BLOCK_ENTRIES", 3 * 2 * 7)
    generator = torch.Generator().manual_seed(0)
    stack = LoRAFactors(torch.randn(2, 3, 7, generator=generator), torch.randn(2, 10, 3, generator=generator))
    edges = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = histogram(stack, edges)
    assert found.entries == 70
    for counts, dense in zip(found.counts, stack.dense(), strict=True):
        assert list(counts) == np.histogram(dense.numpy(), edges.numpy())[0].tolist()
    assert sum(found.counts[0]) < 70, "some are beyond the edges"
    both = found + found
    assert (both.entries, both.counts[1][3]) == (140, 2 * found.counts[1][3])
    with pytest.raises(ValueError, match="over the same edges"):
        found + histogram(stack, edges[1:])
    with pytest.raises(ValueError, match="at least two ascending edges"):
        histogram(stack, edges.flip(0))

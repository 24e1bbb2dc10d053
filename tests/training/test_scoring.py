"""Losses and exact matches of adapters and mixtures, without generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seedlora.training.scoring import ScoredLabels, common_prefix
from tests.helpers.models import SEEDS, built, make_data, moved_in_all
from tests.helpers.precision import SAME

TASK = {"task": "chain_sum", "task_options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}


@pytest.mark.usefixtures("float64")
def test_exact_match_is_what_greedy_generation_gives(tiny_llama):
    """On a model that was trained until it gets some answers right and others wrong."""
    module = built(tiny_llama, 42, r=16)
    data = make_data(task="chain_sum", num_train=16, num_test=0, task_options={"max_digits": 1, "max_terms": 2})
    data.tokenizer = module.tokenizer
    data.setup("fit")
    rows = data.rows["train"]
    ids, labels = rows.padded(range(16))
    module.stack.route(["seed_42"])
    optimizer = torch.optim.AdamW(module.stack.parameters("seed_42"), lr=2e-2)
    matches = 0
    for _ in range(400):
        losses, right, *_ = module.token_losses(ids, labels)
        matches = int(right.all(1).sum())
        if 0 < matches < 16:
            break
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    assert 0 < matches < 16
    module.model.eval()
    with torch.no_grad():
        scored = module.scorer.score({"input_ids": ids, "labels": labels}, ScoredLabels({"it": "seed_42"})).correct[0]
        generated = []
        for i in range(16):
            said = labels[i] != -100
            start = int(said.nonzero()[0])
            answer = ids[i][said]
            new = module.model.generate(
                input_ids=ids[i : i + 1, :start], attention_mask=torch.ones(1, start), max_new_tokens=len(answer),
                do_sample=False, use_cache=False, pad_token_id=0,
            )  # fmt: skip
            generated.append(torch.equal(new[0, start:], answer))
    assert scored.tolist() == generated


def test_a_mixture_is_the_mean_of_the_probabilities(tiny_llama):
    module = built(tiny_llama, 1, 2)
    data = make_data(**TASK)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    ids, labels = data.rows["val"].padded(range(8))
    adapters = {f"seed_{i}": f"seed_{i}" for i in (1, 2)} | {"again": "seed_1"}
    scored = ScoredLabels(adapters, {"mean": ("seed_1", "seed_2")})
    with torch.no_grad():
        losses, right, tokens, _ = module.scorer.score({"input_ids": ids, "labels": labels}, scored)
        p = 0
        for name in ("seed_1", "seed_2"):
            module.stack.route([name])
            p = p + module.model(input_ids=ids).logits.double().softmax(-1) / 2
    targets = labels[:, 1:]
    said = targets != -100
    expected = -p[:, :-1].gather(2, targets.clamp(min=0)[..., None])[..., 0].log()
    assert torch.allclose(losses[3].double(), (expected * said).sum(1), rtol=1e-4)
    assert torch.equal(right[3], ((p[:, :-1].argmax(-1) == targets) | ~said).all(1))
    assert torch.equal(tokens[3], said.sum(1))


def test_more_adapters_than_fit_into_one_forward_score_the_same(tiny_llama, monkeypatch):
    module = built(tiny_llama, 1, 2, 3)
    data = make_data(**TASK)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    ids, labels = data.rows["val"].padded(range(8))
    scored = ScoredLabels({f"seed_{i}": f"seed_{i}" for i in (1, 2, 3)}, {"mean": ("seed_1", "seed_3")})
    with torch.no_grad():
        whole = module.scorer.score({"input_ids": ids, "labels": labels}, scored)
        monkeypatch.setattr("seedlora.training.scoring.ADAPTERS_PER_FORWARD", 2)
        parts = module.scorer.score({"input_ids": ids, "labels": labels}, scored)
    assert torch.allclose(whole[0], parts[0], rtol=1e-5)
    assert torch.equal(whole[1], parts[1])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"adapter": "dora"}, {"modules_to_save": ["lm_head", "norm"]}], ids=str)
def test_rows_that_begin_alike_are_scored_as_whole_rows_are(tiny_llama, options):
    module = moved_in_all(tiny_llama, *SEEDS, **options)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (5, 30), generator=generator)
    ids[:, :12] = ids[0, :12]
    labels = ids.where(torch.arange(30) >= torch.tensor([[14], [20], [12], [29], [13]]), -100)
    labels[1, 25:] = -100  # padding
    scored = ScoredLabels({"base": None, **{f"seed_{seed}": f"seed_{seed}" for seed in SEEDS}})
    scorer = module.scorer
    assert scorer.shares_prefix
    assert common_prefix(ids, labels) == 11
    found = [
        replace(scorer, shares_prefix=shares).score({"input_ids": ids, "labels": labels}, scored)
        for shares in (True, False)
    ]
    for name, shared, whole in zip(found[0]._fields, *found, strict=True):
        torch.testing.assert_close(shared, whole, rtol=SAME, atol=SAME, msg=name)
    assert found[1].losses.unique().numel() == 5 * len(scored.labels)

"""Modules that every replica trains in full; the references are PEFT's own ``modules_to_save`` and plain loops."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.nn.functional import cross_entropy

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.merge.into_base import merge_into_base
from seedlora.training.model_options import PROJECTIONS
from tests.helpers.full_modules import ENDS, save_replica
from tests.helpers.models import ROWS, SEEDS, make_data, make_module, moved_in_all
from tests.helpers.precision import SAME, plain_model, relative
from tests.helpers.training import SILENT, plain_peft_run, saved, train


@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_a_head_of_its_own_scores_blocks_with_different_numbers_of_labels(tiny_llama, tmp_path):
    module = moved_in_all(tiny_llama, *SEEDS, modules_to_save=ENDS)
    labels = ROWS.clone()
    for row, masked in enumerate((1, 6, 3, 7, 0, 5)):
        labels[row, :masked] = -100
    module.stack.route(["seed_11", None, "seed_42"])
    losses, right, keep, _ = module.token_losses(ROWS, labels)
    assert keep.view(3, -1).sum(1).tolist() == [7, 4, 8]
    for block, name in ((0, "seed_11"), (2, "seed_42")):
        save_replica(module, name, tmp_path / name)
        rows = slice(2 * block, 2 * block + 2)
        logits = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / name)(input_ids=ROWS[rows]).logits[
            :, :-1
        ]
        wanted = cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), reduction="none").view(2, -1)
        torch.testing.assert_close(losses[rows, :-1], wanted, atol=SAME, rtol=SAME)
        assert torch.equal(right[rows][keep[rows]], (logits.argmax(-1) == ROWS[rows, 1:])[keep[rows][:, :-1]])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("family", "names"), [("llama", [*ENDS, "norm"]), ("gemma", ["embed_tokens"])])
def test_a_replica_equals_a_plain_peft_loop(model_of, tmp_path, family, names):
    folder = model_of(family)

    def adapt(folder):
        tied = {"ensure_weight_tying": True} if family == "gemma" else {}
        kept = ["model.norm" if name == "norm" else name for name in names]
        config = LoraConfig(r=4, lora_alpha=12, target_modules=list(PROJECTIONS), modules_to_save=kept, **tied)
        return plain_model(folder), config

    callback = train(folder, tmp_path, SEEDS[:2], modules_to_save=names)
    ours = saved(callback.adapter_path(42))
    expected = plain_peft_run(folder, 42, epochs=1, accumulate=2, clip=0.05, adapt=adapt)
    assert {key for key in ours if "lora_" not in key} >= {"base_model.model.model.embed_tokens.weight"}
    for key, tensor in expected.items():
        assert relative(ours[key], tensor) < SAME, key
    before = plain_model(folder).get_input_embeddings().weight
    assert relative(ours["base_model.model.model.embed_tokens.weight"], before) > 1e-3
    if family == "gemma":
        assert torch.equal(ours["base_model.model.lm_head.weight"], ours["base_model.model.model.embed_tokens.weight"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_stacked_alone_in_passes_and_resumed(tiny_llama, tmp_path, adapter):
    """A stack within rounding of a standalone run; passes and resumed runs to the bit."""
    options = {"adapter": adapter, "lora_dropout": 0.1, "modules_to_save": ENDS}
    alone = saved(train(tiny_llama, tmp_path / "alone", SEEDS[1:2], max_steps=3, **options).adapter_path(42))
    stack = train(tiny_llama, tmp_path / "stack", SEEDS[:2], max_steps=3, **options)
    passes = train(tiny_llama, tmp_path / "passes", SEEDS[:2], stack_size=1, max_steps=3, **options)
    with pytest.raises(TimeoutError):
        train(tiny_llama, tmp_path / "stopped", SEEDS[:2], stop=2, max_steps=3, **options)
    resumed = train(tiny_llama, tmp_path / "stopped", SEEDS[:2], resume=True, max_steps=3, **options)
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"} < set(alone)
    for key, tensor in alone.items():
        found = saved(stack.adapter_path(42))[key]
        assert relative(found, tensor) < SAME, key
        assert torch.equal(saved(passes.adapter_path(42))[key], tensor), key
        assert torch.equal(saved(resumed.adapter_path(42))[key], found), key
        assert relative(saved(stack.adapter_path(11))[key], tensor) > 1e-3, key


def test_a_run_averages_full_modules_in_everything_it_scores(tiny_llama, tmp_path):
    """Live, on validation rows, among controls and in the folders; a whole model is the same."""
    callback = SeedEnsembleCallback(
        SEEDS, dirpath=tmp_path, budget="full", stack_size=2, merge="soup", compare="ties", controls="untrained"
    )
    module, data = make_module(tiny_llama, modules_to_save=ENDS), make_data()
    while callback.pending:
        trainer = pl.Trainer(
            max_steps=3, val_check_interval=1, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **SILENT
        )
        trainer.fit(module, datamodule=data)
    seeds = [saved(callback.adapter_path(seed)) for seed in SEEDS]
    fused = saved(tmp_path / "fused")
    for key in ("base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"):
        torch.testing.assert_close(fused[key], sum(seed[key] for seed in seeds) / 3)
    loaded, losses, tokens = PeftModel.from_pretrained(plain_model(tiny_llama), tmp_path / "fused"), 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            labels = batch["labels"][:, 1:]
            logits = loaded(input_ids=batch["input_ids"]).logits[:, :-1]
            losses += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100))
            tokens += int((labels != -100).sum())
    selection = json.loads((tmp_path / "selection.json").read_text())
    assert selection["scores"]["fused"]["loss"] == pytest.approx(losses / tokens, rel=1e-4)
    assert float(trainer.callback_metrics["val/loss_fused"]) == pytest.approx(losses / tokens, rel=1e-4)
    trainer.test(module, datamodule=data, verbose=False)
    assert {"base", "seed_202", "ties", "greedy_soup", "soup"} < set(callback.results.scores)
    module.stack.route(["soup"])
    with torch.no_grad():
        expected = loaded(input_ids=ROWS).logits
        torch.testing.assert_close(module.model(input_ids=ROWS).logits, expected, atol=1e-4, rtol=1e-4)
        merge_into_base([callback.adapter_path(seed) for seed in SEEDS], tiny_llama, tmp_path / "whole", method="soup")
        torch.testing.assert_close(
            plain_model(tmp_path / "whole")(input_ids=ROWS).logits, expected, atol=1e-4, rtol=1e-4
        )
    assert "averaged" in (tmp_path / "fused" / "README.md").read_text()


def test_a_base_in_bfloat16_trains_float32_copies(tiny_llama, tmp_path):
    callback = train(tiny_llama, tmp_path, [42], max_steps=1, dtype="bfloat16", modules_to_save=ENDS)
    ours = saved(callback.adapter_path(42))["base_model.model.lm_head.weight"]
    assert ours.dtype == torch.float32
    step = (ours - plain_model(tiny_llama).lm_head.weight.bfloat16().float()).abs()
    # AdamW's first step is the learning rate, which bfloat16 would have lost on most entries
    assert 0 < step.max() < 2.1e-3
    assert (ours != ours.bfloat16().float()).float().mean() > 0.9

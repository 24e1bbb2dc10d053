"""Every weight trained: replicas that are whole models, merged by what training added."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from seedlora.callbacks import SeedEnsembleCallback
from seedlora.cli.main import main
from seedlora.training.live_updates import load_updates
from seedlora.training.schedule import learning_rate_factor
from seedlora.training.whole_models import WholeModels
from tests.helpers.models import FULL, ROWS, SEEDS, make_data, make_module
from tests.helpers.precision import SAME, plain_model, relative
from tests.helpers.training import SILENT, train


def plain_run(base_model, seed, *, steps, accumulate, clip):
    """Full fine-tuning in plain PyTorch, each row alone in its forward; of ours is the order of the rows."""
    data = make_data()
    data.tokenizer = make_module(base_model).tokenizer
    data.setup("fit")
    data.seeds = (seed,)
    model = plain_model(base_model).eval()  # without GPT-2's own dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    sampler = data.train_dataloader().sampler
    sampler.batch_size, sampler.steps = 2 * accumulate, sampler.steps // accumulate
    for step, micro in zip(range(steps), sampler, strict=False):
        factor = learning_rate_factor(step, "cosine", warmup=-(-6 * steps // 100), total=steps)
        optimizer.param_groups[0]["lr"] = 2e-4 * factor
        losses, tokens = [], 0
        for row in micro.rows[0]:
            ids, labels = data.rows["train"].padded([row])
            logits, said = model(input_ids=ids).logits[0, :-1], labels[0, 1:] != -100
            losses.append(cross_entropy(logits[said], ids[0, 1:][said], reduction="sum"))
            tokens += int(said.sum())
        (sum(losses) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "qwen2"])
def test_a_replica_is_what_a_plain_loop_trains(model_of, tmp_path, family):
    """In a stack and alone; the folder is one that transformers loads."""
    folder = model_of(family)
    callback = train(folder, tmp_path / "stack", SEEDS[:2], stack_size=2, max_steps=3, **FULL)
    expected = plain_run(folder, 42, steps=3, accumulate=2, clip=0.05)
    found = load_file(callback.adapter_path(42) / "model.safetensors")
    assert set(found) == set(load_file(Path(folder) / "model.safetensors"))
    for key, tensor in found.items():
        assert relative(tensor, expected[key]) < SAME, key
    loaded = plain_model(callback.adapter_path(42)).state_dict()
    assert all(relative(loaded[key], tensor) < 1e-7 for key, tensor in found.items())  # read in float32
    if family != "llama":
        assert (callback.adapter_path(42) / "tokenizer.json").is_file()
        return
    alone = train(folder, tmp_path / "alone", SEEDS[1:2], max_steps=3, **FULL)
    passes = train(folder, tmp_path / "passes", SEEDS[:2], max_steps=3, **FULL)  # one at a time is the default
    with pytest.raises(TimeoutError):
        train(folder, tmp_path / "stopped", SEEDS[1:2], stop=2, max_steps=3, **FULL)
    resumed = train(folder, tmp_path / "stopped", SEEDS[1:2], resume=True, max_steps=3, **FULL)
    for key, tensor in load_file(alone.adapter_path(42) / "model.safetensors").items():
        assert relative(found[key], tensor) < SAME
        for other in (passes, resumed):
            assert torch.equal(load_file(other.adapter_path(42) / "model.safetensors")[key], tensor), key


def test_copies_start_at_the_files_where_the_base_is_rounded(tiny_llama, tmp_path):
    """Or the rounding of the base would be merged as if it had been learnt."""
    options = FULL | {"learning_rate": 1e-9, "dtype": "bfloat16"}
    callback = train(tiny_llama, tmp_path, [42], max_steps=1, **options)
    found = plain_model(callback.adapter_path(42)).state_dict()
    for key, tensor in plain_model(tiny_llama).state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-7, rtol=0)


@pytest.fixture(scope="module")
def whole_run(tiny_llama, tmp_path_factory):
    """A run of whole models, merged by SeedLoRA, with TIES beside it; what it scored."""
    folder = tmp_path_factory.mktemp("whole")
    callback = SeedEnsembleCallback(SEEDS, dirpath=folder, budget="full", compare="ties")
    module, data = make_module(tiny_llama, **FULL), make_data()
    while callback.pending:
        trainer = pl.Trainer(max_steps=3, callbacks=[callback], accelerator="cpu", num_sanity_val_steps=0, **SILENT)
        trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return callback, module, data


def test_whole_models_are_merged_by_the_rule_on_what_training_added(tiny_llama, whole_run):
    callback, *_ = whole_run
    before = plain_model(tiny_llama).state_dict()
    seeds = [plain_model(callback.adapter_path(seed)).state_dict() for seed in SEEDS]
    fused, soup = (plain_model(callback.dirpath / name).state_dict() for name in ("fused", "soup"))
    for key, start in before.items():
        added = torch.stack([seed[key] - start for seed in seeds]).double()
        mean = added.mean(0)
        torch.testing.assert_close(soup[key], (start + mean).float(), atol=1e-6, rtol=1e-5)
        if start.ndim == 2:
            sigma = added.flatten(1).std(1, correction=0).mean()
            wanted = sigma * (mean - mean.mean()) / mean.std(correction=0) + added.mean((1, 2)).mean()
            assert relative(fused[key].double() - start, wanted) < 1e-3, key
            assert relative(fused[key].double() - start, mean) > 1e-2, key
        else:
            torch.testing.assert_close(fused[key], soup[key])
    record = json.loads((callback.fused_path / "fusion.json").read_text())
    assert record["averaged"] == ["input_layernorm", "norm", "post_attention_layernorm"]
    card = (callback.fused_path / "README.md").read_text()
    assert "3 models merged with `seedlora`" in card
    assert "averaged: `input_layernorm`" in card
    assert f"--method seedlora --into_base {tiny_llama}" in card
    assert "**this model**" in card
    assert "rank of a seed" not in card


def test_whole_models_are_scored_as_their_folders_answer(whole_run):
    callback, module, data = whole_run
    scores = callback.results.scores
    assert list(scores) == ["base", "seed_11", "seed_42", "seed_202", "soup", "ties", "fused"]
    sample = json.loads((callback.dirpath / "results.json").read_text())["train_sample"]
    assert list(sample["losses"]) == list(scores)
    answers = plain_model(callback.fused_path)
    correct, losses, tokens = [], 0.0, 0
    for batch in data.train_sample(sample["rows"]):
        with torch.no_grad():
            logits = answers(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        losses += float(cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100))
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    assert sample["losses"]["fused"]["value"] == pytest.approx(losses / tokens, rel=1e-4)
    for batch in data.test_dataloader():
        predicted = answers(input_ids=batch["input_ids"]).logits[:, :-1].argmax(-1)
        labels = batch["labels"][:, 1:]
        right = ((predicted == labels) | (labels == -100)).all(1)
        correct += right[batch["items"] >= 0].tolist()
    assert scores["fused"].value == pytest.approx(sum(correct) / len(correct))
    load_updates(module.stack, "fused", WholeModels(module.stack, module.options).read(callback.fused_path))
    module.stack.route([None, "fused"])
    with torch.no_grad():
        rows = torch.cat([ROWS, ROWS])
        torch.testing.assert_close(module.model(input_ids=rows).logits[6:], answers(input_ids=ROWS).logits)


def test_whole_models_trained_elsewhere_go_through_merge(tiny_llama, whole_run, tmp_path, capsys):
    callback, *_ = whole_run
    models = [str(callback.adapter_path(seed)) for seed in SEEDS]
    assert main(["merge", *models, "--out", str(tmp_path / "no")]) == 2
    assert "seed_11 is a whole model and no adapter; python -m seedlora merge merges such models by --into_base" in (
        capsys.readouterr().err
    )
    assert main(["merge", *models, "--into_base", tiny_llama, "--out", str(tmp_path / "out")]) == 0
    found, expected = (plain_model(folder).state_dict() for folder in (tmp_path / "out", callback.fused_path))
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    for options, message in (
        (["--method", "tsv_m"], "works on the factors"),
        (["--rank", "4"], "rank 4 is for adapters"),
    ):
        assert main(["merge", *models, "--into_base", tiny_llama, "--out", str(tmp_path / "no"), *options]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()

"""What is chosen on validation rows and what is scored beside the seeds: against separate runs and dense formulas."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules import ReasoningGym
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import make_rule
from seedlora.selection.comparison import Comparison
from tests.helpers.models import make_data, make_module
from tests.helpers.training import SILENT, make_trainer

SEEDS = [1, 2, 3]
TASK = {"task": "chain_sum", "task_options": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}}


def fit(folder, base_model, *, seeds=SEEDS, data=None, test=True, module=None, **options):
    callback = SeedEnsembleCallback(seeds, dirpath=folder, **options)
    module = module or make_module(base_model, learning_rate=2e-2)
    data = data or make_data(**TASK)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    run = lambda **kw: pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, **quiet, **kw)  # noqa: E731
    while callback.pending or callback.pending_controls:
        limits = callback.ensemble.control_limits(max_epochs=3, max_steps=-1)
        trainer = run(**{"max_epochs": 3, **limits})
        trainer.fit(module, datamodule=data)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    return callback, module, data


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def everything(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return fit(folder / "x", tiny_llama, merge="auto", compare="ties,greedy_soup", controls="all")


def test_all_are_scored_on_the_same_items(everything):
    callback, _, data = everything
    labels = list(callback.results.items)
    assert labels[:4] == ["base", "seed_1", "seed_2", "seed_3"]
    controls = {"long_seed", "wide_seed", "logit_mean", "gain_seed", "gain_soup", "greedy_soup"}
    assert set(labels[4:]) == {*controls, "ties", "soup", "fused"}
    assert labels[-1] == "fused"
    assert {len(digits) for digits in callback.results.items.values()} == {12}
    stored = json.loads((callback.dirpath / "results.json").read_text())
    assert stored["items"] == callback.results.items
    terms = [data.items["test"][number]["metadata"]["num_terms"] for number in data.rows["test"].numbers]
    assert stored["domains"]["num_terms"] == [str(term) for term in terms]


def test_validation_scores_are_those_of_the_written_adapters(everything):
    """Against one adapter, all rows in one forward."""
    callback, module, data = everything
    ids, labels = data.rows["val"].padded(range(8))
    stacks = stack_adapters({str(seed): read_adapter(callback.adapter_path(seed)) for seed in SEEDS})
    found = callback.ensemble.folder.selection
    named = {row["name"]: row for row in found["candidates"]}
    on_ffn = make_rule("seedlora_gain", {"p": 0.75, "layers": "ffn", "rest": "soup"})
    for layers, row in (
        (read_adapter(callback.fused_path).layers, found["scores"]["fused"]),
        (read_adapter(callback.dirpath / "soup").layers, found["scores"]["soup"]),
        (merge_stacks(stacks, soup), named["soup"]),
        (merge_stacks(stacks, on_ffn), named["seedlora_gain p=0.75 on ffn"]),
    ):
        module.stack.load("it", layers)
        module.stack.route(["it"])
        with torch.no_grad():
            losses, _, keep, _ = module.token_losses(ids, labels)
        assert row["loss"] == pytest.approx((losses.sum() / keep.sum()).item(), rel=1e-5)
    best = min(found["candidates"], key=lambda row: row["loss"])
    assert found["chosen"]["name"] == best["name"]
    assert found["scores"]["fused"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert json.loads((callback.fused_path / "fusion.json").read_text())["method"] == found["chosen"]["method"]
    assert [len(row["seeds"]) for row in found["subsets"]] == [1, 1, 1, 2, 2, 2, 3]
    tuned = found["controls"]["gain_soup"]
    assert min(row["loss"] for row in tuned["candidates"]) == found["scores"]["gain_soup"]["loss"]


def test_all_that_was_tested_has_a_loss_on_the_same_training_rows(everything):
    """Against PEFT's way through the model, a row and an adapter at a time."""
    callback, module, data = everything
    results = json.loads((callback.dirpath / "results.json").read_text())
    found, rows = results["train_sample"], data.rows["train"]
    assert found["losses"].keys() == callback.results.items.keys()
    assert found["rows"] == 12  # as many as test items
    drawn = sorted(np.random.default_rng(0).permutation(24)[:12].tolist())
    stacks = stack_adapters({str(seed): read_adapter(callback.adapter_path(seed)) for seed in SEEDS})
    adapters = {"base": None, "ties": merge_stacks(stacks, make_rule("ties"))}
    folders = ("seed_1", "seed_2", "seed_3", "long_seed", "wide_seed", "soup", "fused")
    adapters |= {name: read_adapter(callback.dirpath / name).layers for name in folders}
    losses = {}
    for name, layers in adapters.items():
        if layers is not None:
            module.stack.load(name, layers)
        module.stack.route([None if layers is None else name])
        losses[name] = []
        for row in drawn:
            ids, labels = rows.padded([row])
            with torch.no_grad():
                logp = module.model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            kept = labels[0, 1:] != -100
            losses[name].append(-logp[0].gather(1, ids[0, 1:, None])[kept, 0])
    members = [torch.cat(losses[f"seed_{seed}"]) for seed in SEEDS]
    losses["logit_mean"] = [-torch.stack([(-loss).exp() for loss in members]).mean(0).log()]
    for name, parts in losses.items():
        assert found["losses"][name]["value"] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-4), name
    assert found["tokens"] == sum(map(len, losses["soup"]))
    # A bootstrap of our own, of rows with their tokens.
    rng = np.random.default_rng(7)
    sums, sizes = (np.array([float(of(part)) for part in losses["soup"]]) for of in (torch.sum, len))
    some = rng.integers(12, size=(20_000, 12))
    interval = np.quantile(sums[some].sum(1) / sizes[some].sum(1), [0.025, 0.975])
    row = found["losses"]["soup"]
    # Student's is wider on twelve rows, and by no more than his quantile at four degrees of freedom makes it.
    assert row["low"] <= interval[0] < interval[1] <= row["high"]
    assert row["high"] - row["low"] <= 1.75 * (interval[1] - interval[0])


def test_the_training_rows_do_not_change_what_the_test_says(everything):
    """The outcomes of what is scored beside the test's own pass, on the test's batches alone."""
    callback, module, data = everything
    made = {name: make() for name, make in callback.ensemble.beside(module.device).items()}
    alone = module.scorer.score_rows(made, data.test_dataloader())
    for name, row in alone.items():
        assert callback.results.items[name] == "".join("01"[int(right)] for right in row.correct), name
        assert len(row.tokens) == 12
    assert "1" in "".join(callback.results.items.values()), "some are right, or nothing would be compared"


def test_a_trained_control_is_the_run_it_stands_for(everything, tiny_llama, tmp_path):
    callback, *_ = everything
    one = {"seeds": [1], "merge": "none", "test": False}
    fit(tmp_path / "long", tiny_llama, **one)
    assert weights(tmp_path / "long" / "seed_1") == weights(callback.dirpath / "long_seed")
    assert json.loads((callback.dirpath / "long_seed" / "control.json").read_text()) == {"seeds": 3}
    wide = make_module(tiny_llama, learning_rate=2e-2, r=12, lora_alpha=36)
    plain, *_ = fit(tmp_path / "wide", tiny_llama, module=wide, seeds=[1, 5, 6], merge="none", test=False, stack_size=1)
    assert weights(plain.adapter_path(1)) == weights(callback.dirpath / "wide_seed")


def test_comparing_does_not_change_the_seeds(everything, tiny_llama, tmp_path):
    callback, *_ = everything
    plain, *_ = fit(tmp_path / "x", tiny_llama, merge="soup", test=False)
    for seed in SEEDS:
        assert weights(plain.adapter_path(seed)) == weights(callback.adapter_path(seed))
    # soup as the method is not written twice
    assert not (plain.dirpath / "soup").exists()
    assert weights(plain.fused_path) == weights(callback.dirpath / "soup")


def test_soup_as_the_method_is_not_an_older_soup(tiny_llama, tmp_path):
    same = {"budget": "full"}
    fit(tmp_path / "x", tiny_llama, seeds=[1, 2], **same)
    assert (tmp_path / "x" / "soup").is_dir()
    callback, module, _ = fit(tmp_path / "x", tiny_llama, merge="soup", resume=True, **same)
    assert not (callback.dirpath / "soup").exists()
    scored = module.stack.loaded_sha256("soup")
    module.stack.load("of today", read_adapter(callback.fused_path).layers)
    assert scored == module.stack.loaded_sha256("of today")


def test_a_test_returns_and_logs_scores_and_losses(tiny_llama, tmp_path):
    callback, module, data = fit(tmp_path / "x", tiny_llama, seeds=[1, 2], merge="ties", budget="full", test=False)
    logger = CSVLogger(tmp_path / "logs")
    run = pl.Trainer(callbacks=[callback], accelerator="cpu", **{**SILENT, "logger": logger})
    (found,) = run.test(module, datamodule=data, verbose=False)
    labels = ["base", "seed_1", "seed_2", "soup", "fused"]
    assert found.keys() == {f"test/{kind}_{label}" for kind in ("score", "loss") for label in labels}
    for label, score in callback.results.scores.items():
        assert found[f"test/score_{label}"] == pytest.approx(score.value)
        assert run.callback_metrics[f"test/score_{label}"].item() == pytest.approx(score.value)
    rows = module.scorer.score_batches(data.test_dataloader(), module.scored)
    assert found["test/loss_fused"] == pytest.approx(rows["fused"].loss, rel=1e-4)
    assert "test/loss_fused" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_validation_after_a_test_leaves_its_results_unless_it_merges_otherwise(tiny_llama, tmp_path, capsys):
    callback, module, data = fit(tmp_path / "x", tiny_llama, seeds=[1, 2], merge="ties", budget="full")
    results, card = (callback.dirpath / name for name in ("results.json", "fused/README.md"))
    said = results.read_bytes(), card.read_bytes()
    assert b"this adapter" in said[1]
    make_trainer(callback).validate(module, datamodule=data, verbose=False)
    assert (results.read_bytes(), card.read_bytes()) == said
    assert capsys.readouterr().err == ""
    other = SeedEnsembleCallback([1, 2], budget="full", merge="seedlora", dirpath=callback.dirpath)
    make_trainer(other).validate(module, datamodule=data, verbose=False)
    assert not results.exists()
    removed = "removed results.json and samples.jsonl, said of an earlier merge; the test says it anew"
    assert capsys.readouterr().err == f"{callback.dirpath}: {removed}\n"


def test_a_control_that_is_missing_is_trained_alone(everything, tiny_llama, tmp_path):
    callback, *_ = everything
    folder = shutil.copytree(callback.dirpath, tmp_path / "x")
    shutil.rmtree(folder / "wide_seed")
    before = (folder / "long_seed" / "adapter_model.safetensors").stat().st_mtime_ns
    again, *_ = fit(folder, tiny_llama, merge="auto", controls="all", test=False, resume=True)
    assert weights(folder / "wide_seed") == weights(callback.dirpath / "wide_seed")
    assert (folder / "long_seed" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert again.pending_controls == ()


def test_the_full_budget_gives_the_long_control_as_much_as_all_seeds(tmp_path):
    callback = SeedEnsembleCallback([1, 2], budget="full", controls="all", dirpath=tmp_path)
    assert callback.ensemble.control_limits(max_epochs=3, max_steps=-1) == {}
    for seed in (1, 2):
        callback.adapter_path(seed).mkdir()
        (callback.adapter_path(seed) / "adapter_config.json").write_text("{}")
    assert callback.ensemble.control_limits(max_epochs=3, max_steps=-1) == {"max_epochs": 6}
    assert callback.ensemble.next_names == ("long_seed",)


class _Untouchable(ReasoningGym):
    """Its test rows cannot be read until they are allowed to."""

    allowed = False

    def test_dataloader(self):
        assert self.allowed
        return super().test_dataloader()

    @property
    def rows(self):
        return {k: v for k, v in self._rows.items() if k != "test" or self.allowed}

    @rows.setter
    def rows(self, value):
        self._rows = value


class _OfSomebodysOwn(_Untouchable):
    """It has no training rows to be scored."""

    train_sample = None


def test_selection_never_sees_a_test_item(tiny_llama, tmp_path):
    """Neither the rows, nor through what they say: with other test items the same is chosen, to the bit."""
    chosen = []
    for name, num_test, kind in (("a", 12, _Untouchable), ("b", 7, _OfSomebodysOwn)):
        data = kind(num_train=24, num_val=8, num_test=num_test, batch_size=2, eval_batch_size=5, **TASK)
        options = {"merge": "auto_gain", "controls": "untrained", "test": False}
        callback, module, _ = fit(tmp_path / name, tiny_llama, data=data, **options)
        selection = (callback.dirpath / "selection.json").read_bytes()
        chosen.append((selection, weights(callback.fused_path)))
        data.allowed = True
        trainer = pl.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.test(module, datamodule=data, verbose=False)
        assert callback.results.scores["fused"].n == num_test
        assert ("train_sample" in json.loads((callback.dirpath / "results.json").read_text())) == (name == "a")
        assert (callback.dirpath / "selection.json").read_bytes() == selection
        assert weights(callback.fused_path) == chosen[-1][1]
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"merge": "auto"}, "merge=.auto. chooses on"),
        ({"merge": "auto_gain"}, "merge=.auto_gain. chooses on"),
        ({"controls": "untrained"}, "controls=.untrained. chooses on"),
        ({"compare": ["greedy_soup"]}, "compare=.greedy_soup. chooses on"),
    ],
)
def test_without_validation_rows_nothing_is_trained(tiny_llama, tmp_path, options, reason):
    with pytest.raises(ValueError, match=f"{reason} validation rows, and there are none"):
        fit(tmp_path / "x", tiny_llama, data=make_data(num_val=0), **options)
    assert not (tmp_path / "x").exists()


def test_what_is_given_is_not_chosen(tiny_llama, tmp_path):
    assert not Comparison("seedlora_gain", {"p": 1}).chooses
    assert Comparison("seedlora", compare=["seedlora", "soup", "ties"]).compare.keys() == {"ties"}
    callback, *_ = fit(tmp_path / "x", tiny_llama, seeds=[1], merge="auto", controls="all")
    assert callback.ensemble.folder.selection["chosen"] is None
    assert list(callback.results.items) == ["base", "seed_1", "fused"]

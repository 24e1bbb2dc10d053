"""What is chosen on validation rows and what is scored beside the seeds: against separate runs and dense formulas."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from seedlora.adapters.reading import read_adapter
from seedlora.callbacks import SeedEnsembleCallback
from seedlora.datamodules import ReasoningGym
from seedlora.merge.inputs import stack_adapters
from seedlora.merge.layers import merge_stacks
from seedlora.merge.methods.soup import soup
from seedlora.merge.registry import make_rule
from seedlora.scores.advice import advice
from seedlora.scores.intervals import loss_difference
from seedlora.scores.results import Results, results
from seedlora.scores.row_scores import RowScores
from seedlora.selection.comparison import Comparison
from seedlora.selection.settling import settle
from seedlora.training.scoring import ScoredLabels
from tests.helpers.models import built, make_data, make_module
from tests.selection.test_candidates import rows, stacks

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
            losses, _, keep = module.token_losses(ids, labels)
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
    np.testing.assert_allclose([row["low"], row["high"]], interval, atol=0.03 * (row["high"] - row["low"]))


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


def test_a_mixture_is_the_mean_of_the_probabilities(tiny_llama):
    module = built(tiny_llama, 1, 2)
    data = make_data(**TASK)
    data.tokenizer = module.tokenizer
    data.setup("fit")
    ids, labels = data.rows["val"].padded(range(8))
    adapters = {f"seed_{i}": f"seed_{i}" for i in (1, 2)} | {"again": "seed_1"}
    scored = ScoredLabels(adapters, {"mean": ("seed_1", "seed_2")})
    with torch.no_grad():
        losses, right, tokens = module.scorer.score({"input_ids": ids, "labels": labels}, scored)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge": "auto", "options": {"p": 1}}, "Merge method 'auto' chooses the options too"),
        ({"merge": "tie"}, "Unknown merge method 'tie'; choose one of .* 'auto' and 'auto_gain' choose"),
        ({"merge": "auto_gain", "options": {"cup": 1}}, "has no option 'cup'"),
        ({"merge": "seedlora_gain"}, "seedlora_gain needs its p, .* to choose it on validation rows, take auto_gain"),
        ({"compare": ["ties", "tie"]}, "Unknown merge method 'tie'"),
        ({"compare": ["ties"], "compare_options": {"ties": {"density": 2}}}, "Merge method 'ties': density"),
        ({"compare": ["ties"], "compare_options": {"soup": {}}}, "names soup, which ensemble.compare does not"),
        ({"compare": ["ties", "ties"]}, "names ties more than once"),
        ({"merge": "none", "controls": "all"}, "ensemble.controls is tuned where seeds are merged"),
        ({"merge": "none", "compare": ["greedy_soup"]}, "ensemble.compare greedy_soup is tuned where seeds are merged"),
        ({"controls": "some"}, "Unknown ensemble.controls 'some'; choose one of none, untrained, all"),
        ({"select_by": "lose"}, "Unknown ensemble.select_by 'lose'"),
    ],
)
def test_what_cannot_be_compared_is_said_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        Comparison(**options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"merge": "auto"}, "--merge auto chooses on"),
        ({"merge": "auto_gain"}, "--merge auto_gain chooses on"),
        ({"controls": "untrained"}, "ensemble.controls chooses on"),
        ({"compare": ["greedy_soup"]}, "ensemble.compare greedy_soup chooses on"),
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


def test_a_loss_that_is_no_number_is_never_chosen_nor_written():
    stack = stacks()
    bad = {path: factors.dense()[1] for path, factors in stack.items()}

    def score(adapters):
        alike = {
            name: all(torch.allclose(layers[path].dense()[0], bad[path]) for path in layers)
            for name, layers in adapters.items()
        }
        return {name: rows(math.nan if alike[name] else 1.0, 0.5) for name in adapters}

    for merge in ("auto", "auto_gain", "greedy_soup", "seedlora"):
        settled = settle(Comparison(merge, controls="untrained"), stack, ["seed_1", "seed_2", "seed_3"], score)
        rule, found = settled.rule, settled.selection
        json.dumps(found, allow_nan=False)
        assert found["best_seed"] == "seed_1"
        assert "seed_2" not in found["scores"]
        assert "seed_2" in found["not_finite"]
        assert found["controls"]["greedy_soup"]["members"][0] != 1
        assert found["against"]["soup"]["value"] == 0
        assert rule.name == (merge if merge == "seedlora" else "soup" if merge != "greedy_soup" else merge)


def results_with(**right: int) -> Results:
    """A test of which adapters get the first so many of 100 items right."""
    outcomes = np.stack([np.arange(100) < count for count in right.values()], axis=1)
    return results(outcomes, list(right), ["seed_1"] if "seed_1" in right else [], metric="it")


def difference(value: float, shown: bool = True) -> dict[str, object]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 64, "shown": shown}


def test_advice_names_the_better_adapter_and_where_the_measures_disagree():
    losses = {"fused": 1.064, "soup": 0.972, "seed_1": 0.973, "seed_2": 0.995}
    selection = {
        "best_seed": "seed_1",
        "scores": {label: {"loss": loss, "match": 0.0} for label, loss in losses.items()},
        "against": {"soup": difference(0.092), "seed_1": difference(0.091)},
    }
    judged = lambda test, chosen=selection: advice(chosen, test, ["seed_1", "seed_2"], method="seedlora")  # noqa: E731
    found = judged(results_with(fused=40, soup=60, seed_1=42))
    assert found["better"] == "soup"
    assert found["sentences"][0].startswith(
        "The fused adapter (seedlora) is worse than soup: its validation loss is 1.064 against 0.972 "
        "(+0.092, +0.082 to +0.102, n = 64) and it gets 20.0 points less of the test items (-28.0 to -12.0, n = 100)."
    )
    assert "worse than seed_1, the best seed of the validation rows: its validation loss" in found["sentences"][1]
    found = judged(results_with(fused=60, soup=40, seed_1=40))
    assert found["better"] is None
    assert "Against soup, its validation loss is 1.064" in found["sentences"][0]
    assert "but it gets 20.0 points more of the test items" in found["sentences"][0]
    better = {**selection, "against": {"soup": difference(-0.1), "seed_1": difference(0.1, shown=False)}}
    assert judged(None, better) == {"sentences": [], "better": None}
    assert judged(results_with(fused=10, soup=60), None)["better"] == "soup"
    assert judged(None, None) == {"sentences": [], "better": None}


def test_a_control_of_another_rank_needs_the_same_start(tiny_llama, tmp_path):
    callback = SeedEnsembleCallback(dirpath=tmp_path / "run", controls="all")
    with pytest.raises(ValueError, match="controls all trains an adapter of another rank.*pissa.*use untrained"):
        callback.open(None, make_module(tiny_llama, adapter="pissa"), None)
    assert not (tmp_path / "run").exists()


def test_the_interval_of_a_loss_difference_resamples_rows_with_their_tokens():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 60, size=80)
    first, second = (torch.tensor(tokens * rng.normal(mean, 0.4, size=80)) for mean in (2.0, 1.8))
    a, b = (RowScores(losses, torch.zeros(80, dtype=torch.bool), torch.tensor(tokens)) for losses in (first, second))
    found = loss_difference(a, b)
    draws = []
    for _ in range(4000):
        some = rng.integers(80, size=80)
        draws.append(float((first - second)[some].sum()) / tokens[some].sum())
    assert found["value"] == pytest.approx(a.loss - b.loss)
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(draws, [0.025, 0.975]), atol=0.012)
    # One difference per token, whatever the row's length: no resample can say otherwise.
    c = RowScores(second + 0.25 * torch.tensor(tokens), b.correct, b.tokens)
    same = loss_difference(c, b)
    assert (same["low"], same["high"]) == pytest.approx((0.25, 0.25))


def test_what_one_seed_cannot_use_is_said():
    asked = Comparison("auto", compare=["ties"], controls="untrained")
    assert asked.nothing_for(1) == (
        "With one seed --merge auto, --compare, --controls do nothing: there is nothing to merge or compare."
    )
    assert asked.nothing_for(2) is None
    assert Comparison("seedlora").nothing_for(1) is None

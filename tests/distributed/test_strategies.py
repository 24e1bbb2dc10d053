"""Two processes give the fused adapter of one, under every strategy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from seedlora.adapters.reading import read_adapter
from tests.helpers import strategies_job
from tests.helpers.precision import SAME, assert_trained_alike, in_float64


def difference(a, b):
    """Largest relative difference of any layer's update."""
    a, b = (read_adapter(folder).layers for folder in (a, b))
    assert set(a) == set(b)
    return max(((a[path].dense() - b[path].dense()).norm() / a[path].dense().norm()).item() for path in a)


@pytest.fixture(scope="module")
def one(tiny_llama, tmp_path_factory):
    """The folder and the metrics of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    with in_float64():
        return folder, strategies_job.run(tiny_llama, folder, batch_size=4, strategy=lambda: "auto", devices=1)


@pytest.fixture(scope="module")
def two(tiny_llama, tmp_path_factory):
    """The folder with what two processes made under each strategy."""
    folder = tmp_path_factory.mktemp("two")
    strategies_job.start(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("name", strategies_job.STRATEGIES)
def test_two_processes_give_the_adapters_and_the_scores_of_one(one, two, name):
    folder, metrics = one
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(folder / adapter, two / name / adapter) < SAME
    found = json.loads((two / name / "metrics.json").read_text())
    for key in ("val/loss_seed_11", "val/loss_seed_202", "val/loss_fused", "val/match_fused"):
        assert found[key] == pytest.approx(metrics[key], rel=SAME)
    for label in ("base", "seed_42", "soup", "fused", "ties"):
        assert found[f"test/{label}"] == metrics[f"test/{label}"]
    chosen, wanted = (json.loads((run / "selection.json").read_text()) for run in (two / name, folder))
    assert chosen["rows"] == 9
    for label in ("seed_11", "seed_42", "seed_202", "soup", "fused"):
        assert chosen["scores"][label]["loss"] == pytest.approx(wanted["scores"][label]["loss"], rel=SAME)
    assert found["test/fused"][1] == 13
    sample, expected = (json.loads((run / "results.json").read_text())["train_sample"] for run in (two / name, folder))
    assert (sample["rows"], sample["tokens"]) == (13, expected["tokens"])
    assert sample["losses"].keys() == {"base", "seed_11", "seed_42", "seed_202", "soup", "fused", "ties"}
    for label, row in sample["losses"].items():
        assert row == pytest.approx(expected["losses"][label], rel=SAME), label


@pytest.mark.usefixtures("float64")
def test_two_processes_train_replicas_of_different_options_as_one_does(tiny_llama, two, tmp_path):
    options = {"batch_size": 4, "strategy": lambda: "auto", "devices": 1, "sweep": strategies_job.SWEPT}
    strategies_job.run(tiny_llama, tmp_path, **options)
    names = [*(folder.name for folder in tmp_path.glob("seed_*")), "fused"]
    assert len(names) == 4
    for name in names:
        for strategy in ("ddp", "zero2"):
            assert difference(tmp_path / name, two / f"swept {strategy}" / name) < SAME, (name, strategy)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scheme", strategies_job.SCHEMES)
def test_two_processes_train_a_scheme_as_one_does(tiny_llama, two, tmp_path, scheme):
    options = {"batch_size": 4, "strategy": lambda: "auto", "devices": 1, "scheme": strategies_job.SCHEMES[scheme]}
    strategies_job.run(tiny_llama, tmp_path, **options)
    # a halving leaves two of the three
    trained = [path.name for path in tmp_path.glob("seed_*") if path.is_dir()]
    assert len(trained) == {"branch": 6, "local": 3, "halved": 2}[scheme]
    assert {*trained} == {path.name for path in (two / scheme).glob("seed_*")}
    for name in (*trained, "fused"):
        assert difference(tmp_path / name, two / scheme / name) < SAME, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", strategies_job.KINDS)
def test_two_processes_give_the_adapters_of_one_of_every_kind(tiny_llama, tmp_path, kind):
    strategies_job.start(tiny_llama, tmp_path, kind)
    one, options = tmp_path / "one", strategies_job.KINDS[kind]
    with strategies_job.precision_of(kind):
        strategies_job.run(tiny_llama, one, batch_size=4, strategy=lambda: "auto", devices=1, **options)
    for name in strategies_job.strategies_of(kind):
        for seed in ("seed_11", "seed_42", "seed_202"):
            file = Path(seed) / ("model.safetensors" if kind == "full" else "adapter_model.safetensors")
            expected, found = load_file(one / file), load_file(tmp_path / name / file)
            if (noise := strategies_job.IN_FLOAT32.get(kind)) is not None:
                rate = options.get("learning_rate", 2e-3)
                assert_trained_alike(found, expected, steps=3, rate=rate, noise=noise)
                continue
            for key, tensor in expected.items():
                assert ((found[key] - tensor).norm() / tensor.norm()).item() < SAME, (name, key)
        assert (tmp_path / name / "fused" / "fusion.json").is_file()
    if kind == "full":
        scored = {path.name: path.read_text() for path in tmp_path.glob("* scores ties")}
        assert len(scored) == 2
        assert len(set(scored.values())) == 1
        assert len(list(tmp_path.glob("* merges ties"))) == 1


@pytest.mark.usefixtures("float64")
def test_two_processes_exclude_a_diverged_seed_as_one_does(tiny_llama, two, tmp_path):
    poison = (strategies_job.Poison("seed_42", 2),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=poison)
    assert json.loads((two / "excluded" / "excluded.json").read_text()) == {
        "seed_42": "training loss not finite in step 3"
    }
    assert not (two / "excluded" / "seed_42").exists()
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "excluded" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_two_processes_find_weights_that_a_last_step_broke(tiny_llama, two, tmp_path):
    poison = (strategies_job.Break("seed_42", 3),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=poison)
    for folder in (tmp_path, two / "broken"):
        excluded = json.loads((folder / "excluded.json").read_text())
        assert excluded == {"seed_42": "weights not finite after step 3"}
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "broken" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_two_processes_stop_seeds_and_keep_their_best_weights_as_one_does(tiny_llama, two, tmp_path):
    options = {"watched": True, **strategies_job.WATCHED}
    wanted = strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, **options)
    found = json.loads((two / "watched" / "metrics.json").read_text())
    decided = [{k: v for k, v in of.items() if k.startswith(("best step", "stopped"))} for of in (wanted, found)]
    assert decided[0] == decided[1]
    assert {key.split()[0] for key in decided[0]} == {"best", "stopped"}
    for adapter in ("seed_11", "seed_42", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "watched" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_a_stopped_seed_keeps_still_in_two_processes_as_in_one(tiny_llama, two, tmp_path):
    stop = (strategies_job.Stop("seed_42", 2),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=stop)
    for adapter in ("seed_11", "seed_42", "seed_202"):
        assert difference(tmp_path / adapter, two / "stopped" / adapter) < SAME

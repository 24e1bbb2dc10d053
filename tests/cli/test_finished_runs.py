"""Commands on a folder that holds a run: tested, merged again, with one more seed, or left as it is."""

from __future__ import annotations

import json
from pathlib import Path

from seedlora.cli.train import main
from tests.helpers.commands import train


def test_a_folder_with_a_run_is_not_overwritten(tiny_llama, capsys):
    assert train(tiny_llama, "--ensemble.dirpath", "here") == 0
    before = Path("here/fused/adapter_model.safetensors").stat().st_mtime_ns
    assert train(tiny_llama, "--ensemble.dirpath", "here") == 2
    assert "here already holds a run; go on with it by --resume" in capsys.readouterr().err
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--resume", "--model.r", "4") == 2
    assert "here was started with model.r = 8, now it is 4" in capsys.readouterr().err
    assert Path("here/fused/adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_run_does_not_go_on_with_other_rows_at_the_same_path(tiny_llama, capsys):
    rows = [{"prompt": f"{i}?", "response": "yes"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "rows.jsonl", "--merge"]
    options += ["none", "--ensemble.seeds", "[1]", "--ensemble.dirpath", "here", "--trainer.max_steps", "1"]
    assert main(options) == 0
    rows[3]["response"] = "no"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*options, "--resume"]) == 2
    assert "here was started with sha256 of the train rows = '" in capsys.readouterr().err


def test_one_more_seed_trains_just_that_seed(tiny_llama):
    same = ["--ensemble.dirpath", "here", "--ensemble.budget", "full", "--trainer.max_epochs", "1"]
    assert train(tiny_llama, *same, "--ensemble.seeds", "[1,2]") == 0
    before = {seed: Path(f"here/seed_{seed}/adapter_model.safetensors").stat().st_mtime_ns for seed in (1, 2)}
    assert train(tiny_llama, *same, "--ensemble.seeds", "[1,2,3]", "--resume") == 0
    after = {seed: Path(f"here/seed_{seed}/adapter_model.safetensors").stat().st_mtime_ns for seed in (1, 2)}
    assert before == after
    assert len(json.loads(Path("here/fused/fusion.json").read_text())["inputs"]) == 3
    assert "seed_3" in json.loads(Path("here/results.json").read_text())["scores"]
    # What was written by a resumed run starts a new one, and does not go on with this one unasked.
    assert main(["--config", "here/config.yaml"]) == 2


def test_a_finished_run_is_tested_as_it_is(tiny_llama):
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--merge", "soup") == 0
    before = {path.name: path.read_bytes() for path in Path("here").glob("*.*") if "report" not in path.name}
    assert main(["test", "--ensemble.dirpath", "here", "--trainer.limit_test_batches", "9"]) == 0
    assert {path.name: path.read_bytes() for path in Path("here").glob("*.*") if "report" not in path.name} == before


def test_the_curves_of_a_trained_run_do_not_change_when_it_is_merged_again(tiny_llama):
    assert train(tiny_llama, "--ensemble.dirpath", "here") == 0
    before = Path("here/metrics.jsonl").read_text()
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--resume", "--merge", "soup") == 0
    assert Path("here/metrics.jsonl").read_text() == before


def test_a_finished_run_is_merged_again_by_another_method(tiny_llama, capsys):
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--merge", "none") == 0
    assert not Path("here/fused").exists()
    for method in ("soup", "seedlora"):
        assert train(tiny_llama, "--ensemble.dirpath", "here", "--merge", method, "--resume") == 0
        assert json.loads(Path("here/fused/fusion.json").read_text())["method"] == method
    assert main(["test", "--ensemble.dirpath", "here", "--merge", "none"]) == 2
    assert "here was merged by seedlora; --resume instead of test removes that" in capsys.readouterr().err
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--merge", "none", "--resume") == 0
    said = "--merge none merges nothing: removed fused and soup, which were made by seedlora"
    assert said in capsys.readouterr().err
    assert not [name for name in ("fused", "soup", "selection.json") if (Path("here") / name).exists()]
    assert list(json.loads(Path("here/results.json").read_text())["scores"]) == [
        "base",
        "seed_11",
        "seed_42",
        "seed_202",
    ]
    assert "Nothing was merged." in Path("here/report.md").read_text()


def test_a_trial_leaves_no_trace(tiny_llama, capsys):
    here = ["--ensemble.checkpoint_every_n_steps", "1", "--ensemble.dirpath", "here"]
    assert train(tiny_llama, *here, "--plan") == 0
    assert not Path("here").exists()
    assert train(tiny_llama, *here) == 0
    Path("here/unfinished").touch()
    state = lambda: {path: path.stat().st_mtime_ns for path in Path("here").rglob("*")}  # noqa: E731
    before = state()
    for trial in (["--plan"], ["--trainer.fast_dev_run", "true"]):
        assert train(tiny_llama, *here, "--resume", "--merge", "auto", *trial) == 0
        assert state() == before
    assert "All is trained already, so there was nothing to measure." in capsys.readouterr().out

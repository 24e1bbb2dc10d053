"""Reports of runs in which something is missing."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml

from seedlora.adapters import adapter as adapter_file
from seedlora.adapters.adapter import adapter_sha256
from seedlora.merge import record
from seedlora.report import terminal
from seedlora.report.facts import facts
from seedlora.report.figures import figures
from seedlora.report.stored import _read_options
from seedlora.report.training_curves import POINTS, training_curves
from tests.helpers.report_runs import SEEDS, train_into, written_text


def test_a_run_from_before_has_the_losses_of_its_last_steps(run):
    results = json.loads((run / "results.json").read_text())
    del results["train_sample"]
    (run / "results.json").write_text(json.dumps(results))
    text, found = written_text(run), facts(run)
    assert "No training rows were scored beside the test" in text
    assert "| adapter | score | loss of the last steps | tokens |" in text
    drawn = figures(found)["loss-score"]
    assert ">training loss at the end (nats per token)<" in drawn
    assert ">fused<" not in drawn


def test_the_validation_curve_of_plain_soup_is_soups(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"]["merge"] = "soup"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(run / "fused")
    assert set(facts(run)["training"]["validation"]) == {*SEEDS, "soup"}


def test_an_interrupted_run_says_so(run):
    for name in ("seed_42", "fused"):
        shutil.rmtree(run / name)
    (run / "results.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')
    text = written_text(run)
    assert "The run is not finished: seed_42 is not trained; repeat its command with --resume" in text
    assert "No test set was scored" in text
    assert "\nThe run is not finished, so there is no verdict.\n" in text
    assert "| seed_11 |" in text


def test_nothing_but_settings_is_a_report_too(run):
    for path in run.iterdir():
        if path.name != "run.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = written_text(run)
    for sentence in ("no verdict", "No training losses", "There was no validation.", "no config.yaml", "No test set"):
        assert sentence in text


def test_seeds_left_out_and_adapters_that_cannot_be_read(run):
    (run / "excluded.json").write_text('{"seed_42": "training loss not finite in step 3"}')
    shutil.rmtree(run / "seed_42")
    (run / "fused" / "adapter_model.safetensors").write_bytes(b"broken")
    text = written_text(run)
    assert "seed_42 was left out: training loss not finite in step 3." in text
    assert "The adapters cannot be read" in text
    assert "not finished" not in text


def test_adapters_are_hashed_once_also_where_tasks_were_scored(run, monkeypatch):
    (run / "evaluation").mkdir(exist_ok=True)
    labels = ["base", *SEEDS, "fused"]
    sha256 = {label: None if label == "base" else adapter_sha256(run / label) for label in labels}
    known = {label: {"prompt": "plain", "weights_sha256": found} for label, found in sha256.items()}
    hashed, real = [], record.files_sha256
    for module in (record, adapter_file):
        monkeypatch.setattr(module, "files_sha256", lambda files: hashed.extend(files) or real(files))
    for changed in ([], ["seed_42"]):
        adapters = known | {label: known[label] | {"weights_sha256": "another"} for label in changed}
        settings = {"protocol": "paper", "adapters": adapters, "tasks": {}}
        (run / "evaluation" / "settings.json").write_text(json.dumps(settings))
        hashed.clear()
        assert ("answered with other weights" in written_text(run)) == bool(changed)
        assert sorted(hashed) == sorted(run / label / "adapter_model.safetensors" for label in [*SEEDS, "fused"])


def test_one_seed_without_validation_or_test(tiny_llama, tmp_path, capsys):
    options = ["--ensemble.seeds", "[11]", "--merge", "none", "--data.num_val", "0", "--data.num_test", "0"]
    assert train_into(tmp_path / "one", tiny_llama, *options, "--compare", "ties") == 0
    assert "report: " in (shown := capsys.readouterr().out)
    text = (tmp_path / "one" / "report.md").read_text()
    for sentence in ("Only one seed was trained", "Nothing was merged.", "There was no validation.", "No test set"):
        assert sentence in text
    idle = "With one seed --compare does nothing: there is nothing to merge or compare."
    assert idle in text
    assert idle in " ".join(re.sub("[│]", " ", shown).split())


def test_a_fault_in_the_report_does_not_lose_the_run(tiny_llama, tmp_path, capsys, monkeypatch):
    def fail(_run):
        raise RuntimeError("no ink")

    monkeypatch.setattr(terminal, "write_report", fail)
    assert train_into(tmp_path / "run", tiny_llama, "--merge", "soup", "--data.num_val", "0") == 0
    assert "no report: RuntimeError: no ink; the run is whole" in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").is_file()
    # Plain soup is the fused adapter: one label for both.
    found = facts(tmp_path / "run")
    assert found["train_sample"]["losses"].keys() == {"base", *SEEDS, "soup"}
    assert found["merged"] == "soup"
    assert list(found["weights"]["distributions"]["density"]) == [*SEEDS, "soup"]
    assert found["verdict"].startswith("Nobody got anything right: 0 of 12 items")
    assert "Use fused: no other" in found["verdict"]
    assert "Soup: no difference from the mean seed shown" in found["verdict"]


def test_curves_of_several_passes_are_joined_and_thinned(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["ensemble"]["seeds"] = [42, 11]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").unlink()
    for seed, loss in ((11, 2.0), (42, 3.0)):
        lines = [{"step": i, f"train/loss_seed_{seed}": loss + i % 2} for i in range(2 * POINTS)]
        lines.append({"step": 2 * POINTS - 1, "val/loss_fused": loss, f"val/loss_seed_{seed}": float("nan")})
        (run / f"metrics-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    training = facts(run)["training"]
    assert training["steps_per_point"] == 2
    assert training["train"]["seed_42"] == [[2.0 * (i + 1), 3.5] for i in range(POINTS)]
    # Seed 11 came last, and with it the fused adapter of all; what is not finite is no point.
    assert training["validation"] == {"fused": [[2 * POINTS, 2.0]]}


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "[1]", '{"step": null, "val/loss_seed_1": 1}', '{"step": 3, "val/loss_seed_1": "x"}']
)
def test_lines_of_a_metrics_file_that_say_nothing_are_left_out(tmp_path, line):
    whole = '{"step": 1, "val/loss_seed_1": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + line + "\n" + whole)
    curves = training_curves(tmp_path, seeds=["seed_1"], merged="soup")
    assert curves["validation"] == {"seed_1": [[2, 0.5], [2, 0.5]]}


@pytest.mark.parametrize("text", ["[" * 1000, "- 1", "ensemble: 3"])
def test_options_that_cannot_be_read_are_named(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config.yaml cannot be read: "):
        _read_options(tmp_path)

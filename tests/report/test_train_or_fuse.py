"""What a report says of training longer and of fusing."""

from __future__ import annotations

import json
import math

import pytest

from seedlora.names import LONG_SEED
from seedlora.records.report import REPORT
from seedlora.report.page import write_report
from tests.helpers.report_runs import check_numbers, train_into


def test_the_sentence_follows_from_the_curves_and_the_validation_rows(tiny_llama, tmp_path, monkeypatch, capsys):
    # Whether the curves of a model that learns nothing fit is left open here; tests/scores asks it.
    monkeypatch.setattr("seedlora.scores.train_or_fuse._fits", lambda *_: True)
    options = ["--model.lr_scheduler", "constant", "--model.warmup_ratio", "0", "--data.num_train", "32"]
    options += ["--trainer.val_check_interval", "0.25", "--controls", "--merge", "soup", "--data.num_test", "4"]
    assert train_into(tmp_path, tiny_llama, *options) == 0
    printed = " ".join(capsys.readouterr().out.split())
    report = REPORT.read(tmp_path)
    found, scores, curves = report["train_or_fuse"], report["selection"]["scores"], report["training"]["validation"]
    seeds = ["seed_11", "seed_42", "seed_202"]
    assert found["seeds"] == 3
    assert found["gain"]["value"] == pytest.approx(
        sum(scores[seed]["loss"] for seed in seeds) / 3 - scores["soup"]["loss"]
    )
    # under a constant rate the slope is that of a straight line over the logarithm of the step
    slopes = []
    for seed in seeds:
        x, y = zip(*((math.log(step), loss) for step, loss in curves[seed]), strict=True)
        mean = sum(x) / len(x)
        slopes.append(-sum((a - mean) * b for a, b in zip(x, y, strict=True)) / sum((a - mean) ** 2 for a in x))
    assert found["slope"]["value"] == pytest.approx(sum(slopes) / 3)
    assert found["margin"]["value"] == pytest.approx(found["gain"]["value"] - sum(slopes) / 3 * math.log(3))
    assert found["long_seed"] == pytest.approx(curves[LONG_SEED][-1][1] - scores["soup"]["loss"])
    assert found["sentences"][0].startswith("Train longer, or fuse? ")
    assert "It was tried: the validation loss of soup is" in found["sentences"][-1]
    for sentence in found["sentences"]:
        assert sentence in printed
    check_numbers(tmp_path)
    # Validations in training need not meet the last step: the selection scores the last weights on the same rows.
    for name in ("metrics.jsonl", f"metrics-{LONG_SEED}.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        last = max(i for i, line in enumerate(lines) if '"val/loss_' in line)
        (tmp_path / name).write_text("".join(f"{line}\n" for i, line in enumerate(lines) if i != last))
    without = write_report(tmp_path)
    assert [len(without["training"]["validation"][seed]) for seed in seeds] == [len(curves[seed]) - 1 for seed in seeds]
    assert without["train_or_fuse"]["slope"] == pytest.approx(found["slope"], rel=1e-4)


def test_what_cannot_be_said_is_said_so(stored, run):
    found = REPORT.read(stored)["train_or_fuse"]
    assert (found["verdict"], found["slope"], found["margin"], found["long_seed"]) == ("unknown", None, None, None)
    assert found["sentences"][0].endswith("too few validations tell how fast the seeds still improve.")
    (run / "selection.json").unlink()
    assert "what soup gains was not measured" in write_report(run)["train_or_fuse"]["sentences"][0]


@pytest.mark.parametrize(("scheme", "asked"), [("branch", False), ("local", False), ("independent", True)])
def test_replicas_that_learn_from_each_other_are_not_asked(run, scheme, asked):
    """An exponential mean beside independent seeds, which the plan tells of in the same place, changes nothing."""
    settings = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**settings, "ensemble.scheme": scheme}))
    plan = json.loads((run / "cost.json").read_text())
    plan["plan"]["scheme"] = "an exponential mean of each replica's weights"
    (run / "cost.json").write_text(json.dumps(plan))
    assert (write_report(run)["train_or_fuse"] is not None) == asked

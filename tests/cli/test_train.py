"""``train.py`` as a user meets it: the main job, and overrides of it."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from seedlora.adapters.reading import read_adapter
from seedlora.cli.train import main
from seedlora.datamodules.prompts import render
from tests.helpers.commands import train

#: Aliases of aliases: seed 119 of the benchmark of files of options.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in pairwise("abcdefgh")
)


def only_run():
    (folder,) = Path("runs").iterdir()
    return folder


def test_the_main_job_end_to_end(tiny_llama, capsys):
    started = time.monotonic()
    assert train(tiny_llama, "--merge", "seedlora") == 0
    assert time.monotonic() - started < 60
    folder, shown = only_run(), capsys.readouterr().out
    for text in (
        "The run",
        "each seed 1 epoch of 16 rows, 4 steps of 4 rows",
        "trainable",
        "memory",
        "vs mean seed",
        "n = 12",
        "vllm serve",
    ):
        assert text in shown
    written = {
        "seed_11",
        "seed_42",
        "seed_202",
        "fused",
        "config.yaml",
        "metrics.jsonl",
        "results.json",
        "samples.jsonl",
        "run.json",
    }
    written |= {"soup", "selection.json", "cost.json", "report.html", "report.md", "report.json", "trained.json"}
    assert {path.name for path in folder.iterdir()} - {"checkpoints"} == written
    results = json.loads((folder / "results.json").read_text())
    assert list(results["scores"]) == ["base", "seed_11", "seed_42", "seed_202", "soup", "fused"]
    assert all(score["n"] == 12 for score in results["scores"].values())
    assert set(results["differences"]["fused"]) == {"mean seed", "best seed", "soup"}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"train/loss_seed_42", "val/loss_seed_42", "val/loss_fused"} <= {key for line in metrics for key in line}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["ensemble"]["merge"] == "seedlora"
    assert config["model"]["base_model"] == tiny_llama
    assert len(read_adapter(folder / "fused").layers) == 14
    prompts = [json.loads((folder / name / "prompt.json").read_text()) for name in ("seed_11", "fused")]
    assert prompts[0] == prompts[1]
    assert render(prompts[0], "1+1=") == "1+1=\n"


def test_the_written_config_repeats_the_run(tiny_llama):
    assert train(tiny_llama, "--merge", "soup", "--ensemble.dirpath", "one") == 0
    assert main(["--config", "one/config.yaml", "--ensemble.dirpath", "two"]) == 0
    one, two = (Path(name, "fused", "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (["--merge", "soup"], ["base", "seed_11", "seed_42", "seed_202", "soup"]),
        (["--merge=none"], ["base", "seed_11", "seed_42", "seed_202"]),
        (["--ensemble.seeds", "[1,2]", "--ensemble.budget", "full"], ["base", "seed_1", "seed_2", "soup", "fused"]),
        (["--ensemble.seeds", "[5]"], ["base", "seed_5", "fused"]),
        (["--ensemble.stack_size", "2"], ["base", "seed_11", "seed_42", "seed_202", "soup", "fused"]),
    ],
)
def test_overrides_of_the_ensemble(tiny_llama, options, labels):
    assert train(tiny_llama, *options) == 0
    assert list(json.loads((only_run() / "results.json").read_text())["scores"]) == labels
    assert (only_run() / "fused").is_dir() == ("soup" in labels or "fused" in labels)


def test_without_merge_the_default_is_seedlora(tiny_llama):
    assert train(tiny_llama, "--model.r", "16", "--trainer.max_epochs", "6") == 0
    assert json.loads((only_run() / "fused" / "fusion.json").read_text())["method"] == "seedlora"
    config = json.loads((only_run() / "seed_42" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert json.loads((only_run() / "fused" / "adapter_config.json").read_text())["r"] == 3 * 16 + 1
    assert json.loads((only_run() / "run.json").read_text())["epochs per seed"] == 2


def test_a_users_own_data_is_trained_on(tiny_llama):
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["--data.prompt_field", "question", "--data.response_field", "answer", "--data.batch_size", "4"]
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "rows.jsonl", *fields]
    assert main([*options, "--data.pack_tokens", "1024"]) == 0
    assert next(iter(json.loads((only_run() / "results.json").read_text())["scores"].values()))["n"] == 10


def test_layers_that_are_not_trained_are_zeros_in_the_fused_adapter(tiny_llama):
    options = ["--model.target_modules", "[q_proj,down_proj]", "--compare", "ties, soup", "--controls", "untrained"]
    assert train(tiny_llama, *options, "--ensemble.dirpath", "here") == 0
    fused = read_adapter("here/fused").layers
    assert not fused["model.layers.0.self_attn.v_proj"].dense().any()
    assert Path("here/report.html").is_file()
    assert main(["test", "--ensemble.dirpath", "here"]) == 0


def test_a_stack_that_is_chosen_by_memory(tiny_llama, capsys):
    assert train(tiny_llama, "--ensemble.stack_size", "auto", "--ensemble.dirpath", "here") == 0
    assert "11, 42, 202 in one stack" in capsys.readouterr().out
    assert "val/loss_fused" in Path("here/metrics.jsonl").read_text()


def test_callbacks_of_the_user_are_there_in_every_pass(tiny_llama):
    options = ["--ensemble.stack_size", "2", "--trainer.callbacks+=LearningRateMonitor", "--ensemble.dirpath", "here"]
    assert train(tiny_llama, *options, "--trainer.enable_progress_bar", "false") == 0
    for name in ("metrics-11-42.jsonl", "metrics-202.jsonl"):
        assert "lr-AdamW" in Path("here", name).read_text()


def test_a_timer_of_the_users_is_written_into_the_config(tiny_llama):
    """Its interval is a member of an enumeration, which YAML has no form for."""
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    assert train(tiny_llama, "--merge", "soup", *timer) == 0
    (written,) = yaml.safe_load((only_run() / "config.yaml").read_text())["trainer"]["callbacks"]
    assert (written["class_path"].rpartition(".")[2], written["init_args"]["interval"]) == ("Timer", "step")


def test_tasks_of_slurm_that_lightning_refuses_are_one_sentence(tiny_llama, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert train(tiny_llama, "--merge", "soup") == 2
    assert "Use `--ntasks-per-node=4` instead" in capsys.readouterr().err


def test_fast_dev_run_takes_a_step_and_writes_nothing(tiny_llama):
    assert train(tiny_llama, "--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "text",
    [
        "trainer: -1",
        "ensemble: []",
        "model: 3.5",
        "evaluate: true",
        "data: [1]",
        "[" * 5000,
        BOMB,
        "model: &a {r: *a}",
        "config: 1",
    ],
)
def test_a_file_of_options_that_holds_something_else_is_one_sentence(text, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    file.write_text(text + "\n")
    assert main(["--config", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}")

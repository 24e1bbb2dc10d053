"""The command line as a user meets it: runs, overrides, and one sentence for what cannot be done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO

from seedlora.adapters.reading import read_adapter
from seedlora.cli import main as shell
from seedlora.cli.train import main
from seedlora.datamodules.prompts import render
from seedlora.training.scoring import Scorer
from tests.helpers.disk import files_of_at_most
from tests.helpers.paths import ROOT
from train import PARTS

SMALL = ["--data.num_train", "16", "--data.num_val", "4", "--data.num_test", "12", "--data.batch_size", "4"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(base_model, *options):
    return main(PARTS, ["--model.base_model", base_model, *SMALL, *options])


def only_run():
    (folder,) = Path("runs").iterdir()
    return folder


def test_the_main_job_end_to_end(tiny_llama, capsys):
    started = time.monotonic()
    assert run(tiny_llama, "--merge", "seedlora") == 0
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
    written = {"seed_11", "seed_42", "seed_202", "fused", "config.yaml", "metrics.jsonl", "results.json", "run.json"}
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
    assert run(tiny_llama, "--merge", "soup", "--ensemble.dirpath", "one") == 0
    assert main(PARTS, ["--config", "one/config.yaml", "--ensemble.dirpath", "two"]) == 0
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
    assert run(tiny_llama, *options) == 0
    assert list(json.loads((only_run() / "results.json").read_text())["scores"]) == labels
    assert (only_run() / "fused").is_dir() == ("soup" in labels or "fused" in labels)


def test_without_merge_the_default_is_seedlora(tiny_llama):
    assert run(tiny_llama, "--model.r", "16", "--trainer.max_epochs", "6") == 0
    assert json.loads((only_run() / "fused" / "fusion.json").read_text())["method"] == "seedlora"
    config = json.loads((only_run() / "seed_42" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 16)
    assert json.loads((only_run() / "fused" / "adapter_config.json").read_text())["r"] == 3 * 16 + 1
    assert json.loads((only_run() / "run.json").read_text())["epochs per seed"] == 2


def test_a_users_own_data(tiny_llama):
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(10) for b in range(10)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = ["--data.prompt_field", "question", "--data.response_field", "answer", "--data.batch_size", "4"]
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "rows.jsonl", *fields]
    assert main(PARTS, [*options, "--data.pack_tokens", "1024"]) == 0
    assert next(iter(json.loads((only_run() / "results.json").read_text())["scores"].values()))["n"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.rr", "16"], "unknown option --model.rr; did you mean --model.r?"),
        (["--ensemble.seed", "[1]"], "unknown option --ensemble.seed; did you mean --ensemble.seeds?"),
        (["--trainer.max_epoch", "3"], "unknown option --trainer.max_epoch; did you mean --trainer.max_epochs?"),
        (["--merge", "tie"], "Unknown merge method 'tie'; choose one of"),
        (["--merge", "soup", "--ensemble.merge_options", "{density: 1}"], "'soup' has no option 'density'; it takes"),
        (["--ensemble.seeds", "[7,42,7]"], "ensemble.seeds must differ, but 7 is given more than once"),
        (["--ensemble.seeds", "[]"], "ensemble.seeds is empty"),
        (["--trainer.max_epochs", "4"], "trainer.max_epochs 4 among 3 seeds, which does not divide evenly"),
        (["--ensemble.budget", "half"], "Unknown ensemble.budget 'half'; choose one of equal, full"),
        (["--model.base_model", "./nowhere"], "Base model './nowhere' does not exist"),
        (["--model.target_modules", "[c_attn]"], "target_modules c_attn: base model"),
        (["--model.r", "0"], "model.r must be at least 1, got 0"),
        (["--model.lora_plus_ratio", "0"], "model.lora_plus_ratio must be positive, got 0"),
        (["--model.r", "many"], "--model.r takes a whole number, got many"),
        (["--model.warmup_steps", "x"], "--model.warmup_steps takes a whole number, got x"),
        (["--model.gradient_checkpointing", "maybe"], "takes true or false, got maybe"),
        (["--ensemble.seeds", "1,2,3"], '--ensemble.seeds takes a list such as "[1,2]", got 1,2,3'),
        (["--ensemble.seeds", "[1,99999999999999999999]"], "ensemble.seeds must be from 0 to 2**63 - 1, got 999"),
        (["--ensemble.merge_options", "5"], "--ensemble.merge_options takes a mapping such as"),
        (["--trainer.precision", "17"], "--trainer.precision takes one of 64, 32, 16, 'transformer-engine'"),
        (["--trainer.devices", "x"], "Lightning's Trainer refuses these options: `devices`"),
        (["--trainer.max_epochs", "-3"], "Lightning's Trainer refuses these options: `max_epochs`"),
        (["--merg", "soup"], "unknown option --merg; did you mean --merge?"),
        (["--compare", "ties", "soup"], "unexpected word 'soup'"),
        (["--merge", "SeedLora"], "did you mean 'seedlora'? ('none' merges nothing, 'auto' chooses)"),
        (["--data.task", "chain_sun"], "reasoning-gym has no task 'chain_sun'"),
        (["--data.num_train", "0"], "ReasoningGym needs num_train >= 1"),
        (["--data.num_train", "3"], "3 training rows do not fill one optimizer step of 4"),
        (["--data.style", "fancy"], "Unknown prompt style 'fancy'; choose one of alpaca, alpaca_split, chat"),
        (["--data.num_trian", "5"], "unknown option --data.num_trian; --data.help NAME shows"),
        (["--data.batch_size", "2.5"], "--data.batch_size takes a whole number, got 2.5"),
        (["--data.batch_size", "0"], "train.py: error: data.batch_size must be at least 1, got 0"),
        (["--data", "InstructionData"], "this data module needs --data.path"),
        (["--data", "InstructonData"], "unknown data module 'InstructonData'; did you mean InstructionData?"),
        (["--data", "gsm8k"], "unknown data module 'gsm8k'; did you mean GSM8K?"),
        (["--data", "Nope"], "data modules are CodeFeedback, Commonsense170k, GSM8K, InstructionData, MetaMathQA"),
        (["--data", "InstructionData", "--data.path", "no.jsonl"], "data.path 'no.jsonl' is no file or folder"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--resume"], "--resume found no unfinished run under runs"),
        (["--compare", "soup,tie"], "Unknown merge method 'tie'; choose one of core_ties"),
        (["--controls", "some"], "Unknown ensemble.controls 'some'; choose one of none, untrained, all"),
        (["--controls", "--data.num_val", "0"], "ensemble.controls chooses on validation rows, and there are none"),
        (["--merge", "auto", "--trainer.limit_val_batches", "0"], "--merge auto chooses on validation rows, and there"),
    ],
)
def test_bad_requests_get_one_sentence_and_exit_code_2(tiny_llama, capsys, options, message):
    assert run(tiny_llama, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("train.py: error: ")
    assert message in error[0]
    assert "<class" not in error[0]
    assert "Namespace" not in error[0]
    assert not list(Path().glob("runs/*/seed_*"))


def test_the_options_of_the_default_data_do_not_leak_into_another(tiny_llama):
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    from seedlora.cli.parser import SeedLoRACLI

    for options in (["--data", "InstructionData", "--data.path", "rows.jsonl"], ["--config", "run.yaml"]):
        Path("run.yaml").write_text(
            "data: {class_path: seedlora.datamodules.InstructionData, init_args: {path: rows.jsonl}}"
        )
        given = SeedLoRACLI(PARTS, options).config.data.init_args
        assert (given.num_train, given.style, given.eval_batch_size) == (None, None, 16)


def test_the_clock_comes_before_the_ensemble_whose_phases_it_times():
    from seedlora.cli.parser import SeedLoRACLI

    kinds = [type(callback).__name__ for callback in SeedLoRACLI(PARTS, []).trainer.callbacks]
    assert kinds.index("Throughput") < kinds.index("SeedEnsembleCallback")


def test_an_empty_data_file(tiny_llama, capsys):
    Path("empty.jsonl").write_text("")
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "empty.jsonl"]
    assert main(PARTS, options) == 2
    assert "InstructionData found no training rows" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(tiny_llama, capsys):
    assert run(tiny_llama, "--ensemble.dirpath", "here") == 0
    before = Path("here/fused/adapter_model.safetensors").stat().st_mtime_ns
    assert run(tiny_llama, "--ensemble.dirpath", "here") == 2
    assert "here already holds a run; go on with it by --resume" in capsys.readouterr().err
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--resume", "--model.r", "4") == 2
    assert "here was started with model.r = 8, now it is 4" in capsys.readouterr().err
    assert Path("here/fused/adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_run_does_not_go_on_with_other_rows_at_the_same_path(tiny_llama, capsys):
    rows = [{"prompt": f"{i}?", "response": "yes"} for i in range(12)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "rows.jsonl", "--merge"]
    options += ["none", "--ensemble.seeds", "[1]", "--ensemble.dirpath", "here", "--trainer.max_steps", "1"]
    assert main(PARTS, options) == 0
    rows[3]["response"] = "no"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(PARTS, [*options, "--resume"]) == 2
    assert "here was started with sha256 of the train rows = '" in capsys.readouterr().err


def test_one_more_seed_trains_just_that_seed(tiny_llama):
    same = ["--ensemble.dirpath", "here", "--ensemble.budget", "full", "--trainer.max_epochs", "1"]
    assert run(tiny_llama, *same, "--ensemble.seeds", "[1,2]") == 0
    before = {seed: Path(f"here/seed_{seed}/adapter_model.safetensors").stat().st_mtime_ns for seed in (1, 2)}
    assert run(tiny_llama, *same, "--ensemble.seeds", "[1,2,3]", "--resume") == 0
    after = {seed: Path(f"here/seed_{seed}/adapter_model.safetensors").stat().st_mtime_ns for seed in (1, 2)}
    assert before == after
    assert len(json.loads(Path("here/fused/fusion.json").read_text())["inputs"]) == 3
    assert "seed_3" in json.loads(Path("here/results.json").read_text())["scores"]
    # What was written by a resumed run starts a new one, and does not go on with this one unasked.
    assert main(PARTS, ["--config", "here/config.yaml"]) == 2


def test_layers_that_are_not_trained_are_zeros_in_what_is_fused(tiny_llama):
    options = ["--model.target_modules", "[q_proj,down_proj]", "--compare", "ties, soup", "--controls", "untrained"]
    assert run(tiny_llama, *options, "--ensemble.dirpath", "here") == 0
    fused = read_adapter("here/fused").layers
    assert not fused["model.layers.0.self_attn.v_proj"].dense().any()
    assert Path("here/report.html").is_file()
    assert main(PARTS, ["test", "--ensemble.dirpath", "here"]) == 0


def test_a_stack_that_is_chosen_by_memory(tiny_llama, capsys):
    assert run(tiny_llama, "--ensemble.stack_size", "auto", "--ensemble.dirpath", "here") == 0
    assert "11, 42, 202 in one stack" in capsys.readouterr().out
    assert "val/loss_fused" in Path("here/metrics.jsonl").read_text()


def test_callbacks_of_the_user_are_there_in_every_pass(tiny_llama):
    options = ["--ensemble.stack_size", "2", "--trainer.callbacks+=LearningRateMonitor", "--ensemble.dirpath", "here"]
    assert run(tiny_llama, *options, "--trainer.enable_progress_bar", "false") == 0
    for name in ("metrics-11-42.jsonl", "metrics-202.jsonl"):
        assert "lr-AdamW" in Path("here", name).read_text()


def test_resume_alone_finds_the_run_that_is_not_finished(tiny_llama, capsys):
    assert run(tiny_llama, "--ensemble.dirpath", "runs/done") == 0
    assert main(PARTS, ["--resume"]) == 2
    assert "found no unfinished run" in capsys.readouterr().err
    Path("runs/done/unfinished").touch()
    assert run(tiny_llama, "--resume") == 0
    assert not Path("runs/done/unfinished").exists()


def test_a_finished_run_is_tested_as_it_is(tiny_llama):
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--merge", "soup") == 0
    before = {path.name: path.read_bytes() for path in Path("here").glob("*.*") if "report" not in path.name}
    assert main(PARTS, ["test", "--ensemble.dirpath", "here", "--trainer.limit_test_batches", "9"]) == 0
    assert {path.name: path.read_bytes() for path in Path("here").glob("*.*") if "report" not in path.name} == before


def test_the_curves_of_a_trained_run_do_not_change_when_it_is_fused_again(tiny_llama):
    assert run(tiny_llama, "--ensemble.dirpath", "here") == 0
    before = Path("here/metrics.jsonl").read_text()
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--resume", "--merge", "soup") == 0
    assert Path("here/metrics.jsonl").read_text() == before


def test_help_and_print_config_in_a_fresh_process():
    for option, expected in (("--help", "--ensemble.seeds"), ("--print_config", "base_model: embedded")):
        command = [sys.executable, "-X", "importtime", "train.py", option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in done.stdout
        # They would take seconds.
        assert not re.search(r"\| +(peft|transformers\.modeling_utils)$", done.stderr, re.MULTILINE)
        assert done.stdout.count("\n") < 220


def test_the_default_config_says_what_the_defaults_are(tmp_path):
    from seedlora.cli.parser import SeedLoRACLI

    cli = SeedLoRACLI(PARTS, [])
    defaults = yaml.safe_load(cli.parser.dump(cli.config))
    written = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text())

    def given(options):
        return {key: value for key, value in options.items() if value is not None}

    assert given(written["model"]) == given(defaults["model"])
    assert given(written["data"]["init_args"]) == given(defaults["data"]["init_args"])
    assert given(written["ensemble"]) == given(defaults["ensemble"])
    assert written["trainer"].items() <= defaults["trainer"].items()


def stopped(capsys, *, where):
    """What a stopped run says, once the commands that it names were found to work."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("train.py: stopped: ")]
    assert f"; what was saved before is whole; repeat the command with --resume --ensemble.dirpath {where}; " in line
    assert line.endswith(f"; python -m seedlora report {where} shows how far it came")
    assert shell.main(["report", where]) == 0
    assert (Path(where) / "report.html").is_file()
    assert not list(Path(where).rglob(".*.tmp"))
    return line


def test_a_run_that_diverged_is_not_told_to_repeat_itself(tiny_llama, capsys):
    same = ["--ensemble.dirpath", "here", "--model.learning_rate", "1e30"]
    assert run(tiny_llama, *same) == 1
    advice = (
        "what was saved before is whole; --resume takes another on_divergence there; another learning_rate needs "
        "another --ensemble.dirpath; python -m seedlora report here shows how far it came"
    )
    error = capsys.readouterr().err.strip()
    assert "seed_202: training loss not finite in step 2; lower model.learning_rate, or go on without it" in error
    assert error.endswith(advice)
    assert run(tiny_llama, *same, "--resume", "--ensemble.on_divergence", "exclude") == 1
    shown = capsys.readouterr()
    assert "stopped: the training loss of every seed is not finite; lower model.learning_rate; " + advice in shown.err
    assert "validation loss \n" not in shown.out


@pytest.mark.parametrize("content", [b"", b"\x80\x02abc", b"model: {r: 8", b"just words"])
def test_a_config_that_cannot_be_read_is_named(capsys, content):
    Path("here").mkdir()
    Path("here/config.yaml").write_bytes(content)
    for words, instead in (
        (["--config", "here/config.yaml"], ""),
        (["--config=here/config.yaml"], ""),
        (["test", "--ensemble.dirpath", "here"], "; --resume with the options of the run writes it again"),
    ):
        assert main(PARTS, words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(rf"train\.py: error: here/config\.yaml cannot be read: [^;]+{instead}", line)


def test_a_disk_that_is_full_at_a_checkpoint_is_said_and_the_run_goes_on_later(tiny_llama, monkeypatch, capsys):
    save, calls = TorchCheckpointIO.save_checkpoint, []

    def full(self, checkpoint, path, storage_options=None):
        calls.append(path)
        with files_of_at_most(20_000) if len(calls) == 2 else nullcontext():
            save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    same = ["--ensemble.dirpath", "here", "--ensemble.checkpoint_every_n_steps", "1"]
    assert run(tiny_llama, *same) == 1
    line = stopped(capsys, where="here")
    assert re.search(
        r"/step=2\.ckpt was not written: File too large; it takes 0\.[1-9] MiB, [\d,.]+ MiB are free", line
    )
    (kept,) = Path("here").glob("checkpoints/*/*")
    assert kept.name == "step=1.ckpt"
    deepspeed = ["--trainer.strategy", "deepspeed_stage_2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert run(tiny_llama, *same, "--resume", *deepspeed) == 2
    assert f"{kept} was saved without DeepSpeed; resume by the --trainer.strategy" in capsys.readouterr().err
    # and what a disk may spoil
    kept.with_name("step=2.ckpt").write_bytes(kept.read_bytes()[:-100])
    Path("here/cost.json").write_text('{"plan":')
    assert run(tiny_llama, *same, "--resume") == 2
    error = capsys.readouterr().err
    assert "here/cost.json cannot be read: Expecting value: line 1 column 9 (char 8); without it --resume does" in error
    Path("here/cost.json").unlink()
    with Path("here/metrics.jsonl").open("ab") as file:
        file.write(b'{"st\x80\n{}\n[]\n')
    assert run(tiny_llama, *same, "--resume") == 0
    assert f"Going on from {kept}, as step=2.ckpt is damaged\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 3, 3]
    assert (Path("here") / "fused").is_dir()


# an adapter takes 30 KB, one of three times the rank 90 KB
@pytest.mark.parametrize(("size", "folder", "there"), [(20_000, "seed_11", 0), (60_000, "fused", 3)])
def test_a_disk_that_is_full_at_the_end_is_said_and_the_run_goes_on_later(tiny_llama, capsys, size, folder, there):
    same = ["--merge", "soup", "--ensemble.dirpath", "here"]
    with files_of_at_most(size):
        assert run(tiny_llama, *same) == 1
    assert f"stopped: here/{folder} was not written: File too large; it takes 0." in stopped(capsys, where="here")
    assert len(list(Path("here").glob("seed_*"))) == there
    assert not Path("here/fused").exists()
    assert run(tiny_llama, *same, "--resume") == 0
    assert Path("here/fused").is_dir()


def test_a_sigterm_after_training_leaves_at_once_and_the_rest_is_done_later(tiny_llama, monkeypatch, capsys):
    score, calls = Scorer.score_rows, []

    def terminated(self, *args, **kwargs):
        if not calls:
            calls.append("now")
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, *args, **kwargs)

    monkeypatch.setattr(Scorer, "score_rows", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert run(tiny_llama, "--ensemble.dirpath", "here") == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped: terminated by SIGTERM after training; the adapters are written;" in stopped(capsys, where="here")
    assert not Path("here/fused").exists()
    written = Path("here/seed_42/adapter_model.safetensors").stat().st_mtime_ns
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--resume") == 0
    assert run(tiny_llama, "--ensemble.dirpath", "whole") == 0
    assert Path("here/seed_42/adapter_model.safetensors").stat().st_mtime_ns == written
    fused = [Path(name, "fused/adapter_model.safetensors").read_bytes() for name in ("here", "whole")]
    assert fused[0] == fused[1]


def test_a_finished_run_is_fused_again_by_another_method(tiny_llama, capsys):
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--merge", "none") == 0
    assert not Path("here/fused").exists()
    for method in ("soup", "seedlora"):
        assert run(tiny_llama, "--ensemble.dirpath", "here", "--merge", method, "--resume") == 0
        assert json.loads(Path("here/fused/fusion.json").read_text())["method"] == method
    assert main(PARTS, ["test", "--ensemble.dirpath", "here", "--merge", "none"]) == 2
    assert "here was merged by seedlora; --resume instead of test removes that" in capsys.readouterr().err
    assert run(tiny_llama, "--ensemble.dirpath", "here", "--merge", "none", "--resume") == 0
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
    assert run(tiny_llama, *here, "--plan") == 0
    assert not Path("here").exists()
    assert run(tiny_llama, *here) == 0
    Path("here/unfinished").touch()
    state = lambda: {path: path.stat().st_mtime_ns for path in Path("here").rglob("*")}  # noqa: E731
    before = state()
    for trial in (["--plan"], ["--trainer.fast_dev_run", "true"]):
        assert run(tiny_llama, *here, "--resume", "--merge", "auto", *trial) == 0
        assert state() == before
    assert "All is trained already, so there was nothing to measure." in capsys.readouterr().out


def test_fast_dev_run_takes_a_step_and_writes_nothing(tiny_llama):
    assert run(tiny_llama, "--trainer.fast_dev_run", "true") == 0
    assert not Path("runs").exists()

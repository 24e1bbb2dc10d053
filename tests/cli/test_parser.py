"""The options of ``train.py``: help, defaults, and one sentence for what cannot be done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seedlora.cli.parser import SeedLoRACLI
from seedlora.cli.train import main
from tests.helpers.commands import train
from tests.helpers.paths import ROOT


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
        (["--ensemble.budget", "half"], "Unknown --ensemble.budget 'half'; choose one of equal, full"),
        (["--model.base_model", "./nowhere"], "Base model './nowhere' does not exist"),
        (["--model.target_modules", "[c_attn]"], "target_modules c_attn: base model"),
        (["--model.r", "0"], "model.r must be at least 1, got 0"),
        (["--model.lora_plus_ratio", "0"], "model.lora_plus_ratio must be positive, got 0"),
        (["--model.r", "many"], "--model.r takes a whole number, got many"),
        (["--model.warmup_steps", "x"], "--model.warmup_steps takes a whole number, got x"),
        (
            ["--model.gradient_checkpointing", "maybe"],
            "gradient_checkpointing 'maybe'; choose one of none, selective, full",
        ),
        (["--ensemble.seeds", "1;2;3"], '--ensemble.seeds takes a list such as "[1,2]", got 1;2;3'),
        (["--ensemble.seeds", "[1,99999999999999999999]"], "ensemble.seeds must be from 0 to 2**63 - 1, got 999"),
        (["--ensemble.merge_options", "5"], "--ensemble.merge_options takes a mapping such as"),
        (["--trainer.precision", "17"], "--trainer.precision takes one of 64, 32, 16, 'transformer-engine'"),
        (["--trainer.devices", "x"], "Lightning's Trainer refuses these options: `devices`"),
        (["--trainer.max_epochs", "-3"], "Lightning's Trainer refuses these options: `max_epochs`"),
        (["--merg", "soup"], "unknown option --merg; did you mean --merge?"),
        (["--compare", "ties", "soup"], "unexpected word 'soup'"),
        (["--merge", "SeedLora"], "did you mean 'seedlora'? ('none' merges nothing, 'auto' and 'auto_gain' choose)"),
        (["--data.task", "chain_sun"], "reasoning-gym has no task 'chain_sun'"),
        (["--data.num_train", "0"], "ReasoningGym needs num_train >= 1"),
        (["--data.num_train", "3"], "3 training rows do not fill one optimizer step of 4"),
        (["--data.style", "fancy"], "Unknown prompt style 'fancy'; choose one of alpaca, alpaca_split, chat"),
        (["--data.num_trian", "5"], "unknown option --data.num_trian; --data.help NAME shows"),
        (["--data.batch_size", "2.5"], "--data.batch_size takes a whole number, got 2.5"),
        (["--data.batch_size", "0"], "error: --data.batch_size must be at least 1, got 0"),
        (["--data", "InstructionData"], "this data module needs --data.path"),
        (["--data", "InstructonData"], "unknown data module 'InstructonData'; did you mean InstructionData?"),
        (["--data", "gsm8k"], "unknown data module 'gsm8k'; did you mean GSM8K?"),
        (["--data", "Nope"], "data modules are CodeFeedback, "),
        (["--data", "InstructionData", "--data.path", "no.jsonl"], "data.path 'no.jsonl' is no file or folder"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--ensemble.seeds"], "error: --ensemble.seeds needs a value"),
        (["--resume"], "--resume found no unfinished run under runs"),
        (["--compare", "soup,tie"], "Unknown merge method 'tie'; choose one of core_ties"),
        (["--controls", "some"], "Unknown --controls 'some'; choose one of none, untrained, all"),
        (["--controls", "--data.num_val", "0"], "--controls chooses on validation rows, and there are none"),
        (["--merge", "auto", "--trainer.limit_val_batches", "0"], "--merge auto chooses on validation rows, and there"),
    ],
)
def test_bad_requests_get_one_sentence_and_exit_code_2(tiny_llama, capsys, options, message):
    assert train(tiny_llama, *options) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert message in error[0]
    assert "<class" not in error[0]
    assert "Namespace" not in error[0]
    assert not list(Path().glob("runs/*/seed_*"))


def test_the_options_of_the_default_data_do_not_leak_into_another(tiny_llama):
    Path("rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    for options in (["--data", "InstructionData", "--data.path", "rows.jsonl"], ["--config", "run.yaml"]):
        Path("run.yaml").write_text(
            "data: {class_path: seedlora.datamodules.InstructionData, init_args: {path: rows.jsonl}}"
        )
        given = SeedLoRACLI(options).config.data.init_args
        assert (given.num_train, given.style, given.eval_batch_size) == (None, None, 16)


def test_the_clock_comes_before_the_ensemble_whose_phases_it_times():
    kinds = [type(callback).__name__ for callback in SeedLoRACLI([]).trainer.callbacks]
    assert kinds.index("Throughput") < kinds.index("SeedEnsembleCallback")


def test_an_empty_data_file_is_refused(tiny_llama, capsys):
    Path("empty.jsonl").write_text("")
    options = ["--model.base_model", tiny_llama, "--data", "InstructionData", "--data.path", "empty.jsonl"]
    assert main(options) == 2
    assert "InstructionData found no training rows" in capsys.readouterr().err


def test_help_and_print_config_in_a_fresh_process():
    for option, expected in (("--help", "--ensemble.seeds"), ("--print_config", "base_model: embedded")):
        command = [sys.executable, "-X", "importtime", "train.py", option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in done.stdout
        # They would take seconds.
        assert not re.search(r"\| +(peft|transformers\.modeling_utils)$", done.stderr, re.MULTILINE)
        assert done.stdout.count("\n") < 300


def test_the_default_config_says_what_the_defaults_are(tmp_path):
    cli = SeedLoRACLI([])
    defaults = yaml.safe_load(cli.parser.dump(cli.config))
    written = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text())

    def given(options):
        return {key: value for key, value in options.items() if value is not None}

    assert given(written["model"]) == given(defaults["model"])
    assert given(written["data"]["init_args"]) == given(defaults["data"]["init_args"])
    assert given(written["ensemble"]) == given(defaults["ensemble"])
    assert written["trainer"].items() <= defaults["trainer"].items()


@pytest.mark.parametrize("content", [b"", b"\x80\x02abc", b"model: {r: 8", b"just words"])
def test_a_config_that_cannot_be_read_is_named(capsys, content):
    Path("here").mkdir()
    Path("here/config.yaml").write_bytes(content)
    for words, instead in (
        (["--config", "here/config.yaml"], ""),
        (["--config=here/config.yaml"], ""),
        (["test", "--ensemble.dirpath", "here"], "; --resume with the options of the run writes it again"),
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(rf"error: here/config\.yaml cannot be read: [^;]+{instead}", line)


@pytest.mark.parametrize(
    "logger", [["null"], ["false"], ["lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "x"]]
)
def test_the_curves_are_written_whatever_logger_is_chosen(tmp_path, logger):
    cli = SeedLoRACLI(["--ensemble.dirpath", str(tmp_path), "--trainer.logger", *logger])
    assert cli.metrics.path == tmp_path / "metrics.jsonl"
    assert cli.trainer.loggers[-1] is cli.metrics
    assert len(cli.trainer.loggers) == 1 + (logger[0].endswith("CSVLogger"))

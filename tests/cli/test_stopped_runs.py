"""Runs that are stopped: what they say, and that they go on later."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from lightning.pytorch.plugins.io import TorchCheckpointIO

from seedlora.cli import main as shell
from seedlora.cli.train import main
from seedlora.records.owner import OWNER
from seedlora.run.ownership import started_at, take_folder
from seedlora.training.scoring import Scorer
from tests.helpers.commands import train
from tests.helpers.disk import files_of_at_most


def test_resume_alone_finds_the_run_that_is_not_finished(tiny_llama, capsys):
    assert train(tiny_llama, "--ensemble.dirpath", "runs/done") == 0
    assert main(["--resume"]) == 2
    assert "found no unfinished run" in capsys.readouterr().err
    Path("runs/done/unfinished").touch()
    assert train(tiny_llama, "--resume") == 0
    assert not Path("runs/done/unfinished").exists()


def stopped(capsys, *, where):
    """What a stopped run says, once the commands that it names were found to work."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("stopped: ")]
    assert f"; what was saved before is whole; repeat the command with --resume --ensemble.dirpath {where}; " in line
    assert line.endswith(f"; python -m seedlora report {where} shows how far it came")
    assert shell.main(["report", where]) == 0
    assert (Path(where) / "report.html").is_file()
    assert not list(Path(where).rglob(".*.tmp"))
    return line


def test_a_run_that_diverged_is_not_told_to_repeat_itself(tiny_llama, capsys):
    same = ["--ensemble.dirpath", "here", "--model.learning_rate", "1e30"]
    assert train(tiny_llama, *same) == 1
    advice = (
        "what was saved before is whole; --resume takes another on_divergence there; another learning_rate needs "
        "another --ensemble.dirpath; python -m seedlora report here shows how far it came"
    )
    error = capsys.readouterr().err.strip()
    assert "seed_202: training loss not finite in step 2; lower --model.learning_rate, or go on without it" in error
    assert error.endswith(advice)
    assert train(tiny_llama, *same, "--resume", "--ensemble.on_divergence", "exclude") == 1
    shown = capsys.readouterr()
    assert "stopped: the training loss of every seed is not finite; lower --model.learning_rate; " + advice in shown.err
    assert "validation loss \n" not in shown.out


def test_a_disk_that_is_full_at_a_checkpoint_is_said_and_the_run_goes_on_later(tiny_llama, monkeypatch, capsys):
    save, calls = TorchCheckpointIO.save_checkpoint, []

    def full(self, checkpoint, path, storage_options=None):
        calls.append(path)
        with files_of_at_most(20_000) if len(calls) == 2 else nullcontext():
            save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", full)
    same = ["--ensemble.dirpath", "here", "--ensemble.checkpoint_every_n_steps", "1"]
    assert train(tiny_llama, *same) == 1
    line = stopped(capsys, where="here")
    assert re.search(
        r"/step=2\.ckpt was not written: File too large; it takes 0\.[1-9] MiB, [\d,.]+ MiB are free", line
    )
    (kept,) = Path("here").glob("checkpoints/*/*")
    assert kept.name == "step=1.ckpt"
    deepspeed = ["--trainer.strategy", "deepspeed_stage_2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    assert train(tiny_llama, *same, "--resume", *deepspeed) == 2
    assert f"{kept} was saved without DeepSpeed; resume by the --trainer.strategy" in capsys.readouterr().err
    # and what a disk may spoil
    kept.with_name("step=2.ckpt").write_bytes(kept.read_bytes()[:-100])
    Path("here/cost.json").write_text('{"plan":')
    assert train(tiny_llama, *same, "--resume") == 2
    error = capsys.readouterr().err
    assert "here/cost.json cannot be read: Expecting value: line 1 column 9 (char 8); without it --resume does" in error
    Path("here/cost.json").unlink()
    with Path("here/metrics.jsonl").open("ab") as file:
        file.write(b'{"st\x80\n{}\n[]\n')
    assert train(tiny_llama, *same, "--resume") == 0
    assert f"Going on from {kept}, as step=2.ckpt is damaged\n" in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("here/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 3, 3, 4]  # the last one is the test's
    assert (Path("here") / "fused").is_dir()


# an adapter takes 30 KB, one of three times the rank 90 KB
@pytest.mark.parametrize(("size", "folder", "there"), [(20_000, "seed_11", 0), (60_000, "fused", 3)])
def test_a_disk_that_is_full_at_the_end_is_said_and_the_run_goes_on_later(tiny_llama, capsys, size, folder, there):
    same = ["--merge", "soup", "--ensemble.dirpath", "here"]
    with files_of_at_most(size):
        assert train(tiny_llama, *same) == 1
    assert f"stopped: here/{folder} was not written: File too large; it takes 0." in stopped(capsys, where="here")
    assert len(list(Path("here").glob("seed_*"))) == there
    assert not Path("here/fused").exists()
    assert train(tiny_llama, *same, "--resume") == 0
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
    assert train(tiny_llama, "--ensemble.dirpath", "here") == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped: terminated by SIGTERM after training; the adapters are written;" in stopped(capsys, where="here")
    assert not Path("here/fused").exists()
    written = Path("here/seed_42/adapter_model.safetensors").stat().st_mtime_ns
    assert train(tiny_llama, "--ensemble.dirpath", "here", "--resume") == 0
    assert train(tiny_llama, "--ensemble.dirpath", "whole") == 0
    assert Path("here/seed_42/adapter_model.safetensors").stat().st_mtime_ns == written
    fused = [Path(name, "fused/adapter_model.safetensors").read_bytes() for name in ("here", "whole")]
    assert fused[0] == fused[1]


def test_resume_of_a_run_that_is_at_work_or_not_there_is_refused(tiny_llama, capsys):
    same = ["--merge", "soup", "--ensemble.dirpath", "here"]
    assert train(tiny_llama, *same, "--resume") == 2
    message = "error: here holds no run to go on with: it has no run.json; is the name right?"
    assert capsys.readouterr().err.startswith(message)
    assert not Path("here").exists()
    assert train(tiny_llama, *same) == 0
    assert not Path("here/owner.json").exists()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        owner = take_folder(Path("here"))
        OWNER.write(Path("here"), {**owner, "process": other.pid, "started": started_at(other.pid)})
        before = {path: path.stat().st_mtime_ns for path in Path("here").rglob("*")}
        for words in ([*same, "--resume"], [*same, "--resume", "--merge", "none"]):
            assert train(tiny_llama, *words) == 2
            assert f"here is in use: process {other.pid} on {owner['host']} has been" in capsys.readouterr().err
        assert main(["test", "--ensemble.dirpath", "here"]) == 2
        assert f"here is in use: process {other.pid} on" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in Path("here").rglob("*")} == before
    assert train(tiny_llama, *same, "--resume") == 0
    assert not Path("here/owner.json").exists()

"""A process that dies stops the other, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import training_process
from tests.helpers.fits import assert_alike
from tests.helpers.training_process import finish, wait_for_step

ROWS = ("--data.num_train", "48", "--data.num_val", "5", "--data.num_test", "13")
TWO = ("--trainer.accelerator", "cpu", "--trainer.devices", "2")


def start(base_model, dirpath, *options):
    return training_process.start(base_model, dirpath, *ROWS, *TWO, *options)


def processes(first):
    """The process ids of the ranks, in their order."""
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    is_rank = [b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
    return [first.pid, *(int(child) for child, rank in zip(children, is_rank, strict=True) if rank)]


def kill_at(first, dirpath, step, rank):
    """SIGKILL one rank at a checkpoint; returns the output, once all processes have ended."""
    waited = wait_for_step(first, dirpath, step)
    os.kill(processes(first)[rank], signal.SIGKILL)
    # the pipe is closed when the last process that writes to it has ended; a busy machine is slow in that, too
    output, _ = first.communicate(timeout=max(30, waited))
    assert first.returncode != 0
    return output


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("runs") / "ddp"
    finish(start(tiny_llama, dirpath, "--trainer.strategy", "ddp"))
    return dirpath


def assert_resumed(found, wanted, *, same):
    """See that a run ended like one that was not stopped: to the bit, or but for rounding under another strategy."""
    for seed in (11, 42, 202):
        assert_alike(found, wanted, seed)
        ours, theirs = ((run / f"seed_{seed}" / "adapter_model.safetensors").read_bytes() for run in (found, wanted))
        assert not same or ours == theirs


def test_sigterm_saves_the_step_on_all_processes_and_resumes(tiny_llama, whole, tmp_path):
    dirpath = tmp_path / "terminated"
    options = ("--trainer.strategy", "ddp", "--ensemble.checkpoint_every_n_steps", "100")
    first = start(tiny_llama, dirpath, *options)
    while not (dirpath / "metrics.jsonl").is_file():
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    for process in processes(first):
        os.kill(process, signal.SIGTERM)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 1
    (step,) = set(re.findall(r"terminated by SIGTERM; step (\d+) is saved", output))
    assert len(list(dirpath.glob(f"checkpoints/*/step={step}.ckpt"))) == 1
    assert "Going on from" in finish(start(tiny_llama, dirpath, *options, "--resume"))
    assert_resumed(dirpath, whole, same=True)


KILLED = [
    ("ddp", 0, 5),
    ("ddp", 1, 9),
    ("deepspeed_stage_1", 1, 3),
    ("deepspeed_stage_2", 0, 3),
    ("deepspeed_stage_2", 1, 9),
    ("deepspeed_stage_3", 0, 7),
    ("deepspeed_stage_3", 1, 4),
    ("fsdp2", 0, 5),
    ("deepspeed_stage_2_offload", 1, 4),
    ("deepspeed_stage_3_offload", 1, 4),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "rank", "step"), KILLED)
def test_a_rank_that_dies_stops_the_other_and_the_run_resumes(tiny_llama, whole, tmp_path, strategy, rank, step):
    dirpath = tmp_path / "killed"
    options = ("--trainer.strategy", strategy)
    output = kill_at(start(tiny_llama, dirpath, *options), dirpath, step, rank)
    reason = "the process that started this one is gone" if rank == 0 else "process 1 of 2 was killed by signal 9"
    assert re.search(rf"stopped \(process {1 - rank}\): ({reason}|the connection)", output), output
    for file in dirpath.glob("checkpoints/**/*"):
        # of a base model of 133 KB there is nothing
        assert not file.is_file() or file.stat().st_size < 700_000
    assert "Going on from" in finish(start(tiny_llama, dirpath, *options, "--resume"))
    assert_resumed(dirpath, whole, same=strategy == "ddp")
    scores = [json.loads((folder / "results.json").read_text())["scores"] for folder in (whole, dirpath)]
    assert scores[0] == scores[1]
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (whole, dirpath)]
    steps = [[json.loads(line)["step"] for line in part] for part in lines]
    assert steps[1] == sorted(steps[1])
    # a line is written after the checkpoint of its step, so the kill may have come between the two
    assert len(set(steps[0]) - set(steps[1])) <= 1

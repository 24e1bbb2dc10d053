"""A run that is killed goes on to the bits of the run that was not."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from datetime import date
from functools import partial
from pathlib import Path
from random import Random

import pytest

from tests.helpers import training_process
from tests.helpers.training_process import finish, wait_for_step

ROWS = ("--data.num_train", "48", "--data.num_val", "4", "--data.num_test", "4")
CONTROLS = ("--controls", "--ensemble.seeds", "[1,2]")


def start(base_model, dirpath, *options, dying=None):
    return training_process.fork(base_model, dirpath, *ROWS, *options, dying=dying)


def kill_at(process, dirpath, step, **options):
    wait_for_step(process, dirpath, step, **options)
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("exec sleep 60", "waiting for step 3, the run got no further than step 2 for 0.2 s: "),
        ("echo why; exit 7", "waiting for step 3, the run ended with exit code 7: why"),
    ],
)
def test_a_run_that_is_waited_for_in_vain_says_why(tmp_path, command, message):
    (tmp_path / "checkpoints" / "seed_1").mkdir(parents=True)
    (tmp_path / "checkpoints" / "seed_1" / "step=2.ckpt").touch()
    process = subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match=re.escape(message)):
        wait_for_step(process, tmp_path, 3, quiet=0.2)


def adapters(dirpath):
    return {path.parent.name: path.read_bytes() for path in sorted(dirpath.glob("[!.]*/adapter_model.safetensors"))}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(tiny_llama, dirpath))
    return dirpath


#: Of the drawn kills, so that one that fails can be repeated.
DRAW = os.environ.get("SEEDLORA_TEST_KILLS", date.today().isoformat())


# 12 steps an epoch: just before the end of the first one; and drawn ones, with a time to wait from there on
@pytest.mark.parametrize("draw", [None, 1, 2])
def test_a_killed_run_resumes_to_the_same_bits(tiny_llama, whole, tmp_path, draw):
    dirpath, random = tmp_path / "killed", Random(f"{DRAW} {draw}")
    step, delay = (11, 0.0) if draw is None else (random.randrange(1, 12), random.uniform(0, 0.1))
    drawn = f"killed {delay:.3f} s after step {step}; again: SEEDLORA_TEST_KILLS={DRAW}"
    process = start(tiny_llama, dirpath)
    wait_for_step(process, dirpath, step)
    time.sleep(delay)
    process.kill()
    process.wait()
    assert not (dirpath / "fused").exists(), drawn
    output = finish(start(tiny_llama, dirpath, "--resume"))
    assert "Going on from" in output, drawn
    assert adapters(dirpath) == adapters(whole), drawn
    scores = [json.loads((run / "results.json").read_text()) for run in (dirpath, whole)]
    assert scores[0] == scores[1], drawn
    lines = [(dirpath / "metrics.jsonl").read_text(), (whole / "metrics.jsonl").read_text()]
    steps = [[json.loads(line)["step"] for line in text.splitlines()] for text in lines]
    assert steps[0] == sorted(steps[0]), drawn
    # a line is written after the checkpoint of its step, so the kill may have come between the two
    assert len(set(steps[1]) - set(steps[0])) <= 1, drawn


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(name):
    """Be killed when a file or folder of this name is whole, and only its name is not its own yet."""
    replace = os.replace

    def dying(source, destination):
        if Path(destination).name == name:
            kill_me()
        replace(source, destination)

    os.replace = dying


def dying_within(name):
    """Be killed when half of the temporary file of this checkpoint is written."""
    from lightning.fabric.plugins.io import torch_io

    save = torch_io._atomic_save

    def dying(checkpoint, path):
        save(checkpoint, path)
        if Path(path).name == name:
            os.truncate(path, Path(path).stat().st_size // 2)
            kill_me()

    torch_io._atomic_save = dying


@pytest.mark.parametrize(
    ("dying", "there"),
    [
        (partial(dying_within, "step=9.tmp"), {"step=8.ckpt", "step=9.tmp"}),
        (partial(dying_at, "step=9.ckpt"), {"step=8.ckpt", "step=9.tmp"}),
    ],
)
def test_a_checkpoint_that_is_not_finished_is_not_taken_for_one(tiny_llama, whole, tmp_path, dying, there):
    dirpath = tmp_path / "killed"
    process = start(tiny_llama, dirpath, dying=dying)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert {path.name for path in dirpath.glob("checkpoints/*/*")} == there
    assert "step=8.ckpt" in finish(start(tiny_llama, dirpath, "--resume"))
    assert adapters(dirpath) == adapters(whole)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_llama, whole, tmp_path):
    dirpath = tmp_path / "killed"
    process = start(tiny_llama, dirpath)
    while not (dirpath / "run.json").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    finish(start(tiny_llama, dirpath, "--resume"))
    assert adapters(dirpath) == adapters(whole)


# before the seeds, between them, between them and the soup, between the soup and the fused adapter
@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("trained.json", set()),
        ("seed_42", {"seed_11"}),
        ("soup", {"seed_11", "seed_42", "seed_202"}),
        ("fused", {"seed_11", "seed_42", "seed_202", "soup"}),
    ],
)
def test_a_run_killed_while_it_writes_the_adapters_ends_with_the_same_bits(tiny_llama, whole, tmp_path, name, there):
    dirpath = tmp_path / "killed"
    process = start(tiny_llama, dirpath, dying=partial(dying_at, name))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert adapters(dirpath).keys() == there
    written = {seed: (dirpath / seed / "adapter_model.safetensors").stat().st_mtime_ns for seed in there}
    output = finish(start(tiny_llama, dirpath, "--resume"))
    assert adapters(dirpath) == adapters(whole)
    assert (dirpath / "trained.json").read_bytes() == (whole / "trained.json").read_bytes()
    assert ("Going on from" in output) == (name in ("trained.json", "seed_42"))
    if name != "seed_42":
        for seed in there - {"soup"}:
            assert (dirpath / seed / "adapter_model.safetensors").stat().st_mtime_ns == written[seed]
    assert not (dirpath / "checkpoints").exists()
    assert not list(dirpath.glob(".*.tmp"))


# no checkpoint was due: the seeds that are lacking train in the stack in which they began
def test_a_run_without_a_checkpoint_killed_between_two_adapters_ends_with_the_same_bits(tiny_llama, whole, tmp_path):
    dirpath, options = tmp_path / "killed", ("--ensemble.checkpoint_every_n_steps", "100")
    process = start(tiny_llama, dirpath, *options, dying=partial(dying_at, "seed_42"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output
    assert adapters(dirpath).keys() == {"seed_11"}
    assert not list(dirpath.glob("checkpoints/*/*"))
    finish(start(tiny_llama, dirpath, *options, "--resume"))
    assert adapters(dirpath) == adapters(whole)
    for name in ("trained.json", "results.json"):
        assert (dirpath / name).read_bytes() == (whole / name).read_bytes()
    assert not (dirpath / "checkpoints").exists()


def test_a_run_in_two_passes_killed_in_the_second_resumes_to_the_same_bits(tiny_llama, tmp_path):
    options = ("--ensemble.stack_size", "2", "--model.dtype", "bfloat16")
    whole, dirpath = tmp_path / "whole", tmp_path / "killed"
    finish(start(tiny_llama, whole, *options))
    kill_at(start(tiny_llama, dirpath, *options), dirpath, 7, of="seed_202")
    written = {seed: (dirpath / seed / "adapter_model.safetensors").stat().st_mtime_ns for seed in adapters(dirpath)}
    assert written.keys() == {"seed_11", "seed_42"}
    assert "checkpoints/seed_202/step=" in finish(start(tiny_llama, dirpath, *options, "--resume"))
    assert adapters(dirpath) == adapters(whole)
    for seed, time_ns in written.items():
        assert (dirpath / seed / "adapter_model.safetensors").stat().st_mtime_ns == time_ns


@pytest.fixture(scope="module")
def whole_with_controls(tiny_llama, tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(tiny_llama, dirpath, *CONTROLS))
    return dirpath


@pytest.mark.slow
@pytest.mark.parametrize("control", ["long_seed", "wide_seed"])
def test_a_run_killed_in_a_trained_control_resumes_to_the_same_bits(tiny_llama, whole_with_controls, tmp_path, control):
    dirpath = tmp_path / "killed"
    kill_at(start(tiny_llama, dirpath, *CONTROLS), dirpath, 15, of=control)
    assert not (dirpath / control).exists()
    before = adapters(dirpath)
    assert {"seed_1", "seed_2", "soup", "fused"} <= before.keys()
    written = (dirpath / "seed_1" / "adapter_model.safetensors").stat().st_mtime_ns
    assert "Going on from" in finish(start(tiny_llama, dirpath, *CONTROLS, "--resume"))
    whole = adapters(whole_with_controls)
    assert adapters(dirpath) == whole
    assert before.items() <= whole.items()
    assert whole.keys() - before.keys() == {"wide_seed", control}
    assert (dirpath / "seed_1" / "adapter_model.safetensors").stat().st_mtime_ns == written
    for name in ("results.json", "selection.json"):
        assert (dirpath / name).read_bytes() == (whole_with_controls / name).read_bytes(), name

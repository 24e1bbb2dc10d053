"""A run that is killed goes on to the bits of the run that was not."""

from __future__ import annotations

import json
import time

import pytest

from tests import training_process
from tests.training_process import finish, wait_for_step

ROWS = ("--data.num_train", "48", "--data.num_val", "4", "--data.num_test", "4")
CONTROLS = ("--controls", "--ensemble.seeds", "[1,2]")


def start(base_model, dirpath, *options):
    return training_process.start(base_model, dirpath, *ROWS, *options)


def kill_at(process, dirpath, step, **options):
    wait_for_step(process, dirpath, step, **options)
    process.kill()
    process.wait()


def adapters(dirpath):
    return {path.parent.name: path.read_bytes() for path in sorted(dirpath.glob("*/adapter_model.safetensors"))}


@pytest.fixture(scope="module")
def whole(tiny_llama, tmp_path_factory):
    dirpath = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(tiny_llama, dirpath))
    return dirpath


# 12 steps an epoch: in the first, just before its end, in the second
@pytest.mark.parametrize("step", [3, 11, 17])
def test_a_killed_run_resumes_to_the_same_bits(tiny_llama, whole, tmp_path, step):
    dirpath = tmp_path / "killed"
    kill_at(start(tiny_llama, dirpath), dirpath, step)
    assert not (dirpath / "fused").exists()
    output = finish(start(tiny_llama, dirpath, "--resume"))
    assert "Going on from" in output
    assert adapters(dirpath) == adapters(whole)
    assert json.loads((dirpath / "results.json").read_text()) == json.loads((whole / "results.json").read_text())
    lines = [(dirpath / "metrics.jsonl").read_text(), (whole / "metrics.jsonl").read_text()]
    steps = [[json.loads(line)["step"] for line in text.splitlines()] for text in lines]
    assert steps[0] == sorted(steps[0])
    # a line is written after the checkpoint of its step, so the kill may have come between the two
    assert len(set(steps[1]) - set(steps[0])) <= 1


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(tiny_llama, whole, tmp_path):
    dirpath = tmp_path / "killed"
    kill_at(start(tiny_llama, dirpath), dirpath, 5)
    # the kill may have come between writing a checkpoint and removing the one before it
    checkpoint = max(dirpath.glob("checkpoints/*/step=*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    checkpoint.with_name("step=99.tmp").write_bytes(checkpoint.read_bytes()[:1000])
    finish(start(tiny_llama, dirpath, "--resume"))
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


def test_a_run_killed_between_training_and_fusion_only_fuses(tiny_llama, whole, tmp_path):
    import shutil

    dirpath = tmp_path / "killed"
    shutil.copytree(whole, dirpath)
    shutil.rmtree(dirpath / "fused")
    (dirpath / "results.json").unlink()
    before = (dirpath / "seed_42" / "adapter_model.safetensors").stat().st_mtime_ns
    finish(start(tiny_llama, dirpath, "--resume"))
    assert adapters(dirpath) == adapters(whole)
    assert (dirpath / "seed_42" / "adapter_model.safetensors").stat().st_mtime_ns == before


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

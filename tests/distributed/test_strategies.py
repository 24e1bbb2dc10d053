"""Two processes give the fused adapter of one, under every strategy; and a process that dies stops the other."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import load_file

from seedlora.adapters.reading import read_adapter
from seedlora.distributed.strategies import (
    CPUDeepSpeedStrategy,
    FSDP2Strategy,
    check_batches,
    choose_strategy,
    prepare_strategy,
)
from tests.helpers import strategies_job, training_process
from tests.helpers.fits import assert_alike
from tests.helpers.precision import SAME, assert_trained_alike, in_float64
from tests.helpers.training_process import finish, wait_for_step


def difference(a, b):
    """Largest relative difference of any layer's update."""
    a, b = (read_adapter(folder).layers for folder in (a, b))
    assert set(a) == set(b)
    return max(((a[path].dense() - b[path].dense()).norm() / a[path].dense().norm()).item() for path in a)


@pytest.fixture(scope="module")
def one(tiny_llama, tmp_path_factory):
    """The folder and the metrics of one process with the same global batch."""
    folder = tmp_path_factory.mktemp("one")
    with in_float64():
        return folder, strategies_job.run(tiny_llama, folder, batch_size=4, strategy=lambda: "auto", devices=1)


@pytest.fixture(scope="module")
def two(tiny_llama, tmp_path_factory):
    """The folder with what two processes made under each strategy."""
    folder = tmp_path_factory.mktemp("two")
    strategies_job.start(tiny_llama, folder)
    return folder


@pytest.mark.parametrize("name", strategies_job.STRATEGIES)
def test_two_processes_give_the_adapters_and_the_scores_of_one(one, two, name):
    folder, metrics = one
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(folder / adapter, two / name / adapter) < SAME
    found = json.loads((two / name / "metrics.json").read_text())
    for key in ("val/loss_seed_11", "val/loss_seed_202", "val/loss_fused", "val/match_fused"):
        assert found[key] == pytest.approx(metrics[key], rel=SAME)
    for label in ("base", "seed_42", "soup", "fused", "ties"):
        assert found[f"test/{label}"] == metrics[f"test/{label}"]
    chosen, wanted = (json.loads((run / "selection.json").read_text()) for run in (two / name, folder))
    assert chosen["rows"] == 9
    for label in ("seed_11", "seed_42", "seed_202", "soup", "fused"):
        assert chosen["scores"][label]["loss"] == pytest.approx(wanted["scores"][label]["loss"], rel=SAME)
    assert found["test/fused"][1] == 13
    sample, expected = (json.loads((run / "results.json").read_text())["train_sample"] for run in (two / name, folder))
    assert (sample["rows"], sample["tokens"]) == (13, expected["tokens"])
    assert sample["losses"].keys() == {"base", "seed_11", "seed_42", "seed_202", "soup", "fused", "ties"}
    for label, row in sample["losses"].items():
        assert row == pytest.approx(expected["losses"][label], rel=SAME), label


@pytest.mark.slow
@pytest.mark.parametrize("kind", strategies_job.KINDS)
def test_two_processes_give_the_adapters_of_one_of_every_kind(tiny_llama, tmp_path, kind):
    strategies_job.start(tiny_llama, tmp_path, kind)
    one, options = tmp_path / "one", strategies_job.KINDS[kind]
    with strategies_job.precision_of(kind):
        strategies_job.run(tiny_llama, one, batch_size=4, strategy=lambda: "auto", devices=1, **options)
    for name in strategies_job.strategies_of(kind):
        for seed in ("seed_11", "seed_42", "seed_202"):
            file = Path(seed) / ("model.safetensors" if kind == "full" else "adapter_model.safetensors")
            expected, found = load_file(one / file), load_file(tmp_path / name / file)
            if (noise := strategies_job.IN_FLOAT32.get(kind)) is not None:
                rate = options.get("learning_rate", 2e-3)
                assert_trained_alike(found, expected, steps=3, rate=rate, noise=noise)
                continue
            for key, tensor in expected.items():
                assert ((found[key] - tensor).norm() / tensor.norm()).item() < SAME, (name, key)
        assert (tmp_path / name / "fused" / "fusion.json").is_file()
    if kind == "full":
        scored = {path.name: path.read_text() for path in tmp_path.glob("* scores ties")}
        assert len(scored) == 2
        assert len(set(scored.values())) == 1
        assert len(list(tmp_path.glob("* merges ties"))) == 1


@pytest.mark.usefixtures("float64")
def test_two_processes_exclude_a_diverged_seed_as_one_does(tiny_llama, two, tmp_path):
    poison = (strategies_job.Poison("seed_42", 2),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=poison)
    assert json.loads((two / "excluded" / "excluded.json").read_text()) == {
        "seed_42": "training loss not finite in step 3"
    }
    assert not (two / "excluded" / "seed_42").exists()
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "excluded" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_two_processes_find_weights_that_a_last_step_broke(tiny_llama, two, tmp_path):
    poison = (strategies_job.Break("seed_42", 3),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=poison)
    for folder in (tmp_path, two / "broken"):
        excluded = json.loads((folder / "excluded.json").read_text())
        assert excluded == {"seed_42": "weights not finite after step 3"}
    for adapter in ("seed_11", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "broken" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_two_processes_stop_seeds_and_keep_their_best_weights_as_one_does(tiny_llama, two, tmp_path):
    options = {"watched": True, **strategies_job.WATCHED}
    wanted = strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, **options)
    found = json.loads((two / "watched" / "metrics.json").read_text())
    decided = [{k: v for k, v in of.items() if k.startswith(("best step", "stopped"))} for of in (wanted, found)]
    assert decided[0] == decided[1]
    assert {key.split()[0] for key in decided[0]} == {"best", "stopped"}
    for adapter in ("seed_11", "seed_42", "seed_202", "fused"):
        assert difference(tmp_path / adapter, two / "watched" / adapter) < SAME


@pytest.mark.usefixtures("float64")
def test_a_stopped_seed_keeps_still_in_two_processes_as_in_one(tiny_llama, two, tmp_path):
    stop = (strategies_job.Stop("seed_42", 2),)
    strategies_job.run(tiny_llama, tmp_path, batch_size=4, strategy=lambda: "auto", devices=1, poison=stop)
    for adapter in ("seed_11", "seed_42", "seed_202"):
        assert difference(tmp_path / adapter, two / "stopped" / adapter) < SAME


def test_the_words_of_the_command_line():
    for word, stage in (("deepspeed_stage_1", 1), ("deepspeed_stage_2", 2), ("deepspeed_stage_3", 3)):
        strategy = choose_strategy(word, accelerator="cpu")
        assert isinstance(strategy, CPUDeepSpeedStrategy)
        assert strategy.config["zero_optimization"]["stage"] == stage
        assert choose_strategy(word, accelerator="gpu") == word
    assert isinstance(choose_strategy("fsdp2", accelerator="gpu"), FSDP2Strategy)
    assert choose_strategy("ddp", accelerator="cpu") == "ddp"
    given = DDPStrategy()
    assert type(choose_strategy(given, accelerator="cpu")) is DDPStrategy
    assert choose_strategy(given, accelerator="cpu") is not given


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("ddp_spawn", {}, "ddp_spawn starts its processes out of this one.*use ddp"),
        ("fsdp", {}, "fsdp flattens frozen and trained.*use fsdp2"),
        ("deepspeed_stage_2", {"precision": "bf16-mixed"}, "bf16-mixed under CPUDeepSpeedStrategy.*--model.dtype"),
        ("deepspeed_stage_2", {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "value.*choose norm"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(strategy, options, message):
    import lightning.pytorch as pl

    with pytest.raises(ValueError, match=message):
        chosen = choose_strategy(strategy, accelerator="cpu")
        prepare_strategy(pl.Trainer(strategy=chosen, accelerator="cpu", devices=1, logger=False, **options))


def test_deepspeed_does_not_clip_a_second_time():
    import lightning.pytorch as pl

    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    prepare_strategy(pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, gradient_clip_val=0.1))
    assert strategy.config["gradient_clipping"] == 0.0
    with pytest.raises(ValueError, match="must not have a section 'bf16'"):
        strategy = CPUDeepSpeedStrategy(config={"bf16": {"enabled": True}})
        prepare_strategy(pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False))


def test_deepspeed_leaves_the_base_model_in_its_dtype():
    import lightning.pytorch as pl

    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False)
    prepare_strategy(trainer)
    module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert trainer.strategy.precision_plugin.convert_module(module).weight.dtype == torch.bfloat16


def test_deepspeed_needs_whole_steps():
    import lightning.pytorch as pl

    strategy = choose_strategy("deepspeed_stage_2", accelerator="cpu")
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=1, logger=False, accumulate_grad_batches=2)
    check_batches(trainer, 4)
    with pytest.raises(ValueError, match="leaves 5 micro-batches.*accumulate_grad_batches 2 does not divide"):
        check_batches(trainer, 5)


# Killed processes


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
    assert re.search(rf"train.py: stopped \(process {1 - rank}\): ({reason}|the connection)", output), output
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

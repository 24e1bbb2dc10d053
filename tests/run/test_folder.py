"""The folder of a run as the state of its ensemble, without a Trainer."""

from __future__ import annotations

import json
import re

import pytest
import torch

from seedlora.records.owner import OWNER
from seedlora.run.folder import RunFolder
from seedlora.run.ownership import take_folder

SETTINGS = {"model.r": 8, "model.gradient_checkpointing": False, "processes": 2}


def train(folder, *names):
    for name in names:
        (folder.path / name).mkdir(parents=True)
        (folder.path / name / "adapter_config.json").write_text("{}")


def save(folder, names, step):
    with folder.new_checkpoint(names, step) as temporary:
        torch.save({"step": step, "weights": torch.ones(300)}, temporary)
    folder.keep(temporary)


def test_what_is_left_to_do(tmp_path):
    folder = RunFolder(tmp_path, ["seed_3", "seed_1", "seed_2"], controls=("long_seed", "wide_seed"))
    assert (folder.trained, folder.pending, folder.pending_controls) == ((), ("seed_3", "seed_1", "seed_2"), ())
    train(folder, "seed_1")
    assert (folder.trained, folder.pending) == (("seed_1",), ("seed_3", "seed_2"))
    assert folder.next_stack(1) == ("seed_3",)
    assert folder.next_stack(None) == ("seed_3", "seed_2")
    folder.leave_out({"seed_2": "diverged"})
    train(folder, "seed_3")
    assert (folder.trained, folder.pending) == (("seed_3", "seed_1"), ())
    assert folder.pending_controls == ("long_seed", "wide_seed")
    folder.leave_out({"long_seed": "diverged too"})
    assert folder.pending_controls == ("wide_seed",)
    assert folder.left_out == {"seed_2": "diverged", "long_seed": "diverged too"}


def test_a_control_of_fewer_seeds_is_trained_anew(tmp_path):
    for number, seeds in enumerate((["seed_1", "seed_2"], ["seed_1", "seed_2", "seed_3"]), start=2):
        folder = RunFolder(tmp_path, seeds, controls=("long_seed", "wide_seed"))
        train(folder, *(name for name in seeds if not (tmp_path / name).exists()))
        assert folder.pending_controls == ("long_seed", "wide_seed")
        for name in folder.controls:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "adapter_config.json").write_text("{}")
            (tmp_path / name / "control.json").write_text(json.dumps({"seeds": number}))
        assert folder.pending_controls == ()
        assert folder.trained_controls == ("long_seed", "wide_seed")
    # and what was begun of it is of no use
    again = RunFolder(tmp_path, ["seed_1", "seed_2", "seed_3", "seed_4"], controls=("long_seed", "wide_seed"))
    save(again, ("wide_seed",), 7)
    again.forget_checkpoints(("seed_4",))
    assert again.checkpoint(("wide_seed",)) is None


def test_what_was_merged_before_is_forgotten(tmp_path):
    folder = RunFolder(tmp_path, ["seed_1"])
    train(folder, "seed_1", "fused", "soup")
    (tmp_path / "fused" / "fusion.json").write_text('{"method": "ties"}')
    (tmp_path / "selection.json").write_text("{}")
    assert folder.forget_fused() == ["fused"]
    # whatever else has that name was not made by a merge
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed_1", "soup"]
    assert folder.fusion is None


def test_metrics_have_a_file_for_each_part_of_the_seeds(tmp_path):
    folder = RunFolder(tmp_path, ["seed_1", "seed_2", "seed_3"])
    names = [(), ("seed_1", "seed_2", "seed_3"), ("seed_1", "seed_3"), ("long_seed",)]
    files = ["metrics.jsonl", "metrics.jsonl", "metrics-1-3.jsonl", "metrics-long_seed.jsonl"]
    assert [folder.metrics(part).name for part in names] == files


def test_many_long_names_are_cut_to_what_a_file_system_takes(tmp_path):
    names = [f"seed_{seed}_lr0p00{seed}_r16_alpha32_cosine" for seed in range(11, 29)]
    folder = RunFolder(tmp_path, [*names, "seed_7"])
    folder.begin(names)
    save(folder, names, 3)
    save(folder, names, 4)
    assert folder.checkpoint(names).name == "step=4.ckpt"
    (of_stack,) = (tmp_path / "checkpoints").iterdir()
    assert of_stack.name.startswith(f"{names[0]}-and-17-more-")
    assert folder.metrics(names).name.startswith("metrics-11_lr0p0011_r16_alpha32_cosine-and-17-more-")
    assert folder.checkpoint(names[:-1]) is None
    train(folder, *names[:5])
    assert folder.next_stack(None) == tuple(names)
    train(folder, *names[5:])
    folder.forget_checkpoints(names[:1])
    assert not of_stack.exists()


def test_one_checkpoint_is_kept_and_a_half_written_one_is_none(tmp_path):
    folder = RunFolder(tmp_path, ["seed_1", "seed_2"])
    both = ("seed_1", "seed_2")
    assert folder.checkpoint(both) is None
    for step in (9, 10):
        save(folder, both, step)
    (tmp_path / "checkpoints" / "seed_1-seed_2" / "step=9 of mine.ckpt").write_text("a copy")
    with folder.new_checkpoint(both, 11) as temporary:
        temporary.write_text("half")
    assert folder.checkpoint(both).name == "step=10.ckpt"
    assert {path.name for path in tmp_path.glob("checkpoints/*/*.ckpt")} == {"step=10.ckpt", "step=9 of mine.ckpt"}
    train(folder, *both)
    folder.forget_checkpoints(both)
    assert not (tmp_path / "checkpoints").exists()


DAMAGES = {
    "empty": lambda whole: b"",
    "truncated": lambda whole: whole[:-100],
    "without its head": lambda whole: bytes(40) + whole[40:],
    "other weights": lambda whole: whole.replace(torch.ones(3).numpy().tobytes(), bytes(12), 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["", "checkpoint/rank_1.pt"], ids=["file", "folder"])
def test_of_two_checkpoints_the_newest_that_is_whole_is_taken(tmp_path, file, damage):
    # killed between the two steps of keep()
    old, new = (tmp_path / "checkpoints" / "seed_1" / f"step={step}.ckpt" for step in (9, 10))
    for path in (old, new):
        for part in {file, file.replace("1", "0")}:
            (path / part).parent.mkdir(parents=True, exist_ok=True)
            torch.save({"weights": torch.ones(300)}, path / part)
    assert RunFolder(tmp_path, ["seed_1"]).checkpoint(("seed_1",)) == new
    (new / file).write_bytes(damage((new / file).read_bytes()))
    assert RunFolder(tmp_path, ["seed_1"]).checkpoint(("seed_1",)) == old
    (old / file).write_bytes(damage((old / file).read_bytes()))
    folder = RunFolder(tmp_path, ["seed_1"])
    with pytest.raises(ValueError, match=r"seed_1/step=10\.ckpt is damaged, and no older one is there; without it"):
        folder.checkpoint(("seed_1",))
    # the run gets there again
    with folder.new_checkpoint(("seed_1",), 10) as temporary:
        torch.save({}, temporary)
    folder.keep(temporary)
    assert folder.saved(("seed_1",)) == [folder.checkpoint(("seed_1",))] == [new]


@pytest.mark.parametrize("content", [b"", b'{"model.r": 8, "mod', b"\x80\x02}q\x00", b"[1]"])
@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("run.json", "it resume=True takes the options that are given for those that it was started with"),
        ("excluded.json", "it resume=True trains what was left out again"),
        ("trained.json", "it resume=True does not know how long finished adapters were trained"),
        ("selection.json", "it resume=True chooses again"),
        ("long_seed/control.json", "that folder resume=True makes it anew"),
        ("fused/fusion.json", "that folder resume=True makes it anew"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(tmp_path, name, without, content):
    folder = RunFolder(tmp_path, ["seed_1"], controls=["long_seed"])
    folder.open(SETTINGS, resume=False)
    train(folder, "seed_1", "long_seed", "fused")
    (tmp_path / name).write_bytes(content)
    message = rf"{re.escape(str(tmp_path / name))} cannot be read: .*; without {without}$"
    with pytest.raises(ValueError, match=message):
        folder.trained_controls if "control" in name else folder.open(SETTINGS, resume=True)


def test_a_stack_that_was_killed_while_it_was_written_goes_on_as_it_was(tmp_path):
    folder = RunFolder(tmp_path, ["seed_1", "seed_2", "seed_3"])
    folder.begin(("seed_1", "seed_2", "seed_3"))
    assert folder.next_stack(2) == ("seed_1", "seed_2")
    folder.begin(("seed_1", "seed_2"))
    train(folder, "seed_1")
    assert folder.next_stack(2) == ("seed_1", "seed_2")
    assert folder.next_stack(1) == ("seed_2",)
    train(folder, "seed_2")
    folder.forget_checkpoints(("seed_1", "seed_2"))
    # of a larger stack that was begun before nothing is left: its finished seeds would train again
    assert folder.next_stack(None) == ("seed_3",)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_run_goes_on_with_its_own_settings(tmp_path):
    folder = RunFolder(tmp_path, ["seed_1"])
    folder.open(SETTINGS, resume=False)
    assert folder.settings == SETTINGS
    with pytest.raises(ValueError, match="already holds a run; go on with it by resume=True, or choose another d"):
        folder.open(SETTINGS, resume=False)
    folder.open({**SETTINGS, "model.gradient_checkpointing": True}, resume=True)
    with pytest.raises(ValueError, match=r"was started with model\.r = 8, now it is 4"):
        folder.open({**SETTINGS, "model.r": 4}, resume=True)
    with pytest.raises(ValueError, match="was started with processes = 2, now it is 1"):
        folder.open({**SETTINGS, "processes": 1}, resume=True)
    train(folder, "seed_1")
    folder.open({**SETTINGS, "processes": 1}, resume=True)
    assert json.loads((tmp_path / "run.json").read_text()) == SETTINGS


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    folders = [RunFolder(tmp_path / "runs" / "2026", [1], is_new=True) for _ in range(3)]
    assert [folder.take() for folder in folders] == [True] * 3
    assert [folder.path.name for folder in folders] == ["2026", "2026-2", "2026-3"]
    assert not folders[1].take()
    for folder in folders:
        folder.leave()
        assert not list(folder.path.iterdir())


def test_a_run_that_is_not_there_does_not_go_on(tmp_path):
    folder = RunFolder(tmp_path / "mistyped", [1])
    with pytest.raises(ValueError, match=r"mistyped holds no run to go on with: it has no run\.json; is the name"):
        folder.take(resume=True)
    assert not folder.path.exists()
    (tmp_path / "mistyped").mkdir()
    leave_behind = take_folder(folder.path)  # killed before it wrote more
    OWNER.write(folder.path, {**leave_behind, "started": 1})
    assert folder.take(resume=True)

"""The folder of a run, which is the state of its ensemble."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from seedlora.adapters.adapter import is_trained
from seedlora.names import FUSED, RESULTS_NAME, SAMPLES_NAME, SELECTION_NAME, SOUP
from seedlora.records.fusion import FUSION, FusionRecord
from seedlora.records.json_file import Content, JSONFile
from seedlora.records.owner import OWNER, OwnerRecord
from seedlora.records.selection import SELECTION, Selection
from seedlora.records.settings import SETTINGS, RunSettings
from seedlora.records.training import CONTROL, EXCLUDED, TRAINED, ControlRecord, TrainedRow
from seedlora.run.ownership import leave_folder, take_folder
from seedlora.utils.files import remove_folder, saving, sync, write_text
from seedlora.utils.options import name_option

#: Settings that may change when a run goes on: they decide on memory and speed, not on what is learned.
FREE = {"model.gradient_checkpointing", "data.eval_batch_size"}
#: Characters of a file's name that the names of a stack may take: file systems take 255.
LONGEST_NAME = 200
#: In the folder of a stack's checkpoints, the names of its adapters where the folder's own name is too short for them.
MEMBERS = "members.txt"
#: What a run does without a file, for whoever has to remove one that cannot be read.
WITHOUT = {
    SETTINGS.name: "takes the options that are given for those that it was started with",
    EXCLUDED.name: "trains what was left out again",
    TRAINED.name: "does not know how long finished adapters were trained",
    SELECTION.name: "chooses again",
}


class RunFolder:
    """Tell what a run has finished, has begun and has still to do, from its files, which are read each time.

    - ``run.json``: the settings that decide what is learned.
    - ``seed_11``, ..., ``long_seed``, ``wide_seed``: an adapter, or a whole model, that is trained. A seed or a trained
      control is finished when its folder is there.
    - ``excluded.json``: the adapters that were left out, and why.
    - ``trained.json``: how long each adapter was trained, on how many tokens, and which step was kept.
    - ``checkpoints/seed_11-seed_42/step=25.ckpt``: of the stack in training, the newest alone. The folder is there from
      the first step on, until all of the stack is written.
    - ``soup``, ``fused``, ``selection.json``: what the finished seeds were merged to, and what validation said of it.
    - ``results.json``: what the last test said.
    - ``owner.json``: the process at work in the folder, of which there is one at a time.

    Each is whole or not there, wherever a process was killed. Only the first rank writes.

    Args:
        path: of the folder; it need not exist.
        names: of the replicas of the ensemble.
        controls: the controls to train after them, in this order.
        is_new: whether nobody has named it: if it is there when it is taken, it gets another name.
    """

    def __init__(
        self, path: str | Path, names: Sequence[str], *, controls: Sequence[str] = (), is_new: bool = False
    ) -> None:
        self.path, self.names, self.controls = Path(path), tuple(names), tuple(controls)
        self._is_new = is_new
        self._own: OwnerRecord | None = None
        #: Checkpoints that were read from end to end.
        self._whole: set[Path] = set()

    # Who is at work in it

    def take(self, *, resume: bool = False) -> bool:
        """Make the folder this process's own, until :meth:`leave`; return whether it was not before.

        Args:
            resume: whether a run is to go on, which has to be there then.

        Raises:
            ValueError: if another process is at work in it, or if there is no run to go on with.
        """
        if self._own is not None:
            return False
        if resume and not (self.path / SETTINGS.name).is_file() and not (self.path / OWNER.name).is_file():
            raise ValueError(
                f"{self.path} holds no run to go on with: it has no {SETTINGS.name}; is the name right? Without "
                f"{name_option('ensemble.resume', True)} a new run begins there"
            )
        if self._is_new:
            self._make_new()
        self._own = take_folder(self.path)
        return True

    def leave(self) -> None:
        """Give the folder up, if it is ours."""
        if self._own is not None:
            leave_folder(self.path, self._own)
            self._own = None

    def _make_new(self) -> None:
        """Make the folder under the first name that is free: of two runs that begin together each gets its own."""
        first = self.path
        for number in count(2):
            try:
                self.path.mkdir(parents=True)
            except FileExistsError:
                self.path = first.with_name(f"{first.name}-{number}")
            else:
                self._is_new = False
                return

    # What is to be done

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the replicas whose adapters, or whole models, are there."""
        return tuple(name for name in self.names if is_trained(self.path / name))

    @property
    def left_out(self) -> dict[str, str]:
        """Return the adapters that were left out, seeds and controls, and why."""
        return self._read(EXCLUDED) or {}

    @property
    def pending(self) -> tuple[str, ...]:
        """Return the replicas that are still to be trained."""
        done = {*self.trained, *self.left_out}
        return tuple(name for name in self.names if name not in done)

    @property
    def pending_controls(self) -> tuple[str, ...]:
        """Return the controls that are still to be trained, once the seeds are."""
        if self.pending:
            return ()
        left_out = self.left_out
        return tuple(name for name in self.controls if name not in {*left_out, *self.trained_controls})

    @property
    def trained_controls(self) -> tuple[str, ...]:
        """Return the controls that are there, for as many seeds as now: of fewer they were trained for less."""
        there = (name for name in self.controls if is_trained(self.path / name))
        return tuple(name for name in there if self._read(CONTROL, name) in (None, self.control_record))

    @property
    def control_record(self) -> ControlRecord:
        """Return what ``control.json`` says of a control that is trained now: how many seeds it stands for."""
        return {"seeds": len(self.names)}

    def next_stack(self, stack_size: int | None) -> tuple[str, ...]:
        """Return the replicas to train next, ``stack_size`` at once; all by default.

        A stack that was killed while its adapters were written goes on as it was, from its checkpoint if it has one: a
        smaller stack would start anew, and its products are rounded otherwise.
        """
        pending, trained = {*self.pending}, {*self.trained}
        for folder in self._stacks():
            names = _names_of(folder)
            stack = tuple(name for name in names if name in self.names)
            partly = pending.intersection(stack) and trained.intersection(stack)
            fits = len(stack) == len(names) <= (stack_size or len(names))
            if partly and fits:
                return stack
        return self.pending[:stack_size]

    def metrics(self, names: Sequence[str]) -> Path:
        """Return where the metrics of these adapters belong: one file per stack of seeds, one per control."""
        if len(names) in (0, len(self.names)):
            return self.path / "metrics.jsonl"
        return self.path / f"metrics-{_joined([name.removeprefix('seed_') for name in names])}.jsonl"

    # Settings and outcomes

    def open(self, settings: RunSettings, *, resume: bool) -> None:
        """Begin a run here, or go on with the one that is here.

        Args:
            settings: plain data, all that decides a replica's training.
            resume: whether a run may be here.

        Raises:
            ValueError: if one is and may not be, if it was started differently, or a file of it cannot be read.
        """
        before = self.settings
        self._read(EXCLUDED)
        self._read(TRAINED)
        self._read(SELECTION)
        self._read(FUSION, FUSED)
        if before is None:
            SETTINGS.write(self.path, settings)
            return
        if not resume:
            raise ValueError(
                f"{self.path} already holds a run; go on with it by {name_option('ensemble.resume', True)}, or choose "
                "another "
                f"{name_option('ensemble.dirpath')}"
            )
        # How many processes train does not matter once all is trained.
        free = FREE if self.pending or self.pending_controls else {*FREE, "processes"}
        for key in sorted((set(before) | set(settings)) - free):
            if before.get(key) != settings.get(key):
                raise ValueError(
                    f"{self.path} was started with {key} = {before.get(key)!r}, now it is "
                    f"{settings.get(key)!r}; resume with the same settings, or choose another "
                    f"{name_option('ensemble.dirpath')}"
                )
        # What a killed process was writing: a whole model, perhaps.
        for rest in self.path.glob(".*.tmp"):
            remove(rest)

    @property
    def settings(self) -> RunSettings | None:
        """Return the settings that the run was started with; None before."""
        return self._read(SETTINGS)

    @property
    def selection(self) -> Selection | None:
        """Return what the validation rows said when the seeds were merged."""
        return self._read(SELECTION)

    @property
    def fusion(self) -> FusionRecord | None:
        """Return how the fused adapter was made."""
        return self._read(FUSION, FUSED)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Write down adapters that are left out, and why."""
        EXCLUDED.write(self.path, {**self.left_out, **reasons})

    @property
    def trained_on(self) -> dict[str, TrainedRow]:
        """Return how long each adapter was trained."""
        return self._read(TRAINED) or {}

    def add_trained(self, rows: Mapping[str, TrainedRow]) -> None:
        """Write down how adapters were trained."""
        TRAINED.write(self.path, {**self.trained_on, **rows})

    def forget_fused(self) -> list[str]:
        """Remove what these seeds were merged to before, and what was said of it; return the names of the folders."""
        found = [name for name in (FUSED, SOUP) if (self.path / name / FUSION.name).is_file()]
        for name in (SELECTION_NAME, RESULTS_NAME, SAMPLES_NAME):
            (self.path / name).unlink(missing_ok=True)
        for name in found:
            remove_folder(self.path / name)
        return found

    def _read(self, file: JSONFile[Content], folder: str = "") -> Content | None:
        """Read one of the JSON files, of the run or of a folder of it, if it is there.

        Raises:
            ValueError: if it cannot be read, with what the run does without it.
        """
        try:
            return file.read(self.path / folder)
        except ValueError as error:
            gone, does = ("that folder", "makes it anew") if folder else ("it", WITHOUT[file.name])
            raise ValueError(f"{error}; without {gone} {name_option('ensemble.resume', True)} {does}") from None

    # Checkpoints

    def begin(self, names: Sequence[str]) -> None:
        """Write down that these are trained in one stack."""
        folder = self._checkpoints(names)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.name != "-".join(names):
            write_text(folder / MEMBERS, "\n".join(names))

    def checkpoint(self, names: Sequence[str]) -> Path | None:
        """Return the newest checkpoint of a stack that is whole; a file is read from end to end for that, once.

        Raises:
            ValueError: if there are some and none is whole.
        """
        saved = self.saved(names)
        for path in saved:
            if path in self._whole or _is_whole(path):
                self._whole.add(path)
                return path
        if saved:
            raise ValueError(
                f"{saved[0]} is damaged, and no older one is there; without it {name_option('ensemble.resume', True)} "
                "starts at "
                "step 0"
            )
        return None

    def saved(self, names: Sequence[str]) -> list[Path]:
        """Return the checkpoints of a stack, the newest first; copies of other names are somebody's own."""
        found = [path for path in self._checkpoints(names).glob("step=*.ckpt") if path.stem[5:].isdigit()]
        return sorted(found, key=step_of, reverse=True)

    @contextmanager
    def new_checkpoint(self, names: Sequence[str], step: int) -> Iterator[Path]:
        """Yield where to save the next one, to be given to :meth:`keep`; it is removed after an error.

        Raises:
            OSError: as :func:`seedlora.utils.files.saving`.
        """
        path, before = self._checkpoints(names) / f"step={step}.ckpt", next(iter(self.saved(names)), None)
        temporary = path.with_suffix(".tmp")
        self.begin(names)
        # Lightning writes to a temporary file first: on the disk where it belongs, which has room for it.
        elsewhere, tempfile.tempdir = tempfile.tempdir, str(path.parent)
        try:
            with saving(path, size=before.stat().st_size if before is not None and before.is_file() else None):
                yield temporary
        except BaseException:
            remove(temporary)
            raise
        finally:
            tempfile.tempdir = elsewhere

    def keep(self, temporary: Path) -> None:
        """Flush a new checkpoint, rename it, then remove the older ones: at any moment a whole one is there."""
        path = temporary.with_suffix(".ckpt")
        sync(temporary)
        if path.is_dir():  # one that was damaged
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
        for other in self.saved(_names_of(path.parent)):
            if other != path:
                remove(other)

    def forget_checkpoints(self, names: Sequence[str]) -> None:
        """Remove the checkpoints of a finished stack, and of others that share a seed; after the last one all."""
        finished = {*names}
        if not finished.intersection(self.controls):
            # A control that was begun before these seeds stands for fewer.
            finished.update(self.controls)
        for folder in self._stacks():
            if finished.intersection(_names_of(folder)):
                shutil.rmtree(folder, ignore_errors=True)
        if not (self.pending or self.pending_controls):
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def _checkpoints(self, names: Sequence[str]) -> Path:
        return self.path / "checkpoints" / _joined(names)

    def _stacks(self) -> list[Path]:
        """Return the folders of the stacks that were begun."""
        return sorted((self.path / "checkpoints").glob("*"))


def _joined(names: Sequence[str]) -> str:
    """Return the names of a stack as one file name; many long ones are cut to the first, their number and a hash."""
    joined = "-".join(names)
    if len(joined) <= LONGEST_NAME:
        return joined
    return f"{names[0]}-and-{len(names) - 1}-more-{hashlib.sha256(joined.encode()).hexdigest()[:12]}"


def _names_of(folder: Path) -> list[str]:
    """Return whose checkpoints a folder holds."""
    members = folder / MEMBERS
    return members.read_text(encoding="utf-8").split() if members.is_file() else folder.name.split("-")


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in which a checkpoint was taken."""
    return int(checkpoint.stem.removeprefix("step="))


def _is_whole(path: Path) -> bool:
    """Return whether a checkpoint has every byte that torch.save wrote, by its checksums, which torch.load ignores.

    Under DeepSpeed a checkpoint is a folder of such files.
    """
    files = [*path.rglob("*.pt")] if path.is_dir() else [path]
    for file in files:
        with file.open("rb") as opened:
            try:
                if zipfile.ZipFile(opened).testzip() is not None:
                    return False
            except Exception:  # zipfile has no word for all that may be wrong with a file
                return False
    return bool(files)


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there: a file, or a folder under DeepSpeed."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

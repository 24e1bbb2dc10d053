"""A run's folder as plain data: all that its report says, and the content of ``report.json``.

Everything is read or computed again from what the run stored; what is drawn has a fixed seed, and no clock is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError, is_model
from seedlora.merge.common_options import COMMON_DEFAULTS
from seedlora.merge.inputs import read_adapters, stack_adapters, weight_files_of
from seedlora.merge.record import hash_inputs
from seedlora.names import EVALUATION_FOLDER, FUSED
from seedlora.records.evaluation import EVALUATION_SETTINGS
from seedlora.records.report import Report, Reproduction, WeightRecord
from seedlora.records.samples import read_samples
from seedlora.report.costs import adapter_rows, ensemble_shares
from seedlora.report.examples import choose_examples
from seedlora.report.front import front_record, title_of
from seedlora.report.outcomes import describe_tests
from seedlora.report.sentences import ANSWERED_BY_OTHERS, further_comparisons, left_out, missing
from seedlora.report.stored import StoredRun, read_run
from seedlora.report.sweep import sweep_record
from seedlora.report.train_or_fuse import train_or_fuse_record
from seedlora.report.training_curves import training_curves
from seedlora.report.weights import LAYERS, weight_facts
from seedlora.scores.advice import advise
from seedlora.scores.intervals import CONFIDENCE_PERCENT
from seedlora.scores.results import stored_results

#: The sha256 of adapters' weights by the path of their folder, as :func:`seedlora.merge.record.hash_inputs` gives it.
Digests = Mapping[str, Future[str]]


def facts(run: str | Path, *, layers: str = LAYERS, on_layer: Callable[[str], object] = lambda _path: None) -> Report:
    """Read a run's folder, finished or not.

    Costs one pass over the adapters' factors, and over the entries of one layer's updates, a block of rows at a time.

    Args:
        run: the folder.
        layers: whose entries are counted, in the middle of the model: ``attention``, ``ffn``, ``all``, or a regular
            expression that is searched for in a layer's path.
        on_layer: called with each layer's path when it is done.

    Raises:
        ValueError: if the folder holds no run, or a file in it cannot be read.
    """
    stored = read_run(Path(run))
    answers = _read_answers(stored)
    digests = hash_inputs([*_adapter_folders(stored), *answers.folders.values()])
    replaced = answers.replaced(digests)
    tests = describe_tests(stored, answered=not replaced)
    curves = training_curves(stored.folder, stored.seeds, stored.merged_label)
    results = None if stored.results is None else stored_results(stored.results, stored.trained)
    adapters = _describe_adapters(stored, digests, layers, on_layer)
    advised = advise(stored.selection, results, stored.trained, method=stored.method, merged=stored.merged)
    shares = ensemble_shares(stored)
    front = front_record(stored, tests, curves, advised, shares)
    verdict = (front["helped"], front["sure"], front["compared"])
    return {
        "run": stored.name,
        "title": title_of(front),
        "front": front,
        "examples": choose_examples(read_samples(stored.folder)),
        "method": stored.method,
        "merged": stored.merged,
        "seeds": list(stored.seeds),
        "trained": list(stored.trained),
        "confidence_percent": CONFIDENCE_PERCENT,
        "tests": tests,
        "training": curves,
        "train_sample": None if stored.results is None else stored.results.get("train_sample"),
        "selection": stored.selection,
        "sweep": sweep_record(stored, curves),
        "train_or_fuse": train_or_fuse_record(stored, curves),
        "advice": advised,
        "weights": adapters.weights,
        "cost": None if stored.cost is None else stored.cost["plan"],
        "took": {} if stored.cost is None else stored.cost["took"],
        "trained_on": dict(stored.trained_on),
        "shares": shares,
        "missing": [
            *missing(stored, tests, curves),
            *(["Cosines, spectra and gains are of adapters; these seeds are whole models."] if adapters.whole else []),
            *([ANSWERED_BY_OTHERS.format(", ".join(replaced))] if replaced else []),
            *adapters.faults,
        ],
        "left_out": left_out(stored),
        "more": further_comparisons(stored),
        "reproduce": _reproduction(stored, adapters.sha256),
        "adapters": adapter_rows(stored, tests, curves),
        "verdict": " ".join(sentence for sentence in verdict if sentence),
    }


def _adapter_folders(stored: StoredRun) -> list[Path]:
    """Return the folders of the seeds that are trained, and of the fused adapter."""
    fused = [] if stored.fusion is None else [stored.folder / FUSED]
    return [*(stored.folder / seed for seed in stored.trained), *fused]


@dataclass(frozen=True)
class _Answers:
    """Tell who answered the tasks that were scored by generation.

    Args:
        sha256: by label, of the weights that answered; ``None`` where they were not files.
        folders: by label, where such weights are today.
    """

    sha256: Mapping[str, str | list[str] | None]
    folders: Mapping[str, Path]

    def replaced(self, digests: Digests) -> list[str]:
        """Return whose weights are no longer those that answered.

        What was compared has no folder; the fused adapter has none once it was removed.
        """
        now = {label: digests[str(folder)].result() for label, folder in self.folders.items()}
        return [
            label
            for label, known in self.sha256.items()
            if (label in now or label == FUSED) and known not in (None, now.get(label))
        ]


def _read_answers(stored: StoredRun) -> _Answers:
    """Read who answered."""
    settings = EVALUATION_SETTINGS.read(stored.folder / EVALUATION_FOLDER)
    adapters = {} if settings is None else settings["adapters"]
    folders = {label: stored.folder / (FUSED if label == stored.merged_label else label) for label in adapters}
    return _Answers(
        sha256={label: known.get("weights_sha256") for label, known in adapters.items()},
        folders={label: folder for label, folder in folders.items() if (folder / WEIGHTS_NAME).is_file()},
    )


@dataclass(frozen=True)
class _Adapters:
    """Tell what the adapters' own files say.

    Args:
        weights: what they look like; ``None`` for whole models and unreadable folders.
        sha256: of each one's weights, by label.
        whole: whether the seeds are whole models.
        faults: why they cannot be read, in a sentence.
    """

    weights: WeightRecord | None
    sha256: dict[str, str]
    whole: bool
    faults: Sequence[str]


def _describe_adapters(
    stored: StoredRun, digests: Digests, layers: str, on_layer: Callable[[str], object]
) -> _Adapters:
    """Read the adapters of seeds and fused one, and describe them."""
    seeds = [stored.folder / seed for seed in stored.trained]
    weights: WeightRecord | None = None
    sha256: dict[str, str] = {}
    faults: list[str] = []
    whole = any(map(is_model, seeds))
    try:
        if seeds and not whole:
            base, fused = weight_files_of(seeds), stored.folder / FUSED
            weights = weight_facts(
                stack_adapters(read_adapters(seeds, base=base)),
                stored.trained,
                merged=stored.merged,
                fused={} if stored.fusion is None else read_adapters([fused], base=base)[str(fused)].layers,
                layers=layers,
                on_layer=on_layer,
            )
        if seeds:
            sha256 = {folder.name: digests[str(folder)].result() for folder in _adapter_folders(stored)}
    except (AdapterError, OSError) as error:
        reason = " ".join(str(error).split())
        faults = [f"The adapters cannot be read, so nothing is said about their weights: {reason}"]
    return _Adapters(weights, sha256, whole, faults)


def _reproduction(stored: StoredRun, sha256: dict[str, str]) -> Reproduction:
    """Return what it takes to make the run again."""
    command = f"python -m seedlora train --config {stored.started_as}/config.yaml --ensemble.dirpath NEW"
    options: dict[str, object] = {}
    if stored.fusion is not None:
        use = stored.fusion.get("use", {})
        options = {
            **stored.fusion["options"],
            **{key: value for key, value in use.items() if value != COMMON_DEFAULTS.get(key)},
        }
    return {
        "command": command if stored.options.known and stored.options.only_from_python is None else None,
        "versions": {} if stored.cost is None else stored.cost["versions"],
        "options": options,
        "sha256": sha256,
        "base": {} if stored.cost is None else stored.cost["base"],
        "settings": stored.settings,
    }

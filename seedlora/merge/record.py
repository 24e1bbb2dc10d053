"""Make the content of ``fusion.json``: how a fused adapter was made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from seedlora.adapters.adapter import PROMPT_NAME, WEIGHTS_NAME, Adapter, files_sha256, is_model, locate
from seedlora.merge.bound_rule import BoundRule
from seedlora.merge.layers import Fused
from seedlora.model.tokenizer_files import read_tokenizer_files
from seedlora.model.weight_files import shards
from seedlora.records.fusion import AppliedRule, FusionRecord, GainRecord, UseRecord
from seedlora.utils.places import expanded, without_home


def record_kinds(record: FusionRecord, adapters: Mapping[str, Adapter]) -> None:
    """Add to a record what adapters are besides plain LoRA, and what of them was averaged whatever the rule."""
    kinds = sorted({kind for adapter in adapters.values() for kind in adapter.kinds})
    first = next(iter(adapters.values()))
    averaged = [*(["lora_bias"] if first.biases else []), *sorted(first.modules)]
    if kinds:
        record["kinds"] = kinds
    if averaged:
        record["averaged"] = averaged


def gain_record(gains: Sequence[float]) -> GainRecord:
    """Return how much longer the fused updates are than the mean updates, over the layers."""
    return {"mean": sum(gains) / len(gains), "min": min(gains), "max": max(gains)}


def run_around(out: str | Path, sources: Sequence[str | Path]) -> Path | None:
    """Return the folder around ``out``, if it holds all that is merged: the run which these adapters are of."""
    run = Path(out).resolve().parent
    return run if all(locate(source).resolve().is_relative_to(run) for source in sources) else None


def recorded(source: str | Path, run: Path | None) -> str:
    """Name a folder or hub id in a record, which is sent to others: as given, but for the home folder, and a folder of
    a run as it is found from the run's folder.
    """
    if run is None or not expanded(source).is_dir():
        return without_home(str(source))
    folder = expanded(source).resolve()
    return without_home(str(folder.relative_to(run) if folder.is_relative_to(run) else folder))


def hash_inputs(sources: Sequence[str | Path]) -> dict[str, Future[str]]:
    """Start to hash the weights of folders or hub ids, beside what else is done; return the sha256 by name."""
    pool = ThreadPoolExecutor(1, "sha256")
    folders = {str(source): locate(source) for source in sources}
    hashes = {name: pool.submit(_weights_sha256, folder) for name, folder in folders.items()}
    pool.shutdown(wait=False)
    return hashes


def _weights_sha256(folder: Path) -> str:
    return files_sha256(shards(folder) if is_model(folder) else [folder / WEIGHTS_NAME])


def common_files(sources: Sequence[str | Path], names: Sequence[str]) -> dict[str, bytes]:
    """Return the files that lie beside all inputs and are the same: the prompt or base model of their training."""
    found, folders = {}, [locate(source) for source in sources]
    for name in names:
        files = [folder / name for folder in folders]
        contents = {file.read_bytes() if file.is_file() else None for file in files}
        if len(contents) == 1 and (content := contents.pop()) is not None:
            found[name] = content
    return found


def differing_files(sources: Sequence[str | Path]) -> list[str]:
    """Return the files of prompt and tokenizer that the inputs differ in, or that some lack; no result has them."""
    folders = [locate(source) for source in sources]
    each = [read_tokenizer_files(folder) | _content(folder / PROMPT_NAME) for folder in folders]
    names = sorted({name for files in each for name in files})
    return [name for name in names if len({files.get(name) for files in each}) > 1]


def _content(file: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes()} if file.is_file() else {}


def common_tokenizer(sources: Sequence[str | Path]) -> dict[str, bytes]:
    """Return the files of the tokenizer beside all inputs, if all have the same one."""
    first, *others = (read_tokenizer_files(locate(source)) for source in sources)
    return first if all(files == first for files in others) else {}


def rule_record(bound: BoundRule) -> AppliedRule:
    """Return what a rule is: its method, its options, and those that every method has as far as they are set."""
    use: UseRecord = {"layers": bound.common.layers}
    if bound.common.rest is not None:
        use["rest"] = bound.common.rest
    if bound.common.rank is not None:
        use["rank"] = bound.common.rank
    if bound.common.match_norm is not None:
        use["match_norm"] = bound.common.match_norm
    use["svd"], use["seed"] = bound.common.svd, bound.common.seed
    return {"method": bound.name, "options": dict(bound.options), "use": use}


def applied_rule(record: FusionRecord) -> AppliedRule:
    """Return the rule that a record tells of."""
    return {"method": record["method"], "options": record["options"], "use": record.get("use", {})}


def rule_as_stored(bound: BoundRule) -> AppliedRule:
    """Return what a rule is as a file would tell it, to be compared with :func:`applied_rule`."""
    stored: AppliedRule = json.loads(json.dumps(rule_record(bound), default=str))
    return stored


def tells_of(record: FusionRecord, bound: BoundRule, folders: Sequence[Path], run: Path) -> bool:
    """Return whether a record tells of just this merge, by this version; reads all weights of the inputs.

    Args:
        record: of a fused adapter that is there.
        bound: the rule.
        folders: of the inputs.
        run: the folder that they are named relative to.
    """
    if record.get("seedlora") != version("seedlora") or applied_rule(record) != rule_as_stored(bound):
        return False
    inputs = [{"name": recorded(folder, run.resolve()), "sha256": _weights_sha256(folder)} for folder in folders]
    return record["inputs"] == inputs


def fusion_record(
    bound: BoundRule,
    fused: Fused | None,
    hashes: Mapping[str, Future[str]],
    *,
    base_model: str,
    run: Path | None = None,
) -> FusionRecord:
    """Return how a fused adapter was made.

    Args:
        bound: the rule.
        fused: its result; None if it went into a base model without compression.
        hashes: of the inputs, as :func:`hash_inputs` gives them.
        base_model: name or path of the base model.
        run: as :func:`run_around` says; the inputs are named relative to it, so that a run can be moved.
    """
    rule = rule_record(bound)
    record: FusionRecord = {
        "method": rule["method"],
        "options": rule["options"],
        "use": rule["use"],
        "source": bound.method.source,
        "inputs": [{"name": recorded(source, run), "sha256": digest.result()} for source, digest in hashes.items()],
        "base_model": base_model,
        "seedlora": version("seedlora"),
    }
    if differing := differing_files(list(hashes)):
        record["differing"] = differing
    if fused is not None and fused.compression:
        errors = list(fused.compression.values())
        record["compression"] = {
            "relative_error_mean": sum(errors) / len(errors),
            "relative_error_max": max(errors),
            "svd": dict(Counter(fused.svd.values())),
            "layers": dict(fused.compression),
        }
    if fused is not None and fused.inputs:
        record["inputs_compressed"] = {"relative_error_max": max(fused.inputs.values()), "layers": dict(fused.inputs)}
    return record

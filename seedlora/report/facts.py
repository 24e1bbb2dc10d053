"""A run's folder as plain data: all that its report says, and the content of ``report.json``.

Everything is computed again from what the run stored; what is drawn has a fixed seed, and no clock is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from seedlora.adapters.adapter import WEIGHTS_NAME, AdapterError, is_model, is_trained
from seedlora.merge.bound_rule import COMMON_DEFAULTS
from seedlora.merge.inputs import read_adapters, stack_adapters, weight_files_of
from seedlora.merge.record import RECORD_NAME, hash_inputs
from seedlora.names import BASE, COST_NAME, FUSED, LONG_SEED, SELECTION_NAME, SOUP, TRAINED_NAME, WIDE_SEED, seed_name
from seedlora.report.outcomes import item_outcomes, tests_of
from seedlora.report.sentences import ANSWERED_BY_OTHERS, further_comparisons, left_out, missing, verdict_of
from seedlora.report.stored import Facts, config_of, read_json, seed_folders
from seedlora.report.training_curves import training_curves
from seedlora.report.weights import LAYERS, weight_facts
from seedlora.scores.advice import advice


def facts(run: str | Path, *, layers: str = LAYERS, on_layer: Callable[[str], object] = lambda _path: None) -> Facts:
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
    run = Path(run)
    if not (run / "run.json").is_file():
        raise ValueError(f"{run} holds no run: it has no run.json")
    settings, config = read_json(run / "run.json"), config_of(run)
    excluded, record, cost = (read_json(run / name) for name in ("excluded.json", f"{FUSED}/{RECORD_NAME}", COST_NAME))
    ensemble = config.get("ensemble", {})
    seeds = [*map(seed_name, ensemble.get("seeds", ()))] or seed_folders(run, excluded)
    trained = [seed for seed in seeds if is_trained(run / seed)]
    method = record.get("method") or ensemble.get("merge")
    # Plain soup is not scored a second time as the fused adapter.
    merged = SOUP if method == SOUP and not ensemble.get("merge_options") else FUSED
    stored = [run / seed for seed in trained] + ([run / FUSED] if record else [])
    answered = read_json(run / "evaluation" / "settings.json").get("adapters", {})
    homes = {label: run / (FUSED if label == merged else label) for label in answered}
    homes = {label: home for label, home in homes.items() if (home / WEIGHTS_NAME).is_file()}
    digests = hash_inputs([*stored, *homes.values()])
    now = {label: digests[str(home)].result() for label, home in homes.items()}
    # Whose weights are no longer those that answered the tasks scored by generation. What was compared has no folder;
    # the fused adapter has none once it was removed.
    replaced = [
        label
        for label, known in answered.items()
        if (label in now or label == FUSED) and known.get("weights_sha256") not in (None, now.get(label))
    ]
    tests, training = tests_of(run, trained, answered=not replaced), training_curves(run, seeds, merged)
    results = read_json(run / "results.json")
    selection, name = read_json(run / SELECTION_NAME), run.resolve().name
    # As the run was started, which is not where it is read from.
    started = Path(str(ensemble.get("dirpath") or name))
    found: Facts = {
        "run": name,
        "method": method,
        "merged": merged if record else None,
        "seeds": seeds,
        "trained": trained,
        "confidence_percent": 95,
        "tests": tests,
        "training": training,
        "train_sample": results.get("train_sample"),
        "selection": selection or None,
        "advice": advice(selection, item_outcomes(results), trained, method=method),
        "weights": None,
        "cost": cost.get("plan"),
        "took": cost.get("took", {}),
        "trained_on": read_json(run / TRAINED_NAME),
        "shares": [],
        "missing": [],
        "left_out": [],
        "more": [],
        "reproduce": {
            "command": f"python train.py --config {started if started.name == name else name}/config.yaml "
            "--ensemble.dirpath NEW",
            "versions": cost.get("versions", {}),
            "options": {
                **record.get("options", {}),
                **{key: value for key, value in record.get("use", {}).items() if value != COMMON_DEFAULTS.get(key)},
            },
            "sha256": {},
            "base": cost.get("base", {}),
            "settings": settings,
        },
    }
    if not config:
        found["reproduce"]["command"] = None
    broken, whole = None, any(is_model(run / seed) for seed in trained)
    try:
        if trained and not whole:
            base = weight_files_of([run / seed for seed in trained])
            stacks = stack_adapters(read_adapters([run / seed for seed in trained], base=base))
            fused = read_adapters([run / FUSED], base=base)[str(run / FUSED)].layers if record else {}
            label = merged if record else None
            found["weights"] = weight_facts(
                stacks, trained, merged=label, fused=fused, layers=layers, on_layer=on_layer
            )
        if trained:
            found["reproduce"]["sha256"] = {folder.name: digests[str(folder)].result() for folder in stored}
    except (AdapterError, OSError) as error:
        broken = " ".join(str(error).split())
    found["shares"] = _shares(found, cost)
    found["left_out"] = left_out(found, excluded=excluded, record=record)
    found["more"] = further_comparisons(found, ensemble)
    found["missing"] = [
        *missing(found, excluded=excluded, config=config, record=record),
        *(["Cosines, spectra and gains are of adapters; these seeds are whole models."] if whole else []),
        *([] if not replaced else [ANSWERED_BY_OTHERS.format(", ".join(replaced))]),
        *([] if broken is None else [f"The adapters cannot be read, so nothing is said about their weights: {broken}"]),
    ]
    found["adapters"] = _adapters(found)
    pending = set(seeds) - {*trained, *excluded}
    found["verdict"] = "The run is not finished, so there is no verdict." if pending else verdict_of(found)
    return found


def _shares(found: Facts, cost: Mapping[str, Any]) -> list[Facts]:
    """What the ensemble takes, and what one of its seeds takes alone; ``None`` where that is not known.

    Tokens are those that were seen, for one seed their mean; until all seeds are trained, those of the plan. The times
    of one seed are those of the control that is trained for the tokens of all.
    """
    if not (plan := found["cost"]):
        return []
    n, seen = len(plan["seeds"]), [found["trained_on"].get(seed, {}) for seed in found["seeds"]]
    estimates = (sum(plan.get(key, {}).values()) / 2**30 for key in ("memory", "memory_alone"))
    took, peak = found["took"].get("seeds", {}), cost.get("peak_bytes", 0) / 2**30
    alone = took if n == 1 else found["took"].get(LONG_SEED, {})
    rows: list[tuple[str, float | None, float | None]] = []
    for key, planned, what in (("tokens", "tokens", "tokens"), ("scored", "supervised", "of these scored")):
        counts = [row[key] for row in seen if key in row]
        if len(counts) == n:
            rows.append((what, sum(counts), round(sum(counts) / n)))
        else:
            rows.append((f"{what}, planned", n * plan[planned], plan[planned]))
    rows += [
        ("trainable parameters", n * plan["trainable"], plan["trainable"]),
        ("memory of training, estimated, GiB", *estimates),
        ("memory of training, its peak as measured, GiB", peak, peak if n == 1 else None),
        ("training on the tokens of all, seconds", took.get("training"), alone.get("training")),
        ("validating meanwhile, seconds", took.get("validation"), alone.get("validation")),
    ]
    return [{"what": what, "all": every, "one": one or None} for what, every, one in rows if every]


def _adapters(found: Facts) -> list[Facts]:
    """What each adapter cost, where its training loss ended, and its score on the first test set.

    ``train_loss`` is the mean over the last tenth of the training, at least one point; ``sample_loss`` that on the
    training rows that all adapters were scored on after the test. The tokens of the fused adapter are those of all
    seeds. Where it is not stored how many an adapter has seen, the plan says it, unless a seed may have been stopped.
    """
    plan, training = found["cost"], found["training"]
    seeds, n = found["trained"], len(found["trained"])
    tests = found["tests"][:1]
    scores = {row["adapter"]: row for test in tests for row in test["scores"]}
    share = {
        **dict.fromkeys(seeds, 1),
        LONG_SEED: len(plan["seeds"]) if plan else None,
        WIDE_SEED: 1,
        FUSED: n,
        SOUP: n,
    }
    seen = {label: row["tokens"] for label, row in found["trained_on"].items() if "tokens" in row}
    if all(seed in seen for seed in seeds):
        seen |= dict.fromkeys((FUSED, SOUP), sum(seen[seed] for seed in seeds))
    if plan and not found["reproduce"]["settings"].get("ensemble.patience"):
        seen = {label: plan["tokens"] * times for label, times in share.items() if times} | seen
    sample = (found["train_sample"] or {}).get("losses", {})
    rows = []
    for label in (*share, *(label for label in sample if label not in share and label != BASE)):
        curve, score = training["train"].get(label, []), scores.get(label)
        if score is None and not curve:
            continue
        last = [loss for _, loss in curve[-max(1, len(curve) // 10) :]]
        rows.append(
            {
                "adapter": label,
                "tokens": seen.get(label),
                "train_loss": sum(last) / len(last) if last else None,
                "sample_loss": sample.get(label),
                **{key: score and score[key] for key in ("value", "low", "high")},
            }
        )
    return rows

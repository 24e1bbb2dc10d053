"""Say what a run cost: the ensemble beside one of its seeds, and each adapter beside its score."""

from __future__ import annotations

from collections.abc import Sequence

from seedlora.names import BASE, FUSED, LONG, LONG_SEED, SOUP, WIDE_BATCH, WIDE_SEED
from seedlora.records.cost import MemoryRecord, PlanRecord, replica_count
from seedlora.records.report import AdapterRow, Share, TestSet, TrainingCurves
from seedlora.report.stored import StoredRun
from seedlora.report.training_curves import end_of


def ensemble_shares(run: StoredRun) -> list[Share]:
    """Return what the ensemble takes, and what one of its seeds takes alone; ``None`` where that is not known.

    The times of one seed are those of the control that is trained for the tokens of all.
    """
    if run.cost is None:
        return []
    plan, took, peak = run.cost["plan"], run.cost["took"], run.cost["peak_bytes"] / 2**30
    n, seeds = replica_count(plan), took.get("seeds", {})
    alone = seeds if n == 1 else took.get(LONG_SEED, {})
    rows: list[Share] = [
        *_token_shares(run, plan),
        {"what": "trainable parameters", "all": n * plan["trainable"], "one": plan["trainable"]},
        {
            "what": "memory of training, estimated, GiB",
            "all": _gib(plan["memory"]),
            "one": _gib(plan["memory_alone"]) if "memory_alone" in plan else None,
        },
        {
            "what": "memory of training, its peak as measured, GiB",
            "all": peak,
            "one": peak if n == 1 else None,
        },
        {
            "what": "training on the tokens of all, seconds",
            "all": seeds.get("training", 0),
            "one": alone.get("training"),
        },
        {
            "what": "validating meanwhile, seconds",
            "all": seeds.get("validation", 0),
            "one": alone.get("validation"),
        },
    ]
    return [{**row, "one": row["one"] or None} for row in rows if row["all"]]


def _token_shares(run: StoredRun, plan: PlanRecord) -> list[Share]:
    """Return the tokens that were seen, for one seed their mean; until all seeds are trained, those of the plan."""
    n = replica_count(plan)
    seen = [run.trained_on[seed] for seed in run.seeds if seed in run.trained_on]
    tokens = [row["tokens"] for row in seen if "tokens" in row]
    scored = [row["scored"] for row in seen if "scored" in row]
    rows: list[Share] = []
    for what, counts, planned in (
        ("tokens", tokens, plan["tokens"]),
        ("of these scored", scored, plan["supervised"]),
    ):
        if len(counts) == n:
            rows.append({"what": what, "all": sum(counts), "one": round(sum(counts) / n)})
        else:
            part = plan.get("replica_steps", n * plan["steps"]) / plan["steps"]
            rows.append({"what": f"{what}, planned", "all": round(part * planned), "one": planned})
    return rows


def _gib(memory: MemoryRecord) -> float:
    return (memory["base"] + memory["adapters"] + memory["optimizer"] + memory["activations"]) / 2**30


def adapter_rows(run: StoredRun, tests: Sequence[TestSet], curves: TrainingCurves) -> list[AdapterRow]:
    """Return what each adapter cost, where its training loss ended, and its score on the first test set.

    Adapters without a score and without a training loss have no row.
    """
    seen = _tokens_seen(run)
    sample = {} if run.results is None or "train_sample" not in run.results else run.results["train_sample"]["losses"]
    scores = {row["adapter"]: row for test in tests[:1] for row in test["scores"]}
    labels = dict.fromkeys([*run.trained, *LONG, WIDE_SEED, WIDE_BATCH, FUSED, SOUP, *sample])
    rows: list[AdapterRow] = []
    for label in labels:
        curve, score = curves["train"].get(label, []), scores.get(label)
        if label == BASE or (score is None and not curve):
            continue
        rows.append(
            {
                "adapter": label,
                "tokens": seen.get(label),
                "train_loss": end_of(curve) if curve else None,
                "sample_loss": sample.get(label),
                "value": None if score is None else score["value"],
                "low": None if score is None else score["low"],
                "high": None if score is None else score["high"],
            }
        )
    return rows


def _tokens_seen(run: StoredRun) -> dict[str, int]:
    """Return the tokens that went into each adapter; those of the fused adapter are those of all seeds, also of dropped
    ones.

    Where it is not stored how many an adapter has seen, the plan says it, unless a seed may have been stopped.
    """
    seen = {label: row["tokens"] for label, row in run.trained_on.items() if "tokens" in row}
    if all(seed in seen for seed in run.trained):
        seen |= dict.fromkeys((FUSED, SOUP), sum(seen.get(seed, 0) for seed in run.seeds))
    if run.cost is None or run.settings.get("ensemble.patience") or run.settings.get("ensemble.halving"):
        return seen
    plan, n = run.cost["plan"], len(run.trained)
    times = {
        **dict.fromkeys(run.trained, 1),
        **dict.fromkeys((*LONG, WIDE_BATCH), replica_count(plan)),
        WIDE_SEED: 1,
        FUSED: n,
        SOUP: n,
    }
    return {label: plan["tokens"] * share for label, share in times.items() if share} | seen

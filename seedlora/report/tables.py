"""Tables and sentences for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from seedlora.evaluation import Difference, Score
from seedlora.report.results import FUSED, MEAN_SEED, SOUP, Results

#: vLLM's --max-lora-rank takes one of these.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def results_table(results: Results, *, method: str | None = None) -> Table:
    """Scores with intervals, and paired differences of the merged adapters, in percent and points."""
    n = next(iter(results.scores.values())).n
    fused = f"; fused by {method}" if method else ""
    table = Table(title=f"Test set: {results.metric}, n = {n}, 95 % intervals{fused}", title_justify="left")
    table.add_column("adapter")
    for header in ("score", "interval", f"vs {MEAN_SEED}", f"vs {SOUP}"):
        table.add_column(header, justify="right", no_wrap=True)
    for label, score in results.scores.items():
        differences = results.differences.get(label, {})
        table.add_row(
            label,
            f"{100 * score.value:.1f}",
            _interval(score),
            *(_points(differences.get(name)) for name in (MEAN_SEED, SOUP)),
            style="bold" if label == FUSED else None,
        )
    spread = "" if results.seed_spread is None else f", spread between seeds {100 * results.seed_spread:.1f}"
    table.caption = f"mean seed {100 * results.mean_seed:.1f}{spread}; differences are paired, in points"
    table.caption_justify = "left"
    return table


def verdict(results: Results) -> str:
    """What the test showed about the fused adapter, in one sentence."""
    if not (differences := results.differences.get(FUSED) or results.differences.get(SOUP)):
        return "Nothing was fused, so there is nothing to compare."
    name = "the fused adapter" if FUSED in results.differences else "soup"
    parts = [
        f"{'better' if d.value > 0 else 'worse'} than {reference} by {abs(100 * d.value):.1f} points"
        if d.shown
        else f"no difference from {reference} shown"
        for reference, d in differences.items()
    ]
    return f"{name[0].upper()}{name[1:]}: {'; '.join(parts)}."


def next_commands(*, base_model: str, adapter: Path, rank: int) -> str:
    """How to load the adapter with PEFT, and how to serve it."""
    fitting = [size for size in VLLM_RANKS if size >= rank]
    serve = (
        f"vllm serve {base_model} --enable-lora --max-lora-rank {fitting[0]} \\\n    --lora-modules fused={adapter}"
        if fitting
        else f"# rank {rank} is over vLLM's limit of {VLLM_RANKS[-1]}: fuse fewer or smaller adapters to serve it"
    )
    return f"""# load it with PEFT
python - <<'PY'
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("{adapter}")
PY
# serve it with vLLM
{serve}"""


def _interval(score: Score) -> str:
    return f"{100 * score.low:.1f} to {100 * score.high:.1f}"


def _points(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{100 * difference.value:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"

"""List the merge methods in a table that needs no library: what each does, its options, and where its code is.

:mod:`seedlora.merge.registry` makes rules of the rows. Help, errors and figures show the names without the code, which
takes torch's time to import.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from seedlora.names import AUTO, AUTO_GAIN, NO_MERGE
from seedlora.utils.spelling import closest

#: In the place of a default: the option must be given.
REQUIRED = inspect.Parameter.empty
#: Options that only Python can give: a function and a generator.
PYTHON_ONLY = ("generator", "score")


@dataclass(frozen=True)
class MethodRow:
    """State what a merge method is.

    Args:
        rule: its module below ``seedlora.merge.methods`` and its function, with a dot between them.
        formula: what it does, in a line.
        source: paper and equation.
        options: names and defaults of its keyword options, as the functions have them: those of surveys come first.
        surveys: as in :class:`seedlora.merge.bound_rule.Method`, with functions named as in ``rule``.
        match_norm: likewise.
        dense: likewise.
        elementwise: likewise.
    """

    rule: str
    formula: str
    source: str
    options: Mapping[str, object] = field(default_factory=dict)
    surveys: Mapping[str, str] = field(default_factory=dict)
    match_norm: bool = False
    dense: bool = False
    elementwise: bool = False


METHOD_TABLE: Mapping[str, MethodRow] = MappingProxyType(
    {
        "seedlora": MethodRow(
            "seedlora.seedlora",
            "mean update, rescaled to the seeds' mean and spread",
            "SeedLoRA, eq. 4-5",
            {"weights": None, "mean_shift": True},
            match_norm=True,
            dense=True,
        ),
        "seedlora_gain": MethodRow(
            "seedlora.seedlora_gain",
            "mean update times min(rho^-2p, cap)",
            "this project, after SeedLoRA eq. 5",
            {"p": 0.5, "cap": 2.0},
            match_norm=True,
            dense=True,
        ),
        "seedlora_subspace": MethodRow(
            "subspace.seedlora_subspace",
            "large entries by majority, the others merged within the mean's subspace",
            "SeedLoRA, ICML 2025, two-stage (second-hand)",
            {
                "quantile": 0.9,
                "subspace_rank": None,
                "z_merge": "ties",
                "z_density": 1.0,
                "p": 0.5,
                "generator": None,
            },
            match_norm=True,
            elementwise=True,
        ),
        "soup": MethodRow(
            "soup.soup", "mean of the updates", "Wortsman et al., arXiv 2203.05482", {"weights": None}, dense=True
        ),
        "greedy_soup": MethodRow(
            "soup.greedy_soup",
            "soup of the adapters that do not lower a validation score, best first",
            "Wortsman et al., arXiv 2203.05482, recipe 1",
            {"score": REQUIRED},
            surveys={"members": "soup.greedy_members"},
        ),
        "task_arithmetic": MethodRow(
            "task_arithmetic.task_arithmetic",
            "sum of the updates times scale",
            "Ilharco et al., arXiv 2212.04089",
            {"scale": None},
            dense=True,
        ),
        "ties": MethodRow(
            "ties.ties",
            "trim, elect a sign per entry, mean of the entries that agree",
            "Yadav et al., arXiv 2306.01708",
            {"density": 0.2, "scope": "layer", "scale": 1.0},
            surveys={"thresholds": "ties.ties_thresholds"},
            dense=True,
            elementwise=True,
        ),
        "dare_linear": MethodRow(
            "dare.dare_linear",
            "drop at random, rescale, mean",
            "Yu et al., arXiv 2311.03099",
            {"p": 0.5, "generator": None},
            dense=True,
            elementwise=True,
        ),
        "dare_ties": MethodRow(
            "dare.dare_ties",
            "drop at random, rescale, then TIES without trim",
            "Yu et al., arXiv 2311.03099",
            {"p": 0.5, "scale": 1.0, "generator": None},
            dense=True,
            elementwise=True,
        ),
        "della": MethodRow(
            "della.della",
            "drop at random by rank in the row, rescale, then TIES without trim",
            "Deep et al., arXiv 2406.11617",
            {"density": 0.5, "epsilon": 0.15, "scale": 1.0, "generator": None},
            dense=True,
            elementwise=True,
        ),
        "model_stock": MethodRow(
            "model_stock.model_stock",
            "mean update times Nc / (1 + (N-1)c), c the mean cosine",
            "Jang et al., arXiv 2403.19522",
            dense=True,
        ),
        "karcher": MethodRow(
            "karcher.karcher",
            "spherical mean of the directions times the mean norm",
            "Karcher, 1977",
            {"max_iter": 10, "tol": 1e-5},
            dense=True,
        ),
        "sce": MethodRow(
            "sce.sce",
            "entries of largest variance, adapters weighted by energy, minority signs erased",
            "Wan et al., arXiv 2408.07990",
            {"select_topk": 1.0},
            dense=True,
            elementwise=True,
        ),
        "tsv_m": MethodRow(
            "tsv.tsv_m",
            "singular vectors side by side, made orthogonal",
            "Gargiulo et al., arXiv 2412.00081",
            {"k": None, "scale": 1.0},
        ),
        "iso_c": MethodRow(
            "iso.iso_c", "SVD of the sum with all values equal", "Marczak et al., arXiv 2502.04959", {"scale": None}
        ),
        "core_ties": MethodRow(
            "core_space.core_ties",
            "TIES on lossless core matrices",
            "Panariello et al., arXiv 2509.17786",
            {"density": 1.0, "basis": "factors", "scope": "layer", "scale": 1.0},
            surveys={"thresholds": "core_space.core_thresholds"},
        ),
        "knots_ties": MethodRow(
            "knots.knots_ties",
            "TIES in the basis of the updates side by side, trimmed over all layers",
            "Stoica et al., arXiv 2410.19735",
            {"density": 0.2, "scope": "model", "scale": 1.0},
            surveys={"thresholds": "knots.knots_thresholds"},
        ),
        "knots_dare_ties": MethodRow(
            "knots.knots_dare_ties",
            "DARE, then TIES without trim, in the basis of the updates side by side",
            "Stoica et al., arXiv 2410.19735; Yu et al., arXiv 2311.03099",
            {"p": 0.5, "scale": 1.0, "generator": None},
        ),
        "seedft": MethodRow(
            "seedft.seedft", "KnOTS basis with the polar factor of the summed right vectors", "second-hand, after KnOTS"
        ),
    }
)


def check_method(name: str) -> None:
    """Raise ValueError for a name that no method has, with the one that may have been meant."""
    if name not in METHOD_TABLE:
        meant = closest(name, METHOD_TABLE)
        hint = f"; did you mean '{meant}'?" if meant else ""
        raise ValueError(f"Unknown merge method '{name}'; choose one of {', '.join(sorted(METHOD_TABLE))}{hint}")


def check_ensemble_merge(name: str) -> None:
    """Raise ValueError for a value of ``ensemble.merge`` that is neither a method nor says to choose one, or none."""
    if name in (AUTO, AUTO_GAIN, NO_MERGE):
        return
    try:
        check_method(name)
    except ValueError as error:
        others = f"'{NO_MERGE}' merges nothing, '{AUTO}' and '{AUTO_GAIN}' choose"
        raise ValueError(f"{error} ({others})") from None

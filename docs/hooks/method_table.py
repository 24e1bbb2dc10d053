"""The table of all merge rules, made of the one in ``seedlora/merge/method_table.py``."""

from __future__ import annotations

from seedlora.merge.method_table import METHOD_TABLE


def method_table() -> str:
    """Return a row for each rule: its name as a link to its entry, its formula, its source."""
    rows = [f"| [{name}](#{name}) | {method.formula} | {method.source} |" for name, method in METHOD_TABLE.items()]
    return "\n".join(["| rule | formula | source |", "|---|---|---|", *(row.replace("\n", " ") for row in rows)])

"""The options of an ensemble."""

from __future__ import annotations

VARY = ("both", "init", "order")
KEEP = ("last", "best")
ON_DIVERGENCE = ("stop", "exclude")

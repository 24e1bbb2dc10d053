"""Merge rules: pure functions of :class:`~seedlora.updates.factors.LoRAFactors`, one paper per file."""

"""Seed random streams by what they are for, and by nothing that ran before."""

from __future__ import annotations

import hashlib


def stream_seed(*key: int | str) -> int:
    """Return a seed of 63 bits for a generator, from the parts of a key; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1

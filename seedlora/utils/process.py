"""When this process began."""

from __future__ import annotations

import os
import time
from pathlib import Path


def process_start() -> float:
    """Return when the process began, by the monotonic clock; now, where the system does not say.

    Linux gives the ticks since the machine started, which its monotonic clock leaves out while it sleeps.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic()
    return time.monotonic() - max(age, 0.0)

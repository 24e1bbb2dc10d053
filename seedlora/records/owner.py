"""``owner.json``: the process that a run's folder belongs to at the moment."""

from __future__ import annotations

from typing import TypedDict

from seedlora.names import OWNER_NAME
from seedlora.records.json_file import JSONFile


class OwnerRecord(TypedDict):
    """Tell which process is at work in a run's folder.

    Attributes:
        host: name of its machine.
        process: its number there.
        since: when it took the folder.
        started: clock ticks between the machine's start and its own, which tell it from a later process with the same
            number; null where the system does not say.
        machine: what tells the machine from another of the same name; null where the system does not say.
        boot: what tells the machine's start from an earlier one; null where the system does not say.
        namespace: the container whose numbers of processes these are; null where the system does not say.
        token: what tells this record from all others.
    """

    host: str
    process: int
    since: str
    started: int | None
    machine: str | None
    boot: str | None
    namespace: str | None
    token: str


OWNER = JSONFile(OWNER_NAME, OwnerRecord)

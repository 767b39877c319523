"""Processes that use an environment but hold no flock on it.

Every interpreter of an environment takes a hold at its start. If one could not, because its descriptors were used up or
the entry was held exclusively for long, the collector may not see that it runs. `why` and `doctor` name it. Programs
that are no Pythons, such as raylet, never take a hold; the collector sees them by their executable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.survey.inventory import User
from ray_envcache.system import processes
from ray_envcache.system.texts import utc

INTERPRETER, PROGRAM = "without hold", "program"
"""The kinds of such a user: a Python, which should have a hold; and any other program, which never has one."""


def users_without_hold(layout: Layout, entries: list[Entry]) -> dict[str, list[User]]:
    """The processes that use one of these ready entries without a hold, by the entry's name. Linux only.

    Flocks are looked at last: an interpreter that was just starting has its hold by then.
    """
    wanted = {entry.path.name: entry for entry in entries if not entry.readonly}
    if sys.platform != "linux" or not wanted:
        return {}
    users = processes.processes_using(layout.entries, wanted)
    ready = {name: pids for name, pids in users.items() if wanted[name].ready.exists()}
    holders = _holders(layout, [wanted[name] for name in ready])
    found = {name: [*_described(pid for pid in pids if (pid, name) not in holders)] for name, pids in ready.items()}
    return {name: unheld for name, unheld in found.items() if unheld}


def _holders(layout: Layout, entries: list[Entry]) -> set[tuple[int, str]]:
    """The pid of each process that holds a flock on one of these entries, and the name of the entry."""
    inodes = {}
    for entry in entries:
        with suppress(OSError):  # a collector removed it meanwhile
            found = entry.in_use.stat()
            inodes[found.st_dev, found.st_ino] = entry.path.name
    held = processes.flock_holders(inodes, layout.entries)
    return {(process.pid, name) for name, found in held.items() for process in found}


def _described(pids: Iterable[int]) -> Iterator[User]:
    for pid in pids:
        if process := processes.describe(pid):
            kind = INTERPRETER if processes.is_python(_executable(pid)) else PROGRAM
            yield User(pid, kind, processes.ray_session(pid), "", process.command, utc(process.started))


def _executable(pid: int) -> bytes:
    with suppress(OSError):
        return os.fsencode(os.readlink(f"/proc/{pid}/exe"))
    return b""

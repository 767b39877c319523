"""Processes that use an environment but hold no flock on it.

Every interpreter of an environment takes a hold at its start. One that could not (its descriptors were used up, the
store could not be read) protects the environment only as far as the collector can see it in /proc. So people must be
told of it. raylet and other programs that are no Pythons never take a hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from ray_envcache.store.inventory import User
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.system import processes
from ray_envcache.system.units import utc

INTERPRETER, PROGRAM = "without hold", "program"
"""The kinds of such a user: a Python, which should have a hold; and any other program, which never has one."""


def users_without_hold(layout: Layout, entries: list[Entry]) -> dict[str, list[User]]:
    """The processes that use one of these ready entries without a hold, by the entry's name. Linux only.

    Flocks are looked at last: an interpreter that was just starting has its hold by then.
    """
    wanted = {entry.path.name: entry for entry in entries if not entry.readonly}
    if sys.platform != "linux" or not wanted:
        return {}
    users = {name: {use.pid for use in uses} for name, uses in _seen_in_proc(layout, wanted).items()}
    for name, pid in _seen_in_command_lines(layout):
        if name in wanted:
            users.setdefault(name, set()).add(pid)
    holders = _holders(layout, [wanted[name] for name in users])
    found = {name: [*_described(sorted(pids - holders.get(name, set())))] for name, pids in users.items()}
    return {name: unheld for name, unheld in found.items() if unheld and wanted[name].ready.exists()}


def _seen_in_proc(layout: Layout, wanted: dict[str, Entry]) -> dict[str, list[processes.Use]]:
    return processes.processes_using(layout.entries, wanted).by_name


def _seen_in_command_lines(layout: Layout) -> Iterator[tuple[str, int]]:
    """The entry and pid of each Python that was started by an entry's interpreter.

    A venv's interpreter is a link to the base Python: as executable /proc shows the base Python, and without compiled
    packages no file of the entry is open or mapped.
    """
    prefix = f"{os.path.realpath(layout.entries)}/"
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it ended, or belongs to another user
            if _is_python(process.exe()):
                folder = os.path.realpath(os.path.dirname(_started_by(process)))
                if folder.startswith(prefix):
                    yield folder.removeprefix(prefix).partition("/")[0], process.pid


def _is_python(executable: str) -> bool:
    return os.path.basename(executable).startswith(("python", "pypy"))


def _started_by(process: psutil.Process) -> str:
    """The path of a process's interpreter, found as Python itself finds it: by argv[0] and PATH.

    Ray's workers change their argv[0] ("ray::IDLE"). For them it is VIRTUAL_ENV, which the agent sets.
    """
    first = next(iter(process.cmdline()), "/")  # it ended
    if "/" in first:
        return os.path.join(process.cwd(), first)
    environ = process.environ()
    candidates = (os.path.join(folder, first) for folder in environ.get("PATH", "").split(":") if folder)
    return next(filter(os.path.isfile, candidates), f"{environ.get('VIRTUAL_ENV', '')}/bin/python")


def _holders(layout: Layout, entries: list[Entry]) -> dict[str, set[int]]:
    inodes = {}
    for entry in entries:
        with suppress(OSError):  # a collector removed it meanwhile
            found = entry.in_use.stat()
            inodes[found.st_dev, found.st_ino] = entry.path.name
    held = processes.flock_holders(inodes, layout.entries).by_name
    return {name: {process.pid for process in found} for name, found in held.items()}


def _described(pids: list[int]) -> Iterator[User]:
    for pid in pids:
        if process := processes.describe(pid):
            kind = INTERPRETER if _is_python(_executable(pid)) else PROGRAM
            yield User(pid, kind, processes.ray_session(pid), "", process.command, utc(process.started))


def _executable(pid: int) -> str:
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/exe").readlink())
    return ""

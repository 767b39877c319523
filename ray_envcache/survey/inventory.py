"""What is in the store, for people: the state of each entry, who uses it, what it occupies and would free.

Sizes are measured when an entry is finished, and kept in a record beside it. SIZE stays true from then on. RECLAIMABLE
changes without the entry: when uv's cache is cleaned, or when another entry with the same files comes or goes. So
`list` shows a figure that is at most an hour old. The collector measures anew where bytes decide what goes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ray_envcache.store import leases, pins, roots
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import ReadyRecord, read_record, write_record
from ray_envcache.survey import shared_bytecode, uv_cache
from ray_envcache.survey.shared_bytecode import Inode
from ray_envcache.system import disk, flock, processes
from ray_envcache.system.disk import DiskUse
from ray_envcache.system.texts import utc

FRESH_SECONDS = 3600.0
"""How long a record is believed where people look: to measure an environment of 20,000 files takes 0.1 s."""


class Status(NamedTuple):
    """One entry as people see it. Sizes in bytes; times in Unix seconds or, with `_at`, UTC ISO 8601.

    `exact` is False where `reclaimable_bytes` is a lower bound. `in_use` may be true without a named user: processes
    of other containers hold flocks, but have no pid here. `base` is the key of the environment that a layer lies on,
    `base_path` its place. A `readonly` entry lies in a read-only store, and is never collected from here.
    """

    key: str
    state: str
    in_use: bool
    users: tuple[Holder, ...]
    pinned: bool
    size_bytes: int
    reclaimable_bytes: int
    exact: bool
    created_at: str | None
    last_used: float
    python: str | None
    ray: str | None
    project: str | None
    source: str | None
    path: str
    base: str | None = None
    readonly: bool = False
    base_path: str | None = None


_RECORDED = ("created_at", "python", "ray", "project", "source")
"""What a status has from the ready record; None where there is none."""


def survey(layout: Layout, below: Iterable[Layout] = (), *, max_age: float = FRESH_SECONDS) -> list[Status]:
    """All entries of the store, the least recently used first; then those of the stores below it.

    Sizes that were measured more than `max_age` seconds ago are measured again.
    """
    return [status for store in (layout, *below) for status in _survey(layout, store, max_age)]


def _survey(layout: Layout, store: Layout, max_age: float) -> list[Status]:
    try:
        found = _statuses(layout, store, list(store.all_entries()), max_age)
    except PermissionError as error:
        if store.readonly:
            raise roots.unreadable(store, error) from error
        raise
    return sorted(found, key=lambda one: (one.last_used, one.key))


def status(layout: Layout, entry: Entry) -> Status:
    """What is known about one entry, of the store `layout` or of one below it, at this moment."""
    (found,) = _statuses(layout, layout_of(entry), [entry], FRESH_SECONDS)
    return found


def _statuses(layout: Layout, store: Layout, entries: list[Entry], max_age: float) -> list[Status]:
    """The status of these entries. What can be asked once for all is: a store may have thousands."""
    leases_of = {key: leases.live_leases(layout, key) for key in layout.leased_keys() & {one.key for one in entries}}
    # Found in one pass over all processes: with 120 of them that takes 35 ms.
    running = processes.processes_using(store.entries, [entry.path.name for entry in entries]) if entries else {}
    pinned = set() if store.readonly else pins.pinned_keys(store)
    # A store of fifty has 100,000 such files.
    linked, found = cache(lambda: going_too(layout)), []
    for entry in entries:
        name = entry.path.name
        users = _users(layout, entry, running.get(name, ()), leases_of.get(entry.key, []))
        # Asked where no user has a name, as in another container: it takes an exclusive flock, for which claims wait.
        in_use = bool(users) or not (entry.readonly or flock.is_free(entry.in_use))
        (state, record), size = _state(layout, entry), _sizes(entry, max_age, linked)
        base = entry.base(record.base) if record and record.base else None
        found.append(
            Status(
                key=entry.key,
                state=state,
                in_use=in_use,
                users=users,
                # A pin keeps the sound entry of a key.
                pinned=entry.key in pinned and entry.ready.exists(),
                size_bytes=size.size,
                reclaimable_bytes=0 if entry.readonly else size.reclaimable,
                exact=entry.readonly or size.exact,
                last_used=last_used(entry),
                path=os.fspath(entry.path),
                base=base.key if base else None,
                readonly=entry.readonly,
                base_path=os.fspath(base.path) if base else None,
                **{name: getattr(record, name, None) for name in _RECORDED},
            )
        )
    return found


def _users(layout: Layout, entry: Entry, pids: Iterable[int], live: Iterable[tuple[str, Holder]]) -> tuple[Holder, ...]:
    """Holders of live leases and processes that run from the entry; a process that does both counts once."""
    named = [holder for name, holder in live if name == layout.name_of(entry)]
    known = {user.pid for user in named}
    running = [
        Holder("process", processes.ray_session(pid), "", pid, process.command, utc(process.started))
        for pid in pids
        if pid not in known and (process := processes.describe(pid))
    ]
    return (*named, *running)


def _state(layout: Layout, entry: Entry) -> tuple[str, ReadyRecord | None]:
    """The state of an entry, and the record of one that is ready."""
    record = ReadyRecord.read(entry)
    if record is None:
        if entry.building.exists() if entry.readonly else flock.is_held(layout.builder_flock(entry.key)):
            return "building", None
        record = ReadyRecord.read(entry)  # its builder may have come to the end between the two looks
    return "ready" if record else "broken", record


def last_used(entry: Entry) -> float:
    """When a process last began or ceased to use the entry, in Unix seconds; 0 where that is not known."""
    return _mtime(entry.in_use)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _sizes(entry: Entry, max_age: float, linked: Callable[[], frozenset[Inode]]) -> DiskUse:
    """The sizes of an entry by its record or, where that is older than `max_age`, measured; `linked` as for `measure`.

    Those of a read-only store are believed at any age: only its owner measures there.
    """
    use, age = read_record(DiskUse, entry.measured), time.time() - _mtime(entry.measured)
    # A record of the future means that the clock went back.
    if use is None or not (entry.readonly or 0 <= age < max_age):
        use = disk.measure(entry.path, linked())
        if entry.compiled.exists() and not entry.readonly:
            with suppress(OSError):  # no room for it
                write_record(entry.measured, use)
    return use


def record_sizes(layout: Layout, entry: Entry) -> DiskUse:
    """Measure a finished entry, and keep the result."""
    return _sizes(entry, 0, lambda: going_too(layout))


def going_too(layout: Layout) -> frozenset[Inode]:
    """The files of the store outside of entries of which one link goes with the last entry that has them."""
    return shared_bytecode.inodes(layout) | uv_cache.inodes(layout)

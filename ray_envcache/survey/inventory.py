"""What is in the store, for people: the state of each entry, who uses it, and its size."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_envcache.store import leases, pins, readonly
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey.sizes import FRESH_SECONDS, MeasuredRecord, Sizes
from ray_envcache.system import flock, processes
from ray_envcache.system.processes import ray_session
from ray_envcache.system.texts import utc

if TYPE_CHECKING:
    from ray_envcache.system.processes import Process


class User(NamedTuple):
    """A process that uses an entry: by a lease (`kind` is its holder's) or by running from it ("process").

    `since` is UTC ISO 8601. `cluster` is the Ray session it belongs to, "" where it belongs to none that lives.
    """

    pid: int
    kind: str
    cluster: str
    job: str
    command: str
    since: str


class Status(NamedTuple):
    """One entry as people see it. Sizes in bytes; times in Unix seconds or, with `_at`, UTC ISO 8601.

    `exact` is False where `reclaimable_bytes` is a lower bound. `in_use` may be true without a named user: processes
    of other containers hold flocks, but have no pid here. `base` is the key of the environment that a layer lies on,
    `base_path` its place. `hashes` and `no_build` are those of the ready record. A `readonly` entry lies in a read-only
    store, and is never collected from here.
    """

    key: str
    state: str
    in_use: bool
    users: tuple[User, ...]
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
    hashes: str | None = None
    no_build: bool | None = None
    readonly: bool = False
    base_path: str | None = None


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
            raise readonly.unreadable(store, error) from error
        raise
    return sorted(found, key=lambda one: (one.last_used, one.key))


def status(layout: Layout, entry: Entry) -> Status:
    """What is known about one entry, of the store `layout` or of one below it, at this moment."""
    (found,) = _statuses(layout, layout_of(entry), [entry], FRESH_SECONDS)
    return found


def _statuses(layout: Layout, store: Layout, entries: list[Entry], max_age: float) -> list[Status]:
    """The status of these entries. What can be asked once for all is: a store may have thousands."""
    seen = {entry.path.name: found for entry in entries if (found := _stat(entry.in_use))}
    leases_of = {key: leases.live_leases(layout, key) for key in layout.leased_keys() & {one.key for one in entries}}
    held = {entry.path.name for entry in entries if leases_of.get(entry.key) or _is_held(entry)}
    running = _processes(store, {name: seen[name] for name in held & seen.keys()})
    pinned = set() if store.readonly else pins.pinned_keys(store)
    sizes, statuses = Sizes(layout, max_age), []
    for entry in entries:
        name = entry.path.name
        users = _users(layout, entry, running.get(name, []), leases_of.get(entry.key, []))
        # Asked again where no user has a name: the process that held the flock may have ended, or only looked, like us.
        in_use = bool(users) or (name in held and not entry.readonly and not flock.is_free(entry.in_use))
        size, used = sizes.of(entry), _mtime(seen.get(name))
        statuses.append(_status(layout, entry, users, size, used, in_use=in_use, pinned=entry.key in pinned))
    return statuses


def _is_held(entry: Entry) -> bool:
    """Whether any process may hold the entry. Asking takes an exclusive flock, for which claims have to wait.

    So it is asked only of an entry without a lease, and of none in a read-only store: there all count as held.
    """
    return entry.readonly or not flock.is_free(entry.in_use)


def _status(
    layout: Layout,
    entry: Entry,
    users: tuple[User, ...],
    size: MeasuredRecord,
    used: float,
    *,
    in_use: bool,
    pinned: bool,
) -> Status:
    record = ReadyRecord.read(entry)
    base = entry.base(record.base) if record and record.base else None
    return Status(
        key=entry.key,
        state=_state(layout, entry, record),
        in_use=in_use,
        users=users,
        pinned=pinned,
        size_bytes=size.size_bytes,
        reclaimable_bytes=0 if entry.readonly else size.reclaimable_bytes,
        exact=entry.readonly or size.exact,
        created_at=record.created_at if record else None,
        last_used=used,
        python=record.python if record else None,
        ray=record.ray if record else None,
        project=record.project if record else None,
        source=record.source if record else None,
        path=os.fspath(entry.path),
        base=base.key if base else None,
        hashes=record.hashes if record else None,
        no_build=record.no_build if record else None,
        readonly=entry.readonly,
        base_path=os.fspath(base.path) if base else None,
    )


def _users(layout: Layout, entry: Entry, others: list[Process], live: Iterable[Mapping[str, Any]]) -> tuple[User, ...]:
    """Holders of live leases and processes that run from the entry; a process that does both counts once."""
    named = [
        User(**{name: holder.get(name, "") for name in ("pid", "kind", "cluster", "job", "command", "since")})
        for holder in live
        if holder.get("entry") == layout.name_of(entry)
    ]
    known = {user.pid for user in named}
    running = [
        User(one.pid, "process", ray_session(one.pid), "", one.command, utc(one.started))
        for one in others
        if one.pid not in known
    ]
    return (*named, *running)


def _processes(layout: Layout, held: Mapping[str, os.stat_result]) -> dict[str, list[Process]]:
    """The processes that hold the flock of each entry now, found in one pass over all processes."""
    if not held:
        return {}
    inodes = {(found.st_dev, found.st_ino): name for name, found in held.items()}
    return processes.flock_holders(inodes, layout.entries)


def _state(layout: Layout, entry: Entry, record: ReadyRecord | None) -> str:
    if record is not None:
        return "ready"
    if entry.readonly:
        return "building" if entry.building.exists() else "broken"
    return "building" if flock.is_held(layout.builder_flock(entry.key)) else "broken"


def last_used(entry: Entry) -> float:
    """When a process last began or ceased to use the entry, in Unix seconds; 0 where that is not known."""
    return _mtime(_stat(entry.in_use))


def _mtime(found: os.stat_result | None) -> float:
    return found.st_mtime if found else 0.0


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None

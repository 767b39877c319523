"""Removing one entry: never one that is in use or pinned, never half, never waiting for anybody.

The order is what makes it safe. The builder's flock keeps everybody out who would build the key. The exclusive flock
on `in-use` exists only while no lease and no interpreter holds a shared one, and whoever comes later finds it taken.
Then the ready record goes, so that nobody is handed the entry even if we die on the next line; then the rename; then
the flocks are free again, and only then begins what takes time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.errors import InUseError, ReadOnlyError, UnknownKeyError
from ray_envcache.store import leases, pins, shared_bytecode
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.system import disk, files, flock, processes, testpoints


@dataclass(frozen=True)
class Evicted:
    """What a removal gave: bytes that became free, bytes as files count them, seconds the flocks were held."""

    freed: int
    logical: int
    exact: bool
    flock_seconds: float


def evict(layout: Layout, entry: Entry, *, still_due: Callable[[], bool] = lambda: True) -> Evicted:
    """Remove one entry. Raises InUseError where somebody builds, uses or pinned it; then it is untouched.

    Raises UnknownKeyError where somebody else removed it in the meantime, ReadOnlyError where it is in a lower store.
    `still_due` is asked under the flocks, when nobody can begin to use the entry any more. Users wait for nothing
    longer than a rename: flocks are only tried, and free before the deleting begins.
    """
    if entry.readonly:
        root = layout_of(entry).root
        raise ReadOnlyError(
            f"The environment {entry.path.name} cannot be removed: `{root}` is read-only here",
            f"its owner can: RAY_ENVCACHE_DIR={root} ray-envcache rm {entry.key[:12]}",
        )
    try:
        return _evict(layout, entry, still_due)
    except FileNotFoundError as error:
        if os.path.lexists(entry.path):
            raise
        raise UnknownKeyError(
            f"The environment {entry.path.name} is gone already: somebody else removed it",
            "ray-envcache list shows the rest",
        ) from error


def _evict(layout: Layout, entry: Entry, still_due: Callable[[], bool]) -> Evicted:
    _require_no_process(layout, entry)
    testpoints.reach("evict-chosen")
    with ExitStack() as flocks:
        began = time.monotonic()
        _take_flocks(flocks, layout, entry)
        if pins.is_pinned(layout, entry):
            raise refusal(entry, "it is pinned", "ray-envcache unpin, if nobody needs it any more")
        if not still_due():
            raise refusal(entry, "somebody used it a moment ago")
        testpoints.reach("evict-locked")
        record = disk.measure(entry.ready).size
        entry.ready.unlink(missing_ok=True)
        testpoints.reach("evict-unpublished")
        moved = files.to_trash(entry.path, layout.trash)
        seconds = time.monotonic() - began
    testpoints.reach("evict-renamed")
    shared_bytecode.let_go(layout, moved)
    use = disk.measure(moved)
    files.remove_tree(moved)
    leases.sweep_dead(layout, entry.key)
    return Evicted(use.reclaimable + record, use.size + record, use.exact, seconds)


def refusal(entry: Entry, reason: str, hint: str = "") -> InUseError:
    """The error for an entry that stays."""
    return InUseError(
        f"The environment {entry.path.name} cannot be removed: {reason}",
        hint or f"stop its users first; `ray-envcache why {entry.key[:12]}` shows them",
    )


def _take_flocks(flocks: ExitStack, layout: Layout, entry: Entry) -> None:
    if not _take(flocks, layout.builder_flock(entry.key), os.O_RDWR | os.O_CREAT):
        raise refusal(entry, "it is being built")
    try:
        free = _take(flocks, entry.in_use, os.O_RDONLY)
    except FileNotFoundError:
        # No such file, no such user: the remains of a builder that died early, or somebody removed it before us.
        free = True
    if not free:
        raise refusal(entry, _users(layout, entry))


def _take(flocks: ExitStack, path: Path, flags: int) -> bool:
    """Try to take an exclusive flock until the stack unwinds.

    Through a fresh descriptor: a failed upgrade of a shared flock would lose the shared one.
    """
    descriptor = flock.try_flock(path, exclusive=True, flags=flags)
    if descriptor is None:
        return False
    flocks.callback(os.close, descriptor)
    return True


def _require_no_process(layout: Layout, entry: Entry) -> None:
    """A second veto, independent of the flocks.

    raylet and gcs_server are no Pythons and hold nothing; some daemons close all their descriptors. It may only say
    "in use", never "free".
    """
    usage = processes.processes_using(layout.entries, [entry.path.name])
    if uses := usage.by_name.get(entry.path.name):
        raise refusal(entry, f"in use by process {uses[0].pid} ({uses[0].reason})")


def _users(layout: Layout, entry: Entry) -> str:
    known = [
        f"{holder.get('kind')} {holder.get('pid')} ({holder.get('cluster') or holder.get('command')})"
        for holder in leases.live_leases(layout, entry.key)
        if holder.get("entry") == entry.path.name
    ]
    return f"in use by {', '.join(known)}" if known else "a process runs from it"

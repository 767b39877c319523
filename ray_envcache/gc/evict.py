"""Removing one entry: never one that is in use or pinned, never half, and without waiting for a flock.

The order makes it safe. The builder's flock keeps out all who would build the key. The exclusive flock on `in-use` can
be had only while no lease and no interpreter holds a shared one, and no new one can be had meanwhile. One rename then
takes the whole entry out of sight: a collector that dies leaves all of it or nothing. The flocks are free again before
the deleting begins, which takes seconds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from ray_envcache.errors import InUseError, UnknownKeyError
from ray_envcache.store import journal, leases, pins
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.store.roots import require_own
from ray_envcache.survey import shared_bytecode
from ray_envcache.system import disk, files, flock, processes, testpoints
from ray_envcache.system.disk import DiskUse


def evict(layout: Layout, entry: Entry) -> DiskUse:
    """Remove one entry; what it occupied and freed. Raises InUseError where it is being built, in use or pinned.

    Then it is untouched. Raises UnknownKeyError where another process removed it in the meantime, ReadOnlyError where
    it is in a read-only store. A user waits no longer than for a rename: flocks are only tried, and free before the
    deleting begins.
    """
    require_own(entry, "rm")
    _require_no_process(entry, entry.path)
    return evict_idle(layout, entry)


def evict_idle(
    layout: Layout, entry: Entry, *, still_due: Callable[[], bool] = lambda: True, reason: str = "by hand"
) -> DiskUse:
    """Remove an entry of this store from which no process was seen to run. Raises as `evict`.

    `still_due` is asked under the flocks, when no process can begin to use the entry any more. `reason` is for people.
    """
    testpoints.reach("evict-chosen")
    try:
        moved = _take_away(layout, entry, still_due)
    except FileNotFoundError as error:
        if os.path.lexists(entry.path):
            raise
        raise UnknownKeyError(
            f"The environment {entry.name} is gone already: another process removed it",
            "ray-envcache list shows the rest",
        ) from error
    shared_bytecode.let_go(layout, moved)
    use = disk.measure(moved)
    files.remove_tree(moved)
    leases.sweep_dead(layout, entry.key)
    journal.note(layout, "removal", key=entry.key, reason=reason, freed_bytes=use.reclaimable, bytes=use.size)
    return use


def with_layers(layout: Layout, entries: Iterable[Entry]) -> list[Entry]:
    """These entries, each after the layers of this store that lie on it: they can never be used without it."""
    layers = defaultdict[str, list[Entry]](list)
    for one in layout.all_entries():
        if (record := ReadyRecord.read_any(one)) and record.base:
            layers[record.base].append(one)
    return [
        *dict.fromkeys(each for one in entries for each in (*layers.get("" if one.readonly else one.name, ()), one))
    ]


def _take_away(layout: Layout, entry: Entry, still_due: Callable[[], bool]) -> Path:
    """Take the entry out of sight, and return where it is now."""
    with ExitStack() as flocks:
        _take_flocks(flocks, layout, entry)
        if entry.key in pins.pinned_keys(layout) and entry.ready.exists():
            raise _refusal(entry, "it is pinned", "ray-envcache unpin, if it is not needed any more")
        if not still_due():
            raise _refusal(entry, "it was used a moment ago")
        testpoints.reach("evict-locked")
        moved = _to_trash(layout, entry)
    testpoints.reach("evict-renamed")
    try:
        # A program without a hold, such as raylet, may have started since the look at all processes.
        _require_no_process(entry, moved)
    except InUseError:
        _give_back(layout, entry, moved)
        raise
    return moved


def _take_flocks(flocks: ExitStack, layout: Layout, entry: Entry) -> None:
    if not _take_builders_flock(flocks, layout, entry):
        raise _refusal(entry, "it is being built")
    try:
        # Through a fresh descriptor: a failed upgrade of a shared flock would lose the shared one.
        free = flocks.enter_context(flock.tried_flock(entry.in_use)) is not None
    except FileNotFoundError:
        # No such file, no such user: the remains of a builder that died early, or it is gone.
        free = True
    if not free:
        raise _refusal(entry, "it is in use")


def _take_builders_flock(flocks: ExitStack, layout: Layout, entry: Entry) -> bool:
    path = layout.builder_flock(entry.key)
    descriptor = flocks.enter_context(flock.tried_flock(path, flags=os.O_RDWR | os.O_CREAT))
    # A collector may have unlinked the file before its flock was ours.
    return descriptor is not None and flock.still_names(path, descriptor)


def _to_trash(layout: Layout, entry: Entry) -> Path:
    try:
        return files.to_trash(entry.path, layout.trash)
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
    # No room for a name in the trash: it is deleted where it is, and nothing can be given back. So the second look
    # comes first. Without its record it is not handed out, and without `in-use` no process takes itself for a user.
    _require_no_process(entry, entry.path)
    entry.ready.unlink(missing_ok=True)
    entry.in_use.unlink(missing_ok=True)
    return entry.path


def _give_back(layout: Layout, entry: Entry, moved: Path) -> None:
    """Rename an entry back, unless a builder of its key is at work, who may take the same place.

    Then it stays in the trash, which is not deleted while a process uses it.
    """
    with ExitStack() as flocks:
        if _take_builders_flock(flocks, layout, entry) and not os.path.lexists(entry.path):
            moved.rename(entry.path)


def _require_no_process(entry: Entry, place: Path) -> None:
    """Raise InUseError where a process runs from `place`. A second veto, independent of the flocks.

    raylet and gcs_server are no Pythons and hold nothing; some daemons close all their descriptors. It may only say
    "in use", never "free".
    """
    for pid, how in processes.processes_using(place.parent, [place.name]).get(place.name, {}).items():
        raise _refusal(entry, f"in use by process {pid} ({how})")


def _refusal(entry: Entry, reason: str, hint: str = "") -> InUseError:
    return InUseError(
        f"The environment {entry.name} cannot be removed: {reason}",
        hint or f"stop its users first; `ray-envcache why {entry.short}` shows them",
    )

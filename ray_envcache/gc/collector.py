"""The collector: removes what the policy chose, one by one, and sweeps what dead processes left.

It only tries: an entry that is in use stays, and while another collector is at work it does nothing. It needs no room
on the disk. `companion` starts it as `python -m ray_envcache.gc.collector ROOT DELAY`.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import InUseError, UnknownKeyError
from ray_envcache.gc import companion, policy, rubbish
from ray_envcache.gc.evict import evict_idle
from ray_envcache.gc.policy import Limits
from ray_envcache.store import journal, leases
from ray_envcache.store.layout import Layout
from ray_envcache.survey import shared_bytecode, uv_cache
from ray_envcache.survey.inventory import Status, going_too, last_used, survey
from ray_envcache.system import disk
from ray_envcache.system.flock import tried_flock
from ray_envcache.system.texts import Space

PATIENCE_SECONDS = 60.0
"""How long a build on a full disk waits for another collector: to delete 60 GB takes about 10 s."""


@dataclass(frozen=True)
class Removed:
    """One environment that went, or would go. `freed_bytes` are those of the disk: a lower bound, if not `exact`."""

    key: str
    name: str
    project: str
    reason: str
    freed_bytes: int
    exact: bool = True


@dataclass
class Collected:
    """What a run did. `skipped` says why it did nothing at all.

    `swept_bytes`: what dead processes left, and what uv's cache in the store had for entries that are gone.
    """

    removed: list[Removed] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    in_use: int = 0
    pinned: int = 0
    swept_bytes: int = 0
    skipped: str = ""

    @property
    def freed_bytes(self) -> int:
        """All that became free."""
        return sum(one.freed_bytes for one in self.removed) + self.swept_bytes

    def add_failure(self, name: str, error: OSError) -> None:
        """Note what could not be removed, and why."""
        self.failed.append((name, error.strerror or str(error)))


def collect(layout: Layout, limits: Limits, *, dry_run: bool = False, patience: float = 0.0) -> Collected:
    """Remove what the limits say, and all rubbish; with `dry_run` only say what would go.

    For another collector at work it waits `patience` seconds at most. An entry that cannot be removed is no exception:
    the result has it.
    """
    with tried_flock(layout.collector_flock, flags=os.O_RDWR | os.O_CREAT, seconds=patience) as alone:
        if alone is None:
            return Collected(skipped="another collector is at work")
        return _would_collect(layout, limits) if dry_run else _collect(layout, limits)


def make_room(layout: Layout, wanted: int) -> None:
    """Remove idle environments, least recently used first, until `wanted` bytes are free or none is left.

    Never shrinks the store below $RAY_ENVCACHE_RESERVED_SPACE. What another collector frees at this moment is waited
    for. Raises FieldValueError where a variable with a limit makes no sense.
    """
    floor = Limits.from_environ(os.environ).reserved_space
    limits = Limits(unused_for=None, min_free_space=Space(size=wanted), reserved_space=floor)
    collect(layout, limits, patience=PATIENCE_SECONDS)


def _collect(layout: Layout, limits: Limits) -> Collected:
    collected, began = Collected(), time.time()
    uv_cache.retire(layout, collected.add_failure, before=_unused_since(layout, limits))
    _sweep(layout, collected)
    for one, reason in _chosen(layout, limits, collected):
        _remove(layout, one, reason, collected)
    if limits.everything:
        uv_cache.retire_all(layout, collected.add_failure)
    elif collected.removed:
        # A second earlier: the kernel's clock for files runs a little behind.
        uv_cache.retire(layout, collected.add_failure, since=began - 1)
    rubbish.sweep_records(layout, 0 if limits.everything else rubbish.MEMOS)
    _sweep(layout, collected)
    counts = {"removed": len(collected.removed), "failed": len(collected.failed), "swept_bytes": collected.swept_bytes}
    journal.note(layout, "collection", seconds=round(time.time() - began, 3), **counts)
    return collected


def _sweep(layout: Layout, collected: Collected) -> None:
    collected.swept_bytes += rubbish.sweep(layout, collected.add_failure) + shared_bytecode.sweep(layout)


def _unused_since(layout: Layout, limits: Limits) -> float:
    """Since when a package in uv's cache must be without links to go: like an environment, or now if space is short."""
    space = disk.free_space(layout.root)
    if limits.lacks_space(space.total, space.free):
        return math.inf
    return -math.inf if limits.unused_for is None else time.time() - limits.unused_for


def _would_collect(layout: Layout, limits: Limits) -> Collected:
    """What a run would say. What several entries share is freed with the last of them."""
    collected = Collected()
    chosen = _chosen(layout, limits, collected)
    freed = disk.freed_in_turn((Path(one.path) for one, _ in chosen), going_too(layout))
    collected.removed = [
        _removed(one, reason, size, exact=exact) for (one, reason), (size, exact) in zip(chosen, freed, strict=True)
    ]
    return collected


def _chosen(layout: Layout, limits: Limits, collected: Collected) -> list[tuple[Status, str]]:
    """The entries that go, and why, as the policy says of what is in the store at this moment."""
    _note_deaths(layout)
    # With the recorded sizes, however old they are: where bytes decide, they are measured below.
    found = policy.in_turn(survey(layout, max_age=math.inf))
    collected.in_use = sum(one.in_use for one in found)
    collected.pinned = sum(one.pinned for one in found)
    for one in found:
        if one.in_use and (entry := layout.entry(one.path)):
            # Else what actors used for weeks would be unused for weeks when their cluster is killed.
            leases.touch(entry.in_use)
    space, other = disk.free_space(layout.root), 0
    # Trees are walked through only where bytes decide, 5 s for a million files.
    if limits.max_used_space or limits.reserved_space:
        found, other = _with_occupied(layout, found)
    if limits.lacks_space(space.total, space.free):
        found = _with_freed(layout, found)
    return policy.choose(found, limits, space, other, time.time())


def _note_deaths(layout: Layout) -> None:
    """Count the death of a lease's holder as a use: when it died is not known, only that it was after the last look."""
    for key in layout.leased_keys():
        folder = layout.leases_of(key)
        with suppress(FileNotFoundError):
            if len(os.listdir(folder)) > len(leases.live_leases(layout, key)):
                for entry in layout.entries_of(key):
                    leases.touch(entry.in_use)


def _with_occupied(layout: Layout, found: list[Status]) -> tuple[list[Status], int]:
    """The entries with what the store occupies less when they go in turn, and what it occupies besides them."""
    # Files that they share with what stays do not go.
    ordered = sorted(found, key=policy.may_go, reverse=True)
    trees = [layout.uv_cache, layout.bytecode, *(Path(one.path) for one in ordered)]
    uv_cache, bytecode, *occupied = disk.occupied_in_turn(trees)
    sized = [one._replace(size_bytes=size) for one, size in zip(ordered, occupied, strict=True)]
    return policy.in_turn(sized), uv_cache + bytecode


def _with_freed(layout: Layout, found: list[Status]) -> list[Status]:
    """The entries with what deleting them in turn frees."""
    idle = [one for one in found if policy.may_go(one)]
    freed = disk.freed_in_turn([Path(one.path) for one in idle], going_too(layout))
    measured = [one._replace(reclaimable_bytes=size) for one, (size, _) in zip(idle, freed, strict=True)]
    return [*(one for one in found if not policy.may_go(one)), *measured]


def _remove(layout: Layout, one: Status, reason: str, collected: Collected) -> None:
    entry = layout.entry(one.path)
    if entry is None:
        return

    def unused_since() -> bool:
        return one.state != "ready" or last_used(entry) == one.last_used

    try:
        gone = evict_idle(layout, entry, still_due=unused_since, reason=reason)
    except InUseError:
        # A user came since the choice: as it should be.
        collected.in_use += 1
    except UnknownKeyError:
        # `ray-envcache rm` was faster: it is gone, which is all that was wanted.
        return
    except OSError as error:
        collected.add_failure(entry.name, error)
    else:
        collected.removed.append(_removed(one, reason, gone.reclaimable, exact=gone.exact))


def _removed(one: Status, reason: str, freed: int, *, exact: bool) -> Removed:
    return Removed(one.key, os.path.basename(one.path), one.project or "-", reason, freed, exact)


def main(arguments: list[str]) -> int:
    """Wait DELAY seconds, then collect, unless another process did so within the interval."""
    root, delay = arguments
    layout = Layout(Path(root))
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    time.sleep(float(delay))
    if companion.is_time(layout, os.environ):
        with suppress(OSError):  # on a disk without inodes the next cluster collects once more
            layout.last_collection.touch()
        collect(layout, Limits.from_environ(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

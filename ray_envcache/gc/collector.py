"""The collector: removes what the policy chose, one by one, and sweeps what dead processes left.

It only tries: an entry that is in use stays, and while another collector is at work it does nothing. It needs no room
on the disk. `companion` starts it as `python -m ray_envcache.gc.collector ROOT DELAY`.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import InUseError, UnknownKeyError
from ray_envcache.gc import choosing, companion, rubbish
from ray_envcache.gc.evict import evict_idle
from ray_envcache.gc.policy import Limits, Victim
from ray_envcache.store import journal
from ray_envcache.store.layout import Layout
from ray_envcache.survey import shared_bytecode, uv_cache
from ray_envcache.survey.inventory import Status, going_too, last_used
from ray_envcache.system import disk, flock
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
    with _alone(layout, patience) as alone:
        if not alone:
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
    for victim, status in _chosen(layout, limits, collected):
        _remove(layout, victim, status, collected)
    if limits.everything:
        uv_cache.retire_all(layout, collected.add_failure)
    elif collected.removed:
        # A second earlier: the kernel's clock for files runs a little behind.
        uv_cache.retire(layout, collected.add_failure, since=began - 1)
    rubbish.sweep_records(layout)
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
    freed = disk.freed_in_turn((Path(status.path) for _, status in chosen), going_too(layout))
    collected.removed = [
        _removed(victim, status, size, exact=exact)
        for (victim, status), (size, exact) in zip(chosen, freed, strict=True)
    ]
    return collected


def _chosen(layout: Layout, limits: Limits, collected: Collected) -> list[tuple[Victim, Status]]:
    found = choosing.look_at(layout)
    collected.in_use = sum(status.in_use for status in found.values())
    collected.pinned = sum(status.pinned for status in found.values())
    return choosing.choose(layout, limits, found)


def _remove(layout: Layout, victim: Victim, status: Status, collected: Collected) -> None:
    entry = layout.entry(victim.candidate.name)
    if entry is None:
        return

    def unused_since() -> bool:
        return status.state != "ready" or last_used(entry) == status.last_used

    try:
        gone = evict_idle(layout, entry, still_due=unused_since, reason=victim.reason)
    except InUseError:
        # A user came since the choice: as it should be.
        collected.in_use += 1
    except UnknownKeyError:
        # `ray-envcache rm` was faster: it is gone, which is all that was wanted.
        return
    except OSError as error:
        collected.add_failure(victim.candidate.name, error)
    else:
        collected.removed.append(_removed(victim, status, gone.reclaimable, exact=gone.exact))


def _removed(victim: Victim, status: Status, freed: int, *, exact: bool) -> Removed:
    name, project = victim.candidate.name, status.project or "-"
    return Removed(status.key, name, project, victim.reason, freed, exact)


@contextmanager
def _alone(layout: Layout, patience: float) -> Iterator[bool]:
    deadline = time.monotonic() + patience
    while (descriptor := flock.try_flock(layout.collector_flock, exclusive=True, flags=os.O_RDWR | os.O_CREAT)) is None:
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


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

"""The collector: removes what the policy chose, one by one, and sweeps what dead processes left.

It only tries: an entry that is in use stays, and while another collector is at work it does nothing. It needs no room
on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import InUseError, UnknownKeyError
from ray_envcache.gc import choosing, rubbish
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits, Victim
from ray_envcache.store import shared_bytecode
from ray_envcache.store.inventory import Status, last_used
from ray_envcache.store.layout import Layout
from ray_envcache.system import flock
from ray_envcache.system.units import Space


@dataclass(frozen=True)
class Removed:
    """One environment that went, or would go. Bytes: `freed` on the disk, `logical` as its files count."""

    key: str
    name: str
    project: str
    reason: str
    freed_bytes: int
    logical_bytes: int
    exact: bool = True


@dataclass
class Collected:
    """What a run did. `skipped` says why it did nothing at all; `swept_bytes` is rubbish of dead processes."""

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

    @property
    def logical_bytes(self) -> int:
        """What the removed files count, whoever else has them."""
        return sum(one.logical_bytes for one in self.removed) + self.swept_bytes

    def add_failure(self, name: str, error: OSError) -> None:
        """Note what could not be removed, and why."""
        self.failed.append((name, error.strerror or str(error)))


def collect(layout: Layout, limits: Limits, *, dry_run: bool = False) -> Collected:
    """Remove what the limits say, and all rubbish; with `dry_run` only say what would go.

    An entry that cannot be removed is no exception: the result has it.
    """
    with _alone(layout) as alone:
        if not alone:
            return Collected(skipped="another collector is at work")
        return _would_collect(layout, limits) if dry_run else _collect(layout, limits)


def make_room(layout: Layout, wanted: int) -> None:
    """Remove idle environments, least recently used first, until `wanted` bytes are free or none is left."""
    collect(layout, Limits(unused_for=None, min_free_space=Space(size=wanted)))


def _collect(layout: Layout, limits: Limits) -> Collected:
    collected = Collected()
    collected.swept_bytes += rubbish.sweep(layout, collected.add_failure)
    collected.swept_bytes += shared_bytecode.sweep(layout)
    for victim, status in _chosen(layout, limits, collected):
        _remove(layout, victim, status, collected)
    rubbish.sweep_records(layout)
    collected.swept_bytes += shared_bytecode.sweep(layout)
    return collected


def _would_collect(layout: Layout, limits: Limits) -> Collected:
    """What a run would say. What several entries share is freed with the last of them."""
    collected = Collected()
    chosen = _chosen(layout, limits, collected)
    more = shared_bytecode.freed_in_turn(layout, (Path(status.path) for _, status in chosen))
    collected.removed = [
        _removed(victim, status, status.reclaimable_bytes + shared, status.size_bytes, exact=status.exact)
        for (victim, status), shared in zip(chosen, more, strict=True)
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
        gone = evict(layout, entry, still_due=unused_since)
    except InUseError:
        # A user came since the choice: as it should be.
        collected.in_use += 1
    except UnknownKeyError:
        # `ray-envcache rm` was faster: it is gone, which is all that was wanted.
        return
    except OSError as error:
        collected.add_failure(victim.candidate.name, error)
    else:
        collected.removed.append(_removed(victim, status, gone.freed, gone.logical, exact=gone.exact))


def _removed(victim: Victim, status: Status, freed: int, logical: int, *, exact: bool) -> Removed:
    name, project = victim.candidate.name, status.project or "-"
    return Removed(status.key, name, project, victim.reason, freed, logical, exact)


@contextmanager
def _alone(layout: Layout) -> Iterator[bool]:
    descriptor = flock.try_flock(layout.collector_flock, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)

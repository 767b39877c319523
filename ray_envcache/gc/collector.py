"""The collector: asks the policy who goes, removes them one by one, and sweeps what the dead left behind.

Everything is only tried: whoever is busy is passed over, and another collector at work means there is nothing to do.
It needs no room on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_envcache.errors import InUseError, UnknownKeyError
from ray_envcache.gc import policy
from ray_envcache.gc.clock import note_clock
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Candidate, Disk, Limits, Victim
from ray_envcache.store import leases, shared_bytecode
from ray_envcache.store.inventory import Status, last_used, survey
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.system import disk, files, flock
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
class Report:
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


def collect(layout: Layout, limits: Limits, *, dry_run: bool = False) -> Report:
    """Remove what the limits say, and all rubbish; with `dry_run` only say what would go.

    An entry that cannot be removed is no exception: the report has it.
    """
    with _alone(layout) as alone:
        if not alone:
            return Report(skipped="another collector is at work")
        report = Report()
        if dry_run:
            report.removed = _would_remove(layout, _plan(layout, limits, report))
            return report
        _sweep(layout, report)
        for victim, status in _plan(layout, limits, report):
            entry = layout.entry(victim.candidate.name)
            if entry is not None:
                _remove(layout, entry, victim, status, report)
        _sweep_records(layout)
        report.swept_bytes += shared_bytecode.sweep(layout)
        return report


def make_room(layout: Layout, wanted: int) -> None:
    """Remove idle environments, least recently used first, until `wanted` bytes are free or none is left."""
    collect(layout, Limits(unused_for=None, min_free_space=Space(size=wanted)))


def has_due(layout: Layout, limits: Limits) -> bool:
    """Whether an entry would go by its age if nobody used it at this moment."""
    now, not_before = note_clock(layout)
    candidates = [_candidate(status, not_before) for status in survey(layout) if status.state != "building"]
    idle = [replace(one, protected="") for one in candidates if one.protected != "pinned"]
    age_only = Limits(unused_for=limits.unused_for, min_free_space=None)
    return bool(policy.choose(idle, age_only, Disk(0, 0), now))


def _plan(layout: Layout, limits: Limits, report: Report) -> list[tuple[Victim, Status]]:
    now, not_before = note_clock(layout)
    found = {os.path.basename(status.path): status for status in survey(layout)}
    report.in_use = sum(_is_used(status) for status in found.values())
    report.pinned = sum(status.pinned for status in found.values())
    space = disk.free_space(layout.root)
    candidates = [_candidate(status, not_before) for status in found.values()]
    victims = policy.choose(candidates, limits, Disk(space.total, space.free), now)
    chosen = [(victim, found[victim.candidate.name]) for victim in victims]
    return [*chosen, *_layers_of(chosen, candidates, found)]


def _layers_of(
    chosen: list[tuple[Victim, Status]], candidates: list[Candidate], found: dict[str, Status]
) -> list[tuple[Victim, Status]]:
    """The layers on environments that go: nobody can use them without."""
    going, gone = {victim.candidate.name for victim, _ in chosen}, {status.path for _, status in chosen}
    left = [one for one in candidates if one.name not in going and not one.protected]
    return [(Victim(one, "its environment goes"), found[one.name]) for one in left if found[one.name].base_path in gone]


def _candidate(status: Status, not_before: float) -> Candidate:
    protected = "pinned" if status.pinned else "in use" if _is_used(status) else ""
    protected = "building" if status.state == "building" else protected
    # A broken entry is nobody's any more: it goes whatever its age.
    last_used = max(status.last_used, not_before) if status.state == "ready" else 0.0
    return Candidate(os.path.basename(status.path), last_used, status.size_bytes, status.reclaimable_bytes, protected)


def _is_used(status: Status) -> bool:
    # The compiler of bytecode gives way to the collector.
    only_compiler = bool(status.users) and all(user.kind == "bytecode" for user in status.users)
    return status.in_use and not only_compiler


def _would_remove(layout: Layout, chosen: list[tuple[Victim, Status]]) -> list[Removed]:
    """What a run would say. What several of them share is freed with the last."""
    more = shared_bytecode.freed_in_turn(layout, (Path(status.path) for _, status in chosen))
    return [
        Removed(
            key=status.key,
            name=victim.candidate.name,
            project=status.project or "-",
            reason=victim.reason,
            freed_bytes=status.reclaimable_bytes + shared,
            logical_bytes=status.size_bytes,
            exact=status.exact,
        )
        for (victim, status), shared in zip(chosen, more, strict=True)
    ]


def _remove(layout: Layout, entry: Entry, victim: Victim, status: Status, report: Report) -> None:
    def unused_since() -> bool:
        return status.state != "ready" or last_used(entry) == status.last_used

    try:
        gone = evict(layout, entry, still_due=unused_since)
    except InUseError:
        # Somebody came in between: as it should be.
        report.in_use += 1
    except UnknownKeyError:
        # Somebody was faster: it is gone, which is all that was wanted.
        return
    except OSError as error:
        report.failed.append((victim.candidate.name, error.strerror or str(error)))
    else:
        name, project = victim.candidate.name, status.project or "-"
        removed = Removed(entry.key, name, project, victim.reason, gone.freed, gone.logical, gone.exact)
        report.removed.append(removed)


def _sweep(layout: Layout, report: Report) -> None:
    """Remove what no living process will ever use again."""
    for path in _paths(layout.trash):
        _delete(path, report)
    for path in [*_paths(layout.entries), *_paths(layout.memo), *_paths(layout.pins), *_paths(layout.top)]:
        if files.is_temporary(path) and flock.is_free(path):
            _delete(path, report)
    report.swept_bytes += shared_bytecode.sweep(layout)


def _sweep_records(layout: Layout) -> None:
    """Remove what speaks of entries and processes that are no more."""
    keys = {entry.key for entry in layout.all_entries()}
    for path in _paths(layout.leases):
        leases.sweep_dead(layout, path.name)
        if path.name not in keys:
            with suppress(OSError):
                path.rmdir()
    for path in layout.memo.glob("*.json"):
        entry = layout.entry(str((files.read_json(path) or {}).get("entry")))
        # Of a lower store only what was remembered is known, and its keys are nobody's here.
        known = entry is not None and (os.path.exists(entry.ready) if entry.readonly else entry.key in keys)
        if not known:
            path.unlink(missing_ok=True)


def _delete(path: Path, report: Report) -> None:
    freed = disk.measure(path).reclaimable
    try:
        files.remove_tree(path)
    except OSError as error:
        report.failed.append((path.name, error.strerror or str(error)))
    else:
        report.swept_bytes += freed


def _paths(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


@contextmanager
def _alone(layout: Layout) -> Iterator[bool]:
    descriptor = flock.try_flock(layout.collector_flock, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)

"""What dead processes left in the store, and records of what is no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from ray_envcache.survey.uv_cache import OnError
from ray_envcache.system import disk, files, flock, processes

MEMOS = 1000
"""How many memos a store keeps, those recalled last: each edit of a project makes one, of 4 kB on the disk."""


def sweep(layout: Layout, on_error: OnError) -> int:
    """Delete the trash, and files whose writers died; the bytes that became free. `on_error` gets what stays."""
    return sum(_delete(path, on_error) for path in [*_trash(layout), *_half_written(layout)])


def sweep_records(layout: Layout, memos: int) -> None:
    """Delete what speaks of entries and processes that are no more, and all but so many memos."""
    _sweep_leases(layout)
    _sweep_memos(layout, memos)
    _sweep_flocks(layout)


def _trash(layout: Layout) -> Iterator[Path]:
    """What lies in the trash, without what a process still runs from: a collector died before it gave that back."""
    found = _paths(layout.trash)
    used = processes.processes_using(layout.trash, [path.name for path in found]) if found else {}
    return (path for path in found if path.name not in used)


def _sweep_leases(layout: Layout) -> None:
    for folder in _paths(layout.leases):
        leases.sweep_dead(layout, folder.name)
        with suppress(OSError):  # it is not empty; who takes a lease makes it again
            folder.rmdir()


def _sweep_memos(layout: Layout, keep: int) -> None:
    found = sorted(layout.memo.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found[keep:]:
        path.unlink(missing_ok=True)


def _sweep_flocks(layout: Layout) -> None:
    """Delete the files of builders' flocks, one for each key that was ever built.

    Under the flock: a builder who waits for it finds that its file has no name any more, and opens the new one.
    """
    keys = {entry.key for entry in layout.all_entries()}
    for path in layout.flocks.glob("*.build"):
        if path.stem not in keys:
            leases.remove_free(path)


def _half_written(layout: Layout) -> Iterator[Path]:
    for folder in (layout.entries, layout.memo, layout.pins, layout.top):
        yield from (path for path in _paths(folder) if files.is_temporary(path) and flock.is_free(path))


def _delete(path: Path, on_error: OnError) -> int:
    freed = disk.measure(path).reclaimable
    try:
        files.remove_tree(path)
    except OSError as error:
        on_error(path.name, error)
        return 0
    return freed


def _paths(directory: Path) -> list[Path]:
    return [directory / name for name in sorted(files.names_in(directory))]

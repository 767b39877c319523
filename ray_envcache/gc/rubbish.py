"""What dead processes left in the store, and records of what is no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from ray_envcache.survey.uv_cache import OnError
from ray_envcache.system import disk, files, flock, processes

MEMOS = 50
"""How many memos an entry keeps: states of files and machines that lead to it. Without its memo it is planned anew."""


def sweep(layout: Layout, on_error: OnError) -> int:
    """Delete the trash, and files whose writers died; the bytes that became free. `on_error` gets what stays."""
    return sum(_delete(path, on_error) for path in [*_trash(layout), *_half_written(layout)])


def sweep_records(layout: Layout) -> None:
    """Delete what speaks of entries and processes that are no more, and bound what speaks of those that are."""
    keys = {entry.key for entry in layout.all_entries()}
    _sweep_leases(layout)
    _sweep_memos(layout, keys)
    _sweep_flocks(layout, keys)


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


def _sweep_memos(layout: Layout, keys: set[str]) -> None:
    """Delete memos of entries that are gone, and of each entry all but the newest: each edit of a project makes one."""
    by_key: dict[str, list[Path]] = {}
    for path in sorted(layout.memo.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        by_key.setdefault(_key_of(layout, path, keys), []).append(path)
    for path in [*by_key.pop("", []), *(path for paths in by_key.values() for path in paths[MEMOS:])]:
        path.unlink(missing_ok=True)


def _key_of(layout: Layout, memo: Path, keys: set[str]) -> str:
    """The key of the entry that a memo speaks of, "" where that is gone."""
    entry = layout.entry(str((files.read_json(memo) or {}).get("entry")))
    if entry is None:
        return ""
    # An entry of a read-only store has a key that no entry here needs to have.
    is_there = os.path.exists(entry.ready) if entry.readonly else entry.key in keys
    return entry.key if is_there else ""


def _sweep_flocks(layout: Layout, keys: set[str]) -> None:
    """Delete the files of builders' flocks, one for each key that was ever built.

    Under the flock: a builder who waits for it finds that its file has no name any more, and opens the new one.
    """
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

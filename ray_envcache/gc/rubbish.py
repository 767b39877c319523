"""What dead processes left in the store, and records of what is no more."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from ray_envcache.system import disk, files, flock

OnError = Callable[[str, OSError], None]


def sweep(layout: Layout, on_error: OnError) -> int:
    """Delete the trash, and files whose writers died; the bytes that became free. `on_error` gets what stays."""
    return sum(_delete(path, on_error) for path in [*_paths(layout.trash), *_half_written(layout)])


def sweep_records(layout: Layout) -> None:
    """Delete what speaks of entries and processes that are no more."""
    keys = {entry.key for entry in layout.all_entries()}
    for path in _paths(layout.leases):
        leases.sweep_dead(layout, path.name)
        if path.name not in keys:
            with suppress(OSError):
                path.rmdir()
    for path in layout.memo.glob("*.json"):
        if not _speaks_of_an_entry(layout, path, keys):
            path.unlink(missing_ok=True)


def _half_written(layout: Layout) -> Iterator[Path]:
    for folder in (layout.entries, layout.memo, layout.pins, layout.top):
        yield from (path for path in _paths(folder) if files.is_temporary(path) and flock.is_free(path))


def _speaks_of_an_entry(layout: Layout, memo: Path, keys: set[str]) -> bool:
    entry = layout.entry(str((files.read_json(memo) or {}).get("entry")))
    if entry is None:
        return False
    # An entry of a read-only store has a key that no entry here needs to have.
    return os.path.exists(entry.ready) if entry.readonly else entry.key in keys


def _delete(path: Path, on_error: OnError) -> int:
    freed = disk.measure(path).reclaimable
    try:
        files.remove_tree(path)
    except OSError as error:
        on_error(path.name, error)
        return 0
    return freed


def _paths(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []

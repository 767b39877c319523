"""Stores with many entries, and entries with many files: copies of the records of one that was really built."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import write_record
from ray_envcache.system import files
from ray_envcache.system.disk import DiskUse
from ray_envcache.system.texts import utc_now


def fill(store: Path, count: int) -> None:
    """Have `count` entries that are ready, compiled and measured in a store that has one already."""
    layout = Layout(store)
    entries = list(layout.all_entries())
    record = files.read_json(entries[0].ready)
    assert record is not None
    for number in range(len(entries), count):
        _copy(layout, entries[0], record, hashlib.sha256(str(number).encode()).hexdigest()[:32])


def _copy(layout: Layout, template: Entry, record: dict[str, Any], key: str) -> None:
    """One entry: the interpreter, the hold's file, all records, and a memo as each build leaves one."""
    entry = layout.first_entry(key)
    entry.bin.mkdir(parents=True)
    entry.python.symlink_to(os.readlink(template.python))
    entry.in_use.touch(mode=0o600)
    # Not durable: a thousand syncs take long.
    files.write_json(entry.ready, {**record, "key": key, "path": os.fspath(entry.path)}, durable=False)
    files.write_json(entry.compiled, {"compiled_at": utc_now(), "seconds": 1.0}, durable=False)
    write_record(entry.measured, DiskUse(700_000_000, 70_000_000, exact=True))
    shutil.copy(next(layout.memo.iterdir()), layout.memo_of(key))


def add_files(entry: Entry, count: int) -> None:
    """Give an entry so many files, in directories of sixty, as packages have them."""
    for number in range(0, count, 60):
        folder = entry.venv / "lib" / f"package{number}"
        folder.mkdir(parents=True)
        for name in range(min(60, count - number)):
            (folder / f"module{name}.py").touch()

"""Entries as builds leave them, made in a millisecond: with real records, flocks and leases, and without uv."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.store.roots import prepare_root
from ray_envcache.system import files
from ray_envcache.system.files import file_identity
from ray_envcache.system.processes import boot_id
from ray_envcache.system.texts import utc_now


def make_layout(root: Path) -> Layout:
    layout = Layout(root)
    prepare_root(layout)
    return layout


def make_entry(layout: Layout, number: int, *, ready: bool = True) -> Entry:
    """The next entry of the key that belongs to `number`."""
    entry = layout.next_entry(f"{number:032x}")
    entry.bin.mkdir(parents=True)
    (entry.venv / "lib/python3.11/site-packages").mkdir(parents=True)
    entry.python.symlink_to(os.path.realpath(sys.executable))
    entry.in_use.touch(0o600)
    if ready:
        publish(entry)
    return entry


def publish(entry: Entry) -> None:
    identity = file_identity(os.fspath(entry.python))
    assert identity is not None
    record = ReadyRecord(
        key=entry.key, path=os.fspath(entry.path), created_at=utc_now(), project="p", source="/", python="3.11.7",
        base_python=sys.executable, base_python_file=identity, ray="2.60.0", build_seconds=0.0,
        boot_id=boot_id(), inherited=(),
    )  # fmt: skip
    files.write_json(entry.ready, {"schema_version": 1, **record._asdict()}, durable=False)


def change(entry: Entry, **fields: object) -> None:
    """Change fields of its ready record."""
    record = ReadyRecord.read(entry)
    assert record is not None
    record._replace(**fields).write(entry)  # type: ignore[arg-type]


def add_file(entry: Entry, size: int, name: str = "data") -> Path:
    """Give the entry a file of so many bytes."""
    path = entry.site_packages / name
    path.write_bytes(os.urandom(size))
    return path

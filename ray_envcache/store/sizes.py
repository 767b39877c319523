"""How much an entry occupies, and what deleting it would free now, without walking through it each time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.store import shared_bytecode
from ray_envcache.store.layout import MEASURED, Entry, Layout
from ray_envcache.store.record import SCHEMA_VERSION, recorded
from ray_envcache.system import disk, files

_SAMPLES = 8

Sample: TypeAlias = tuple[str, int, int]
"""A file of an entry: its name there, its inode, and its links, as `_look` counts them."""


class MeasuredRecord(NamedTuple):
    """Sizes in bytes. `exact` is False where `reclaimable_bytes` is a lower bound.

    `samples` are some files of the entry as they were when it was measured.
    """

    size_bytes: int
    reclaimable_bytes: int
    files: int
    exact: bool
    samples: tuple[Sample, ...]

    def write(self, entry: Entry) -> None:
        files.write_json(entry.measured, {"schema_version": SCHEMA_VERSION, **self._asdict()}, durable=False)

    @classmethod
    def read(cls, entry: Entry) -> MeasuredRecord | None:
        values = recorded(entry.at(MEASURED), cls._fields)
        return None if values is None else cls._make(values)


def sizes(layout: Layout, entry: Entry, known: dict[int, int] | None = None) -> MeasuredRecord:
    """The sizes of an entry: as recorded, where the record still holds, else measured anew (and recorded).

    What deleting an entry frees changes without the entry: when uv's cache is cleaned, the entry becomes the only
    owner of its files; and when the first other entry with the same packages comes, or the last one goes, of their
    bytecode. Some files, spread over the tree, tell by their number of links. In a lower store nothing is recorded,
    and what it frees is its owner's business.

    `known` has the links of inodes that were looked at already, for the next entry: most packages are those of others
    too.
    """
    record = MeasuredRecord.read(entry)
    if record is not None and entry.readonly and record.size_bytes:
        return record
    if record is not None and _holds(record, os.fspath(entry.path), {} if known is None else known):
        return record
    return record_sizes(layout, entry)


def _holds(record: MeasuredRecord, top: str, known: dict[int, int]) -> bool:
    for name, inode, links in record.samples:
        if inode not in known:
            # By the inode found, should it be another one: of the recorded one nothing is known.
            found, now = _look(f"{top}/{name}")
            known[found] = now
        if known.get(inode) != links:
            return False
    return True


def record_sizes(layout: Layout, entry: Entry) -> MeasuredRecord:
    """Measure an entry and keep the result, if there is room for it and the entry is finished."""
    finished = entry.compiled.exists() and not entry.readonly
    if finished and not entry.measured.exists():
        # The record counts too: it must be there when it is measured.
        _write(entry, MeasuredRecord(0, 0, 0, False, (("", 0, -1),)))
    # Bytecode that only this entry links to goes with it.
    use = disk.measure(entry.path, shared_bytecode.inodes(layout))
    record = MeasuredRecord(use.size, use.reclaimable, use.files, use.exact, tuple(_samples(entry)))
    if finished:
        _write(entry, record)
    return record


def _write(entry: Entry, record: MeasuredRecord) -> None:
    with suppress(OSError):
        record.write(entry)


def _samples(entry: Entry) -> list[Sample]:
    """Files spread evenly over the packages."""
    chosen = [path for kind in _first_files(entry.site_packages) for path in _spread(kind)]
    return [(os.path.relpath(path, entry.path), *_look(os.fspath(path))) for path in chosen]


def _spread(paths: list[Path]) -> list[Path]:
    return sorted(paths)[:: max(1, len(paths) * 2 // _SAMPLES)]


def _first_files(site_packages: Path) -> tuple[list[Path], list[Path]]:
    """A file of each package that uv links like all the others, METADATA, and one of bytecode."""
    try:
        with os.scandir(site_packages) as found:
            folders = [Path(item.path) for item in found if item.is_dir(follow_symlinks=False)]
    except OSError:
        return [], []
    metadata = [folder / "METADATA" for folder in folders if folder.name.endswith(".dist-info")]
    return metadata, [path for folder in [site_packages, *folders] if (path := _bytecode_in(folder))]


def _bytecode_in(package: Path) -> Path | None:
    """The last one by name: the first is that of `__init__`, which is often empty, and shared with everybody."""
    with suppress(OSError):
        folder = package / "__pycache__"
        names = [name for name in os.listdir(folder) if name.endswith(".pyc")]
        return folder / max(names) if names else None
    return None


def _look(path: str) -> tuple[int, int]:
    """The inode of a file, and its links as far as they matter; zeros where there is none.

    That is up to the first one that is not the entry's own (nor, of bytecode, the one of what entries share): how many
    others have the file changes nothing, and would have all entries measured again whenever another one comes.
    """
    try:
        found = os.lstat(path)
    except OSError:
        return 0, 0
    own = 2 if path.endswith(".pyc") else 1
    return found.st_ino, min(found.st_nlink, own + 1)

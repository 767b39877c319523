"""How much an entry occupies, and what deleting it would free now, without walking through it each time."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_envcache import _disk, _fs, shared_bytecode
from ray_envcache.entry import SCHEMA_VERSION, frozen
from ray_envcache.layout import Entry, Layout

_PROBES = 16


@dataclass(frozen=True)
class MeasuredRecord:
    """Sizes in bytes. `exact` is False where `reclaimable_bytes` is a lower bound.

    `probes` are files of the entry and their numbers of links when it was measured.
    """

    size_bytes: int
    reclaimable_bytes: int
    files: int
    exact: bool
    probes: tuple[tuple[str, int], ...]

    def write(self, entry: Entry) -> None:
        _fs.write_json(entry.measured, {"schema_version": SCHEMA_VERSION, **asdict(self)}, durable=False)

    @classmethod
    def read(cls, entry: Entry) -> MeasuredRecord | None:
        data = _fs.read_json(entry.measured)
        if data is None or data.get("schema_version") != SCHEMA_VERSION:
            return None
        try:
            return cls(**{name: frozen(data[name]) for name in cls.__dataclass_fields__})
        except KeyError:
            return None


def sizes(layout: Layout, entry: Entry) -> MeasuredRecord:
    """The sizes of an entry: as recorded, where the record still holds, else measured anew (and recorded).

    What deleting an entry frees changes without the entry: when uv's cache is cleaned, the entry becomes the only
    owner of its files; and when another entry with the same packages comes or goes, of their bytecode. Some files,
    spread over the tree, tell by their number of links. In a lower store nothing is recorded, and what it frees is
    its owner's business.
    """
    record = MeasuredRecord.read(entry)
    if record is not None and entry.readonly and record.size_bytes:
        return record
    top = os.fspath(entry.path)
    if record is not None and all(_links(f"{top}/{name}") == links for name, links in record.probes):
        return record
    return record_sizes(layout, entry)


def record_sizes(layout: Layout, entry: Entry) -> MeasuredRecord:
    """Measure an entry and keep the result, if there is room for it and the entry is finished."""
    finished = entry.compiled.exists() and not entry.readonly
    if finished and not entry.measured.exists():
        # The record counts too: it must be there when it is measured.
        _write(entry, MeasuredRecord(0, 0, 0, False, (("", -1),)))
    # Bytecode that only this entry links to goes with it.
    use = _disk.measure(entry.path, shared_bytecode.inodes(layout))
    record = MeasuredRecord(use.size, use.reclaimable, use.files, use.exact, tuple(_probes(entry)))
    if finished:
        _write(entry, record)
    return record


def _write(entry: Entry, record: MeasuredRecord) -> None:
    with suppress(OSError):
        record.write(entry)


def _probes(entry: Entry) -> list[tuple[str, int]]:
    """Names and link counts of files spread evenly over the packages."""
    chosen = [path for kind in _first_files(entry.site_packages) for path in _spread(kind)]
    return [(os.path.relpath(path, entry.path), _links(path)) for path in chosen]


def _spread(paths: list[Path]) -> list[Path]:
    return sorted(paths)[:: max(1, len(paths) * 2 // _PROBES)]


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


def _links(path: str | Path) -> int:
    try:
        return os.lstat(path).st_nlink
    except OSError:
        return 0

"""The records of an entry: that it is complete, and its facts; and how all records are written and read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from ray_envcache.store.layout import Entry
from ray_envcache.system import files
from ray_envcache.system.files import is_unchanged
from ray_envcache.system.processes import boot_id

SCHEMA_VERSION = 1

R = TypeVar("R", bound=NamedTuple)

Facts: TypeAlias = dict[str, str]
"""What the key of an entry is made of, by kind and name: {"package numpy": "2.4.1", "python version": "3.11.7"}.

A layer has those of the environment below it too.
"""


class ReadyRecord(NamedTuple):
    """The proof that an entry is complete, written last. Times are UTC ISO 8601, sizes bytes.

    `path` is where it was built, the only place where it works. Of a layer `base` is the name of the entry it lies on
    (its path, where that is in a read-only store), and `content` the digest of its packages; both are "" for an
    environment. `inherited` are files of packages used from elsewhere: path, size, mtime in ns. `local` are the local
    packages of a layer: name, folder, the digest of its content, and that of its files as they were built. `fetched` is
    what came from the remote tier.
    """

    key: str
    path: str
    created_at: str
    project: str
    source: str
    python: str
    base_python: str
    base_python_file: tuple[int, int]
    ray: str
    build_seconds: float
    boot_id: str
    inherited: tuple[tuple[str, int, int], ...]
    base: str = ""
    content: str = ""
    local: tuple[tuple[str, str, str, str], ...] = ()
    fetched: bool = False

    def write(self, entry: Entry) -> None:
        """Publish the entry: from now on it is handed out."""
        write_record(entry.ready, self, durable=True)

    @classmethod
    def read(cls, entry: Entry) -> ReadyRecord | None:
        """The record of an entry that may be handed out, else None: not ready, damaged, or its base Python changed.

        Unknown fields are ignored: a newer version of this package may share the store.
        """
        record = cls.read_any(entry)
        return None if record is None or record.fault(entry) else record

    @classmethod
    def read_any(cls, entry: Entry) -> ReadyRecord | None:
        """The record as it was written, whether or not it still holds; None where there is none, or a damaged one."""
        return read_record(cls, entry.ready)

    def fault(self, entry: Entry) -> str:
        """Why the entry is not handed out any more: its place, or what it uses from elsewhere, changed. "": it is."""
        if self.key != entry.key or not _is_same_place(self.path, os.fspath(entry.path)):
            return "it was moved"
        if not is_unchanged(entry.python, self.base_python_file):
            return "its base Python was changed"
        if not all(is_unchanged(path, (size, changed)) for path, size, changed in self.inherited):
            return "a package that it inherits was changed"
        if self.base and not ((base := entry.base(self.base)) and base.ready.exists()):
            return "the environment below it is gone"
        # Written before a crash of the machine and perhaps never brought to the disk: only what was synced counts.
        is_whole = self.boot_id == boot_id() or entry.compiled.exists()
        return "" if is_whole else "the machine went down before all of it was on the disk"


def write_facts(entry: Entry, facts: Facts) -> None:
    """Note the facts of an entry. Not in its ready record, which each claim reads: those of 300 packages take 40 kB."""
    files.write_json(entry.facts, {**facts}, durable=False)


def read_facts(entry: Entry) -> Facts:
    """The facts of an entry; {} where the file is missing or damaged."""
    found = files.read_json(entry.facts) or {}
    return {fact: value for fact, value in found.items() if isinstance(value, str)}


def _is_same_place(built: str, found: str) -> bool:
    """Whether the place where an entry was built, which is in its scripts and links, leads to the one found here."""
    try:
        # Another spelling of the path, by way of links, will do.
        return built == found or os.path.samefile(built, found)
    except OSError:
        return False


def write_record(path: Path, record: NamedTuple, *, durable: bool = False) -> None:
    """Write a record as `read_record` reads it. Raises OSError."""
    files.write_json(path, {"schema_version": SCHEMA_VERSION, **record._asdict()}, durable=durable)


def read_record(kind: type[R], path: Path) -> R | None:
    """The record of this kind at `path`; None where there is none, or not of our schema."""
    data = files.read_json(path)
    if data is None or data.get("schema_version") != SCHEMA_VERSION:
        return None
    try:
        # As records have them: tuples, no lists.
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value := data[name], list) else value
            for name in kind._fields
            if name in data
        }
        make: Callable[..., R] = kind  # for mypy, which knows only what is called NamedTuple itself
        return make(**known)
    except TypeError:
        return None  # one is missing

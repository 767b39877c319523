"""How much an entry occupies, and what deleting it would free.

Both are measured when the entry is finished, and kept in a record beside it. SIZE stays true from then on. RECLAIMABLE
changes without the entry: when uv's cache is cleaned, or when another entry with the same files comes or goes. So
`list` shows a figure that is at most an hour old. The collector measures anew where bytes decide what goes.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ray_envcache.store.layout import MEASURED, Entry, Layout
from ray_envcache.store.record import SCHEMA_VERSION, recorded
from ray_envcache.survey import shared_bytecode, uv_cache
from ray_envcache.survey.shared_bytecode import Inode
from ray_envcache.system import disk, files

FRESH_SECONDS = 3600.0
"""How long a record is believed where people look: to measure an environment of 20,000 files takes 0.1 s."""


class MeasuredRecord(NamedTuple):
    """Sizes in bytes. `exact` is False where `reclaimable_bytes` is a lower bound."""

    size_bytes: int
    reclaimable_bytes: int
    files: int
    exact: bool

    def write(self, entry: Entry) -> None:
        files.write_json(entry.measured, {"schema_version": SCHEMA_VERSION, **self._asdict()}, durable=False)

    @classmethod
    def read(cls, entry: Entry) -> MeasuredRecord | None:
        values = recorded(entry.at(MEASURED), cls._fields)
        return None if values is None else cls._make(values)


@dataclass(frozen=True)
class Sizes:
    """The sizes of the entries of one store, by their records or, where these are older than `max_age`, measured."""

    layout: Layout
    max_age: float = FRESH_SECONDS

    def of(self, entry: Entry) -> MeasuredRecord:
        """The sizes of an entry. Those of a read-only store are believed at any age: only its owner measures there."""
        record = MeasuredRecord.read(entry)
        if record is not None and (entry.readonly or self._is_fresh(entry)):
            return record
        return self._measure(entry)

    def _is_fresh(self, entry: Entry) -> bool:
        with suppress(OSError):
            # A record of the future means that the clock went back.
            return 0 <= time.time() - os.stat(entry.at(MEASURED)).st_mtime < self.max_age
        return False

    def _measure(self, entry: Entry) -> MeasuredRecord:
        """Measure an entry, and keep the result where the entry is finished and the disk has room for a record."""
        record = MeasuredRecord(*disk.measure(entry.path, self._going_too))
        if entry.compiled.exists() and not entry.readonly:
            with suppress(OSError):
                record.write(entry)
        return record

    @cached_property
    def _going_too(self) -> frozenset[Inode]:
        # Once for all entries: a store of fifty has 100,000 such files.
        return going_too(self.layout)


def record_sizes(layout: Layout, entry: Entry) -> MeasuredRecord:
    """Measure a finished entry, and keep the result."""
    return Sizes(layout, max_age=0).of(entry)


def going_too(layout: Layout) -> frozenset[Inode]:
    """The files of the store outside of entries of which one link goes with the last entry that has them."""
    return shared_bytecode.inodes(layout) | uv_cache.inodes(layout)

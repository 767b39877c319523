"""Pins: a person's claim on an environment. Nothing but `unpin` ends it."""

from __future__ import annotations

from pathlib import Path

import psutil

from ray_envcache.errors import ReadOnlyError, StoreError, UnknownKeyError
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.leases import Holder, Lease, claim, hold
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import disk, files
from ray_envcache.system.texts import utc_now


def pin(layout: Layout, entry: Entry) -> None:
    """Keep the environment of this key, and what it lies on.

    Raises UnknownKeyError where a collector was faster, or it is broken; StoreError where the disk has no room for the
    pin, and ReadOnlyError where it is in a read-only store.
    """
    if entry.readonly:
        raise ReadOnlyError(
            f"The environment {entry.path.name} cannot be pinned: `{layout_of(entry).root}` is read-only here",
            f"its owner can: RAY_ENVCACHE_DIR={layout_of(entry).root} ray-envcache pin {entry.key[:12]}",
        )
    with _hold(layout, entry):
        # While the claims are held no collector can be between its look for pins and the removal.
        record = ReadyRecord.read(entry)
        base = entry.base(record.base) if record else None
        # An environment in the making has no record yet: what it lies on is then looked up with each question.
        known = {"base": base.key if base else ""} if record else {}
        by = psutil.Process().username()
        try:
            files.write_json(layout.pin_of(entry.key), {"key": entry.key, **known, "by": by, "since": utc_now()})
        except OSError as error:
            if error.errno not in files.FULL_DISK:
                raise
            raise StoreError(
                f"No space left to note the pin of {entry.path.name}: {disk.room_left(layout.pins)}", "make room"
            ) from error


def _hold(layout: Layout, entry: Entry) -> Lease:
    """A lease on the entry while it is pinned; on an unfinished one too: its builder holds what it lies on."""
    lease = claim(entry, layout, Holder("cli")) or (None if entry.ready.exists() else hold(entry))
    if lease is None:
        gone = "is broken, or what it lies on is just being removed" if entry.ready.exists() else "was just removed"
        raise UnknownKeyError(f"The environment {entry.path.name} {gone}", "ray-envcache build makes it anew")
    return lease


def pinned_keys(layout: Layout) -> set[str]:
    """The keys of all that is pinned, and of what pinned layers lie on.

    Cheap: the collector asks while it keeps an entry to itself.
    """
    return {key for path in layout.pins.glob("*.json") for key in (path.stem, *_base_of(layout, path))}


def _base_of(layout: Layout, pin: Path) -> list[str]:
    """The key of what the pinned environment lies on: as its pin says, else as the records of its entries say."""
    noted = files.read_json(pin) or {}
    if "base" in noted:
        return [str(noted["base"])]
    entries = layout.entries_of(pin.stem)
    bases = [entry.base(record.base) for entry in entries if (record := ReadyRecord.read(entry))]
    return [base.key for base in bases if base]


def unpin(layout: Layout, key: str) -> bool:
    """Give the environment free; False where it was not pinned."""
    try:
        layout.pin_of(key).unlink()
    except FileNotFoundError:
        return False
    return True

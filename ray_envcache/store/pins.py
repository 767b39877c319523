"""Pins: a person's claim on an environment. Nothing but `unpin` ends it."""

from __future__ import annotations

import os
import pwd
from contextlib import suppress

from ray_envcache.errors import ReadOnlyError, StoreError, UnknownKeyError
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.leases import claim, claim_whole
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import disk, files
from ray_envcache.system.units import utc_now


def pin(layout: Layout, entry: Entry) -> None:
    """Keep the environment of this key, and what it lies on.

    Raises UnknownKeyError where a collector was faster, or it is broken; StoreError where the disk has no room for the
    pin, and ReadOnlyError where it is in a lower store.
    """
    if entry.readonly:
        raise ReadOnlyError(
            f"The environment {entry.path.name} cannot be pinned: `{layout_of(entry).root}` is read-only here",
            f"its owner can: RAY_ENVCACHE_DIR={layout_of(entry).root} ray-envcache pin {entry.key[:12]}",
        )
    # One in the making has no record yet, nor needs one: its builder holds what is below.
    lease = claim_whole(entry) or (None if entry.ready.exists() else claim(entry))
    if lease is None:
        gone = "is broken, or what it lies on is just being removed" if entry.ready.exists() else "was just removed"
        raise UnknownKeyError(f"The environment {entry.path.name} {gone}", "ray-envcache build makes it anew")
    # While the claims are held no collector can be between its look for pins and the removal.
    with lease:
        try:
            files.write_json(layout.pin_of(entry.key), {"key": entry.key, "by": _user(), "since": utc_now()})
        except OSError as error:
            if error.errno not in files.FULL_DISK:
                raise
            raise StoreError(
                f"No space left to note the pin of {entry.path.name}: {disk.room_left(layout.pins)}", "make room"
            ) from error


def is_pinned(layout: Layout, entry: Entry) -> bool:
    """Whether the entry is pinned, or a layer on it is."""
    return entry.key in pinned_keys(layout)


def pinned_keys(layout: Layout) -> set[str]:
    """The keys of all that is pinned, and of what pinned layers lie on."""
    pinned = {path.stem for path in layout.pins.glob("*.json")}
    layers = [entry for key in pinned for entry in layout.entries_of(key)]
    bases = [entry.base(record.base) for entry in layers if (record := ReadyRecord.read(entry))]
    return pinned | {base.key for base in bases if base}


def unpin(layout: Layout, key: str) -> bool:
    """Give the environment free; False where it was not pinned."""
    try:
        layout.pin_of(key).unlink()
    except FileNotFoundError:
        return False
    return True


def _user() -> str:
    with suppress(KeyError):
        return pwd.getpwuid(os.geteuid()).pw_name
    return str(os.geteuid())

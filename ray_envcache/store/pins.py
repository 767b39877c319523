"""Pins: a person's claim on an environment. Nothing but `unpin` ends it."""

from __future__ import annotations

import psutil

from ray_envcache.errors import UnknownKeyError
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, claim
from ray_envcache.store.roots import require_own
from ray_envcache.system import files
from ray_envcache.system.texts import utc_now


def pin(layout: Layout, entry: Entry) -> None:
    """Keep the environment of this key, and what it lies on.

    Raises UnknownKeyError where it cannot be handed out, ReadOnlyError where it is in a read-only store, and OSError.
    """
    require_own(entry, "pin")
    lease = claim(entry, layout, Holder("cli"))
    if lease is None:
        raise UnknownKeyError(
            f"The environment {entry.name} cannot be used: it is being built, broken, or just removed",
            "ray-envcache list shows its state, and ray-envcache build waits for it or makes it anew",
        )
    # While the claims are held no collector can be between its look for pins and the removal.
    with lease:
        by, keys = psutil.Process().username(), [one.key for one in lease.entries]
        files.write_json(layout.pin_of(entry.key), {"keys": keys, "by": by, "since": utc_now()})


def pinned_keys(layout: Layout) -> set[str]:
    """The keys of all that is pinned, and of what pinned layers lie on.

    Cheap: the collector asks while it keeps an entry to itself.
    """
    found = {path.stem: files.read_json(path) or {} for path in layout.pins.glob("*.json")}
    return {*found, *(key for pin in found.values() for key in pin.get("keys", []))}


def unpin(layout: Layout, key: str) -> bool:
    """Give the environment free; False where it was not pinned."""
    try:
        layout.pin_of(key).unlink()
    except FileNotFoundError:
        return False
    return True

"""Telling time that passed from a clock that was set.

An entry's last use is a time of the wall clock. Where that clock jumps ahead by weeks, everything looks unused for
weeks; so the collector compares it with the clock that nobody sets (time since the machine started).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from ray_envcache.store.layout import Layout
from ray_envcache.system import files
from ray_envcache.system.processes import boot_id

TOLERANCE_SECONDS = 3600.0
"""Corrections smaller than this (summer time is none: it does not change Unix time) are believed."""


@dataclass(frozen=True)
class Reading:
    """Both clocks at one moment, in seconds. `not_before`: when the wall clock was last caught jumping."""

    boot: str
    wall: float
    uptime: float
    not_before: float = 0.0


def uptime() -> float:
    """Seconds since the machine started, time asleep included where the system counts it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def note_clock(
    layout: Layout, wall: Callable[[], float] = time.time, steady: Callable[[], float] = uptime
) -> tuple[float, float]:
    """(now, not_before): the time, and the moment before which no entry may count as unused.

    Within one run of the machine's kernel a jump of the wall clock is seen and starts everybody's idle time anew.
    Across a restart the clock is believed: the machine may have been off for weeks.
    """
    before, now = _read(layout), Reading(boot_id(), wall(), steady())
    not_before = before.not_before if before and before.not_before <= now.wall else 0.0
    # Where the system does not tell its boots apart, an uptime that went back does.
    if before and before.boot == now.boot and before.uptime <= now.uptime:
        jump = (now.wall - before.wall) - (now.uptime - before.uptime)
        # What was noted for a moment to come, before a small step back, means from now on.
        not_before = now.wall if abs(jump) > TOLERANCE_SECONDS else min(before.not_before, now.wall)
    # Without room to note it, the next look compares with an older reading: no harm.
    with suppress(OSError):
        reading = Reading(now.boot, now.wall, now.uptime, not_before)
        files.write_json(layout.clock, asdict(reading), durable=False)
    return now.wall, not_before


def _read(layout: Layout) -> Reading | None:
    data = files.read_json(layout.clock) or {}
    try:
        return Reading(data["boot"], float(data["wall"]), float(data["uptime"]), float(data["not_before"]))
    except (KeyError, TypeError, ValueError):
        return None

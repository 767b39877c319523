"""Who goes: a pure function of the entries, the limits, the disk and the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ray_envcache.errors import FieldValueError
from ray_envcache.system.units import Space, format_duration, format_size, is_off, parse_duration, parse_space

T = TypeVar("T")
DAY = 86_400.0
TENTH_OF_THE_DISK = Space(share=0.1)
VARIABLES = tuple(
    f"RAY_ENVCACHE_{name}" for name in ("UNUSED_FOR", "MIN_FREE_SPACE", "MAX_USED_SPACE", "RESERVED_SPACE")
)
"""What sets the limits."""


@dataclass(frozen=True)
class Candidate:
    """An entry as the policy sees it: `last_used` in Unix seconds, `size` in bytes it occupies.

    `reclaimable` is what deleting it would free now: less than `size` where uv's cache or another entry has the same
    files. `protected` says why it must stay ("in use", "pinned", "building"), "" where it may go.
    """

    name: str
    last_used: float
    size: int
    reclaimable: int
    protected: str = ""


@dataclass(frozen=True)
class Disk:
    """The disk of the store, in bytes."""

    total: int
    free: int


@dataclass(frozen=True)
class Victim:
    """An entry that goes, and why, in words."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Limits:
    """When entries go, in BuildKit's sense; None switches a limit off.

    `unused_for`: seconds after its last use an entry goes. `max_used_space`: ceiling of the store. `min_free_space`:
    target of free space on the disk. `reserved_space`: floor; the two space limits never shrink the store below it.
    Age knows no floor: what nobody used for so long is not worth its disk. `everything`: all that may go, goes.
    """

    unused_for: float | None = 14 * DAY
    max_used_space: Space | None = None
    min_free_space: Space | None = TENTH_OF_THE_DISK
    reserved_space: Space | None = None
    everything: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Limits:
        """The defaults, changed by RAY_ENVCACHE_UNUSED_FOR, _MAX_USED_SPACE, _MIN_FREE_SPACE and _RESERVED_SPACE.

        "off" switches one off. Raises FieldValueError, which names the variable.
        """
        return cls(
            unused_for=_variable(environ, "UNUSED_FOR", parse_duration, cls.unused_for),
            max_used_space=_variable(environ, "MAX_USED_SPACE", parse_space, cls.max_used_space),
            min_free_space=_variable(environ, "MIN_FREE_SPACE", parse_space, cls.min_free_space),
            reserved_space=_variable(environ, "RESERVED_SPACE", parse_space, cls.reserved_space),
        )


def choose(candidates: Iterable[Candidate], limits: Limits, disk: Disk, now: float) -> list[Victim]:
    """The entries to remove, least recently used first. Never a protected one.

    `now` in Unix seconds. An entry used in the future (the clock went back) counts as used now.
    """
    everyone = sorted(candidates, key=lambda one: (one.last_used, one.name))
    used, free = sum(one.size for one in everyone), disk.free
    victims = []
    for one in everyone:
        if one.protected:
            continue
        if reason := _due(one, limits, now) or _needed(one, limits, disk, used, free):
            victims.append(Victim(one, reason))
            used, free = used - one.size, free + one.reclaimable
    return victims


def _due(one: Candidate, limits: Limits, now: float) -> str:
    idle = max(now - one.last_used, 0.0)
    if limits.everything:
        return "all were asked for"
    if limits.unused_for is not None and idle >= limits.unused_for:
        return f"unused for {format_duration(idle)}"
    return ""


def _needed(one: Candidate, limits: Limits, disk: Disk, used: int, free: int) -> str:
    """Why the space of `one` is needed, while the store occupies `used` and the disk has `free` bytes."""
    floor = limits.reserved_space.bytes_of(disk.total) if limits.reserved_space else 0
    if used - one.size < floor:
        return ""
    if limits.max_used_space is not None and used > limits.max_used_space.bytes_of(disk.total):
        return f"the store takes {format_size(used)}, more than {limits.max_used_space}"
    lacking = limits.min_free_space is not None and free < limits.min_free_space.bytes_of(disk.total)
    if lacking and one.reclaimable:
        return f"{format_size(free)} are free, less than {limits.min_free_space}"
    return ""


def _variable(environ: Mapping[str, str], name: str, parse: Callable[[str], T], default: T | None) -> T | None:
    variable = f"RAY_ENVCACHE_{name}"
    text = environ.get(variable, "").strip()
    if not text:
        return default
    if is_off(text):
        return None
    try:
        return parse(text)
    except FieldValueError as error:
        raise FieldValueError(f"{variable}: {error.message}", error.hint) from error

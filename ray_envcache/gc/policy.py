"""Who goes: a pure function of the entries, the limits, the disk and the clock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray_envcache.errors import FieldValueError
from ray_envcache.survey.inventory import Status
from ray_envcache.system.disk import FileSystem
from ray_envcache.system.texts import Space, format_duration, format_size, is_off, parse_duration, parse_space

DAY = 86_400.0
WORTH = 0.05
"""For free space entries go only while all that are left would free this share of their size: else it is in vain."""


@dataclass(frozen=True)
class _DefaultFreeSpace(Space):
    """A tenth of the disk, but at most 20 GB: on a large disk a tenth is more than environments ever need."""

    def bytes_of(self, total: int) -> int:
        return min(total // 10, 20 * 10**9)

    def __str__(self) -> str:
        return "10 % or 20 GB"


DEFAULT_FREE_SPACE = _DefaultFreeSpace()


@dataclass(frozen=True)
class Limits:
    """When entries go, in BuildKit's sense; None switches a limit off.

    `unused_for`: seconds after its last use an entry goes. `max_used_space`: ceiling of the store. `min_free_space`:
    target of free space on the disk. `reserved_space`: floor; the two space limits never shrink the store below it.
    Age knows no floor: what was not used for so long is not worth its disk. `everything`: all that may go, goes.
    """

    unused_for: float | None = 14 * DAY
    max_used_space: Space | None = None
    min_free_space: Space | None = DEFAULT_FREE_SPACE
    reserved_space: Space | None = None
    everything: bool = False

    def lacks_space(self, total: int, free: int) -> bool:
        """Whether less is free on a disk of `total` bytes than `min_free_space` asks for."""
        return self.min_free_space is not None and free < self.min_free_space.bytes_of(total)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Limits:
        """The defaults, changed by RAY_ENVCACHE_UNUSED_FOR, _MAX_USED_SPACE, _MIN_FREE_SPACE and _RESERVED_SPACE.

        "off" switches one off. Raises FieldValueError, which names the variable.
        """
        found = {}
        for name, variable in zip(_PARSERS, VARIABLES, strict=True):
            if text := environ.get(variable, "").strip():
                try:
                    found[name] = parse_limit(name, text)
                except FieldValueError as error:
                    raise FieldValueError(f"{variable}: {error.message}", error.hint) from error
        return cls(**found)


_PARSERS: Mapping[str, Callable[[Any], Any]] = {
    "unused_for": parse_duration,
    "min_free_space": parse_space,
    "max_used_space": parse_space,
    "reserved_space": parse_space,
}
VARIABLES = tuple(f"RAY_ENVCACHE_{name.upper()}" for name in _PARSERS)
"""What sets the limits."""


def parse_limit(name: str, value: str | float | None) -> Any:
    """The value of the field `name` of `Limits`, as people write it: None and "off" switch it off.

    A text needs a unit: `--max-used-space 50` means 50 GB to who writes it, and 50 bytes would empty the store.
    Raises FieldValueError.
    """
    if name not in _PARSERS:
        raise FieldValueError(f"Unknown limit: `{name}`", f"the limits are {', '.join(_PARSERS)}")
    if isinstance(value, str) and re.fullmatch(r"\s*[\d.]*[1-9][\d.]*\s*", value, re.ASCII):
        raise FieldValueError(f"A limit without a unit: `{value}`", 'write "14d", "50GB" or "10%"; 0 needs none')
    return None if value is None or is_off(str(value)) else _PARSERS[name](value)


def may_go(one: Status) -> bool:
    """Whether an entry is neither in use nor pinned nor being built."""
    return not (one.in_use or one.pinned or one.state == "building")


def in_turn(found: Iterable[Status]) -> list[Status]:
    """Entries of one store in the order in which they go: least recently used first."""
    return sorted(found, key=lambda one: (one.last_used, one.path))


def choose(
    found: Iterable[Status], limits: Limits, space: FileSystem, other: int, now: float
) -> list[tuple[Status, str]]:
    """The entries to remove and why, least recently used first. Never one that is in use, pinned or being built.

    Their sizes are what they are once those before them are gone. `space` is that of the disk, `other` the bytes that
    the store occupies besides its entries, `now` in Unix seconds. An entry used in the future (the clock went back)
    counts as used now.
    """
    everyone = in_turn(found)
    used, free = other + sum(one.size_bytes for one in everyone), space.free
    idle = [one for one in everyone if may_go(one)]
    going = []
    for number, one in enumerate(idle):
        if reason := _due(one, limits, now) or _needed(idle[number:], limits, space.total, used, free):
            going.append((one, reason))
            used, free = used - one.size_bytes, free + one.reclaimable_bytes
    return going


def _due(one: Status, limits: Limits, now: float) -> str:
    idle = max(now - one.last_used, 0.0)
    if one.state == "broken":
        return "it is broken and can never be used"
    if limits.everything:
        return "all were asked for"
    if limits.unused_for is not None and idle >= limits.unused_for:
        return f"unused for {format_duration(idle)}"
    return ""


def _needed(left: list[Status], limits: Limits, total: int, used: int, free: int) -> str:
    """Why the space of the first of those `left` is needed, while the store takes `used` and `free` bytes are free."""
    one = left[0]
    floor = limits.reserved_space.bytes_of(total) if limits.reserved_space else 0
    if used - one.size_bytes < floor:
        return ""
    if limits.max_used_space is not None and used > limits.max_used_space.bytes_of(total):
        return f"the store takes {format_size(used)}, more than {limits.max_used_space}"
    if limits.lacks_space(total, free) and one.reclaimable_bytes and frees_something(left):
        return f"{format_size(free)} are free, less than {limits.min_free_space}"
    return ""


def frees_something(left: Iterable[Status]) -> bool:
    """Whether removing all of them is worth it: not where uv's cache has nearly all of their files too."""
    found = [*left]
    return sum(one.reclaimable_bytes for one in found) >= WORTH * sum(one.size_bytes for one in found)

"""Texts for people: sizes, durations and times as they write them, and what must not be shown of foreign texts."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from types import MappingProxyType

from ray_envcache.errors import FieldValueError

# Only ASCII: other letters fold to the units. At most 18 digits: a float can take them.
_NUMBER = r"\d{1,18}(?:\.\d+)?"
_SIZE = re.compile(rf"({_NUMBER})\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_PART = re.compile(rf"({_NUMBER})\s*([wdhms])", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS = {"w": 604_800, "d": 86_400, "h": 3_600, "m": 60, "s": 1}
_NAMES = ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second"))

# Up to the last `@` before the path: a password with an unquoted `@` in it goes too.
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
# To be shown, one with an unquoted `/` goes too, which no program reads as a password: only a port is left of it.
_SHOWN_LOGIN = re.compile(r"(?<=://)(?:[^/\s]+|[^/\s:@]*:(?!\d*/)[^\s\"'`]{0,256})@")
_WORDS = r"[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential)|(?:[\w.-]*[_.-])?(?:key|sig|auth|pwd|jwt)"
_TOKEN = re.compile(rf"(?i)([?&;#](?:{_WORDS})=)[^&#\s\"`]+")
_SSH_USER = re.compile(r"(?:[a-z]+\+)?ssh://[^/\s:@]+@")
_SECRET_LENGTH = 4
_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Space:
    """An amount of disk: bytes, or a share (0 to 1) of the whole disk."""

    size: int = 0
    share: float | None = None

    def bytes_of(self, total: int) -> int:
        """Return the amount in bytes on a disk of `total` bytes."""
        return self.size if self.share is None else int(total * self.share)

    def __str__(self) -> str:
        return format_size(self.size) if self.share is None else f"{self.share * 100:g} %"


def parse_size(text: str | int) -> int:
    """Read bytes from "50GB" (metric), "50GiB" or a plain number. Raises FieldValueError."""
    parts = _SIZE.fullmatch(str(text).strip())
    if parts is None or (parts[3] and not parts[2]):
        raise FieldValueError(f"Not a size: `{text}`", 'write bytes, "50GB" or "50GiB"')
    return int(float(parts[1]) * (1024 if parts[3] else 1000) ** _POWERS[parts[2].lower()])


def parse_space(text: str | int) -> Space:
    """Read a size, or a share of the disk ("10%"). Raises FieldValueError."""
    written = str(text).strip()
    if not written.endswith("%"):
        return Space(size=parse_size(written))
    try:
        percent = float(written[:-1])
    except ValueError:
        percent = -1
    if not 0 <= percent <= 100:
        raise FieldValueError(f"Not a share of the disk: `{text}`", 'write "0%" to "100%", or a size such as "50GB"')
    return Space(share=percent / 100)


def parse_duration(text: str | float) -> float:
    """Read seconds from "14d", "36h", "1d12h" or a plain number of seconds. Raises FieldValueError."""
    written = str(text).strip()
    if re.fullmatch(_NUMBER, written, re.ASCII):
        return float(written)
    parts = _PART.findall(written)
    if not parts or _PART.sub("", written).strip():
        raise FieldValueError(f"Not a duration: `{text}`", 'write "14d", "36h", "90m", "45s" or a number of seconds')
    return sum(float(number) * _SECONDS[unit.lower()] for number, unit in parts)


def needs_extra(extra: str) -> str:
    """The hint that brings an extra of ray-envcache into the Python that runs it, also below `uv tool`."""
    return f'uv pip install --python "{sys.executable}" "ray-envcache[{extra}]"'


def is_off(text: str) -> bool:
    """Whether this word ("off" or "none") switches a limit off."""
    return text.strip().lower() in {"off", "none"}


def format_size(size: float) -> str:
    """Write a size in metric units, with one decimal below a hundred: "4.1 GB", "512 B"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_duration(seconds: float) -> str:
    """Write a duration in the largest unit that fits: "3 days", "1 minute", "0 seconds"."""
    for length, name in _NAMES:
        count = int(seconds // length)
        if count or length == 1:
            return f"{count} {name}{'' if count == 1 else 's'}"
    raise AssertionError(seconds)


def printable(text: str) -> str:
    """Replace control characters by "?": file names and command lines of other users are shown in terminals."""
    return "".join(character if character.isprintable() else "?" for character in text)


def without_credentials(text: str, given: Mapping[str, str] = _NONE) -> str:
    """Replace by `***` what is secret in every URL, and every password that uv takes from variables.

    The variables are those of this process, and `given`.
    """
    variables = (*os.environ.items(), *given.items())
    named = {value for name, value in variables if name.startswith("UV_") and name.endswith(("_PASSWORD", "_TOKEN"))}
    # The longest first: a shorter one may be its beginning.
    for value in sorted(named, key=len, reverse=True):
        # Shorter ones would be found in ordinary words.
        if len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _TOKEN.sub(r"\1***", _SHOWN_LOGIN.sub("***@", text))


def strip_credentials(url: str) -> str:
    """Remove user and password from a URL: uv adds them again from where the user keeps them."""
    # Only for ssh the user is a part of the address.
    return url if _SSH_USER.match(url) else _LOGIN.sub("", url)


def utc_now() -> str:
    """Return this moment as ISO 8601 in UTC, with seconds."""
    return utc(datetime.now(timezone.utc).timestamp())


def from_utc(moment: str) -> float:
    """Read what `utc` writes."""
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp()


def utc(seconds: float) -> str:
    """Write a Unix time as ISO 8601 in UTC, with seconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")

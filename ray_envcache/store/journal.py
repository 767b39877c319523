"""The journal: what happened in a store, one JSON object a line, in files that never grow beyond a few megabytes.

It is never in the way. A line that cannot be written (a full disk, a read-only store, a store of another user) is
dropped, and what it tells of goes on: this is the one place where dropping is the promise. So what reads the journal
shows what was written down, and decides nothing.

The files are numbered, and only the two newest count. A full one is followed by the next, whose first line carries the
totals of all that came before these two; it is linked into place whole. So no flock is needed: of several processes
that begin the next file one succeeds, and they would all have written the same, because the file before the full one
changes no more. SIGKILLed in between, a process leaves at worst an older file, which the next of them removes.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard

from ray_envcache.system import files, testpoints
from ray_envcache.system.texts import utc_now

if TYPE_CHECKING:
    from ray_envcache.store.layout import Layout

VERSION = 1
FILE_BYTES = 4_000_000
"""When the next file begins: after some 15,000 lines."""
LINE_BYTES = 4096
"""What one write appends in one piece everywhere."""

LARGEST = 1e18

Value: TypeAlias = str | float | None  # an int too
Totals: TypeAlias = dict[str, float]


class Event(NamedTuple):
    """One line: when (UTC ISO 8601), what, and its fields, which another process may have written as it liked."""

    at: str
    name: str
    fields: Mapping[str, Any]

    def text(self, field: str) -> str:
        """A field that is a text, "" where it is not there."""
        value = self.fields.get(field)
        return value if isinstance(value, str) else ""

    def number(self, field: str) -> float:
        """A field that is a number, 0 where it is not there."""
        value = self.fields.get(field)
        return value if _is_number(value) else 0


class Journal(NamedTuple):
    """What the journal has, oldest first; and `totals` since the store began, of lines too that are gone by now.

    `totals` has the sum of each number, and a count, by event and result: "setup found seconds", "build count". Passed
    over were `broken` lines, and those of a `newer` version of this package.
    """

    events: list[Event]
    totals: Totals
    broken: int
    newer: int


def note(layout: Layout, event: str, /, **fields: Value) -> None:
    """Append an event, or drop it: nothing fails, and nothing waits for it. Without secrets: people publish journals.

    `result` is how it ended, one of a few words: events are counted by both. Numbers are summed up.
    """
    line = _line({"v": VERSION, "at": utc_now(), "event": event, **fields})
    with suppress(OSError):
        # Not as root in the store of a user, who could not write to our file.
        if not layout.readonly and os.stat(layout.top).st_uid == os.geteuid():
            _append(layout.journal, line)


def _line(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"), default=str)
    if len(text) >= LINE_BYTES:
        # Others than ASCII letters take up to 12 bytes.
        short = {name: value if _is_number(value) else f"{value}"[:30] for name, value in data.items()}
        text = json.dumps(short, separators=(",", ":"))
    return text.encode() + b"\n"


def _append(folder: Path, line: bytes) -> None:
    for _ in range(3):  # other processes may begin the next file, or remove all, meanwhile
        numbers = _numbers(folder)
        number = numbers[-1] if numbers else 1
        with suppress(FileNotFoundError):
            if _fits_in(_file(folder, number), line, create=not numbers):
                return
            _begin_next(folder, number)
            continue
        folder.mkdir(mode=0o700, exist_ok=True)


def _fits_in(path: Path, line: bytes, *, create: bool) -> bool:
    """Append the line where the file has room for it."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    descriptor = os.open(path, flags, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        if size + len(line) > FILE_BYTES:
            return False
        # A line that a full disk cut off is ended, so that it takes no other with it.
        cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        os.write(descriptor, b"\n" + line if cut_off else line)
        return True
    finally:
        os.close(descriptor)


def _begin_next(folder: Path, full: int) -> None:
    _, totals, _, _ = _read_file(folder, full)
    closed, _, _, _ = _read_file(folder, full - 1)
    first = {"v": VERSION, "at": utc_now(), "event": "totals", "sums": _add(totals, closed)}
    testpoints.reach("journal-full")
    with suppress(FileExistsError):  # another process was faster
        files.write_whole(_file(folder, full + 1), json.dumps(first).encode() + b"\n", mode=0o600, replace=False)
    testpoints.reach("journal-begun")
    for number in _numbers(folder):
        if number < full:
            _file(folder, number).unlink(missing_ok=True)


def read(layout: Layout) -> Journal:
    """All that the journal has. Raises OSError where it cannot be read."""
    while True:
        numbers = _numbers(layout.journal)
        older, newest = [_read_file(layout.journal, number) for number in ([0, 0, *numbers])[-2:]]
        if numbers == _numbers(layout.journal):  # else one may have gone meanwhile
            events = [*older.events, *newest.events]
            broken, newer = older.broken + newest.broken, older.newer + newest.newer
            return Journal(events, _add(newest.totals, events), broken, newer)


def remove(layout: Layout) -> None:
    """Remove the journal; counters begin at zero."""
    files.discard(layout.journal, layout.trash)


def _read_file(folder: Path, number: int) -> Journal:
    """The events of one file, and in `totals` those that its first line carries."""
    found = Journal([], {}, 0, 0)
    try:
        lines = _file(folder, number).read_bytes().split(b"\n")
    except FileNotFoundError:
        return found
    for line in filter(None, lines):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        if isinstance(data, dict) and _is_number(version := data.get("v")) and version > VERSION:
            found = found._replace(newer=found.newer + 1)
        elif not (isinstance(data, dict) and isinstance(data.get("at"), str) and isinstance(data.get("event"), str)):
            found = found._replace(broken=found.broken + 1)
        elif data["event"] == "totals":
            sums = data.get("sums")
            sound = {name: sum_ for name, sum_ in sums.items() if _is_number(sum_)} if isinstance(sums, dict) else {}
            found = found._replace(totals=sound)
        else:
            found.events.append(Event(data.pop("at"), data.pop("event"), data))
    return found


def _add(totals: Totals, events: Iterable[Event]) -> Totals:
    sums = defaultdict(float, totals)
    for event in events:
        kind = f"{event.name} {event.text('result')}".strip()
        sums[f"{kind} count"] += 1
        for name in event.fields.keys() - {"v", "count"}:
            if value := event.number(name):
                sums[f"{kind} {name}"] += value
    return dict(sums)


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a line counts: all of ours are sizes, seconds and counts, neither infinite nor negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _numbers(folder: Path) -> list[int]:
    stems = (name.removesuffix(".jsonl") for name in files.names_in(folder) if name.endswith(".jsonl"))
    return sorted(int(stem) for stem in stems if stem.isdecimal())


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number}.jsonl"

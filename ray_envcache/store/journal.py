"""The journal: what happened in a store, one JSON object a line, in two files of a few megabytes.

It is never in the way. A line that cannot be written (a full disk, a read-only store, a store of another user) is
dropped, and what it tells of goes on: this is the one place where dropping is the promise. So what reads the journal
shows what was written down, and decides nothing.

A full file is renamed over the older one by a process that gets its flock, and the next line begins the next file. The
totals go on: just before, the full file gets a line with those of the older file. That one has been closed for as long
as it took to fill a file, so no writer is at it any more; a line of one that was stopped for so long is lost to them.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeGuard, TypeVar, cast

from ray_envcache.errors import BuildError, BusyError, EnvCacheError, StoreError
from ray_envcache.store.record import read_record
from ray_envcache.system import flock, testpoints
from ray_envcache.system.disk import DiskUse
from ray_envcache.system.texts import utc_now

if TYPE_CHECKING:
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.store.layout import Entry, Layout
    from ray_envcache.store.leases import Holder, Lease

VERSION = 1
FILE_BYTES = 4_000_000
"""When a file is full: after some 15,000 lines."""
LINE_BYTES = 4096
"""What one write appends in one piece everywhere."""

LARGEST = 1e18

Value: TypeAlias = str | float | None  # an int too
Totals: TypeAlias = dict[str, float]
F = TypeVar("F", bound="Callable[..., Lease | None]")


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

    `totals` has the sum of each number, and a count, by event, and by event and result: "build count", "setup found
    seconds".
    `passed_over` is the number of lines that are torn, or of a newer version of this package.
    """

    events: list[Event]
    totals: Totals
    passed_over: int


def note(layout: Layout, event: str, /, **fields: Value) -> None:
    """Append an event, or drop it: nothing fails, and nothing waits for it. Without secrets: people publish journals.

    `result` is how it ended, one of a few words: events are counted by both. Numbers are summed up.
    """
    line = _line({"v": VERSION, "at": utc_now(), "event": event, **fields})
    with suppress(OSError):
        # Not as root in the store of a user, who could not write to our file.
        if not layout.readonly and os.stat(layout.top).st_uid == os.geteuid():
            _rotate_if_full(layout)
            _append(layout.journal, line)


def _line(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"), default=str)
    if len(text) >= LINE_BYTES:
        # Others than ASCII letters take up to 12 bytes.
        short = {name: value if _is_number(value) else f"{value}"[:30] for name, value in data.items()}
        text = json.dumps(short, separators=(",", ":"))
    return text.encode() + b"\n"


def _rotate_if_full(layout: Layout) -> None:
    with suppress(FileNotFoundError):
        if os.stat(layout.journal).st_size < FILE_BYTES:
            return
        with flock.tried_flock(layout.journal) as held:
            if held is None or not flock.still_names(layout.journal, held):
                return  # another process is at it, or was faster
            if os.fstat(held).st_size >= FILE_BYTES:
                older = _read_file(layout.older_journal)
                totals = summed(older.events, older.totals)
                line = {"v": VERSION, "at": utc_now(), "event": "totals", **totals}
                _append(layout.journal, json.dumps(line).encode() + b"\n")
                testpoints.reach("journal-full")
                layout.journal.replace(layout.older_journal)


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        size = os.fstat(descriptor).st_size
        # A line that a full disk cut off is ended, so that it takes no other with it.
        if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)


def read(layout: Layout) -> Journal:
    """All that the journal has. Raises OSError where it cannot be read."""
    while True:
        begun = _inode(layout.journal)
        older, newest = _read_file(layout.older_journal), _read_file(layout.journal)
        if begun == _inode(layout.journal):  # else a file was renamed meanwhile
            totals = summed(newest.events, newest.totals or summed(older.events, older.totals))
            return Journal([*older.events, *newest.events], totals, older.passed_over + newest.passed_over)


def summed(events: Iterable[Event], to: Mapping[str, float] = MappingProxyType({})) -> Totals:
    """The sum of each number, and a count, by event, and by event and result, added to those that there are."""
    sums = defaultdict[str, float](int, to)  # bytes stay integers
    for event in events:
        numbers = [("count", 1), *((name, event.number(name)) for name in event.fields)]
        for kind in {event.name, f"{event.name} {event.text('result')}".strip()}:
            for name, value in numbers:
                sums[f"{kind} {name}"] += value
    return {name: value for name, value in sums.items() if value}


def remove(layout: Layout) -> None:
    """Remove the journal; counters begin at zero."""
    for path in (layout.older_journal, layout.journal):
        path.unlink(missing_ok=True)


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return 0


def _read_file(path: Path) -> Journal:
    """The events of one file; in `totals` those of all files before it, {} while it does not have them."""
    try:
        lines = [*filter(None, path.read_bytes().split(b"\n"))]
    except FileNotFoundError:
        lines = []
    found = [event for line in lines if (event := _event(line))]
    totals = [{name: event.number(name) for name in event.fields} for event in found if event.name == "totals"]
    events = [event for event in found if event.name != "totals"]
    return Journal(events, totals[-1] if totals else {}, len(lines) - len(found))


def _event(line: bytes) -> Event | None:
    try:
        data = json.loads(line)
        is_known = data.pop("v") <= VERSION
        at, name = data.pop("at"), data.pop("event")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return None
    return Event(at, name, data) if is_known and isinstance(at, str) and isinstance(name, str) else None


def _is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a line counts: all of ours are sizes, seconds and counts, neither infinite nor negative."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def noted(set_up: F) -> F:
    """Have a method of `Store` note each set-up, once. Of a lookup that finds nothing there is none."""

    @wraps(set_up)
    def noting(store: Any, spec: EnvSpec, ray: Any, holder: Holder, *args: Any, **options: Any) -> Lease | None:
        began = time.monotonic()
        about: dict[str, Value] = {"path": spec.path, "kind": holder.kind, "cluster": holder.cluster}

        def end(ended: dict[str, Value]) -> None:
            note(store.layout, "setup", seconds=round(time.monotonic() - began, 4), **about, **ended)

        try:
            lease = set_up(store, spec, ray, holder, *args, **options)
        except Exception as error:
            # No BaseException: a set-up that was cancelled has not failed.
            end({"result": _failure(error), "error": type(error).__name__})
            raise
        if lease is not None:
            end(_found(lease))
        return lease

    return cast("F", noting)


def _failure(error: Exception) -> str:
    """Whether the input was refused, which helps no later attempt either, or something failed."""
    failed = isinstance(error, BuildError | StoreError | BusyError) or getattr(error, "passing", False)
    return "refused" if isinstance(error, EnvCacheError) and not failed else "failed"


def _found(lease: Lease) -> dict[str, Value]:
    """What a set-up led to. `bytes`: of the environment and all below it, as far as they are measured."""
    entry, *below = lease.entries
    result = "lower" if lease.how == "found" and entry.readonly else lease.how
    return {
        "result": result,
        "key": entry.key,
        "base": below[0].key if below else None,
        "project": lease.project,
        "bytes": sum(map(_size, lease.entries)),
    }


def _size(entry: Entry) -> int:
    with suppress(OSError):
        use = read_record(DiskUse, entry.measured)
        return use.size if use and isinstance(use.size, int) else 0
    return 0

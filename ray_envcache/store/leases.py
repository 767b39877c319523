"""Leases: claims that keep an entry, freed by the kernel however their holder ends.

A lease is two flocks held by one process: a *shared* one on the entry's `in-use` file, which is the truth the
collector asks, and an exclusive one on a file of its own below `leases/`, which tells people who holds what. The
second may be missing (a full disk); the first never is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_envcache.errors import BusyError
from ray_envcache.store import roots
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import files, flock
from ray_envcache.system.texts import utc_now

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_logger = logging.getLogger(__name__)

CLAIM_SECONDS = 60.0
"""How long a claim waits for a process that keeps the entry to itself: a lister or collector that was stopped."""


def _command() -> str:
    # The program's name only: its arguments may hold secrets.
    return os.path.basename(sys.argv[0] or "python")[:80]


@dataclass(frozen=True)
class Holder:
    """A process that keeps an entry: by a lease, or by running from it (`kind` "process").

    Of a lease `kind` is agent, driver, build, bytecode, push, repair, run, cli or program. `cluster` is the Ray session
    it belongs to, "" where it belongs to none that lives; `since` is UTC ISO 8601.
    """

    kind: str
    cluster: str = ""
    job: str = ""
    pid: int = field(default_factory=os.getpid)
    command: str = field(default_factory=_command)
    since: str = field(default_factory=utc_now)

    def __str__(self) -> str:
        return f"{self.kind} {self.pid} ({self.cluster or self.command})"

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Holder:
        """The holder that a file tells of, with "" for what it does not have."""
        return cls(**{one.name: told.get(one.name, "") for one in fields(cls)})


class Lease:
    """A claim on an entry, and on the entry `below` a layer, until it is released or its process ends.

    Use it as a context manager, or call `release()`. A lease that is collected unreleased warns and releases.
    """

    def __init__(self, entry: Entry, in_use: int, *, counts: bool = True) -> None:
        self.entry = entry
        self.project = ""
        self.how = "found"  # or "built", or "waited" for another builder
        self._in_use: int | None = in_use
        self._counts = counts and not entry.readonly
        self._below: Lease | None = None
        self._file: Path | None = None
        self._file_flock: int | None = None

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.entry.python

    @property
    def key(self) -> str:
        """The key of the environment."""
        return self.entry.key

    @property
    def entries(self) -> list[Entry]:
        """The entry, and those below it."""
        return [self.entry, *(self._below.entries if self._below else [])]

    @property
    def descriptors(self) -> list[int]:
        """The descriptors that keep the entries: a process that inherits one keeps its entry too."""
        mine = [] if self._in_use is None else [self._in_use]
        return [*mine, *(self._below.descriptors if self._below else [])]

    def release(self) -> None:
        """Give the entry back. A second call does nothing."""
        if self._in_use is None:
            return
        if self._counts:
            touch(self._in_use)
        # The claim goes before its file: a collector that finds no file may rely on finding no flock either.
        os.close(self._in_use)
        self._in_use = None
        if self._below is not None:
            self._below.release()
        if self._file is not None and self._file_flock is not None:
            # Unlinked while the flock is ours: a sweep cannot take it for the file of a dead holder.
            self._file.unlink(missing_ok=True)
            os.close(self._file_flock)

    def keep(self, below: Lease) -> None:
        """Hold `below` for as long as this lease is held: a layer keeps the environment it lies on."""
        self._below = below

    def announce(self, layout: Layout, holder: Holder) -> None:
        """Write the file that tells people who holds this lease. Where that fails, the lease holds without it."""
        path = layout.leases_of(self.entry.key) / secrets.token_hex(8)
        try:
            descriptor = _own_file(path)
        except OSError as error:
            if error.errno not in {*files.FULL_DISK, errno.EROFS}:
                _logger.warning("The lease on %s holds, but `list` cannot show it: %s", self.entry.path.name, error)
            return
        self._file, self._file_flock = path, descriptor
        with suppress(OSError):  # a disk that fills up now leaves an empty file: `list` shows "?"
            os.write(descriptor, json.dumps({"entry": layout.name_of(self.entry), **vars(holder)}).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_in_use", None) is not None:
            warnings.warn(f"unreleased lease on {self.entry.path.name}", ResourceWarning, stacklevel=1)
            self.release()


def hold(entry: Entry, *, ready: bool = False, counts: bool = True) -> Lease | None:
    """Keep an entry, finished or not, without a word to people; None where it is gone, or not `ready` as it must be.

    Unless it `counts` as a use, collectors do not wait any longer for it. Raises BusyError where a process keeps the
    entry to itself for CLAIM_SECONDS, and StoreError where the entry is one of a read-only store that cannot be trusted
    or read.
    """
    in_use = _shared_flock(entry, ready=ready)
    if in_use is None:
        return None
    if counts and not entry.readonly:
        touch(in_use)
    return Lease(entry, in_use, counts=counts)


def claim(entry: Entry, layout: Layout, holder: Holder) -> Lease | None:
    """Claim an entry that may be handed out, and what it lies on; None where it is not ready, or gone.

    `layout` is the user's own store, where people are told of `holder`, also for an entry of a read-only store. The
    ready record is read under the claim, so that no collector can change it meanwhile. Raises as `hold`.
    """
    lease = hold(entry, ready=True)
    if lease is None:
        return None
    with ExitStack() as undo:
        undo.callback(lease.release)
        record = ReadyRecord.read(entry)
        if record is None or not _claim_base(lease, record, layout, holder):
            return None
        lease.project = record.project
        lease.announce(layout, holder)
        undo.pop_all()
        return lease


def _claim_base(lease: Lease, record: ReadyRecord, layout: Layout, holder: Holder) -> bool:
    """Claim the environment below a layer too; False where a collector has removed it."""
    base = lease.entry.base(record.base)
    if base is None:
        return True
    below = claim(base, layout, holder)
    if below is not None:
        lease.keep(below)
    return below is not None


def live_leases(layout: Layout, key: str) -> list[tuple[str, Holder]]:
    """The live leases on `key`: of each the name of the entry and the holder, as far as a full disk left them."""
    told = (files.read_json(path) or {} for path in _files(layout.leases_of(key)) if flock.is_held(path))
    return [(one.get("entry", ""), Holder.read(one)) for one in told]


def sweep_dead(layout: Layout, key: str) -> None:
    """Remove the files of leases whose holders died."""
    for path in _files(layout.leases_of(key)):
        remove_free(path)


def remove_free(path: Path) -> None:
    """Remove a file on which no process holds a flock."""
    with suppress(FileNotFoundError), flock.tried_flock(path) as held:
        # The process that made it makes another one where a sweep was faster: that one is not free.
        if held is not None and flock.still_names(path, held):
            path.unlink()


def _own_file(path: Path) -> int:
    """Create the file of a lease and hold its flock; again where a sweep removed either meanwhile."""
    while True:
        try:
            held = flock.try_flock(path, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            continue
        if held is not None and flock.still_names(path, held):
            return held
        if held is not None:
            os.close(held)


def _shared_flock(entry: Entry, *, ready: bool) -> int | None:
    """A shared flock on the entry; None once it is gone, or its ready record is, where it has to be `ready`.

    A time-out is no sign of either, and raises BusyError.
    """
    deadline, pause = time.monotonic() + CLAIM_SECONDS, 0.001
    while True:
        try:
            if (descriptor := _try_shared(entry)) is not None:
                # A collector renames the entry away under its exclusive flock: ours may have come right after.
                if flock.still_names(entry.in_use, descriptor):
                    return descriptor
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if ready and not entry.ready.exists():
            return None
        if time.monotonic() > deadline:
            raise BusyError(
                f"A process has kept `{entry.in_use}` to itself for {CLAIM_SECONDS:.0f} s",
                "a collector or lister of this store is stopped or hangs: look for one in state T or D (ps), end it, "
                "and try again",
            )
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _try_shared(entry: Entry) -> int | None:
    if entry.readonly:
        return roots.shared_flock(entry)
    return flock.try_flock(entry.in_use, exclusive=False)


def touch(in_use: int | Path) -> None:
    """Note that the entry is used. Only its turn in the collector depends on it: where that fails, work goes on."""
    with suppress(OSError):
        os.utime(in_use)


def _files(directory: Path) -> list[Path]:
    return [directory / name for name in files.names_in(directory)]

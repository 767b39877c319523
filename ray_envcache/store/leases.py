"""Leases: claims that keep an entry, freed by the kernel however their holder ends.

A lease is two flocks held by one process: a *shared* one on the entry's `in-use` file, which is the truth the
collector asks, and an exclusive one on a file of its own below `leases/`, which tells people who holds what. The
second may be missing (a full disk); the first never is.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from ray_envcache.store import readonly
from ray_envcache.store.layout import IN_USE, Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import files, flock
from ray_envcache.system.processes import pid_namespace
from ray_envcache.system.units import utc

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


def _command() -> str:
    # The program's name only: its arguments may hold what is nobody's business.
    return os.path.basename(sys.argv[0] or "python")[:80]


def _now() -> str:
    return utc(time.time())


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `kind` is agent, driver, build, bytecode or cli; `since` is UTC ISO 8601.

    `pid` means something only in the pid namespace `pids`: a container has numbers of its own.
    """

    kind: str
    cluster: str = ""
    job: str = ""
    pid: int = field(default_factory=os.getpid)
    command: str = field(default_factory=_command)
    since: str = field(default_factory=_now)
    pids: str = field(default_factory=pid_namespace)

    def __str__(self) -> str:
        return f"{self.kind} {self.pid}" + (f" of {self.cluster}" if self.cluster else "")


class Lease:
    """A claim on an entry, for as long as this object is not released and its process lives.

    Use it as a context manager, or call `release()`. A lease that is collected unreleased warns and releases.
    """

    def __init__(self, entry: Entry, in_use: int) -> None:
        self.entry = entry
        self._in_use: int | None = in_use
        self._below: Lease | None = None
        self._telling = Lock()
        self._file: Path | None = None
        self._file_flock: int | None = None

    @property
    def python(self) -> Path:
        """The interpreter of the environment."""
        return self.entry.python

    @property
    def entries(self) -> list[Entry]:
        """The entry, and those below it."""
        return [self.entry, *(self._below.entries if self._below else [])]

    @property
    def descriptors(self) -> list[int]:
        """Those that keep the entries: whoever inherits one keeps them too."""
        mine = [] if self._in_use is None else [self._in_use]
        return [*mine, *(self._below.descriptors if self._below else [])]

    @property
    def held(self) -> bool:
        """Whether the lease still counts."""
        return self._in_use is not None

    def release(self) -> None:
        """Give the entry back. Twice is once."""
        with self._telling:
            if self._in_use is None:
                return
            if not self.entry.readonly:
                _touch(self._in_use)
            # What counts goes first: once nobody is told of, nobody holds the entry either.
            os.close(self._in_use)
            self._in_use = None
            if self._below is not None:
                self._below.release()
            if self._file is not None and self._file_flock is not None:
                # Unlinked while its flock is ours, so that nobody takes it for the remains of the dead.
                self._file.unlink(missing_ok=True)
                os.close(self._file_flock)

    def keep(self, below: Lease) -> None:
        """Hold `below` for as long as this lease is held: a layer keeps the environment it lies on."""
        self._below = below

    def announce(self, layout: Layout, holder: Holder) -> None:
        """Tell people who holds this lease, and what is below.

        Where the disk has no room, or is read-only by now, it goes untold, but holds.

        Another thread may release it meanwhile: then nobody is told.
        """
        if self._below is not None:
            self._below.announce(layout, holder)
        with self._telling:
            if self._in_use is None:
                return
            path = layout.leases_of(self.entry.key) / files.unique()
            try:
                descriptor = _own_file(path)
            except OSError as error:
                if error.errno in files.FULL_DISK or error.errno == errno.EROFS:
                    return
                raise
            self._file, self._file_flock = path, descriptor
            with suppress(OSError):
                os.write(descriptor, json.dumps({"entry": layout.name_of(self.entry), **vars(holder)}).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()

    def __del__(self) -> None:
        if getattr(self, "_in_use", None) is not None:
            warnings.warn(f"unreleased lease on {self.entry.path.name}", ResourceWarning, stacklevel=1)
            self.release()


def claim(entry: Entry) -> Lease | None:
    """Claim an entry, ready or not; None where a collector removes it or it is gone.

    Raises StoreError where it is one of a lower store that is not to be trusted, or not to be read.
    """
    in_use = _try_patiently(entry)
    if in_use is None:
        return None
    # The collector renames the entry away under its exclusive flock; ours may have come right after.
    if not flock.still_names(entry.at(IN_USE), in_use):
        os.close(in_use)
        return None
    if not entry.readonly:
        _touch(in_use)
    return Lease(entry, in_use)


def claim_ready(entry: Entry, layout: Layout, holder: Holder) -> Lease | None:
    """Claim an entry that may be handed out, and tell people of `holder`; None where there is none.

    `layout` is the user's own store, where people are told, also of an entry of a lower one. Raises as `claim`.
    """
    lease = claim_whole(entry)
    return lease and told(lease, layout, holder)


def told(lease: Lease, layout: Layout, holder: Holder) -> Lease:
    """The lease, once people are told of `holder`; where that cannot be, it is given back and the OSError raised."""
    try:
        lease.announce(layout, holder)
    except BaseException:
        lease.release()
        raise
    return lease


def claim_whole(entry: Entry) -> Lease | None:
    """The same, untold. The record is read under the claim: then it stays true."""
    lease = claim(entry)
    if lease is None:
        return None
    record = ReadyRecord.read(entry)
    if record is None or not _keep_base(lease, record):
        lease.release()
        return None
    return lease


def _keep_base(lease: Lease, record: ReadyRecord) -> bool:
    """Claim the environment below a layer too; False where a collector was faster."""
    base = lease.entry.base(record.base)
    if base is None:
        return True
    below = claim_whole(base)
    if below is not None:
        lease.keep(below)
    return below is not None


def live_leases(layout: Layout, key: str) -> list[dict[str, Any]]:
    """What the live holders of leases on `key` say of themselves: fields of `Holder`, and `entry`."""
    unknown = {"kind": "unknown", "entry": "", "pid": 0}
    return [files.read_json(path) or unknown for path in _files(layout.leases_of(key)) if flock.is_held(path)]


def sweep_dead(layout: Layout, key: str) -> None:
    """Remove the files of leases whose holders died."""
    for path in _files(layout.leases_of(key)):
        with suppress(FileNotFoundError):
            descriptor = flock.try_flock(path, exclusive=True)
            if descriptor is not None:
                path.unlink(missing_ok=True)
                os.close(descriptor)


def _own_file(path: Path) -> int:
    """Create a lease's file and hold its flock. A sweep may have removed it, or the folder, in between: once more."""
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


def _try_patiently(entry: Entry) -> int | None:
    """A shared flock; whoever only looks whether an entry is used holds an exclusive one for microseconds."""
    for _ in range(10):
        try:
            if entry.readonly:
                descriptor = readonly.shared_flock(entry)
            else:
                descriptor = flock.try_flock(entry.at(IN_USE), exclusive=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if descriptor is not None:
            return descriptor
        time.sleep(0.002)
    return None


def _touch(in_use: int) -> None:
    # When it was last used decides about its turn in the collector; that it cannot be noted must stop nobody.
    with suppress(OSError):
        os.utime(in_use)


def _files(directory: Path) -> list[Path]:
    try:
        return [Path(item.path) for item in os.scandir(directory) if item.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []

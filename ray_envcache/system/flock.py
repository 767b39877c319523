"""BSD flocks: freed by the kernel however their holder dies, kept across fork, meaningful across containers.

BSD, not POSIX (`lockf`): those belong to a process and an inode, so that closing *any* descriptor of the file drops
them and a fork does not inherit them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_HELD_ELSEWHERE = frozenset({errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK})


def try_flock(path: str | Path, *, exclusive: bool, flags: int = os.O_RDONLY) -> int | None:
    """Open `path` and take a flock without waiting: the descriptor, or None while another flock is in the way.

    The descriptor is always a fresh one. Upgrading a shared flock is not atomic: a failed upgrade *loses* the shared
    one (flock(2), BUGS). Raises FileNotFoundError, unless `flags` has O_CREAT.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError) and error.errno in _HELD_ELSEWHERE:
            return None
        raise
    return descriptor


@contextmanager
def tried_flock(path: str | Path, *, flags: int = os.O_RDONLY, seconds: float = 0.0) -> Iterator[int | None]:
    """Hold the exclusive flock on `path` where it can be had within `seconds`; yields the descriptor, else None.

    Raises as `try_flock`.
    """
    deadline = time.monotonic() + seconds
    while (descriptor := try_flock(path, exclusive=True, flags=flags)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_held(path: str | Path) -> bool:
    """Whether a process holds an exclusive flock on `path` at this moment."""
    return not _is_to_be_had(path, exclusive=False)


def is_free(path: str | Path) -> bool:
    """Whether no process holds a flock on `path`, or it is gone. Claims of `path` fail while this looks."""
    return _is_to_be_had(path, exclusive=True)


def _is_to_be_had(path: str | Path, *, exclusive: bool) -> bool:
    with suppress(FileNotFoundError):
        descriptor = try_flock(path, exclusive=exclusive)
        if descriptor is None:
            return False
        os.close(descriptor)
    return True


def still_names(path: str | Path, descriptor: int) -> bool:
    """Whether `path` is still the file behind `descriptor`, not removed or replaced before the flock was ours."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def exclusive_flock(path: Path, on_wait: Callable[[], None]) -> Iterator[int]:
    """Hold the exclusive flock on `path`, waiting as long as it takes; yields the descriptor for children to inherit.

    `on_wait` is called about once a second while another process holds it; what it raises ends the waiting.
    """
    held: list[int] = []
    # No soft fallback: a marker file outlives a SIGKILL, and all promises rest on the kernel freeing the flock.
    flock = FileLock(path, fallback_to_soft=False, on_acquired=held.append)
    patience = 0.05
    while not flock.is_locked:
        try:
            flock.acquire(timeout=patience, poll_interval=0.05)
        except Timeout:  # noqa: PERF203  # a loop that waits
            on_wait()
            patience = 1.0
    try:
        yield held[0]
    finally:
        flock.release()

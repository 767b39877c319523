"""A short path to a long temp directory: paths of sockets must fit into 107 bytes, and Ray puts 71 behind its own.

Ray does not resolve symlinks, so a short link does. It lies in a private directory with a random name, which no other
user can have made before. The directory carries a flock of the process that made it: while that lives, neither a sweep
nor systemd-tmpfiles removes it. A cluster that outlives the process keeps the link by naming it.
"""

from __future__ import annotations

import atexit
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_envcache.errors import TempDirError
from ray_envcache.sessions import directories
from ray_envcache.system import disk, files
from ray_envcache.system.processes import find_mentions

if TYPE_CHECKING:
    from typing_extensions import Self

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""What fits into sockaddr_un, without the byte at its end."""
# The longest that Ray appends, with the largest pid that Linux gives; "/ray" is added to RAY_TMPDIR and TMPDIR.
_LONGEST = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
MAX_BYTES = SOCKET_BYTES - len(_LONGEST)
"""The longest path that needs no link."""

RELEASE_SECONDS = 5.0
"""How long a release waits for the last processes of a cluster."""

_LINK = "t"
_NAMED = re.compile(rf"/{directories.LINK_PREFIX}[a-z0-9_]{{8}}(?=/{_LINK}(?:/|\0|\s|$))".encode())
_NEEDED_BYTES = 16_000_000


class ShortTmpdir(str):
    """The path of a temp directory, short enough for Ray: a plain string, and a context manager.

    `target` is the directory itself. Leaving the context, or `release()`, removes the link as soon as no process names
    it, or has its flock as a forked child has. So does the end of the process, unless such a process outlives it; then
    a later call of `short_tmpdir` or a `gc --sessions` does.
    """

    __slots__ = ("_descriptor", "_folder", "target")

    target: str
    _descriptor: int | None
    _folder: Path | None

    def __new__(cls, path: str, target: str, descriptor: int | None = None) -> Self:
        """Take over the flock on the directory of the link."""
        self = super().__new__(cls, path)
        self.target = target
        self._descriptor = descriptor
        self._folder = None if descriptor is None else Path(path).parent
        if self._folder:
            atexit.register(self._at_exit, os.getpid())
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is a path like any other."""
        return str, (str(self),)

    def fileno(self) -> int | None:
        """Return the descriptor that keeps the link, for a child to inherit; None without a link."""
        return self._descriptor

    def release(self, patience: float = RELEASE_SECONDS) -> bool:
        """Remove the link if no process needs it within `patience` seconds. Return whether it is gone.

        The directory itself stays, and what is in it. A second call does nothing, or tries once more.
        """
        directories.close(self._descriptor)
        self._descriptor = None
        if self._folder and directories.wait_until(self._is_gone, patience):
            atexit.unregister(self._at_exit)
            self._folder = None
            _remove_dangling_latest(self.target)
        return self._folder is None

    def _is_gone(self) -> bool:
        directories.sweep([folder := Path(self).parent], _remove)
        return not folder.exists()

    def _at_exit(self, owner: int) -> None:
        if owner == os.getpid():  # a fork may have another file behind the descriptor
            self.release(patience=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def short_tmpdir(path: str | os.PathLike[str]) -> ShortTmpdir:
    """Return a path for `ray.init(_temp_dir=...)`, `ray start --temp-dir`, RAY_TMPDIR or TMPDIR that leads to `path`.

    It is `path` itself if that is short enough, else a private link. Raises TempDirError where Ray could not work in
    the directory (it is missing, not writable, full, on a network file system), or where a link has no place.
    """
    given = directories.absolute(path)
    require_usable(given)
    target = os.path.realpath(given)
    _remove_dangling_latest(target)
    for short in (given, target):
        if len(os.fsencode(short)) <= MAX_BYTES:
            return ShortTmpdir(short, target)
    return make_link(target, _places())


def _remove_dangling_latest(target: str) -> None:
    # It led through a link that is gone.
    for temp in (Path(target), Path(target, "ray")):
        directories.remove_dangling_latest(temp)


def require_usable(path: str) -> None:
    """Raise TempDirError where a cluster with this temp directory would fail later, and less clearly."""
    try:
        found = disk.free_space(Path(path))
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"\0" * 65536)
    except OSError as error:
        if error.errno in files.FULL_DISK:
            raise _full(path, error.strerror or "no space left") from error
        hints = {FileNotFoundError: f"mkdir -p '{path}'", NotADirectoryError: "name a directory"}
        hint = hints.get(type(error), "choose a directory you may write to")
        raise TempDirError(f"Cannot use the temp directory `{path}`: {error.strerror or error}", hint) from error
    if disk.is_network(found.kind) and os.environ.get("RAY_ENVCACHE_ALLOW_NETWORK_FS") != "1":
        raise TempDirError(
            f"The temp directory `{path}` is on a network file system ({found.kind}), where sockets and flocks fail",
            "choose a local disk; if one host alone uses it, RAY_ENVCACHE_ALLOW_NETWORK_FS=1",
        )
    if found.free < _NEEDED_BYTES:
        raise _full(path, f"{found.free // 1_000_000} MB are free")


def _full(path: str, detail: str) -> TempDirError:
    hint = "`ray-envcache gc --sessions` removes what dead clusters left; or choose another disk"
    return TempDirError(f"The disk of the temp directory `{path}` is full: {detail}", hint)


def make_link(target: str, places: Iterable[Path]) -> ShortTmpdir:
    """Make a link in the first of these places that is short enough, writable and safe. Raises TempDirError."""
    tried = []
    for place in places:
        if reason := _refusal(place):
            tried.append(f"{place} ({reason})")
            continue
        sweep_links([place])
        try:
            return _link(place, target)
        except OSError as error:
            tried.append(f"{place} ({error.strerror})")
    raise TempDirError(
        f"No place for a short link to the temp directory `{target}`, which is longer than {MAX_BYTES} bytes: "
        + ", ".join(tried),
        "use a shorter temp directory, or make /tmp writable",
    )


def sweep_links(places: Iterable[Path] | None = None) -> None:
    """Remove our links that no process needs."""
    for place in places or _places():
        directories.sweep(place.glob(f"{directories.LINK_PREFIX}*"), _remove)


def _places() -> list[Path]:
    """Return short directories for links, the best first: that of a login vanishes with it, clusters may not."""
    return [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path(f"/run/user/{os.geteuid()}")]  # noqa: S108  # checked


def _refusal(place: Path) -> str:
    if len(os.fsencode(place)) + len(f"/{directories.LINK_PREFIX}xxxxxxxx/{_LINK}") > MAX_BYTES:
        return "too long"
    try:
        found = place.stat()
    except OSError as error:
        return error.strerror or str(error)
    if found.st_uid not in {0, os.geteuid()}:
        return f"it belongs to user {found.st_uid}"
    # Elsewhere others could rename our directory, and put theirs in its place.
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return "others may rename what is in it"
    return ""


def _link(place: Path, target: str) -> ShortTmpdir:
    folder, descriptor = directories.make_private(directories.LINK_PREFIX, place)
    try:
        (folder / _LINK).symlink_to(target)
    except OSError:
        folder.rmdir()
        directories.close(descriptor)
        raise
    return ShortTmpdir(os.fspath(folder / _LINK), target, descriptor)


def _remove(folder: Path) -> None:
    """Remove a link and its directory, unless a process names it: a cluster may outlive its driver. Raises OSError."""
    if {*os.listdir(folder)} <= {_LINK} and f"/{folder.name}" not in find_mentions(_NAMED).by_name:
        if (folder / _LINK).is_symlink():
            (folder / _LINK).unlink()
        folder.rmdir()

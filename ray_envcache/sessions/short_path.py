"""A short path to a long temp directory: paths of sockets must fit into 107 bytes, and Ray puts 71 behind its own.

Ray does not resolve symlinks, so a short link does. It is named after the directory that it leads to: all programs
share it, it stays when they end, and it is right for as long as that directory is there.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ray_envcache.errors import TempDirError
from ray_envcache.sessions import directories
from ray_envcache.system import disk, files

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""What fits into sockaddr_un, without the byte at its end."""
# The longest that Ray appends, with the largest pid that Linux gives; "/ray" is added to RAY_TMPDIR and TMPDIR.
_LONGEST = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
MAX_BYTES = SOCKET_BYTES - len(_LONGEST)
"""The longest path that needs no link."""

UNUSED_SECONDS = 7 * 86_400.0
"""How long nothing may have followed a link that leads nowhere before it goes."""

_NEEDED_BYTES = 16_000_000


def short_tmpdir(path: str | os.PathLike[str]) -> str:
    """Return a path for `ray.init(_temp_dir=...)`, `ray start --temp-dir`, RAY_TMPDIR or TMPDIR that leads to `path`.

    It is `path` itself if that is short enough, else a private link. Raises TempDirError where Ray could not work in
    the directory (it is missing, not writable, full, on a network file system), or where a link has no place.
    """
    require_usable(os.fspath(path))
    given, target = os.path.abspath(path), os.path.realpath(path)
    for short in (given, target):
        if len(os.fsencode(short)) <= MAX_BYTES:
            return short
    return make_link(target, link_places())


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


def link_places() -> list[Path]:
    """Return short directories for links, the best first: that of a login vanishes with it, clusters may not."""
    return [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path(f"/run/user/{os.geteuid()}")]  # noqa: S108  # checked


def make_link(target: str, places: Iterable[Path]) -> str:
    """Make or find a link in the first of these places that is short enough, writable and safe. Raises TempDirError."""
    # Eight digits: ten do not fit into /run/user.
    name, tried = hashlib.sha256(os.fsencode(target)).hexdigest()[:8], []
    for place in places:
        link = place / f"re-{os.geteuid()}" / name
        try:
            reason = _refusal(link) or _link(link, target)
        except OSError as error:
            reason = error.strerror or str(error)
        if not reason:
            return os.fspath(link)
        tried.append(f"{place} ({reason})")
    raise TempDirError(
        f"No place for a short link to the temp directory `{target}`, which is longer than {MAX_BYTES} bytes: "
        + ", ".join(tried),
        "use a shorter temp directory, or make /tmp writable",
    )


def _refusal(link: Path) -> str:
    """Make the folder of a link. Return why a link in it would not do, "" where it does. Raises OSError."""
    folder, place = link.parent, link.parents[1]
    if len(os.fsencode(link)) > MAX_BYTES:
        return "too long"
    found = place.stat()
    if found.st_uid not in {0, os.geteuid()}:
        return f"it belongs to user {found.st_uid}"
    # Elsewhere others could rename our folder, and put theirs in its place.
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        return "others may rename what is in it"
    folder.mkdir(mode=0o700, exist_ok=True)
    return "" if directories.is_own(folder, private=True) else f"{folder.name} in it is not a private folder of ours"


def _link(link: Path, target: str) -> str:
    """Make the link if it is not there. Return why it does not lead to `target`, "" where it does. Raises OSError."""
    _sweep(link.parent)
    with suppress(FileExistsError):
        link.symlink_to(target)
    leads = os.readlink(link)
    return "" if leads == target else f"{link.parent.name}/{link.name} in it leads to {leads}"


def _sweep(folder: Path) -> None:
    """Remove the links that lead nowhere and were not followed for a week.

    A container that shares the folder may see what they lead to. Its cluster follows them all the time, and the kernel
    notes that once a day.
    """
    for link in folder.iterdir():
        with suppress(OSError):  # another process removed it, or its target cannot be looked at
            is_unused = link.is_symlink() and time.time() - link.lstat().st_atime > UNUSED_SECONDS
            if is_unused and not link.exists():
                link.unlink()

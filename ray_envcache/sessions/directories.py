"""The session directories of Ray: where they are, what is in them, and the link to the latest.

Ray makes `<temp dir>/session_<local time>_<pid>` for every cluster, open to everybody (mode 0777, as its parent), and
removes none. So nothing here trusts a name, and nothing follows a link.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.errors import TempDirError
from ray_envcache.system import disk, files

LATEST = "session_latest"
RUN_PREFIX = "ray-run-"
"""Begins the name of a directory that `ray-envcache run` makes for the clusters of one run."""
NAME = r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}_\d{1,10}"
_NAME = re.compile(r"session_(?P<time>[-\d]{10}_[-\d]{8})_\d{6}_(?P<pid>\d{1,10})")
_GOING = re.compile(rf"\.(?P<name>{NAME})\.going-[0-9a-f]{{8}}")
_LINK_TO_BE = re.compile(rf"\.{LATEST}\.[0-9a-f]{{8}}")
_DAY = 86_400
_LINK_SECONDS = 60


@dataclass(frozen=True)
class SessionDir:
    """A session directory, or what looks like one. `started` and `pid` are what its name says, 0 where it says nothing.

    `going`: a collector has renamed it, and died before it was deleted.
    """

    name: str
    path: Path
    started: float = 0.0
    pid: int = 0
    going: bool = False


@dataclass(frozen=True)
class Contents:
    """What is in a session directory: owner, bytes, virtual environments, when something was last written.

    `changed` is when a name was last made in the directory itself. `complaint` says why it cannot be judged, else "".
    """

    complaint: str
    owner: int
    use: disk.DiskUse
    logs_bytes: int = 0
    venvs: int = 0
    last_written: float = 0.0
    changed: float = 0.0


def temp_dirs(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> list[Path]:
    """The directories to look in, resolved: Ray's own default, or `chosen`, which may be Ray's or the one above it.

    And those of runs that are our own. Raises TempDirError where `chosen` is no directory, or where one cannot be
    looked into; but for those of runs, whose names anybody may take where everybody may write.
    """
    top = _top(chosen, environ)
    # In what cannot be searched there may be a directory of Ray's.
    unclear = os.path.isdir(top) and not os.access(top, os.X_OK)
    meant = [*([top] if chosen is not None or unclear else []), *_resolved([top / "ray"])]
    for temp in meant:
        if not _may_look(temp):
            raise TempDirError(f"You may not look into the temp directory `{temp}`", "choose another one with --tmpdir")
    return [*meant, *filter(_may_look, _resolved(run / "ray" for run in _runs_in(top)))]


def run_dirs(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> list[Path]:
    """Those called like directories of runs where `temp_dirs` looks, our own, also without anything of Ray in them."""
    top = _top(chosen, environ)
    chosen_run = top.parent if top.name == "ray" else top
    is_run = chosen_run.name.startswith(RUN_PREFIX) and _is_own(chosen_run)
    return [*([chosen_run] if is_run else []), *_runs_in(top)]


def _top(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path:
    if chosen is not None:
        if not os.path.isdir(chosen):
            raise TempDirError(f"No directory: `{os.fspath(chosen)}`", "name the temp directory of Ray clusters")
        return Path(chosen).resolve()
    # As in ray._common.utils.get_default_system_temp_dir.
    default = environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return Path(environ.get("RAY_TMPDIR") or default or "/tmp").resolve()  # noqa: S108  # where Ray puts them


def _may_look(temp: Path) -> bool:
    return os.access(temp, os.R_OK | os.X_OK)


def _resolved(temps: Iterable[Path]) -> list[Path]:
    """Those that are directories; also where an administrator, or the user, put a link to another."""
    mine = {0, os.geteuid()}
    # Not as a Path tells it: that raises where we may not look.
    return [
        temp.resolve()
        for temp in temps
        if os.path.isdir(temp) and (not os.path.islink(temp) or temp.lstat().st_uid in mine)
    ]


def _runs_in(top: Path) -> list[Path]:
    return sorted(run for run in top.glob(f"{RUN_PREFIX}*") if _is_own(run))


def _is_own(path: Path) -> bool:
    """Whether it is a directory, not a link, and ours."""
    try:
        found = path.lstat()
    except OSError:
        return False  # its run has ended
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def find_sessions(temp: Path) -> Iterator[SessionDir]:
    """Whatever is called a session in a temp directory, in the order of the names."""
    for name in sorted(_names(temp)):
        path = temp / name
        if going := _GOING.fullmatch(name):
            yield _session(going["name"], path, going=True)
        elif name.startswith("session_") and not (name == LATEST and path.is_symlink()):
            yield _session(name, path)


def going_name(name: str) -> str:
    """A new unique name for a session directory that is about to be deleted."""
    return f".{name}.going-{files.unique(4)}"


def examine(session: SessionDir) -> Contents:
    """Look at all that is in a session directory. Raises FileNotFoundError where it is gone."""
    found = session.path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a symlink" if stat.S_ISLNK(found.st_mode) else "not a directory"
        return Contents(f"it is {what}", found.st_uid, disk.DiskUse(0, 0, 0, exact=True))
    venvs, newest, complaint = _look_through(session.path, found)
    return Contents(
        _complaint(session, found) or complaint,
        found.st_uid,
        disk.measure(session.path),
        disk.measure(session.path / "logs").size,
        venvs,
        newest,
        found.st_mtime,
    )


def mend_latest(temp: Path) -> None:
    """Point a dangling `session_latest` to the newest session that is left, or remove it.

    Ray itself never mends one: it replaces a link only if that leads somewhere. Not being able to is no error.
    """
    with suppress(OSError):
        _sweep_links(temp)
        latest = temp / LATEST
        if not latest.is_symlink() or latest.exists():
            return
        newest = _newest(temp)
        _point(latest, newest)
        # A cluster that starts at this moment makes its directory first, and its link then. If ours came in between,
        # its directory is there by now.
        while (now := _newest(temp)) != newest:
            newest = now
            _point(latest, newest)


def _newest(temp: Path) -> str | None:
    names = (name for name in _names(temp) if _NAME.fullmatch(name))
    return max((name for name in names if _is_directory(temp / name)), default=None)


def _sweep_links(temp: Path) -> None:
    """Remove links of those who were killed between making and renaming one."""
    for name in _names(temp):
        if _LINK_TO_BE.fullmatch(name):
            with suppress(OSError):
                path = temp / name
                if path.is_symlink() and time.time() - path.lstat().st_mtime > _LINK_SECONDS:
                    path.unlink()


def _point(latest: Path, name: str | None) -> None:
    if name is None:
        latest.unlink(missing_ok=True)
        return
    # Relative: absolute links of Ray's are void as soon as the temp directory gets another name.
    new = latest.with_name(f".{LATEST}.{files.unique(4)}")
    try:
        new.symlink_to(name)
        new.replace(latest)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _session(name: str, path: Path, *, going: bool = False) -> SessionDir:
    if parts := _NAME.fullmatch(name):
        with suppress(ValueError, OverflowError):
            started = time.mktime(time.strptime(parts["time"], "%Y-%m-%d_%H-%M-%S"))
            return SessionDir(name, path, started, int(parts["pid"]), going)
    return SessionDir(name, path)


def _complaint(session: SessionDir, found: os.stat_result) -> str:
    if not session.started:
        return "it does not have a name that Ray gives"
    if session.started > time.time() + _DAY:
        return "its name has a date to come"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if not session.going and not all(_is_directory(session.path / name) for name in ("logs", "sockets")):
        return "it does not have the folders of a session"
    kind = disk.free_space(session.path).kind
    if disk.is_network(kind):
        return f"it is on a network file system ({kind}): its cluster may be on another host"
    return _mounted(session.path)


def _mounted(path: Path) -> str:
    """Why something that is mounted below keeps a session. Also bind mounts, which have no device of their own."""
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            # proc(5): blanks and backslashes are escaped as octal numbers.
            point = re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), line.split()[4])
            if point.startswith(os.fsencode(path) + b"/"):
                return f"a file system is mounted in it: {os.fsdecode(point)}"
    return ""


def _look_through(top: Path, top_found: os.stat_result) -> tuple[int, float, str]:
    """The number of virtual environments, when something was last written, and why it cannot be judged."""
    venvs, newest, complaint = 0, top_found.st_mtime, ""
    try:
        for item, found in _walk(top):
            venvs += item.name == "pyvenv.cfg"
            newest = max(newest, found.st_mtime)
            if found.st_uid != top_found.st_uid and not complaint:
                complaint = f"it has files of user {found.st_uid}: {os.path.relpath(item.path, top)}"
            if stat.S_ISDIR(found.st_mode) and found.st_dev != top_found.st_dev and not complaint:
                complaint = f"it has another file system in it: {os.path.relpath(item.path, top)}"
    except OSError as error:
        complaint = complaint or f"not all of it can be looked at: {error.strerror}"
    return venvs, newest, complaint


def _walk(top: Path) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
    pending = [os.fspath(top)]
    while pending:
        with suppress(FileNotFoundError), os.scandir(pending.pop()) as items:
            for item in items:
                with suppress(FileNotFoundError):
                    found = item.stat(follow_symlinks=False)
                    yield item, found
                    if stat.S_ISDIR(found.st_mode):
                        pending.append(item.path)


def _names(temp: Path) -> list[str]:
    try:
        return os.listdir(temp)  # names only
    except (FileNotFoundError, NotADirectoryError):
        return []

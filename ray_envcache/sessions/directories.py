"""Ray's temp directories, and what lies in their session directories.

Ray makes `<temp dir>/session_<local time>_<pid>` for every cluster and removes none. All users may write there (mode
0777, as its parent). So no name is trusted here, and no link is followed.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ray_envcache.errors import TempDirError
from ray_envcache.system import disk, files

LATEST, LOGS = "session_latest", "logs"
RUN_PREFIX = "ray-run-"
"""Begins the name of a directory that `ray-envcache run` makes for the clusters of one run."""
NAME = r"session_\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_\d{6}_\d{1,10}"
_GOING = "going-"
_DAY = 86_400

State = Literal["alive", "dead", "in doubt", "removed", "kept", "failed"]
"""What a session is; and what a collection made of a dead one: "kept" was not old enough, "failed" still there."""


@dataclass(frozen=True)
class Session:
    """A session directory, or what is called like one. Sizes in bytes; times in Unix seconds, 0 where unknown.

    `started` is what its name says. `changed` is when a name was last made in the directory itself, 0 where a collector
    died over it; `last_written` when anything was written below it. `exact` is False where `reclaimable_bytes` is a
    lower bound.
    """

    name: str
    path: str
    state: State
    why: str
    user: int
    started: float
    size_bytes: int = 0
    reclaimable_bytes: int = 0
    exact: bool = True
    last_written: float = 0.0
    changed: float = 0.0


def temp_dirs(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> list[Path]:
    """Return the temp directories to search, resolved: Ray's default, or `chosen` and the `ray` in it.

    Those of our own runs there follow. Raises TempDirError where `chosen` is no directory.
    """
    top = _top(chosen, environ)
    below = _resolved(folder / "ray" for folder in (top, *_runs_in(top)))
    return [*([top] if chosen is not None else []), *below]


def run_dirs(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> list[Path]:
    """Return the directories of our own runs where `temp_dirs` searches, with Ray's in it or not."""
    return _runs_in(_top(chosen, environ))


def _top(chosen: str | os.PathLike[str] | None, environ: Mapping[str, str]) -> Path:
    if chosen is not None:
        if not os.path.isdir(chosen):
            raise TempDirError(f"No directory: `{os.fspath(chosen)}`", "name the temp directory of Ray clusters")
        return Path(chosen).resolve()
    # As in ray._common.utils.get_default_system_temp_dir.
    default = environ.get("TMPDIR") if sys.platform.startswith("linux") else None
    return Path(environ.get("RAY_TMPDIR") or default or "/tmp").resolve()  # noqa: S108  # where Ray puts them


def _resolved(temps: Iterable[Path]) -> list[Path]:
    """Resolve those that are directories. Links count only if the administrator or the user made them."""
    trusted = {0, os.geteuid()}
    # By os.path: the methods of a Path raise where we may not look.
    return [
        temp.resolve()
        for temp in temps
        if os.path.isdir(temp) and (not os.path.islink(temp) or temp.lstat().st_uid in trusted)
    ]


def _runs_in(top: Path) -> list[Path]:
    return sorted(run for run in top.glob(f"{RUN_PREFIX}????????") if is_own(run))  # as mkdtemp names them


def is_own(path: Path, *, private: bool = False) -> bool:
    """Whether this is a directory of ours, not a link; with `private` also one that is closed to other users."""
    try:
        found = path.lstat()
    except OSError:
        return False  # it has been removed
    # The bits above 0777 may come from the directory above: new directories inherit its set-group-id bit.
    is_open = private and stat.S_IMODE(found.st_mode) & 0o777 != stat.S_IRWXU
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not is_open


def session_paths(temp: Path) -> list[Path]:
    """Return all that is called a session in a temp directory, also what a killed collector renamed."""
    names = [name for name in files.names_in(temp) if name.removeprefix(_GOING).startswith("session_")]
    return [temp / name for name in sorted(names) if not (name == LATEST and (temp / name).is_symlink())]


def going(session: Session) -> str:
    """Return the path that a session directory gets when it is about to be deleted, which names the session still."""
    return os.path.join(os.path.dirname(session.path), _GOING + session.name)


def measure_session(path: Path) -> Session:
    """Measure a session directory. The result is "in doubt" where something forbids to remove it, else still "dead".

    Whether it is alive, processes must tell. Raises FileNotFoundError where it is gone.
    """
    name, found = path.name.removeprefix(_GOING), path.lstat()
    named = Session(name, os.fspath(path), "in doubt", "", found.st_uid, _began(name))
    if not stat.S_ISDIR(found.st_mode):
        return replace(named, why="it is a symlink" if stat.S_ISLNK(found.st_mode) else "it is not a directory")
    newest, complaint = _look_through(path, found)
    doubt = _complaint(named, path) or complaint
    use = disk.measure(path)
    return replace(
        named,
        state="in doubt" if doubt else "dead",
        why=doubt,
        size_bytes=use.size,
        reclaimable_bytes=use.reclaimable,
        exact=use.exact,
        last_written=newest,
        changed=found.st_mtime if path.name == name else 0.0,
    )


def remove_dangling_latest(temp: Path) -> None:
    """Remove `session_latest` where it leads nowhere: Ray replaces only a link that leads somewhere."""
    with suppress(OSError):  # another user's directory
        latest = temp / LATEST
        if latest.is_symlink() and not latest.exists():
            latest.unlink()


def _began(name: str) -> float:
    """Return when a session began, zero for a name that Ray does not give."""
    if re.fullmatch(NAME, name):
        with suppress(ValueError, OverflowError):
            return time.mktime(time.strptime(name[8:27], "%Y-%m-%d_%H-%M-%S"))
    return 0.0


def _complaint(session: Session, path: Path) -> str:
    """Return why a directory cannot be taken for a session of ours, "" where it can."""
    if not session.started:
        return "it does not have a name that Ray gives"
    if session.started > time.time() + _DAY:
        return "its name has a date to come"
    if session.user != os.geteuid():
        return f"it belongs to user {session.user}"
    folders = [name for name in (LOGS, "sockets") if is_own(path / name)]
    if folders != [LOGS, "sockets"] and path.name == session.name:
        return "only its logs are left" if folders else "it does not have the folders of a session"
    kind = disk.free_space(path).kind
    if disk.is_network(kind):
        return f"it is on a network file system ({kind}): its cluster may be on another host"
    real = path.resolve()
    inside = next((point for point in disk.mounts() if real in point.parents), None)
    return f"a file system is mounted in it: {inside}" if inside else ""


def _look_through(top: Path, top_found: os.stat_result) -> tuple[float, str]:
    """Return when something was last written, and what forbids to remove it."""
    unread: list[OSError] = []
    newest, complaint = 0.0, ""
    for item, found in disk.walk(top, unread.append):
        newest = max(newest, found.st_mtime)
        if found.st_uid != top_found.st_uid:
            complaint = complaint or f"it has files of user {found.st_uid}: {os.path.relpath(item, top)}"
    unread = [error for error in unread if not isinstance(error, FileNotFoundError)]
    if unread:
        complaint = complaint or f"not all of it can be looked at: {unread[0].strerror}"
    return newest, complaint

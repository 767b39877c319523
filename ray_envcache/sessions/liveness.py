"""Session directories: which clusters are alive, which are certainly dead.

Ray locks no session and removes none; the pid in the name is that of a launcher which may be gone, and socket files
outlive their cluster. So a session is dead only if no process names it, nobody holds a flock of ours on it and nobody
listens on its sockets; and only if that could be seen at all. In doubt it stays.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ray_envcache.sessions import directories
from ray_envcache.sessions.directories import Contents, SessionDir
from ray_envcache.system import disk, flock
from ray_envcache.system.mentions import Mentions, find_mentions, sees_all_processes

STARTING_SECONDS = 60.0
"""How long a cluster may take from making its directory to its first process that names it."""
QUIET_SECONDS = 900.0
"""How long nothing must be written where processes may be hidden from us: raylet writes every ten seconds."""

_QUARTER = 900.0
_CLOCK_SECONDS = 5.0

State = Literal["alive", "dead", "in doubt"]
NAMED = re.compile(directories.NAME.encode())
"""The names of sessions, as processes have them."""
# What a process of Ray that refuses to be looked at may be called.
_LIKE_RAY = re.compile(r"python|pypy|java|ray", re.IGNORECASE)
_NOBODY_LISTENS = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR})


@dataclass(frozen=True)
class Session:
    """One session directory as people see it: sizes in bytes, times in Unix seconds, 0 where unknown.

    `venvs` is the number of virtual environments that Ray left in it. `exact` is False where `reclaimable_bytes` is a
    lower bound.
    """

    name: str
    path: str
    state: State
    why: str
    size_bytes: int
    reclaimable_bytes: int
    exact: bool
    logs_bytes: int
    venvs: int
    started: float
    last_written: float
    user: int


def survey(temps: Iterable[Path], *, starting: float = STARTING_SECONDS) -> list[Session]:
    """All sessions in these temp directories, the oldest first. Raises OSError where one cannot be listed."""
    looked = []
    for directory in [found for temp in temps for found in directories.find_sessions(temp)]:
        with suppress(FileNotFoundError):
            looked.append((directory, directories.examine(directory)))
    # Asked after the long look at the files: what is known of processes must be fresh.
    mentions = find_mentions(NAMED)
    return [_session(directory, contents, mentions, starting) for directory, contents in looked]


def hold(path: str | os.PathLike[str]) -> int:
    """Keep a session directory for as long as the returned descriptor, or a copy of it in a child, is open.

    A flock on the directory itself: it is seen from other containers too. Raises OSError.
    """
    while (held := flock.try_flock(Path(path), exclusive=False, flags=os.O_RDONLY | os.O_DIRECTORY)) is None:
        time.sleep(0.01)  # a collector looks; if it takes the directory, the next try does not find it
    return held


def _session(directory: SessionDir, contents: Contents, mentions: Mentions, starting: float) -> Session:
    state, why = _judge(directory, contents, mentions, starting)
    use = contents.use
    return Session(
        directory.name, os.fspath(directory.path), state, why, use.size, use.reclaimable, use.exact,
        contents.logs_bytes, contents.venvs, directory.started, contents.last_written, contents.owner,
    )  # fmt: skip


def _judge(directory: SessionDir, contents: Contents, mentions: Mentions, starting: float) -> tuple[State, str]:
    try:
        if life := _life(directory, contents, mentions):
            return "alive", life
        doubt = contents.complaint or _doubt(directory, contents, mentions, starting)
    except FileNotFoundError:
        doubt = "it vanished"
    except OSError as error:
        doubt = f"it cannot be looked at: {error.strerror}"
    if doubt:
        return "in doubt", doubt
    return "dead", "a collector died over it" if directory.going else "no process names it"


def _life(directory: SessionDir, contents: Contents, mentions: Mentions) -> str:
    """What shows that a session is in use, "" where nothing does."""
    # What does not come from Ray is not judged by a name that it only claims, nor is it touched.
    if directory.started and directory.name in mentions.by_name:
        return mentions.by_name[directory.name]
    if contents.complaint:
        return ""
    if not _is_free(directory.path):
        return "a process holds a flock on it"
    listening = _listening(directory.path / "sockets")
    return f"somebody listens on its socket {listening}" if listening else ""


def _doubt(directory: SessionDir, contents: Contents, mentions: Mentions, starting: float) -> str:
    """Why it is not certain that no process belongs to a session that none names."""
    since_change, since_write = time.time() - contents.changed, time.time() - contents.last_written
    # Ray changes the directory when a cluster ends, too: what is new was changed soon after the time in its name. That
    # is local time, in whatever zone: all of them differ by quarters of an hour.
    is_new = (contents.changed - directory.started) % _QUARTER < STARTING_SECONDS
    if -_CLOCK_SECONDS < since_change < starting and is_new and not directory.going:
        return "it was made a moment ago, its cluster may be starting"
    if since_write < -_CLOCK_SECONDS:
        return "it was written at a time to come"
    for process in mentions.unseen:
        # Who takes part in a session as another user leaves files of that user in it, and those were looked for.
        later = process.started >= directory.started - STARTING_SECONDS or process.pid == directory.pid
        if process.user == contents.owner and later and _LIKE_RAY.search(process.command):
            return f"process {process.pid} ({process.command.split(' ')[0]}) refuses to be looked at"
    if since_write < QUIET_SECONDS and not (sees_all_processes() or _is_private(directory.path)):
        return "processes of other containers cannot be seen from here, and something was written a moment ago"
    return ""


def _is_private(path: Path) -> bool:
    """Whether it lies in the writable layer of a container, which no other container has."""
    return disk.free_space(path).kind == "overlay" and path.stat().st_dev == Path("/").stat().st_dev


def _is_free(path: Path) -> bool:
    descriptor = flock.try_flock(path, exclusive=True, flags=os.O_RDONLY | os.O_DIRECTORY)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


def _listening(sockets: Path) -> str:
    """The name of a socket on which somebody listens, in whatever container; its file alone says nothing."""
    try:
        descriptor = os.open(sockets, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""  # the rest of one that is being deleted
    try:
        # Through the descriptor, since paths of sockets must be short.
        near = Path(f"/proc/self/fd/{descriptor}")
        folder = near if near.exists() else sockets
        for name in os.listdir(descriptor):
            found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISSOCK(found.st_mode) and _answers(folder / name):
                return name
    finally:
        os.close(descriptor)
    return ""


def _answers(path: Path) -> bool:
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except OSError as error:
            if error.errno is None:  # Python's own, about the length
                raise OSError(errno.ENAMETOOLONG, "the paths of its sockets are too long") from error
            return error.errno not in _NOBODY_LISTENS
    return True

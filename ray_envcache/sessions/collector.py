"""Which clusters are alive, and which are certainly dead; and the removal of what the dead ones left.

Ray locks no session and removes none. The pid in the name may be that of a launcher which has ended, and socket files
outlive their cluster. So a session is dead only if no process names it, none has a flock on it, and none listens on its
sockets; and only if that could be seen at all. In doubt it stays.

The order makes the removal safe: judge all sessions; then, of each, try the flock, rename the directory so that no
process finds it, search all processes once more, and only then delete. A collector that is killed in between leaves a
name that the next one knows.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Collection, Iterable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

from ray_envcache.sessions import directories
from ray_envcache.sessions.directories import Session
from ray_envcache.system import disk, files, flock, testpoints
from ray_envcache.system.processes import Mentions, find_mentions, sees_all_processes

STARTING_SECONDS = 60.0
"""How long a cluster may take from making its directory to its first process that names it."""
QUIET_SECONDS = 900.0
"""How long nothing must be written where processes may be hidden from us: raylet writes every ten seconds."""

NAMED = re.compile(directories.NAME.encode())
"""The names of sessions, as processes have them."""
# What a process of Ray may be called.
_LIKE_RAY = re.compile(r"python|pypy|java|ray", re.IGNORECASE)
_DEAF = frozenset({errno.ECONNREFUSED, errno.ENOENT, errno.ENOTDIR})


def judge_sessions(temps: Iterable[Path], *, starting: float = STARTING_SECONDS) -> list[Session]:
    """Return all sessions in these temp directories, judged, the oldest first. Raises OSError where one is unreadable.

    A session whose directory was changed less than `starting` seconds ago is in doubt.
    """
    measured = []
    for path in [path for temp in temps for path in directories.session_paths(temp)]:
        with suppress(FileNotFoundError):
            measured.append(directories.measure_session(path))
    # Asked last: what is known of processes must be fresh, and measuring takes a second per 50,000 files.
    mentions = find_mentions(NAMED) if measured else Mentions()
    return [_judge(session, mentions, starting) for session in measured]


def _judge(session: Session, mentions: Mentions, starting: float) -> Session:
    try:
        if life := _life(session, mentions):
            return replace(session, state="alive", why=life)
        doubt = session.why or _doubt(session, mentions, starting)
    except FileNotFoundError:
        doubt = "it vanished"
    except OSError as error:
        doubt = f"it cannot be looked at: {error.strerror}"
    if doubt:
        return replace(session, state="in doubt", why=doubt)
    return replace(session, why="no process names it")


def _life(session: Session, mentions: Mentions) -> str:
    """Return what shows that a session is in use, "" where nothing does."""
    # The name counts only where Ray gives such names.
    if session.started and session.name in mentions.by_name:
        return mentions.by_name[session.name]
    if session.state == "in doubt":
        return ""  # neither its flock nor its sockets are touched
    if not flock.is_free(session.path):
        return "a process holds a flock on it"
    listening = _find_listener(Path(session.path, "sockets"))
    return f"a process listens on its socket {listening}" if listening else ""


def _doubt(session: Session, mentions: Mentions, starting: float) -> str:
    """Return why a process may belong to a session that none names, "" where none may."""
    since_change, since_write = time.time() - session.changed, time.time() - session.last_written
    # Ray changes the directory when a cluster ends, too: such a one waits as long.
    if since_change < starting:
        return "it was changed a moment ago, its cluster may be starting"
    for process in mentions.unseen:
        # A worker of another user would leave files of that user in the session, which are in doubt already.
        later = process.started >= session.started - STARTING_SECONDS
        if process.user == session.user and later and _LIKE_RAY.search(process.command):
            return f"process {process.pid} ({process.name}) refuses to be looked at"
    if since_write < QUIET_SECONDS and not (sees_all_processes() or _is_private(Path(session.path))):
        return "processes of other containers cannot be seen from here, and something was written a moment ago"
    return ""


def _is_private(path: Path) -> bool:
    """Whether it lies in the writable layer of a container, which no other container has."""
    return disk.free_space(path).kind == "overlay" and path.stat().st_dev == Path("/").stat().st_dev


def _find_listener(sockets: Path) -> str:
    """Return the name of a socket on which a process of any container listens, "" where there is none."""
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
            return error.errno not in _DEAF
    return True


def collect_sessions(
    temps: Collection[Path],
    *,
    older_than: float = 0.0,
    dry_run: bool = False,
    starting: float = STARTING_SECONDS,
    keep_logs: bool = False,
) -> list[Session]:
    """Remove the sessions of dead clusters into which nothing was written for `older_than` seconds.

    Return all sessions there were, each with its state then; with `dry_run` the one it would have. Callers that know
    that no cluster is starting there set `starting` to 0. With `keep_logs` the logs stay where they are, and all else
    in a session goes. What cannot be removed raises nothing: it has "failed".
    """
    due = time.time() - older_than
    found: list[Session] = []
    for one in judge_sessions(temps, starting=starting):
        if one.state != "dead":
            found.append(one)
        elif one.last_written > due:
            found.append(replace(one, state="kept"))
        elif dry_run:
            found.append(replace(one, state="removed"))
        else:
            with suppress(FileNotFoundError):  # another process removed it
                found.append(_remove(one, keep_logs=keep_logs))
    if not dry_run:
        for temp in temps:
            directories.remove_dangling_latest(temp)
    return found


def _remove(one: Session, *, keep_logs: bool) -> Session:
    """Remove a dead session, and return it with the state it has then. Raises FileNotFoundError where it is gone."""
    place = one.path
    try:
        with flock.tried_flock(place, flags=os.O_RDONLY | os.O_DIRECTORY) as held:
            if held is None:
                return replace(one, state="alive", why="a process holds a flock on it")
            place = _rename_away(one)
            testpoints.reach("sessions-renamed")
            one = _judge_again(one, place, held)
            if one.state == "dead":
                files.empty_directory(held, but=directories.LOGS if keep_logs else "")
                if not (keep_logs and os.listdir(held)):
                    os.rmdir(place)
                one = replace(one, state="removed")
            with suppress(OSError):  # it is deleted, or a new directory has its name
                os.rename(place, one.path)
    except FileNotFoundError:
        raise
    except (OSError, RecursionError) as error:
        return replace(one, state="failed", path=place, why=getattr(error, "strerror", None) or str(error))
    return one


def _rename_away(one: Session) -> str:
    """Rename a session, so that no process sees it half deleted, and return the path it has then."""
    try:
        os.rename(one.path, going := directories.going(one))
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        return one.path  # no room for a longer name
    return going


def _judge_again(one: Session, place: str, held: int) -> Session:
    """Judge what lies at `place` now: no process finds it any more to come to it."""
    if why := find_mentions(NAMED).by_name.get(one.name):
        return replace(one, state="alive", why=why)
    if not flock.still_names(place, held) or os.fstat(held).st_uid != one.user:
        # All users may write there: one of them put another directory in its place.
        return replace(one, state="in doubt", why="it was replaced by another directory")
    return one

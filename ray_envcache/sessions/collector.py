"""Removal of the session directories of dead clusters.

The order makes it safe: judge all sessions; then, of each, try the flock, rename the directory so that no process finds
it, search all processes once more, and only then delete. A collector that is killed in between leaves a name that the
next one knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ray_envcache.sessions import directories
from ray_envcache.sessions.directories import Session
from ray_envcache.sessions.liveness import NAMED, STARTING_SECONDS, judge_sessions
from ray_envcache.system import files, flock, testpoints
from ray_envcache.system.processes import find_mentions


@dataclass
class SessionReport:
    """What a collection did. `removed` freed their `reclaimable_bytes`; `kept` are dead, but not old enough."""

    removed: list[Session] = field(default_factory=list)
    kept: list[Session] = field(default_factory=list)
    alive: list[Session] = field(default_factory=list)
    in_doubt: list[Session] = field(default_factory=list)
    failed: list[Session] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        """The bytes that became free."""
        return sum(one.reclaimable_bytes for one in self.removed)

    def stays(self, session: Session, why: str) -> None:
        """Note that a dead session turned out to be alive."""
        self.alive.append(replace(session, state="alive", why=why))

    def fails(self, session: Session, error: Exception) -> None:
        """Note that a session could not be removed."""
        self.failed.append(replace(session, why=getattr(error, "strerror", None) or str(error)))


def collect_sessions(
    temps: Collection[Path],
    *,
    older_than: float = 0.0,
    dry_run: bool = False,
    starting: float = STARTING_SECONDS,
    keep_logs: bool = False,
) -> SessionReport:
    """Remove the sessions of dead clusters into which nothing was written for `older_than` seconds.

    Callers that know that no cluster is starting there set `starting` to 0. With `keep_logs` the logs stay where they
    are, and all else in a session goes. What cannot be removed raises nothing: it is in the report.
    """
    report = SessionReport()
    going: list[Session] = []
    by_state = {"alive": report.alive, "in doubt": report.in_doubt, "dead": going}
    now = time.time()
    for one in judge_sessions(temps, starting=starting):
        is_young = one.state == "dead" and now - one.last_written < older_than
        (report.kept if is_young else by_state[one.state]).append(one)
    if dry_run:
        report.removed.extend(going)
        return report
    for one in going:
        _remove(one, report, keep_logs=keep_logs)
    for temp in temps:
        directories.remove_dangling_latest(temp)
    return report


def _remove(one: Session, report: SessionReport, *, keep_logs: bool) -> None:
    place = one.path
    try:
        held = flock.try_flock(place, exclusive=True, flags=os.O_RDONLY | os.O_DIRECTORY)
        if held is None:
            report.stays(one, "a process holds a flock on it")
            return
        try:
            place = _rename_away(one)
            testpoints.reach("sessions-renamed")
            if _may_go(one, place, held, report):
                files.empty_directory(held, but=directories.LOGS if keep_logs else "")
                if not (keep_logs and os.listdir(held)):
                    os.rmdir(place)
                report.removed.append(one)
            with suppress(OSError):  # it is deleted, or a new directory has its name
                os.rename(place, one.path)
        finally:
            os.close(held)
    except FileNotFoundError:
        pass  # another process removed it
    except (OSError, RecursionError) as error:
        report.fails(replace(one, path=place), error)


def _rename_away(one: Session) -> str:
    """Rename a session, so that no process sees it half deleted, and return the path it has then."""
    try:
        os.rename(one.path, going := directories.going(one))
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        return one.path  # no room for a longer name
    return going


def _may_go(one: Session, place: str, held: int, report: SessionReport) -> bool:
    """Whether what lies at `place` now is that session, and dead still: no process finds it any more to come to it."""
    if why := find_mentions(NAMED).by_name.get(one.name):
        report.stays(one, why)
        return False
    if not flock.still_names(place, held) or os.fstat(held).st_uid != one.user:
        # All users may write there: one of them put another directory in its place.
        report.in_doubt.append(replace(one, state="in doubt", why="it was replaced by another directory"))
        return False
    return True

"""Removal of the session directories of dead clusters.

The order makes it safe: judge all sessions, try the flock, rename the directory so that no process finds it, search all
processes once more, and only then delete. A collector that is killed in between leaves a name that the next one knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ray_envcache.sessions import directories
from ray_envcache.sessions.directories import Session
from ray_envcache.sessions.liveness import NAMED, STARTING_SECONDS, judge_sessions
from ray_envcache.system import files, flock, testpoints
from ray_envcache.system.processes import find_mentions

_BATCH = 200  # each session takes a descriptor


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
    for first in range(0, len(going), _BATCH):
        _remove(going[first : first + _BATCH], report, keep_logs=keep_logs)
    for temp in temps:
        directories.remove_dangling_latest(temp)
    return report


class _Claim(NamedTuple):
    """A session that is ours to delete: where it lies now, and the descriptor that has its flock."""

    session: Session
    place: str
    descriptor: int

    def give_back(self) -> None:
        """Give it its own name again, unless a new directory has it."""
        with suppress(OSError):
            os.rename(self.place, self.session.path)


def _remove(batch: list[Session], report: SessionReport, *, keep_logs: bool) -> None:
    with ExitStack() as stack:
        claims = [claim for one in batch if (claim := _claim(one, report, stack))]
        testpoints.reach("sessions-renamed")
        # A process may have come between the judgement and the renaming; from now on none finds them.
        named = find_mentions(NAMED).by_name if claims else {}
        for claim in claims:
            if why := named.get(claim.session.name):
                claim.give_back()
                report.stays(claim.session, why)
            else:
                _delete(claim, report, keep_logs=keep_logs)


def _claim(one: Session, report: SessionReport, stack: ExitStack) -> _Claim | None:
    """Rename a session under its flock; None where another process has it, or it cannot be renamed."""
    try:
        held = directories.try_flock(Path(one.path))
        if held is None:
            report.stays(one, "a process holds a flock on it")
            return None
        stack.callback(os.close, held)
        claim = _Claim(one, _rename_away(one), held)
        if flock.still_names(claim.place, held) and os.fstat(held).st_uid == one.user:
            return claim
        # All users may write there: one of them put another directory in its place.
        claim.give_back()
        report.in_doubt.append(replace(one, state="in doubt", why="it was replaced by another directory"))
    except FileNotFoundError:
        pass  # another collector has it
    except OSError as error:
        report.fails(one, error)
    return None


def _rename_away(one: Session) -> str:
    """Rename a session, so that no process sees it half deleted, and return the path it has then."""
    try:
        os.rename(one.path, going := directories.going(one))
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        return one.path  # no room for a longer name
    return going


def _delete(claim: _Claim, report: SessionReport, *, keep_logs: bool) -> None:
    try:
        files.empty_directory(claim.descriptor, but=directories.LOGS if keep_logs else "")
        if keep_logs and os.listdir(claim.descriptor):
            claim.give_back()
        else:
            os.rmdir(claim.place)
    except FileNotFoundError:
        pass  # another process deleted it with us
    except (OSError, RecursionError) as error:
        report.fails(replace(claim.session, path=claim.place), error)
        return
    report.removed.append(claim.session)

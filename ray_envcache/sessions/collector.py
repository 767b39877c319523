"""Removal of the session directories of dead clusters.

The order is what makes it safe: a look at all, a flock that is only tried, a rename that takes the directory from
everybody's sight, another look at all processes, and only then the deleting. Whoever is killed in between leaves a name
that the next run knows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from ray_envcache.sessions import directories
from ray_envcache.sessions.liveness import NAMED, STARTING_SECONDS, Session, survey
from ray_envcache.system import files, flock, testpoints
from ray_envcache.system.mentions import find_mentions

_BATCH = 100  # each session takes two descriptors


@dataclass
class Report:
    """What a run did. `removed` freed their `reclaimable_bytes`; `kept` are dead ones that were written too lately."""

    removed: list[Session] = field(default_factory=list)
    kept: list[Session] = field(default_factory=list)
    alive: list[Session] = field(default_factory=list)
    in_doubt: list[Session] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def freed_bytes(self) -> int:
        """All that became free."""
        return sum(one.reclaimable_bytes for one in self.removed)


def collect_sessions(
    temps: Collection[Path],
    *,
    older_than: float = 0.0,
    dry_run: bool = False,
    only: Collection[str] | None = None,
    starting: float = STARTING_SECONDS,
    logs_to: Path | None = None,
) -> Report:
    """Remove the sessions of dead clusters into which nothing was written for `older_than` seconds.

    `only` names the sessions that are meant; who knows that their clusters have ended may set `starting` to 0. With
    `logs_to` the logs of each are moved there before, under its name; a session whose logs cannot be moved stays. What
    cannot be removed is no exception: the report has it.
    """
    report = Report()
    going: list[Session] = []
    for one in survey(temps, starting=starting):
        if only is None or one.name in only:
            _sort(one, older_than, report, going)
    if dry_run:
        report.removed.extend(going)
        return report
    remaining = iter(going)
    while batch := list(islice(remaining, _BATCH)):
        _remove(batch, report, logs_to)
    for temp in temps:
        directories.mend_latest(temp)
    return report


def _sort(one: Session, older_than: float, report: Report, going: list[Session]) -> None:
    if one.state == "alive":
        report.alive.append(one)
    elif one.state == "in doubt":
        report.in_doubt.append(one)
    elif time.time() - one.last_written < older_than:
        report.kept.append(one)
    else:
        going.append(one)


@dataclass(frozen=True)
class _Claim:
    """A session that is ours to delete: its temp directory and itself as descriptors, and the name it has now."""

    session: Session
    temp: int
    descriptor: int
    name: str


def _remove(batch: list[Session], report: Report, logs_to: Path | None) -> None:
    with ExitStack() as stack:
        claims = [claim for one in batch if (claim := _claim(one, report, stack))]
        testpoints.reach("sessions-renamed")
        # Somebody may have come between our look and the renaming; nobody finds them from now on.
        named = find_mentions(NAMED).by_name if claims else {}
        for claim in claims:
            if why := named.get(claim.session.name):
                _give_back(claim)
                report.alive.append(replace(claim.session, state="alive", why=why))
            elif logs_to is None or _save_logs(claim, logs_to, report):
                _delete(claim, report)


def _claim(one: Session, report: Report, stack: ExitStack) -> _Claim | None:
    parent, name = os.path.split(one.path)
    try:
        held = flock.try_flock(Path(one.path), exclusive=True, flags=os.O_RDONLY | os.O_DIRECTORY)
        if held is None:
            report.alive.append(replace(one, state="alive", why="a process holds a flock on it"))
            return None
        stack.callback(os.close, held)
        temp = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, temp)
        going = _take_away(temp, name, directories.going_name(one.name))
        if _is_same(held, temp, going) and os.fstat(held).st_uid == one.user:
            return _Claim(one, temp, held, going)
        # Where everybody may write, somebody put another directory there.
        _rename(temp, going, name)
        report.in_doubt.append(replace(one, state="in doubt", why="it was replaced by another directory"))
    except FileNotFoundError:
        pass  # another collector has it
    except OSError as error:
        report.failed.append((one.name, error.strerror or str(error)))
    return None


def _take_away(temp: int, name: str, going: str) -> str:
    """Rename a session so that nobody sees it half deleted, and return the name it has then."""
    try:
        _rename(temp, name, going)
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        return name  # no room for a longer name
    return going


def _rename(temp: int, old: str, new: str) -> None:
    os.rename(old, new, src_dir_fd=temp, dst_dir_fd=temp)


def _is_same(descriptor: int, temp: int, name: str) -> bool:
    mine, now = os.fstat(descriptor), os.stat(name, dir_fd=temp, follow_symlinks=False)
    return (mine.st_dev, mine.st_ino) == (now.st_dev, now.st_ino)


def _give_back(claim: _Claim) -> None:
    with suppress(OSError):
        _rename(claim.temp, claim.name, os.path.basename(claim.session.path))


def _save_logs(claim: _Claim, logs_to: Path, report: Report) -> bool:
    """Move the logs out of a session, or give it back with them; whether the rest of it may go."""
    try:
        try:
            _move_logs(claim, logs_to)
        except OSError as error:
            if error.errno not in files.FULL_DISK:
                raise
            # A folder for them needs room, which the rest of the session takes.
            files.empty_directory(claim.descriptor, but="logs")
            _move_logs(claim, logs_to)
    except (OSError, RecursionError) as error:
        _give_back(claim)
        report.failed.append((claim.session.name, _reason(error)))
        return False
    return True


def _move_logs(claim: _Claim, logs_to: Path) -> None:
    with suppress(FileNotFoundError):
        os.stat("logs", dir_fd=claim.descriptor, follow_symlinks=False)  # no folder for logs that are not there
        logs_to.mkdir(exist_ok=True)
        os.rename("logs", logs_to / claim.session.name, src_dir_fd=claim.descriptor)


def _delete(claim: _Claim, report: Report) -> None:
    try:
        files.empty_directory(claim.descriptor)
        os.rmdir(claim.name, dir_fd=claim.temp)
    except FileNotFoundError:
        pass  # another process deleted it with us
    except (OSError, RecursionError) as error:
        report.failed.append((claim.session.name, _reason(error)))
        return
    report.removed.append(claim.session)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

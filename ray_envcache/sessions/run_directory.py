"""A temp directory for the clusters of one run; at its end goes what Ray left there, and nothing else."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.sessions import directories
from ray_envcache.sessions.collector import collect_sessions, judge_sessions
from ray_envcache.sessions.short_path import require_usable, short_tmpdir
from ray_envcache.system import files, flock
from ray_envcache.system.texts import printable

PATIENCE_SECONDS = 10.0
"""How long the processes of a cluster may take to end after the program that started it."""
LENT_SECONDS = 1.0
"""How long other processes of the program may take to end after it."""
UNUSED_SECONDS = 86_400.0
"""How long the directory of a killed run stays after the last change in it."""

_OF_RAY = {
    "ray": re.compile(r"session_latest|ray_current_cluster|(?:tmp_)?prom_metrics_service_discovery\.json"),
    "_ray_lockfiles": re.compile(r"[0-9a-f]{64}\.lock"),
}
"""What Ray makes below $RAY_TMPDIR beside its sessions: folders, and the names of files in each."""
_SHOWN = 5


def sweep(runs: Iterable[Path]) -> None:
    """Remove what Ray left in the directories of killed runs that no process and no session has, after a day.

    Everything that Ray did not make stays.
    """
    for folder in runs:
        with suppress(OSError):
            # A run that has just made its directory may not have the flock yet.
            is_unused = time.time() - folder.stat().st_mtime > UNUSED_SECONDS
            if is_unused and directories.is_own(folder, private=True):
                with flock.tried_flock(folder) as held:
                    if held is not None:
                        _remove(folder)


def _remove(folder: Path) -> list[str]:
    """Remove a run's directory with what Ray made there. Return what else is in it, which stays.

    While a session, or its saved logs, is in it, nothing is removed.
    """
    if directories.session_paths(folder / "ray"):
        return []
    for name, of_ray in _OF_RAY.items():
        if directories.is_own(folder / name):
            for file in (folder / name).iterdir():
                if of_ray.fullmatch(file.name) and (file.is_symlink() or file.is_file()):
                    file.unlink()
            _remove_empty(folder / name)
    _remove_empty(folder)
    left = [f"{name}/{file}" for name in _OF_RAY for file in files.names_in(folder / name)]
    return sorted([*left, *(name for name in files.names_in(folder) if name not in _OF_RAY)])


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # something is in it
        folder.rmdir()


def _wait_until(is_so: Callable[[], bool], patience: float) -> bool:
    """Return whether it is so within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not (answer := is_so()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer


@dataclass(frozen=True)
class RunTmpdir:
    """A directory of one run below the chosen temp directory, mode 0700, and the short path to it for Ray.

    It carries a flock, which the program inherits: no sweep takes it while a process has a descriptor of that.
    """

    folder: Path
    short: str
    descriptors: tuple[int, ...]
    """That of the flock; none on a file system without flocks, where no sweep removes anything."""

    @classmethod
    def make(cls, chosen: str | None, environ: Mapping[str, str]) -> RunTmpdir:
        """Make one below `chosen`, else $RAY_TMPDIR, else $TMPDIR, else the system's. Raises TempDirError."""
        top = chosen or environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir()
        require_usable(top)
        folder = Path(tempfile.mkdtemp(prefix=directories.RUN_PREFIX, dir=os.path.abspath(top)))
        try:
            short = short_tmpdir(folder)
        except BaseException:
            folder.rmdir()
            raise
        held = None
        with suppress(OSError):  # no flocks there
            held = flock.try_flock(folder, exclusive=True)
        return cls(folder, short, () if held is None else (held,))

    @property
    def temp(self) -> Path:
        """Where Ray puts the sessions."""
        return self.folder / "ray"

    def close(self, say: Callable[[str], None], *, failed: bool, keep: bool) -> None:
        """Remove what dead clusters left; with `failed` all but their logs, with `keep` nothing.

        A cluster that lives on, because the program meant it to, keeps its session, and processes that inherited the
        flock keep the directory. What stays is said. What fails is said too, and raises nothing: how the program
        ended matters more.
        """
        try:
            try:
                if keep:
                    for path in directories.session_paths(self.temp):
                        say(f"kept: {path} (--keep-session)")
                else:
                    self._collect(say, failed=failed)
            finally:
                self._give_back(say)
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            say(f"not all of the temp directory could be removed: {self.folder} ({reason})")

    def _collect(self, say: Callable[[str], None], *, failed: bool) -> None:
        """Remove the sessions of dead clusters, and say which stay, and where saved logs are."""
        _wait_until(self._are_dead, PATIENCE_SECONDS)
        for one in collect_sessions([self.temp], starting=0, keep_logs=failed):
            if one.state != "removed":
                say(f"{one.state}: {one.path} ({one.why})")
            elif failed and os.path.isdir(logs := os.path.join(one.path, directories.LOGS)):
                say(f"logs of the failed run: {logs}")

    def _are_dead(self) -> bool:
        return all(one.state == "dead" for one in judge_sessions([self.temp], starting=0))

    def _give_back(self, say: Callable[[str], None]) -> None:
        """Let go of the directory, and remove it with its link where no process needs it."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        if self.descriptors and not _wait_until(lambda: flock.is_free(self.folder), LENT_SECONDS):
            say(f"kept: {self.folder} (the program left a process that has it; `gc --sessions` removes it later)")
        elif left := _remove(self.folder):
            names = ", ".join(left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
            say(printable(f"kept: {self.folder} (what Ray did not make: {names})"))
        if os.path.islink(self.short) and not self.folder.exists():
            os.unlink(self.short)

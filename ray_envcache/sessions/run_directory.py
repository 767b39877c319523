"""A temp directory for the clusters of one run, and its end: nothing is left of what nobody needs any more."""

from __future__ import annotations

import logging
import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.sessions import directories
from ray_envcache.sessions.collector import collect_sessions
from ray_envcache.sessions.directories import find_sessions
from ray_envcache.sessions.liveness import STARTING_SECONDS, Session, survey
from ray_envcache.sessions.short_path import ShortTmpdir, require_usable, short_tmpdir
from ray_envcache.system import files, flock

_logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 10.0
"""How long the processes of a cluster may take to end after the program that started it."""
LENT_SECONDS = 1.0
"""How long what the program started otherwise may take."""

_NAME = re.compile(rf"{directories.RUN_PREFIX}[a-z0-9_]{{8}}")


@contextmanager
def clean_sessions(tmpdir: str | os.PathLike[str] | None = None, *, keep: bool = False) -> Iterator[None]:
    """Have clusters that start in this context leave nothing: around `ray.init()` and `ray.shutdown()`.

    Their sessions go below `tmpdir` (however long its path is), else where they always go, into a directory of their
    own that is removed at the end; after an exception the logs stay, and a message names them. With `keep` all stays.
    What this process still has of a cluster is shut down at the end; another one that lives on keeps its session.
    Raises TempDirError, before Ray starts, where it could not work.
    """
    place = RunTmpdir.make(os.fspath(tmpdir) if tmpdir is not None else None, os.environ)
    before, failed = os.environ.get("RAY_TMPDIR"), True
    os.environ["RAY_TMPDIR"] = place.short
    try:
        yield
        failed = False
    finally:
        _shut_down()
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        place.close(_logger.warning, failed=failed, keep=keep)


def _shut_down() -> None:
    """After an exception nobody may have called `ray.shutdown()`."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def sweep(runs: Iterable[Path]) -> None:
    """Remove what killed runs left of their directories, once nobody holds them and no session is in them.

    Saved logs stay, and whatever is not as a run leaves it.
    """
    for folder in runs:
        with suppress(OSError, RecursionError):
            # The flock comes a moment after the directory.
            held = _take(folder) if _NAME.fullmatch(folder.name) and _age(folder) > STARTING_SECONDS else None
            if held is not None:
                try:
                    if _is_left(folder):
                        _remove(folder, folder / "ray")
                finally:
                    os.close(held)


def _take(folder: Path) -> int | None:
    return flock.try_flock(folder, exclusive=True, flags=os.O_RDONLY | os.O_DIRECTORY)


def _age(folder: Path) -> float:
    """Seconds since something was made in the directory of a run, or in that of its clusters."""
    made = [path.lstat().st_mtime for path in (folder, folder / "ray") if os.path.lexists(path)]
    return time.time() - max(made, default=time.time())


def _is_left(folder: Path) -> bool:
    """Whether this is a directory that a run made, with nothing in it but what dead clusters leave, and saved logs."""
    private = folder.lstat().st_mode & 0o777 == stat.S_IRWXU  # a directory may give its group to what is made in it
    return private and set(os.listdir(folder)) <= {"ray", "logs"} and not any(find_sessions(folder / "ray"))


def _remove(folder: Path, temp: Path) -> None:
    """The directory of a run, but for saved logs. Whatever else Ray left in it is about clusters that are gone."""
    if not (folder / "logs").exists():
        files.remove_tree(folder)
    elif temp.exists():
        files.remove_tree(temp)


@dataclass(frozen=True)
class RunTmpdir:
    """A directory of one run's own below the chosen temp directory, mode 0700, and the short path to it for Ray.

    It carries a flock: while somebody has a descriptor of that nobody sweeps it.
    """

    folder: Path
    short: ShortTmpdir
    descriptor: int | None

    @classmethod
    def make(cls, chosen: str | None, environ: Mapping[str, str]) -> RunTmpdir:
        """Below `chosen`, else $RAY_TMPDIR, else $TMPDIR, else the system's. Raises TempDirError."""
        top = os.path.abspath(chosen or environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir())
        require_usable(top)
        folder, descriptor = _make_folder(top)
        try:
            return cls(folder, short_tmpdir(folder), descriptor)
        except BaseException:
            folder.rmdir()
            _close(descriptor)
            raise

    @property
    def temp(self) -> Path:
        """Where Ray puts the sessions."""
        return self.folder / "ray"

    @property
    def descriptors(self) -> list[int]:
        """Those that keep the directory and the link to it: whoever inherits them keeps both, also when we are dead."""
        return [one for one in (self.descriptor, self.short.fileno()) if one is not None]

    def close(self, say: Callable[[str], None], *, failed: bool, keep: bool, lent: bool = False) -> None:
        """Remove what dead clusters left; with `failed` all but their logs, with `keep` nothing.

        A cluster that lives on, because the program meant it to, keeps its session. With `lent`, what lives on of a
        program that inherited the descriptors keeps the directory. What cannot be removed is said, and no exception:
        how the program ended matters more.
        """
        left = True
        try:
            try:
                left = bool(self._clean(say, failed=failed, keep=keep))
            finally:
                self._give_back(say, left=left, lent=lent)
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            say(f"not all of the temp directory could be removed: {self.folder} ({reason})")

    def _give_back(self, say: Callable[[str], None], *, left: bool, lent: bool) -> None:
        """Let go of directory and link, and remove them where nobody needs them."""
        _close(self.descriptor)
        if lent and self._others_hold():
            self.short.leave()
            say(f"kept: {self.folder} (the program left a process that has it; `gc --sessions` removes it later)")
            return
        self.short.release(patience=0)
        if not left:
            _remove(self.folder, self.temp)

    def _others_hold(self) -> bool:
        """Whether somebody else has the flock, and keeps it for more than a moment."""
        deadline = time.monotonic() + LENT_SECONDS
        while self.descriptor is not None and not flock.is_free(self.folder):
            if time.monotonic() > deadline:
                return True
            time.sleep(0.05)
        return False

    def _clean(self, say: Callable[[str], None], *, failed: bool, keep: bool) -> list[Session]:
        """Remove dead sessions; those that are left, after a word about each."""
        reasons = {} if keep else self._collect(say, failed=failed)
        left = self._sessions()
        for one in left:
            why = "--keep-session" if keep else reasons.get(one.name, one.why)
            say(f"{'kept' if keep else one.state}: {one.path} ({why})")
        return left

    def _collect(self, say: Callable[[str], None], *, failed: bool) -> dict[str, str]:
        """Why what could not be removed could not, by the names of sessions."""
        self._wait()
        dead = {one.name for one in self._sessions() if one.state == "dead"}
        logs = self.folder / "logs" if failed else None
        report = collect_sessions([self.temp], only=dead, starting=0, logs_to=logs)
        for kept in sorted(logs / name for name in dead) if logs else []:
            if kept.is_dir():
                say(f"logs of the failed run: {kept}")
        return dict(report.failed)

    def _sessions(self) -> list[Session]:
        return survey([self.temp], starting=0) if self.temp.is_dir() else []

    def _wait(self) -> None:
        """Until no cluster lives any more, or for as long as that usually takes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and any(one.state != "dead" for one in self._sessions()):
            time.sleep(0.1)


def _make_folder(top: str) -> tuple[Path, int | None]:
    """A new directory and the descriptor of its flock; None on a file system that has none, where nobody sweeps."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=directories.RUN_PREFIX, dir=top))
        try:
            descriptor = _take(folder)
        except FileNotFoundError:
            continue  # a sweep came between
        except OSError:
            return folder, None
        if descriptor is not None and flock.still_names(folder, descriptor):
            return folder, descriptor
        _close(descriptor)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)

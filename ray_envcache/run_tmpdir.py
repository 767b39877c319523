"""A temp directory for the clusters of one run, and its end: nothing is left of what nobody needs any more."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache import _fs, session_dirs
from ray_envcache.session_gc import collect_sessions
from ray_envcache.sessions import STARTING_SECONDS, Session, survey
from ray_envcache.tmpdir import ShortTmpdir, require_usable, short_tmpdir

_logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 10.0
"""How long the processes of a cluster may take to end after the program that started it."""


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


def sweep(temps: Iterable[Path]) -> None:
    """Remove what killed runs left of their directories, once no session is in them. Saved logs stay."""
    for temp in temps:
        folder = temp.parent
        is_run = folder.name.startswith(session_dirs.RUN_PREFIX) and temp.name == "ray"
        with suppress(OSError):
            # Not one in which a cluster is about to make its session.
            if is_run and time.time() - temp.stat().st_mtime > STARTING_SECONDS and not survey([temp]):
                _remove(folder, temp)


def _remove(folder: Path, temp: Path) -> None:
    """The directory of a run, but for saved logs. Whatever else Ray left in it is about clusters that are gone."""
    if not (folder / "logs").exists():
        _fs.remove_tree(folder)
    elif temp.exists():
        _fs.remove_tree(temp)


@dataclass(frozen=True)
class RunTmpdir:
    """A directory of one run's own below the chosen temp directory, mode 0700, and the short path to it for Ray."""

    folder: Path
    short: ShortTmpdir

    @classmethod
    def make(cls, chosen: str | None, environ: Mapping[str, str]) -> RunTmpdir:
        """Below `chosen`, else $RAY_TMPDIR, else $TMPDIR, else the system's. Raises TempDirError."""
        top = os.path.abspath(chosen or environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir())
        require_usable(top)
        folder = Path(tempfile.mkdtemp(prefix=session_dirs.RUN_PREFIX, dir=top))
        try:
            return cls(folder, short_tmpdir(folder))
        except BaseException:
            folder.rmdir()
            raise

    @property
    def temp(self) -> Path:
        """Where Ray puts the sessions."""
        return self.folder / "ray"

    def close(self, say: Callable[[str], None], *, failed: bool, keep: bool) -> None:
        """Remove what dead clusters left; with `failed` all but their logs, with `keep` nothing.

        A cluster that lives on, because the program meant it to, keeps its session.
        """
        if not keep:
            self._wait()
            dead = [one for one in self._sessions() if one.state == "dead"]
            if failed:
                self._save_logs([Path(one.path) for one in dead], say)
            collect_sessions([self.temp], only={one.name for one in dead}, starting=0)
        left = self._sessions()
        for one in left:
            say(f"{'kept' if keep else one.state}: {one.path} ({'--keep-session' if keep else one.why})")
        self.short.release(patience=0)
        if not left:
            _remove(self.folder, self.temp)

    def _sessions(self) -> list[Session]:
        return survey([self.temp], starting=0) if self.temp.is_dir() else []

    def _wait(self) -> None:
        """Until no cluster lives any more, or for as long as that usually takes."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and any(one.state != "dead" for one in self._sessions()):
            time.sleep(0.1)

    def _save_logs(self, sessions: list[Path], say: Callable[[str], None]) -> None:
        for session in sessions:
            kept = self.folder / "logs" / session.name
            with suppress(FileNotFoundError):
                kept.parent.mkdir(exist_ok=True)
                shutil.move(session / "logs", kept)
                # What has no folder for logs is not taken for a session.
                (session / "logs").mkdir()
                say(f"logs of the failed run: {kept}")

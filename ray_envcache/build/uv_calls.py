"""The calls of uv that make one environment, and what their failures mean for the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import BuildError, DiskFullError, PassingError
from ray_envcache.resolve import uv
from ray_envcache.store.layout import Entry, layout_of
from ray_envcache.system import children, disk


@dataclass(frozen=True)
class UvCalls:
    """Calls of uv in `folder`, whose settings it reads. Each keeps the builder's flock and is logged in the entry."""

    entry: Entry
    folder: Path
    project: str
    download_size: int
    cache: Path
    flock: int
    on_line: Callable[[str], None]
    environ: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, *arguments: str | os.PathLike[str]) -> None:
        """Run uv to its end. Raises BuildError where it fails."""
        with self.entry.build_log.open("a", encoding="utf-8") as log:

            def listen(line: str) -> None:
                # A log that cannot be written must not hide why: uv itself will say that the disk is full.
                with suppress(OSError):
                    log.write(f"{line}\n")
                self.on_line(line)

            # `uv sync` installs there; `uv pip` is told by an option.
            environ = {**self.environ, "UV_PROJECT_ENVIRONMENT": os.fspath(self.entry.venv)}
            done = uv.run(
                arguments, cwd=self.folder, cache=self.cache, on_line=listen, pass_fds=[self.flock], more=environ
            )
        uv.require_not_killed(done)
        if done.returncode != 0:
            raise self._error(done)

    def _error(self, done: children.Completed) -> BuildError:
        reason = "\n".join(uv.said(done.stderr).splitlines()[-25:])
        if uv.is_disk_full(done.stderr):
            place, store = uv.full_place(done.stderr), self.entry.path.parent
            ours = (store, layout_of(self.entry).uv_cache)
            if place is None or any(map(place.is_relative_to, ours)):
                return disk_full(store, self.download_size)
            # The folder for temporary files, or a quota of uv's own cache: moving the store would not help.
            return DiskFullError(
                f"No space left for uv to build the environment: {reason}; {disk.room_left(place)}",
                "make room there, or move what uv writes there: UV_CACHE_DIR, TMPDIR",
            )
        passes = uv.is_unreachable(done.stderr) and not uv.is_unauthorized(done.stderr)
        kind = PassingError if passes else BuildError
        return kind(f"uv could not build the environment of `{self.project}`:\n{reason}", self._hint(done.stderr))

    def _hint(self, stderr: str) -> str:
        if uv.is_unauthorized(stderr):
            return uv.CREDENTIALS_HINT
        if uv.is_unreachable(stderr):
            return uv.REACH_HINT
        if "Hash mismatch" in stderr:
            return "the index serves another file than was locked; if that is right, `uv lock --upgrade-package <name>`"
        if "source is disabled" in stderr:
            return "lock what is missing with the project (uv add ray), so that it may be built"
        return f"uv itself, run in {self.folder}, shows the same"


def disk_full(path: Path, download_size: int) -> DiskFullError:
    """The error for a disk that has no room, with figures."""
    # Not every lockfile has sizes; less than a megabyte cannot be all of an environment with ray.
    known = download_size >= 1e6
    need = f"its packages are {download_size / 1e6:,.0f} MB to download and more once unpacked, " if known else ""
    return DiskFullError(
        f"No space left for the environment in `{path}`: {need}{disk.room_left(path)}",
        "make room (ray-envcache list shows what the store holds), or move the store: RAY_ENVCACHE_DIR",
    )

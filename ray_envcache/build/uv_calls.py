"""The calls of uv that make one environment, and what their failures mean for the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import BuildError, DiskFullError, EnvCacheError
from ray_envcache.resolve import uv, uv_errors
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
    scope: uv.Scope = uv.Scope.REACH

    def __call__(self, *arguments: str | os.PathLike[str]) -> None:
        """Run uv to its end. Raises BuildError where it fails."""
        with self.entry.build_log.open("a", encoding="utf-8") as log:

            def listen(line: str) -> None:
                # A log that cannot be written must not hide why: uv itself will say that the disk is full.
                with suppress(OSError):
                    log.write(f"{line}\n")
                self.on_line(line)

            # `uv sync` installs there; `uv pip` is told by an option.
            more, kept = {**self.environ, "UV_PROJECT_ENVIRONMENT": os.fspath(self.entry.venv)}, [self.flock]
            done = uv.run(
                arguments, cwd=self.folder, cache=self.cache, on_line=listen, pass_fds=kept, scope=self.scope, more=more
            )
        if done.returncode != 0:
            raise self._error(done)

    def _error(self, done: children.Completed) -> EnvCacheError:
        place, store = uv_errors.full_place(done.stderr), self.entry.path.parent
        what = f"uv could not build the environment of `{self.project}`"
        error = uv_errors.error_of(done, BuildError, what, f"uv itself, run in {self.folder}, shows the same")
        ours = place is None or any(map(place.is_relative_to, (store, layout_of(self.entry).uv_cache)))
        # Elsewhere, as in the folder for temporary files, moving the store would not help.
        return disk_full(store, self.download_size) if ours and isinstance(error, DiskFullError) else error


def disk_full(path: Path, download_size: int) -> DiskFullError:
    """The error for a disk that has no room, with figures."""
    # Not every lockfile has sizes; less than a megabyte cannot be all of an environment with ray.
    known = download_size >= 1e6
    need = f"its packages are {download_size / 1e6:,.0f} MB to download and more once unpacked, " if known else ""
    return DiskFullError(
        f"No space left for the environment in `{path}`: {need}{disk.room_left(path)}",
        "make room (ray-envcache list shows what the store holds), or move the store: RAY_ENVCACHE_DIR",
    )

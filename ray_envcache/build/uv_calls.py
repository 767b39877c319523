"""The calls of uv that make one environment, and what their failures mean for the user."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ray_envcache.errors import BuildError
from ray_envcache.resolve import uv, uv_errors
from ray_envcache.store.layout import Entry


@dataclass(frozen=True)
class UvCalls:
    """Calls of uv in `folder`, whose settings it reads. Each keeps the builder's flock and is logged in the entry."""

    entry: Entry
    folder: Path
    project: str
    cache: Path
    flock: int
    on_line: Callable[[str], None]
    environ: Mapping[str, str] = field(default_factory=dict)
    scope: uv.Scope = uv.Scope.REACH

    def __call__(self, *arguments: str | os.PathLike[str]) -> None:
        """Run uv to its end. Raises BuildError or its kin where it fails."""
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
        what = f"uv could not build the environment of `{self.project}`"
        uv_errors.expect_success(done, BuildError, what, f"uv itself, run in {self.folder}, shows the same")

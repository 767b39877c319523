"""What a build is made of: the plan of what to install, and the calls of uv that do it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_envcache.errors import BuildError, DiskFullError
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.system import children, disk


@dataclass(frozen=True)
class Plan:
    """What every build needs. Subclasses say what is installed into the fresh venv.

    `holds` is the number of entries that an interpreter of the result holds: its own, and those below it. Before the
    result is handed out, it must `import_ray`, unless that was seen already.
    """

    key: str
    interpreter: Interpreter
    folder: Path
    project: str
    ray: str

    holds = 1
    import_ray = True

    @property
    def headline(self) -> str:
        """What is built, for people."""
        raise NotImplementedError

    @property
    def download_size(self) -> int:
        """Bytes of all artifacts, as far as they are known."""
        return 0

    @property
    def venv_options(self) -> list[str]:
        """What `uv venv` is told beyond the usual."""
        return []

    def prepare(self, entry: Entry) -> None:
        """What has to come before anybody is told of the build: the line may go to a log that lies in a package."""

    def install(self, entry: Entry, run_uv: BuildUv) -> None:
        """Fill the fresh venv of `entry`. Raises BuildError."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the ready record says of this plan alone: fields of `ReadyRecord`."""
        raise NotImplementedError


def into(entry: Entry) -> list[str]:
    """The options by which `uv pip` installs into the venv of `entry`."""
    # Without bytecode, whatever the project's settings say: it comes after the hand-out, or from earlier ones.
    return [f"--python={entry.python}", "--no-python-downloads", "--no-compile-bytecode"]


class BuildUv:
    """Calls of uv for one build: logged, inheriting the builder's flock, their failures turned into our errors."""

    def __init__(self, layout: Layout, entry: Entry, plan: Plan, flock: int, say: Callable[[str], None]) -> None:
        self._entry = entry
        self._plan = plan
        self._flock = flock
        self._say = say
        self._cache = uv.cache_directory(entry.path) or layout.uv_cache

    def __call__(self, *arguments: str | os.PathLike[str]) -> None:
        with self._entry.build_log.open("a", encoding="utf-8") as log:
            done = uv.run(
                arguments,
                cwd=self._plan.folder,
                cache=self._cache,
                on_line=self._listener(log.write),
                pass_fds=[self._flock],
            )
        uv.require_not_killed(done)
        if done.returncode != 0:
            raise self._error(done)

    def _listener(self, write: Callable[[str], Any]) -> Callable[[str], None]:
        def listen(line: str) -> None:
            # A log that cannot be written must not hide why: uv itself will say that the disk is full.
            with suppress(OSError):
                write(f"{line}\n")
            self._say(line)

        return listen

    def _error(self, done: children.Completed) -> BuildError:
        plan, reason = self._plan, uv.said(done.stderr)
        if uv.is_disk_full(done.stderr):
            return disk_full(self._entry.path.parent, plan.download_size)
        what = f"uv could not build the environment of `{plan.project}`:\n{_tail(reason)}"
        if uv.is_unauthorized(done.stderr):
            return BuildError(
                what,
                "give this node the index's credentials as uv takes them: "
                "UV_INDEX_<NAME>_USERNAME and _PASSWORD, netrc or keyring",
            )
        if uv.is_unreachable(done.stderr):
            return BuildError(
                what, "see that this node reaches the index of the lockfile; proxies and mirrors are set as for uv"
            )
        if "Hash mismatch" in reason:
            return BuildError(
                what,
                "the index serves another file than was locked; if that is right, `uv lock --upgrade-package <name>`",
            )
        if "source is disabled" in done.stderr:
            return BuildError(what, "lock what is missing with the project (uv add ray), so that it may be built")
        return BuildError(what, f"uv itself, run in {plan.folder}, shows the same")


def disk_full(path: Path, download_size: int) -> DiskFullError:
    """The error for a disk that has no room, with figures."""
    # Not every lockfile has sizes; what is too little to be all is not told.
    known = download_size >= 1e6
    need = f"its packages are {download_size / 1e6:,.0f} MB to download and more once unpacked, " if known else ""
    return DiskFullError(
        f"No space left for the environment in `{path}`: {need}{disk.room_left(path)}",
        "make room (ray-envcache list shows what the store holds), or move the store: RAY_ENVCACHE_DIR",
    )


def _tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.splitlines()[-lines:])

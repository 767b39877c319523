"""One place on this machine for a run of the suite: its folders, its uv cache, its Python with Ray and this package."""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import uv

from ray_envcache.resolve import interpreter
from ray_envcache.resolve.uv import relevant
from ray_envcache.system import files
from ray_envcache.system.disk import free_space
from tests import support
from tests.benchmarks import processes
from tests.benchmarks.machine import REPOSITORY
from tests.benchmarks.measure import BenchmarkError
from tests.benchmarks.processes import Done

_FOREIGN = ("RAY_", "PYTEST_", "PYTHON", "VIRTUAL_ENV", "CONDA", "UV_", "COV")
_LONGEST = 32
"""Bytes of the path of our folder: sockets of Ray, which lie below it, have at most 107."""
_ROOM = 30 * 10**9
"""Bytes that must be free on the disk for trees to stay that nobody needs any more."""


Command: TypeAlias = Sequence[str | os.PathLike[str]]


@dataclass
class Host:
    """`disk` is where the store and uv's cache are; `other` a folder on another file system, None where there is none."""

    disk: Path
    other: Path | None
    cache: Path
    compiles: bool = True
    """Whether the clusters' own Python has its bytecode before anything is measured."""
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @cached_property
    def python(self) -> Path:
        """The interpreter that runs drivers and clusters: a venv with Ray, this package, and what Ray needs to install."""
        venv = self.disk / "driver"
        self.uv("venv", f"--python={self.base_python}", venv)
        wanted: Command = [f"ray=={support.RAY_VERSION}", "pip", "virtualenv", f"{REPOSITORY}[remote]"]
        compiling = ["--compile-bytecode"] if self.compiles else []
        self.uv("pip", "install", *compiling, f"--python={venv}", *wanted)
        return venv / "bin" / "python"

    @cached_property
    def token(self) -> Path:
        """Ray's token: clusters authenticate as they do by default, and leave the user's own home alone."""
        file = self.disk / "auth_token"
        file.write_text(secrets.token_hex(32))
        return file

    @staticmethod
    def free(place: Path) -> int:
        """Bytes that are free where `place` is."""
        return free_space(place).free

    @property
    def base_python(self) -> str:
        return interpreter.base_executable(None)

    @property
    def uv_binary(self) -> str:
        return os.fspath(uv.find_uv_bin())

    def environ(self, store: Path | None = None, cache: Path | None = None, temp: Path | None = None) -> dict[str, str]:
        """The variables of every child: ours without what would favour or hurt one alternative.

        Without UV_PYTHON too: it would have `uv pip install` of Ray's field `uv` install into the base Python.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
        kept |= relevant(os.environ)
        return kept | {
            "UV_CACHE_DIR": os.fspath(cache or self.cache),
            "UV_PYTHON_DOWNLOADS": "never",
            "UV_NO_PROGRESS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_TOKEN_PATH": os.fspath(self.token),
            # Ray's hook looks for a `uv run` among all parents of a driver: the one that started the suite is not meant.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_TMPDIR": os.fspath(temp or self.disk),
            "RAY_ENVCACHE_DIR": os.fspath(store or self.disk / "no-store"),
            # Nothing is to be collected for want of space on this disk while something is measured.
            "RAY_ENVCACHE_MIN_FREE_SPACE": "off",
        }

    def uv(self, *arguments: str | os.PathLike[str], cache: Path | None = None, **more: str) -> Done:
        """Run uv to its end."""
        command = [self.uv_binary, *arguments]
        environ = {**self.environ(cache=cache), "UV_PYTHON": self.base_python, **more}
        return processes.run(command, environ, self.disk)

    def envcache(
        self, *arguments: str | os.PathLike[str], store: Path, cache: Path | None = None, settle: float = 0.0
    ) -> Done:
        """Run our command line to its end."""
        command = [self.python, "-m", "ray_envcache", *arguments]
        return processes.run(command, self.environ(store, cache), self.disk, settle)

    def program(self, name: str, *arguments: str | os.PathLike[str], store: Path) -> str:
        """Run one of our programs in a fresh process; what it printed last."""
        environ = self.environ(store) | {"RAY_ENVCACHE_GC_INTERVAL": "off"}
        command = [self.python, processes.PROGRAMS / name, *arguments]
        return processes.run(command, environ, self.disk).output.splitlines()[-1]

    @contextmanager
    def folder(self, *, other: bool = False) -> Iterator[Path]:
        """A fresh folder with a short path, on the other file system if asked; gone at the end, or at that of the run.

        For minutes after a tree was removed ext4 takes up to a hundred times longer to make a file: the next sample
        would tell of that. So trees stay while there is room.
        """
        top = self.other if other else self.disk
        assert top is not None
        made = top / f"{next(self.numbers)}"
        made.mkdir()
        try:
            yield made
        finally:
            if other or self.free(top) < _ROOM:
                files.remove_tree(made)


@contextmanager
def prepared(place: Path | None, cache: Path | None, *, smoke: bool) -> Iterator[Host]:
    """A host below `place` (default: the system's temp directory) with the uv cache at `cache`, else one of its own.

    For a smoke run the user's: there is no time to fill one. Everything that was made is gone at the end. Raises BenchmarkError where Ray's sockets would not fit.
    """
    with ExitStack() as stack:
        disk = _temporary(stack, place or Path(tempfile.gettempdir()))
        memory = Path("/dev/shm")
        differs = memory.is_dir() and memory.stat().st_dev != disk.stat().st_dev and sys.platform == "linux"
        other = _temporary(stack, memory) if differs else None
        if cache is None:
            cache = disk / "uv" if not smoke else _users_cache()
        yield Host(disk, other, cache.absolute(), compiles=not smoke)


def _users_cache() -> Path:
    done = subprocess.run([uv.find_uv_bin(), "cache", "dir"], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())


def _temporary(stack: ExitStack, top: Path) -> Path:
    made = Path(tempfile.mkdtemp(prefix="rb", dir=top))
    stack.callback(files.remove_tree, made)
    if len(os.fspath(made)) > _LONGEST:
        raise BenchmarkError(f"`{top}` is too long for the sockets of Ray: choose a shorter place with --dir")
    return made

"""The alternatives: how one cluster's workers come to their environment. The driver is the same program in all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from tests.benchmarks.host import Host
from tests.benchmarks.processes import PROGRAMS
from tests.benchmarks.projects import Project


@dataclass(frozen=True)
class Work:
    """What a driver does after its first task: workers one by one, workers at once, an import, and to wait."""

    more: int = 0
    many: int = 0
    module: str = ""
    env_vars: Mapping[str, str] = field(default_factory=dict)
    hold: bool = False

    def program(self, runtime_env: Mapping[str, Any] | None = None, *, envcache: bool = False) -> list[str]:
        """The arguments of the Python that is the driver."""
        rest = {"env_vars": dict(self.env_vars), "runtime_env": runtime_env, "envcache": envcache}
        work = {"more": self.more, "many": self.many, "module": self.module, "hold": self.hold, **rest}
        return [os.fspath(PROGRAMS / "first_tasks.py"), json.dumps(work)]


@dataclass(frozen=True)
class Kit:
    """A project on a host, with what the alternatives that share something share: made once, with bytecode, warm."""

    host: Host
    project: Project
    store: Path
    finished: Path
    bare: Path
    """As `finished`, without bytecode."""
    log: Path
    """Where the project notes builds of its environment, if it is one that does."""


Command: TypeAlias = list[str | os.PathLike[str]]
Make: TypeAlias = Callable[[Kit, Path, Work], Command]


@dataclass(frozen=True, eq=False)
class Alternative:
    """`make` gives the command of one cluster, which may use a fresh folder of its own.

    `ours`: uses the store. `downloads`: fetches packages anew for each cluster, whatever is cached.
    """

    letter: str
    label: str
    make: Make
    environ: Mapping[str, str] = field(default_factory=dict)
    ours: bool = False
    downloads: bool = False

    def __str__(self) -> str:
        return f"({self.letter}) {self.label}"


def _floor(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, *work.program({"py_executable": os.fspath(kit.finished / "bin" / "python")})]


def _bare(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, *work.program({"py_executable": os.fspath(kit.bare / "bin" / "python")})]


def _uv_run(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.uv_binary, "run", "python", *work.program()]


def _field_uv(kit: Kit, _fresh: Path, work: Work) -> Command:
    # Ray passes --no-cache unless told otherwise.
    return [kit.host.python, *work.program({"uv": {"packages": kit.project.pins, "uv_pip_install_options": []}})]


def _field_uv_without_cache(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, *work.program({"uv": {"packages": kit.project.pins}})]


def _field_pip(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, *work.program({"pip": kit.project.pins})]


def _by_hand(kit: Kit, fresh: Path, work: Work) -> Command:
    both = 'UV_PROJECT_ENVIRONMENT="$1" "$2" sync --quiet --frozen --python="$3" && shift 3 && exec "$@"'
    venv = fresh / "venv"
    return [
        "sh",
        "-c",
        both,
        "sh",
        venv,
        kit.host.uv_binary,
        kit.host.base_python,
        venv / "bin" / "python",
        *work.program(),
    ]


def _field(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, *work.program({"envcache": os.fspath(kit.project.folder)}, envcache=True)]


def _run(kit: Kit, _fresh: Path, work: Work) -> Command:
    return [kit.host.python, "-m", "ray_envcache", "run", "--", "python", *work.program()]


FLOOR = Alternative("a", "plain Ray, finished venv", _floor)
UV_RUN = Alternative("b", "uv run", _uv_run, {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"})
FIELD_UV = Alternative("c", 'runtime_env "uv", cache', _field_uv)
FIELD_UV_NO_CACHE = Alternative("c-", 'runtime_env "uv", no cache', _field_uv_without_cache, downloads=True)
FIELD_PIP = Alternative("d", 'runtime_env "pip"', _field_pip, downloads=True)
BY_HAND = Alternative("e", "uv sync by hand", _by_hand)
FIELD = Alternative("f", "envcache field", _field, ours=True)
RUN = Alternative("g", "ray-envcache run", _run, ours=True)
ALL = (FLOOR, UV_RUN, FIELD_UV, FIELD_UV_NO_CACHE, FIELD_PIP, BY_HAND, FIELD, RUN)
BARE = Alternative("a-", "plain Ray, venv without bytecode", _bare, {"PYTHONDONTWRITEBYTECODE": "1"})

"""The Python and the ray of workers: which packages fit an interpreter, and whether it fits the cluster."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import packaging

from ray_envcache.errors import InterpreterError, RayVersionError
from ray_envcache.inside import identity
from ray_envcache.system import children
from ray_envcache.system.children import clean_environ


class Interpreter(NamedTuple):
    """A base interpreter (never one of a virtual environment).

    `tags` are its compatibility tags, best first, which name platform and libc; `markers` its environment markers.
    """

    executable: str
    implementation: str
    version: str
    build: str
    soabi: str
    tags: tuple[str, ...]
    markers: dict[str, str]

    def identity(self) -> dict[str, Any]:
        """The part of it that goes into a key."""
        data = self._asdict()
        # Hundreds of tags, all derived from the platform: their digest says the same.
        data["tags"] = hashlib.sha256("\n".join(self.tags).encode()).hexdigest()
        # The kernel's release and version change with every update and decide about no package.
        data["markers"] = {
            name: value for name, value in self.markers.items() if name not in {"platform_release", "platform_version"}
        }
        return data


def base_executable(python: str | None) -> str:
    """The real path of the interpreter to build with: of the running one's base, or of the one at path `python`.

    Raises InterpreterError where `python` asks for another version than the running one's, and where there is no
    executable: that of a running Python may be removed.
    """
    given = python if python is not None and os.path.isabs(python) else None
    running = ".".join(map(str, sys.version_info[:3]))
    if python is not None and given is None and not f"{running}.".startswith(f"{python}."):
        raise InterpreterError(
            f"The envcache field asks for Python {python}, the cluster runs {running}",
            "start the cluster with that Python: Ray's workers must have the same version as the cluster",
        )
    path: str = given or getattr(sys, "_base_executable", None) or sys.executable
    # Of the running one only that it is still there: who was given it may not be allowed to start it anew.
    if not os.path.isfile(path) or (given and not os.access(path, os.X_OK)):
        raise InterpreterError(
            f"No executable at `{path}`", "name a Python of the cluster's version, or install that one again"
        )
    return os.path.realpath(path)


def base_of(executable: str) -> str:
    """The real path of the interpreter below `executable`, which may be one of a virtual environment."""
    program = "import sys; print(getattr(sys, '_base_executable', None) or sys.executable)"
    done = children.run([executable, "-I", "-S", "-c", program], environ=clean_environ())
    if done.returncode != 0:
        raise _unusable(executable, done.stderr.strip()[-500:])
    return os.path.realpath(done.stdout.strip())


def fingerprint(executable: str) -> list[Any]:
    """A cheap stand-in for the whole identity, good on this host only: the file, and what it was when we looked."""
    found = os.stat(executable)
    return [executable, found.st_size, found.st_mtime_ns, sys.version]


@cache
def probe(executable: str) -> Interpreter:
    """What the base interpreter at `executable` says it is. Raises InterpreterError where it does not start."""
    program, packages = Path(identity.__file__), Path(packaging.__path__[0]).parent
    try:
        done = children.run([executable, "-I", "-S", program, packages], environ=clean_environ())
        if done.returncode != 0:
            raise _unusable(executable, done.stderr.strip()[-500:])
        data = json.loads(done.stdout)
        return Interpreter(**{**data, "executable": executable, "tags": tuple(data["tags"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        # Not a program of this machine, or none that takes Python's options and prints what we asked for.
        raise _unusable(executable, str(error)) from error


def _unusable(executable: str, reason: str) -> InterpreterError:
    return InterpreterError(
        f"The Python at `{executable}` does not start: {reason}",
        "repair that installation, or name another one with the option `python`",
    )


@dataclass(frozen=True)
class ClusterRay:
    """The ray that the cluster runs, installed in the Python that runs us."""

    version: str

    def require_fit(self, found: Interpreter) -> None:
        """Raise InterpreterError where Ray would not take `found` for a Python of the cluster's version."""
        level = os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "patch")
        length = 2 if level == "minor" else 3
        running = [*map(str, sys.version_info[:3])]
        if found.version.split(".")[:length] != running[:length]:
            raise InterpreterError(
                f"The Python at `{found.executable}` is {found.version}, the cluster runs {'.'.join(running)}",
                "Ray's workers must have the same Python version as the cluster",
            )

    def fingerprint(self) -> list[Any]:
        """A cheap stand-in for ray and the versions of what it needs, good on this host only.

        Each installation, upgrade or removal of a distribution changes the directory that holds them.
        """
        found = find_spec("ray")  # without importing it
        if found is None or not found.origin:
            return [self.version]
        folder = os.path.dirname(os.path.dirname(found.origin))
        return [self.version, folder, os.stat(folder).st_mtime_ns]


class LockedRay:
    """The ray of the lockfile, where driver and cluster run from the environment themselves: then no other counts."""

    def require_fit(self, found: Interpreter) -> None:
        """Accept any interpreter: the whole cluster runs it."""

    def fingerprint(self) -> list[Any]:
        """A constant: nothing of this host decides."""
        return ["locked"]


AnyRay = ClusterRay | LockedRay


def installed_ray() -> ClusterRay:
    """The ray installed beside us, without importing it. Raises RayVersionError where there is none."""
    try:
        return ClusterRay(version("ray"))
    except PackageNotFoundError:
        raise RayVersionError("There is no ray beside ray-envcache", "python -m pip install ray") from None

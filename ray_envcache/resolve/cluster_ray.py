"""The ray of the cluster, and how a resolved set is made to contain exactly it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ray_envcache.errors import RayVersionError
from ray_envcache.resolve.interpreter import require_same_version

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ray_envcache.resolve.interpreter import Interpreter
    from ray_envcache.resolve.lockfile import ResolvedSet


@dataclass(frozen=True)
class ClusterRay:
    """The ray that the cluster runs, installed in the Python that runs us."""

    version: str

    def require_fit(self, interpreter: Interpreter) -> None:
        """Raise InterpreterError where workers with this interpreter would not fit the cluster."""
        require_same_version(interpreter)

    def version_in(self, resolved: ResolvedSet) -> str:  # noqa: ARG002  # the other kind of ray asks it
        """The version that an environment with this set has to have."""
        return self.version

    def fingerprint(self) -> list[Any]:
        """A cheap stand-in for ray and the versions of what it needs, good on this host only.

        Whatever installs, upgrades or removes a distribution changes the directory that holds them.
        """
        folder = packages_folder()
        return [self.version, folder, os.stat(folder).st_mtime_ns] if folder else [self.version]

    def additions(self, resolved: ResolvedSet, interpreter: Interpreter) -> dict[str, str]:
        """What must be added to `resolved` so that a worker of this cluster can run from it: {name: version}.

        Nothing, where the lockfile has this ray. Otherwise ray and what it needs, in the versions the cluster itself
        has, so that the result depends on nothing but the lockfile and the cluster. Raises RayVersionError.
        """
        locked = resolved.version_of("ray")
        if locked is not None and locked != self.version:
            raise RayVersionError(
                f"The lockfile pins ray {locked}, the cluster runs ray {self.version}",
                f'run `uv add "ray=={self.version}"`, or start the cluster with ray {locked}',
            )
        return {} if locked is not None else self._with_needs(resolved, interpreter)

    def _with_needs(self, resolved: ResolvedSet, interpreter: Interpreter) -> dict[str, str]:
        added = {"ray": self.version}
        pending = list(_requirements("ray", interpreter.markers))
        while pending:
            needed, by = pending.pop()
            name = _canonical(needed.name)
            have = resolved.version_of(name) or added.get(name)
            if have is None:
                have = added[name] = _installed_version(name, by)
                pending.extend(_requirements(name, interpreter.markers, needed.extras))
            if not needed.specifier.contains(have, prereleases=True):
                raise RayVersionError(
                    f"{by} needs `{needed.name}{needed.specifier}`, the lockfile has {name} {have}",
                    f'run `uv add "ray=={self.version}"`, so that uv finds versions that go together',
                )
        return added


class LockedRay:
    """The ray of the lockfile, where driver and cluster run from the environment themselves: then no other counts."""

    def require_fit(self, interpreter: Interpreter) -> None:
        """Any Python will do: the whole cluster runs it."""

    def version_in(self, resolved: ResolvedSet) -> str:
        """The version that is locked. Raises RayVersionError where none is."""
        version = resolved.version_of("ray")
        if version is None:
            raise RayVersionError(
                "There is no ray in the lockfile, and the program is to run from it", "run `uv add ray`"
            )
        return version

    def fingerprint(self) -> list[Any]:
        """Nothing of this host has a say."""
        return ["locked"]

    def additions(self, resolved: ResolvedSet, interpreter: Interpreter) -> dict[str, str]:  # noqa: ARG002
        """Nothing: the lockfile has it all."""
        return {}


AnyRay = ClusterRay | LockedRay


def _requirements(
    name: str, markers: dict[str, str], extras: set[str] | None = None
) -> Iterator[tuple[Requirement, str]]:
    for text in requires(name) or ():
        needed = Requirement(text)
        active = [{**markers, "extra": extra} for extra in ("", *(extras or ()))]
        if needed.marker is None or any(needed.marker.evaluate(environment) for environment in active):
            yield needed, name


def _installed_version(name: str, by: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        raise RayVersionError(
            f"{by} needs {name}, which is neither in the lockfile nor installed beside the cluster's ray",
            "repair the cluster's Python (python -m pip check), or lock ray itself: uv add ray",
        ) from None


def _canonical(name: str) -> str:
    return canonicalize_name(name)


def packages_folder() -> str:
    """Where ray is installed beside us, without importing it; "" where it is not."""
    found = find_spec("ray")
    return os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""  # the warm path


def installed_ray() -> ClusterRay:
    """The ray installed beside us, without importing it. Raises RayVersionError where there is none."""
    try:
        return ClusterRay(version("ray"))
    except PackageNotFoundError:
        raise RayVersionError("There is no ray beside ray-envcache", "python -m pip install ray") from None

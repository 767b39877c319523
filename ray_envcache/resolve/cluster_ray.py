"""The ray that workers must have: the cluster's own, or the one that the lockfile names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ray_envcache.errors import RayVersionError
from ray_envcache.resolve.interpreter import packages_folder, require_same_version

if TYPE_CHECKING:
    from ray_envcache.resolve.interpreter import Interpreter


@dataclass(frozen=True)
class ClusterRay:
    """The ray that the cluster runs, installed in the Python that runs us."""

    version: str

    def require_fit(self, interpreter: Interpreter) -> None:
        """Raise InterpreterError where workers with this interpreter would not fit the cluster."""
        require_same_version(interpreter)

    def fingerprint(self) -> list[Any]:
        """A cheap stand-in for ray and the versions of what it needs, good on this host only.

        Each installation, upgrade or removal of a distribution changes the directory that holds them.
        """
        folder = packages_folder()
        return [self.version, folder, os.stat(folder).st_mtime_ns] if folder else [self.version]


class LockedRay:
    """The ray of the lockfile, where driver and cluster run from the environment themselves: then no other counts."""

    def require_fit(self, interpreter: Interpreter) -> None:
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

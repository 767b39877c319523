"""What the cluster's ray adds to a resolved set, so that a worker of the cluster can run from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.pylock import Pylock
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ray_envcache.checkout import toml
from ray_envcache.errors import RayVersionError
from ray_envcache.resolve import lockfile, uv
from ray_envcache.resolve.cluster_ray import AnyRay, LockedRay
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet


def additions(ray: AnyRay, resolved: ResolvedSet, interpreter: Interpreter) -> dict[str, str]:
    """The packages to add to `resolved`: {name: version}, nothing where the lockfile has the right ray.

    They are ray and what it needs, in the versions that the cluster itself has, so that the result depends on nothing
    but the lockfile and the cluster. Raises RayVersionError where the lockfile has another ray, or does not go with it.
    """
    locked = resolved.version_of("ray")
    if isinstance(ray, LockedRay):
        if locked is None:
            raise RayVersionError(
                "There is no ray in the lockfile, and the program is to run from it", "run `uv add ray`"
            )
    elif locked is None:
        return _with_needs(ray.version, resolved, interpreter)
    elif locked != ray.version:
        raise RayVersionError(
            f"The lockfile pins ray {locked}, the cluster runs ray {ray.version}",
            f'run `uv add "ray=={ray.version}"`, or start the cluster with ray {locked}',
        )
    return {}


def located(added: dict[str, str], interpreter: Interpreter) -> tuple[ResolvedPackage, ...]:
    """These packages as the indexes of this node have them, with hashes: wheels alone, which are the same everywhere.

    Settings of projects have no part in it: what the cluster's ray adds is shared by all. Raises RayVersionError where
    an index does not have them, PassingError where it does not answer.
    """
    if not added:
        return ()
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(added.items()))
    with uv.file_of(lines) as file:
        command = ["pip", "compile", "--no-deps", "--no-build", "--no-header", "--format=pylock.toml"]
        arguments = [*command, f"--python={interpreter.executable}", f"/dev/fd/{file}"]
        done = uv.run(arguments, cwd=Path("/"), pass_fds=[file])
    hint = (
        "lock ray with the project (uv add ray), set an index that has them (UV_INDEX, uv.toml), or use the cluster's "
        f'own: {{"inherit": {json.dumps(sorted(added))}}}'
    )
    uv.expect_success(done, RayVersionError, "This node does not get the cluster's ray and what it needs", hint)
    selected = lockfile.select(Pylock.from_dict(toml.parse(done.stdout)), interpreter)
    return tuple(lockfile.resolved_package(package, artifact, Path("/"), "") for package, artifact in selected)


def _with_needs(ray: str, resolved: ResolvedSet, interpreter: Interpreter) -> dict[str, str]:
    added = {"ray": ray}
    pending = list(_requirements("ray", interpreter.markers))
    while pending:
        needed, by = pending.pop()
        name = canonicalize_name(needed.name)
        have = resolved.version_of(name) or added.get(name)
        if have is None:
            have = added[name] = _installed_version(name, by)
            pending.extend(_requirements(name, interpreter.markers, needed.extras))
        if not needed.specifier.contains(have, prereleases=True):
            raise RayVersionError(
                f"{by} needs `{needed.name}{needed.specifier}`, the lockfile has {name} {have}",
                f'run `uv add "ray=={ray}"`, so that uv finds versions that go together',
            )
    return added


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

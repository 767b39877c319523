"""What of a set comes from the cluster's own Python: its ray and what that needs, and packages that are inherited.

Its ray is added to the set and installed. Inherited packages, CUDA builds of an image mostly, are linked and not
copied: the environment has a link for each folder, or file, that such a package brought.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, PackageNotFoundError, distribution, requires, version
from pathlib import Path

import tomli
from packaging.pylock import Pylock
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ray_envcache.errors import InheritError, RayVersionError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import lockfile, uv, uv_errors
from ray_envcache.resolve.interpreter import AnyRay, Interpreter, LockedRay
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from ray_envcache.system.files import file_identity


@dataclass(frozen=True)
class Inherited:
    """An installed package. `folder` is its site-packages, `files` what it brought, from there; `info` its RECORD."""

    name: str
    version: str
    folder: Path
    files: tuple[str, ...]
    info: Path

    def identity(self) -> list[str]:
        """The part of it that goes into a key."""
        return [self.name, self.version, os.fspath(self.folder), hashlib.sha256(self.info.read_bytes()).hexdigest()]

    def watched(self) -> tuple[str, int, int]:
        """The file that changes with each upgrade or removal of the package: its path, size and mtime (ns)."""
        size, changed = file_identity(os.fspath(self.info)) or (0, 0)
        return os.fspath(self.info), size, changed


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
    uv_errors.expect_success(done, RayVersionError, "Cannot find the cluster's ray and what it needs", hint)
    selected = lockfile.select(Pylock.from_dict(tomli.loads(done.stdout)), interpreter)
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


def split(
    resolved: ResolvedSet, added: dict[str, str], spec: EnvSpec
) -> tuple[ResolvedSet, dict[str, str], list[Inherited]]:
    """What to install of `resolved` and `added`, and what to inherit instead.

    Raises InheritError where a named package is not in the lockfile or not installed, or has another version there.
    """
    locked = {package.name: package.version for package in resolved.packages} | added
    wanted = {name for pattern in spec.inherit for name in fnmatch.filter(locked, pattern)}
    taken = {name: found for name in wanted if (found := _inherit(name, locked[name]))}
    _require_all(spec, locked, taken)
    return (
        replace(resolved, packages=tuple(package for package in resolved.packages if package.name not in taken)),
        {name: version for name, version in added.items() if name not in taken},
        [taken[name] for name in sorted(taken)],
    )


def _inherit(name: str, version: str) -> Inherited | None:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    # `2.4.0+cu121` is a build of 2.4.0 (PEP 440): the very thing that images bring.
    if not SpecifierSet(f"=={version}").contains(found.version, prereleases=True):
        raise InheritError(
            f"The lockfile has {name} {version}, the cluster's Python has {name} {found.version}",
            f'lock the version that is there (uv add "{name}=={found.version.partition("+")[0]}"), '
            "or let `inherit` name others alone",
        )
    return _described(name, found)


def _described(name: str, found: Distribution) -> Inherited:
    folder = Path(os.path.realpath(str(found.locate_file(""))))
    files = tuple(str(file) for file in found.files or () if ".." not in file.parts and not os.path.isabs(str(file)))
    records = [file for file in files if file.endswith(".dist-info/RECORD")]
    if not records:
        raise InheritError(
            f"The cluster's Python has {name}, but no list of its files: it was not installed from a wheel",
            "let `inherit` name others alone, or install it from a wheel there",
        )
    return Inherited(name, found.version, folder, files, folder / records[0])


def _require_all(spec: EnvSpec, locked: Collection[str], found: Collection[str]) -> None:
    """A name must be there; of a pattern with `*`, something must be."""
    for pattern in spec.inherit:
        if not fnmatch.filter(found, pattern):
            where = "installed in the cluster's Python" if fnmatch.filter(locked, pattern) else "in the lockfile"
            raise InheritError(f"Nothing to inherit: `{pattern}` is not {where}", "inherit names what both have")

"""From a project's files to the resolved set: the packages that will really be installed on this host."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

from packaging.pylock import (
    PackageDirectory,
    PackageVcs,
    Pylock,
    PylockSelectError,
    PylockValidationError,
)
from packaging.tags import parse_tag
from packaging.utils import canonicalize_name

from ray_envcache.checkout.project import Kind, Project
from ray_envcache.errors import InterpreterError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export, settings
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.system.texts import strip_credentials

if TYPE_CHECKING:
    from packaging.markers import Environment


@dataclass(frozen=True)
class ResolvedPackage:
    """One package of a resolved set. `artifact` is its table in pylock.toml form; `size` in bytes, 0 if unknown.

    `is_pinned` tells whether the lockfile itself has the hash, or the commit; where it has none, the digest is that of
    the file as it is now.
    """

    name: str
    version: str
    kind: str
    digest: str
    size: int
    artifact: dict[str, Any]
    is_pinned: bool = True

    def artifact_tables(self) -> list[dict[str, Any]]:
        """The table of the artifact itself, without the name and version around it."""
        wheels = self.artifact.get("wheels", [])
        return [*wheels, *(value for value in self.artifact.values() if isinstance(value, dict))]

    @property
    def is_built_here(self) -> bool:
        """Whether it is built from source, so that build settings have a say in what is installed."""
        files = (table.get("path") or urlsplit(table.get("url", "")).path for table in self.artifact_tables())
        return self.kind != "wheel" and not any(file.endswith(".whl") for file in files)


@dataclass(frozen=True)
class LocalPackage:
    """A package developed here: the project itself, a member of its workspace, a path dependency."""

    name: str
    path: Path
    editable: bool


@dataclass(frozen=True)
class ResolvedSet:
    """What a lockfile selects for one interpreter. `local` are those left to a layer: developed here."""

    packages: tuple[ResolvedPackage, ...]
    local: tuple[LocalPackage, ...] = ()
    build_settings: str = ""

    def with_packages(self, more: tuple[ResolvedPackage, ...]) -> ResolvedSet:
        """This set and `more` packages."""
        return replace(self, packages=tuple(sorted([*self.packages, *more], key=lambda package: package.name)))

    def version_of(self, name: str) -> str | None:
        """The version of the package with this normalized name, or None."""
        return next((package.version for package in self.packages if package.name == name), None)

    @property
    def is_built_here(self) -> bool:
        """Whether any package is built from source."""
        return any(package.is_built_here for package in self.packages)

    @property
    def loose(self) -> list[ResolvedPackage]:
        """The packages whose hashes the lockfile does not have: its text does not tell when one was replaced."""
        # A repository is not such a file: the commit says all.
        return [package for package in self.packages if not (package.is_pinned or package.kind == "vcs")]

    def local_files(self) -> list[str]:
        """The artifacts of `loose` packages that are files of this host."""
        return [table["path"] for package in self.loose for table in package.artifact_tables() if "path" in table]

    @property
    def download_size(self) -> int:
        """Bytes of all artifacts, as far as the lockfile knows them."""
        return sum(package.size for package in self.packages)


def resolve(spec: EnvSpec, project: Project, interpreter: Interpreter) -> ResolvedSet:
    """The packages `spec` selects from the project's lockfile for `interpreter`. Installs nothing.

    Only for a requirements file, which does not have them, an index is asked where the files are.
    Raises LockfileError (broken lockfile, unknown extra or group, no wheel) or InterpreterError (requires-python).
    """
    lock = _without_refused(_validated(export.export(spec, project, interpreter), project), project.folder)
    _require_python(lock, project, interpreter)
    if project.kind is Kind.PYLOCK:
        _require_options(lock, spec, project)
    selected = select(lock, interpreter, spec.extras, {*(lock.default_groups or ()), *spec.groups})
    known = "".join(path.read_text("utf-8") for path in project.lock_files())
    local = [(package, artifact) for package, artifact in selected if isinstance(artifact, PackageDirectory)]
    others = [(package, artifact) for package, artifact in selected if not isinstance(artifact, PackageDirectory)]
    packages = [resolved_package(package, artifact, project.folder, known) for package, artifact in others]
    built = [f"{one.name} {one.version} ({one.kind})" for one in packages if one.is_built_here]
    if built and spec.no_build:
        raise LockfileError(
            f"Not a wheel, and `no_build` is set: {', '.join(built)}",
            "lock versions that have a wheel for this platform, or leave out `no_build`",
        )
    return ResolvedSet(
        packages=tuple(sorted(packages, key=lambda package: package.name)),
        local=tuple(_local(package, artifact, project.folder) for package, artifact in local),
        build_settings=_build_settings(project.folder),
    )


def _local(package: Any, artifact: Any, folder: Path) -> LocalPackage:
    # A path starts where the lockfile is.
    path = Path(os.path.normpath(folder / artifact.path / (artifact.subdirectory or ".")))
    return LocalPackage(package.name, path, bool(artifact.editable))


def _validated(data: dict[str, Any], project: Project) -> Pylock:
    try:
        return Pylock.from_dict(data)
    except PylockValidationError as error:
        raise LockfileError(
            f"`{project.file}` is not a lockfile that we know: {error}",
            "write it again with the tool that made it; where it is of a later version, upgrade packaging on this node "
            "(python -m pip install --upgrade packaging)",
        ) from error


def _without_refused(lock: Pylock, folder: Path) -> Pylock:
    """The lockfile without the wheels that settings in `folder` refuse, where uv takes the source package instead."""
    found = settings.of_project(folder)
    names = found.get("no-binary-package")
    refused = {canonicalize_name(str(name)) for name in names} if isinstance(names, list) else set()
    every = bool(found.get("no-binary"))
    packages = [
        replace(one, wheels=None) if one.sdist and (every or one.name in refused) else one for one in lock.packages
    ]
    return replace(lock, packages=packages)


def _require_python(lock: Pylock, project: Project, interpreter: Interpreter) -> None:
    wanted = lock.requires_python
    if wanted and not wanted.contains(interpreter.version, prereleases=True):
        raise InterpreterError(
            f"The project in `{project.folder}` requires Python {wanted}, the cluster runs {interpreter.version}",
            "start the cluster with a Python that fits, or relax requires-python and lock again",
        )


def _require_options(lock: Pylock, spec: EnvSpec, project: Project) -> None:
    """Raise LockfileError for an extra or a group that the lockfile was not made with."""
    options = (("extra", spec.extras, lock.extras), ("group", spec.groups, lock.dependency_groups))
    for option, chosen, listed in options:
        known = {str(canonicalize_name(name)) for name in listed or ()}
        for name in chosen:
            if name not in known:
                hint = f"it was locked with: {', '.join(sorted(known)) or f'no {option} at all'}"
                raise LockfileError(f"`{project.file}` has no {option} `{name}`", hint)


def select(
    lock: Pylock, interpreter: Interpreter, extras: Collection[str] = (), groups: Collection[str] = ()
) -> list[tuple[Any, Any]]:
    """The packages for this interpreter and the artifact of each, as packaging has them. Raises LockfileError."""
    tags = [tag for text in interpreter.tags for tag in parse_tag(text)]
    environment = cast("Environment", interpreter.markers)
    try:
        return list(lock.select(environment=environment, tags=tags, extras=extras, dependency_groups=groups))
    except PylockSelectError as error:
        raise LockfileError(
            f"The lockfile has no set of packages for this interpreter: {error}",
            f"lock for Python {interpreter.version} on this platform, with the extras and groups that go together",
        ) from error


def resolved_package(package: Any, artifact: Any, folder: Path, known: str) -> ResolvedPackage:
    """A selected package with its artifact. Relative paths start from `folder`; `known` is the text of the lockfile."""
    kind = type(artifact).__name__.removeprefix("Package").lower()
    table = _artifact_table(artifact, folder)
    index = strip_credentials(package.index or "")
    about = {"name": package.name, "version": str(package.version or ""), "index": index}
    hashes = table.get("hashes", {})
    return ResolvedPackage(
        name=package.name,
        version=about["version"],
        kind=kind,
        digest=_digest(hashes) or table.get("commit-id", ""),
        size=getattr(artifact, "size", None) or 0,
        artifact={
            **{name: value for name, value in about.items() if value},
            # A package has a list of wheels, but one of everything else.
            **({"wheels": [table]} if kind == "wheel" else {kind: table}),
        },
        is_pinned=any(value in known for value in (*hashes.values(), table.get("commit-id")) if value),
    )


def _digest(hashes: dict[str, str]) -> str:
    """The digest of an artifact with these hashes: one where that is enough, whichever others a lockfile adds."""
    if "sha256" in hashes:
        return f"sha256:{hashes['sha256']}"
    return ",".join(f"{name}:{value}" for name, value in sorted(hashes.items()))


def _artifact_table(artifact: Any, folder: Path) -> dict[str, Any]:
    """The artifact as pylock.toml spells it, readable from any folder; local files always with a hash."""
    fields = ("name", "url", "path", "size", "hashes", "type", "requested_revision", "commit_id", "subdirectory")
    values = {field: getattr(artifact, field, None) for field in fields}
    table = {field.replace("_", "-"): value for field, value in values.items() if value is not None}
    if not isinstance(artifact, PackageVcs) and str(table.get("url", "")).startswith("file:"):
        # uv takes archives that are files by their path only.
        table["path"] = unquote(urlsplit(table.pop("url")).path)
    if "path" in table:
        path = folder / table["path"]
        # Of a file that is here the hash says all; uv refuses one whose noted size is off.
        table.pop("size", None)
        table["path"] = str(path)
        if path.is_file():
            table["hashes"] = dict(table.get("hashes") or {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    if "url" in table:
        table["url"] = strip_credentials(table["url"])
    return table


def _build_settings(folder: Path) -> str:
    """The settings that decide what a build from source gives, as canonical JSON."""
    found = settings.of_project(folder)
    chosen = {name: value for name, value in found.items() if name in settings.BUILD}
    return json.dumps(chosen, sort_keys=True, default=str)

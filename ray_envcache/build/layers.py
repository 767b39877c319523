"""Layers: locally developed packages, installed in front of a shared environment without touching it.

A layer is an entry of the store like others, with a small venv of its own: `sys.prefix`, shebangs and the hold work by
themselves, and its site-packages come before those of the environment below. Its key is the key of that environment
and the content of the packages, so an edited line costs a layer and never an environment.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_envcache.build import venv_files
from ray_envcache.build.plan import EnvironmentPlan, Plan, pip_options
from ray_envcache.build.uv_calls import UvCalls
from ray_envcache.checkout import content
from ray_envcache.checkout.content import Content
from ray_envcache.errors import DigestError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export
from ray_envcache.resolve.lockfile import LocalPackage
from ray_envcache.store import key
from ray_envcache.store.layout import Entry
from ray_envcache.system import files

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LocalPackagesPlan(Plan):
    """A build of the local packages in `folders` on top of the environment `base`."""

    base: Entry
    folders: tuple[Path, ...]
    digest: str

    holds = 2
    # The environment below was checked so; an import of ray takes 0.4 s.
    import_ray = False

    @property
    def headline(self) -> str:
        return f"Building the local packages of {self.project}: {', '.join(folder.name for folder in self.folders)}"

    def install(self, entry: Entry, run_uv: UvCalls) -> None:
        venv_files.add_base(entry, self.base)
        run_uv("pip", "install", "--no-deps", *pip_options(entry), *self.packages(entry))
        venv_files.add_scripts_of(entry, self.base)
        venv_files.add_data_of(entry, self.base)

    def packages(self, entry: Entry) -> list[str]:
        """The packages, as arguments of `uv pip install`."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {
            "packages": len(self.folders),
            "added": (),
            "hashes": "none",
            "no_build": False,
            "inherited": (),
            "base": os.fspath(self.base.path) if self.base.readonly else self.base.path.name,
            "content": self.digest,
        }


@dataclass(frozen=True)
class LayerPlan(_LocalPackagesPlan):
    """A build of the packages as their content is now."""

    contents: tuple[Content, ...]

    def install(self, entry: Entry, run_uv: UvCalls) -> None:
        super().install(entry, run_uv)
        files.remove_tree(entry.sources)

    def prepare(self, entry: Entry) -> None:
        """Copy the packages; they keep their places to each other and to the root of their workspace."""
        for one in self.contents:
            one.copy(self._place(entry, one.folder), within=entry.sources)
        _copy_projects(self.folder, self._place(entry, self.folder), within=entry.sources)

    def packages(self, entry: Entry) -> list[str]:
        return [os.fspath(self._place(entry, folder)) for folder in self.folders]

    def _place(self, entry: Entry, folder: Path) -> Path:
        return entry.sources / os.path.relpath(folder, self._top)

    @cached_property
    def _top(self) -> str:
        return os.path.commonpath([self.folder, *self.folders, *(one.top for one in self.contents)])


@dataclass(frozen=True)
class EditableLayerPlan(_LocalPackagesPlan):
    """A build that imports the packages from where they are developed: edits show at once, in this checkout only."""

    def packages(self, entry: Entry) -> list[str]:  # noqa: ARG002  # the other kind needs it
        return [argument for folder in self.folders for argument in ("--editable", os.fspath(folder))]

    def facts(self) -> dict[str, Any]:
        built = map(os.fspath, content.extensions(self.folders))
        return {**super().facts(), "inherited": tuple((path, *(files.file_identity(path) or (0, 0))) for path in built)}


def _copy_projects(root: Path, target: Path, within: Path) -> None:
    """Copy the pyproject.toml of a workspace and its members: a build of one reads what they say of each other."""
    lock = root / "uv.lock"
    for name in {".", *export.local_sources(lock)}:
        source, copy = root / name / "pyproject.toml", target / name / "pyproject.toml"
        # One elsewhere that is not installed is not needed either.
        if source.is_file() and not copy.exists() and content.is_inside(copy, within):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def contents_of(packages: Iterable[LocalPackage]) -> tuple[Content, ...]:
    """The content of the packages, in the order of their folders. Raises LockfileError where one is not here."""
    return tuple(map(content.scan, _folders(packages)))


def _folders(packages: Iterable[LocalPackage]) -> tuple[Path, ...]:
    folders = tuple(sorted({package.path for package in packages}))
    for folder in folders:
        content.require_folder(folder)
    return folders


def digest_of(contents: Iterable[Content]) -> str:
    """The digest of all packages of a layer, "sha256:...": what a field value pins. Their places are not in it."""
    return f"sha256:{key.digest_of(sorted(one.digest for one in contents))}"


def digest_of_editable(packages: Iterable[LocalPackage]) -> str:
    """The digest of packages imported from their folders: their paths, and the files that say how to install them."""
    found = [[os.fspath(folder), content.scan_definition(folder).digest] for folder in _folders(packages)]
    return f"sha256:{key.digest_of(found)}"


def layer_plan(spec: EnvSpec, plan: EnvironmentPlan, base: Entry) -> LayerPlan:
    """The build of `plan`'s local packages on `base`. Raises LockfileError, or DigestError where `spec` pins others."""
    contents = contents_of(plan.resolved.local)
    digest = digest_of(contents)
    if spec.content is not None and spec.content != digest:
        raise DigestError(
            f"The local packages of `{plan.folder}` have the digest {digest[:19]}…, "
            f"the field value pins {spec.content[:19]}…",
            "bring this node's files up to date, or make the field value anew with ray_envcache.runtime_env()",
        )
    for warning in filter(None, (one.warning() for one in contents)):
        _logger.warning(warning)
    return LayerPlan(**_common(plan, base, digest), folders=tuple(one.folder for one in contents), contents=contents)


def editable_plan(_spec: EnvSpec, plan: EnvironmentPlan, base: Entry) -> EditableLayerPlan:
    """The build of `plan`'s local packages on `base`, imported from where they are developed."""
    digest = digest_of_editable(plan.resolved.local)
    return EditableLayerPlan(**_common(plan, base, digest), folders=_folders(plan.resolved.local))


def _common(plan: EnvironmentPlan, base: Entry, digest: str) -> dict[str, Any]:
    return {
        "key": key.layer_key(base.key, digest, plan.resolved.build_settings),
        "interpreter": plan.interpreter,
        "folder": plan.folder,
        "project": plan.project,
        "ray": plan.ray,
        "base": base,
        "digest": digest,
    }

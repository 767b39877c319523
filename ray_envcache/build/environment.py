"""An environment: what a lockfile selects, and the cluster's ray."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ray_envcache.build import venv_files
from ray_envcache.build.plan import BuildUv, Plan, into
from ray_envcache.resolve import inherit
from ray_envcache.resolve.inherit import Inherited
from ray_envcache.resolve.lockfile import ResolvedSet
from ray_envcache.store.layout import Entry
from ray_envcache.system.units import format_size


@dataclass(frozen=True)
class EnvironmentPlan(Plan):
    """A build of the resolved set. `added` are those of it that the cluster's ray brings: {name: version}.

    `inherited` are those used from the cluster's own Python.
    """

    resolved: ResolvedSet
    added: dict[str, str]
    inherited: tuple[Inherited, ...] = ()
    system_site_packages: bool = False

    @property
    def headline(self) -> str:
        count, size = len(self.resolved.packages), self.download_size
        sized = f", {format_size(size)}" if size else ""
        return f"Building the environment of {self.project}: {count} packages{sized}"

    @property
    def download_size(self) -> int:
        return self.resolved.download_size

    @property
    def venv_options(self) -> list[str]:
        return ["--system-site-packages"] if self.system_site_packages else []

    def install(self, entry: Entry, run_uv: BuildUv) -> None:
        entry.pylock.write_text(venv_files.pylock_text(self.resolved), encoding="utf-8")
        common = ["--preview-features=pylock", *into(entry)]
        if self.resolved.packages:
            self._install_build_dependencies(entry, run_uv, common)
            run_uv("pip", "sync", *common, entry.pylock)
        # After uv, which would remove them as nobody's.
        inherit.link(self.inherited, entry.site_packages)

    def _install_build_dependencies(self, entry: Entry, run_uv: BuildUv, common: list[str]) -> None:
        """Where a build is to see the environment itself, everything that needs no build goes there before."""
        if "no-build-isolation" in self.resolved.build_settings and self.resolved.is_built_here:
            wheels = replace(
                self.resolved, packages=tuple(one for one in self.resolved.packages if not one.is_built_here)
            )
            entry.pylock.write_text(venv_files.pylock_text(wheels), encoding="utf-8")
            run_uv("pip", "sync", *common, entry.pylock)
            entry.pylock.write_text(venv_files.pylock_text(self.resolved), encoding="utf-8")

    def facts(self) -> dict[str, Any]:
        return {
            "packages": len(self.resolved.packages),
            "base": "",
            "content": "",
            "hashes": self._hashes(),
            "no_build": not self.resolved.is_built_here,
            "inherited": tuple(one.watched() for one in self.inherited),
            "added": tuple(f"{name}=={version}" for name, version in sorted(self.added.items())),
        }

    def _hashes(self) -> str:
        """Of how many packages the lockfile has the hash. What the cluster's ray brings is not in it."""
        pinned = {package.is_pinned for package in self.resolved.packages}
        return "some" if len(pinned) == 2 else "none" if pinned == {False} else "all"

"""Layers: locally developed packages, installed in front of a shared environment without touching it.

A layer is an entry of the store like others. Its venv has links to all that the environment below has, see `venv`,
and the project's own packages for real, as uv builds them from where they are developed. Its key is the key of that
environment and the content of the packages, so an edited line costs a layer and never an environment.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from packaging.utils import canonicalize_name

from ray_envcache.build import venv
from ray_envcache.build.plan import EnvironmentPlan, Plan, pip_options, settings_facts, sync_options
from ray_envcache.build.venv import UvCalls
from ray_envcache.checkout import content
from ray_envcache.checkout.content import Content
from ray_envcache.errors import ChangedError, DigestError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.lockfile import LocalPackage
from ray_envcache.store import key
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.record import Facts, ReadyRecord, read_facts
from ray_envcache.system import files

# What uv adds to a wheel: notes on where it is from, and scripts, which name the place of their interpreter.
_ADDED = re.compile(
    rb"[^,]*\.dist-info/(INSTALLER|RECORD|REQUESTED|direct_url\.json|uv_build\.json|uv_cache\.json),|(\.\./)+bin/"
)


@dataclass(frozen=True)
class LayerPlan(Plan):
    """A build of the local packages `sources` on top of the environment `base`, as their content is now.

    With `editable` those that the lockfile calls editable are imported from where they are developed: edits show at
    once, in this checkout only. `others` are the names of what uv leaves out: it is in the environment below.
    """

    base: Entry
    sources: tuple[Source, ...]
    digest: str
    editable: bool
    selection: tuple[str, ...] | None
    others: tuple[str, ...]
    build_settings: str

    holds = 2
    # The environment below was checked so; an import of ray takes 0.4 s.
    import_ray = False

    @property
    def headline(self) -> str:
        names = ", ".join(one.package.name for one in self.sources)
        return f"Building the local packages of {self.project}: {names}"

    def install(self, entry: Entry, run_uv: UvCalls) -> None:
        earlier = _earlier_builds(layout_of(entry), self.interpreter)
        with self._visible(entry, run_uv) as call:
            # uv has no eye for an edited source file: it would take the build that its cache has.
            self._install(entry, call, [one for one in self.sources if one.identity() not in earlier])
            # Where another uv has built other content since, the cache has that.
            stale = [one for one in self.sources if earlier.get(one.identity()) not in {None, one.record(entry)}]
            if stale:
                self._install(entry, call, stale)
        self._require_unchanged()

    def link(self, entry: Entry) -> None:
        venv.link(self.base, entry)

    def _install(self, entry: Entry, run_uv: UvCalls, anew: list[Source]) -> None:
        again = [f"--reinstall-package={one.package.name}" for one in anew]
        if self.selection is None:
            folders = [argument for one in self.sources for argument in one.arguments()]
            run_uv("pip", "install", "--no-deps", *pip_options(entry), *again, *folders)
        else:
            modes = [] if self.editable else ["--no-editable"]
            absent = [f"--no-install-package={name}" for name in self.others]
            run_uv("sync", *sync_options(entry), *self.selection, *modes, *absent, *again)

    @contextmanager
    def _visible(self, entry: Entry, run_uv: UvCalls) -> Iterator[UvCalls]:
        """Let builds that see the environment itself see what is below too, while the context lasts."""
        if "no-build-isolation" not in self.build_settings:
            yield run_uv
            return
        chain = entry.site_packages / "_ray_envcache_base.pth"
        chain.write_text(f"import site; site.addsitedir({os.fspath(self.base.site_packages)!r})\n", encoding="utf-8")
        yield replace(run_uv, environ={"PATH": f"{self.base.bin}{os.pathsep}{os.environ.get('PATH', os.defpath)}"})
        chain.unlink()

    def _require_unchanged(self) -> None:
        """Raise ChangedError where a package was edited since its content was hashed: the key tells what is in it."""
        for one in self.sources:
            now = Source.of(one.package, editable=one.is_editable)
            names = one.content.edited_until(now.content)
            if names:
                raise ChangedError(
                    f"`{one.package.path / names[0]}` was edited while the package was built",
                    "try again; name what programs write there in .gitignore, or let them write elsewhere",
                )

    def recorded(self, entry: Entry) -> dict[str, Any]:
        watched = content.extensions([one.package.path for one in self.sources if one.is_editable])
        return {
            "inherited": tuple((path, *(files.file_identity(path) or (0, 0))) for path in map(os.fspath, watched)),
            "base": os.fspath(self.base.path) if self.base.readonly else self.base.path.name,
            "content": self.digest,
            "local": tuple((*one.identity(), one.record(entry)) for one in self.sources),
        }

    def facts(self) -> Facts:
        below, local = read_facts(self.base), [one.identity() for one in self.sources]
        own = {f"content {name}": digest for name, _, digest in local}
        # For one checkout only.
        place = {"option editable": os.fspath(self.folder)} if self.editable else {}
        return below and below | own | place | settings_facts(self.build_settings)


@dataclass(frozen=True)
class Source:
    """A local package and its content; of one that `is_editable` only what says how to install it."""

    package: LocalPackage
    content: Content
    is_editable: bool

    @classmethod
    def of(cls, package: LocalPackage, *, editable: bool) -> Source:
        """The package as it is now. Raises LockfileError where it is not here."""
        content.require_folder(package.path)
        is_editable = editable and package.editable
        scan = content.scan_definition if is_editable else content.scan
        return cls(package, scan(package.path), is_editable)

    def arguments(self) -> list[str]:
        """The package as arguments of `uv pip install`."""
        return [*(["--editable"] if self.is_editable else []), os.fspath(self.package.path)]

    def identity(self) -> tuple[str, str, str]:
        """What a build of it is made from."""
        return self.package.name, os.fspath(self.package.path), self.content.digest

    def record(self, entry: Entry) -> str:
        """The digest of its files in `entry`, as its wheel has them. "" where it is not installed."""
        for info in entry.site_packages.glob("*.dist-info"):
            if canonicalize_name(info.name.partition("-")[0]) == self.package.name:
                lines = sorted(line for line in (info / "RECORD").read_bytes().splitlines() if not _ADDED.match(line))
                return hashlib.sha256(b"\n".join(lines)).hexdigest()
        return ""


def sources_of(packages: Iterable[LocalPackage], *, editable: bool = False) -> tuple[Source, ...]:
    """The packages with their content, in the order of their folders. Raises LockfileError where one is not here."""
    by_folder = {package.path: package for package in packages}
    return tuple(Source.of(by_folder[folder], editable=editable) for folder in sorted(by_folder))


def digest_of(sources: Iterable[Source], *, editable: bool = False) -> str:
    """The digest of all packages of a layer, "sha256:...": what a field value pins. Their places are not in it.

    But for `editable` layers: they are good for one checkout only.
    """
    found = [[os.fspath(one.package.path), one.content.digest] if editable else one.content.digest for one in sources]
    return f"sha256:{key.digest_of(sorted(found))}"


def layer_plan(spec: EnvSpec, plan: EnvironmentPlan, base: Entry, *, editable: bool) -> LayerPlan:
    """The build of `plan`'s local packages on `base`. Raises LockfileError, or DigestError where `spec` pins others."""
    sources = sources_of(plan.resolved.local, editable=editable)
    digest = digest_of(sources, editable=editable)
    if spec.content is not None and not editable and spec.content != digest:
        raise DigestError(
            f"The local packages of `{plan.folder}` have the digest {digest[:19]}…, "
            f"the field value pins {spec.content[:19]}…",
            "bring this node's files up to date, or make the field value anew with ray_envcache.runtime_env()",
        )
    settings = plan.resolved.build_settings
    # For such a build uv wants a version to match among what it installs: then it links all into the layer itself.
    others = [one.name for one in plan.inherited] if "match-runtime" in settings else plan.names
    return LayerPlan(
        key=key.layer_key(base.key, digest, settings),
        interpreter=plan.interpreter,
        folder=plan.folder,
        project=plan.project,
        ray=plan.ray,
        base=base,
        sources=sources,
        digest=digest,
        editable=editable,
        selection=plan.selection,
        others=tuple(others),
        build_settings=settings,
    )


def _earlier_builds(layout: Layout, interpreter: Interpreter) -> dict[tuple[str, str, str], str]:
    """The builds in the layers of a store that this interpreter has made: {name, folder, digest: digest of files}."""
    found: dict[tuple[str, str, str], str] = {}
    for entry in layout.all_entries():
        record = ReadyRecord.read(entry)  # none where the module that an editable one has compiled is gone
        if record and record.base and record.base_python == interpreter.executable:
            found |= {(package, folder, content): built for package, folder, content, built in record.local}
    return found

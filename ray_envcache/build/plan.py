"""What a build will install: from a project to its plan. Making a plan asks uv and the interpreter; changes nothing."""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray_envcache.build import venv
from ray_envcache.build.venv import UvCalls
from ray_envcache.checkout.project import Kind, Project
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export, from_cluster, interpreter, lockfile, uv
from ray_envcache.resolve.from_cluster import Inherited, additions, located
from ray_envcache.resolve.interpreter import AnyRay, Interpreter
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from ray_envcache.store import key
from ray_envcache.store.layout import Entry
from ray_envcache.store.record import Facts
from ray_envcache.system.texts import format_size


@dataclass(frozen=True)
class Plan:
    """What every build needs. Subclasses say what is installed into the fresh venv.

    `holds` is the number of entries that an interpreter of the result holds: its own, and those below it. With
    `import_ray` the result is handed out only after ray was imported in it.
    """

    key: str
    interpreter: Interpreter
    folder: Path
    project: str
    ray: str

    holds = 1
    import_ray = True

    @property
    def headline(self) -> str:
        """What is built, for people."""
        raise NotImplementedError

    @property
    def download_size(self) -> int:
        """Bytes of all artifacts, as far as they are known."""
        return 0

    def is_cached(self, near: Path) -> bool:  # noqa: ARG002  # the other kind needs it
        """Whether uv downloads and unpacks nothing for an environment at `near`: then it needs next to no room."""
        return True

    @property
    def versions(self) -> dict[str, str]:
        """The version of each package, "" where that is not known; {} where the key is that of their contents."""
        return {}

    def install(self, entry: Entry, run_uv: UvCalls) -> None:
        """Install its packages into the fresh venv of `entry`. Raises BuildError."""
        raise NotImplementedError

    def link(self, entry: Entry) -> None:
        """Link the rest, after uv, which would remove links that it did not make."""
        raise NotImplementedError

    def recorded(self, entry: Entry) -> dict[str, Any]:
        """The fields of `ReadyRecord` that this kind of plan knows, for the `entry` that it has filled."""
        raise NotImplementedError

    def facts(self) -> Facts:
        """What the key is made of, in words; {} where that is not known of the environment below."""
        raise NotImplementedError


@dataclass(frozen=True)
class EnvironmentPlan(Plan):
    """A build of the resolved set. `added` are those of it that the cluster's ray brings: {name: version}.

    `inherited` are those used from the cluster's own Python. `selection` are the arguments by which uv selects the set
    from its own lockfile; None where the lockfile is of another kind.
    """

    resolved: ResolvedSet
    added: dict[str, str]
    selection: tuple[str, ...] | None
    inherited: tuple[Inherited, ...] = ()

    @property
    def headline(self) -> str:
        count, size = len(self.resolved.packages), self.download_size
        sized = f", {format_size(size)}" if size else ""
        return f"Building the environment of {self.project}: {count} packages{sized}"

    @property
    def download_size(self) -> int:
        return self.resolved.download_size

    def is_cached(self, near: Path) -> bool:
        cache = uv.cache_directory(near)
        if cache is None:
            return False
        # On a disk without any room there is none to ask either: then it counts as not cached.
        with suppress(OSError), tempfile.TemporaryDirectory() as folder:
            pylock = Path(folder) / "pylock.toml"
            pylock.write_text(venv.pylock_text(self.resolved), encoding="utf-8")
            dry = ["pip", "sync", "--dry-run", "--offline", "--preview-features=pylock", "--break-system-packages"]
            target = [f"--python={self.interpreter.executable}", f"--target={folder}/target"]
            done = uv.run([*dry, *target, pylock], cwd=self.folder, cache=cache)
            return done.returncode == 0 and "Would download" not in done.stderr
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all packages of the lockfile but those developed here."""
        found = {*(package.name for package in self.resolved.packages), *(one.name for one in self.inherited)}
        return tuple(sorted(found - self.added.keys()))

    @property
    def versions(self) -> dict[str, str]:
        return {package.name: package.version for package in self.resolved.packages}

    def install(self, entry: Entry, run_uv: UvCalls) -> None:
        entry.pylock.write_text(venv.pylock_text(self.resolved), encoding="utf-8")
        if self.selection is not None:
            self._sync(entry, run_uv, self.selection)
        elif self.resolved.packages:
            self._sync_list(entry, run_uv)

    def link(self, entry: Entry) -> None:
        venv.link_inherited(self.inherited, entry.site_packages)

    def _sync(self, entry: Entry, run_uv: UvCalls, selection: tuple[str, ...]) -> None:
        """Have uv install from its own lockfile, and then what the cluster's ray adds, with the cluster's settings."""
        elsewhere = [*(one.name for one in self.resolved.local), *(one.name for one in self.inherited)]
        absent = [f"--no-install-package={name}" for name in elsewhere]
        # uv has no hash of these, and would take the file that it saw before. Offline it refuses `--refresh-package`.
        again = [f"--reinstall-package={package.name}" for package in self.resolved.loose]
        run_uv("sync", *sync_options(entry), *selection, "--no-editable", *absent, *again)
        if self.added:
            # By name and hash. By its URL uv takes a file from its cache only where the index sends headers for that:
            # behind a mirror that sends none, each environment would download ray again, and have a copy of its own.
            hashes = {one.name: one.digest.replace(",", " --hash=") for one in self.resolved.packages}
            lines = (f"{name}=={version} --hash={hashes[name]}\n" for name, version in self.added.items())
            listed = entry.path / "added.txt"
            listed.write_text("".join(lines), encoding="utf-8")
            apart = replace(run_uv, folder=Path("/"))
            apart("pip", "install", "--no-deps", "--require-hashes", *pip_options(entry), "-r", listed)
            listed.unlink()

    def _sync_list(self, entry: Entry, run_uv: UvCalls) -> None:
        if "no-build-isolation" in self.resolved.build_settings and self.resolved.is_built_here:
            # A build that sees the environment itself needs everything there that needs no build.
            wheels = tuple(package for package in self.resolved.packages if not package.is_built_here)
            first = entry.path / "pylock.wheels.toml"
            first.write_text(venv.pylock_text(replace(self.resolved, packages=wheels)), encoding="utf-8")
            run_uv("pip", "sync", "--preview-features=pylock", *pip_options(entry), first)
            first.unlink()
        run_uv("pip", "sync", "--preview-features=pylock", *pip_options(entry), entry.pylock)

    def recorded(self, entry: Entry) -> dict[str, Any]:  # noqa: ARG002  # the other kind needs it
        return {"inherited": tuple(one.watched() for one in self.inherited)}

    def facts(self) -> Facts:
        python = self.interpreter.identity()
        found = {f"python {name}": value for name, value in {**python.pop("markers"), **python}.items()}
        for package in self.resolved.packages:
            found[f"package {package.name}"] = package.version or "(no version)"
            found[f"artifact {package.name}"] = _artifact(package)
        for one in self.inherited:
            found[f"package {one.name}"] = f"{one.version} (inherited)"
            found[f"artifact {one.name}"] = key.digest_of(one.identity())
        return found | settings_facts(self.resolved.build_settings if self.resolved.is_built_here else "")


def _artifact(package: ResolvedPackage) -> str:
    """What tells the artifact of a package from another one of its version. Without its URL, which may hold a token."""
    content = key.content_of(package)
    return " ".join(content).strip().removeprefix("sha256:") if package.digest else key.digest_of(content)


def settings_facts(settings: str) -> Facts:
    """The facts of uv's settings, which are JSON. As digests: a value may hold a secret."""
    return {f"setting {name}": key.digest_of(value) for name, value in json.loads(settings or "{}").items()}


def pip_options(entry: Entry) -> list[str]:
    """The options by which `uv pip` installs into the venv of `entry`."""
    # Bytecode is ours to make, after the hand-out and once per store, also where the project asks uv for it.
    return [f"--python={entry.python}", "--no-python-downloads", "--no-compile-bytecode"]


def sync_options(entry: Entry) -> list[str]:
    """The options by which `uv sync` installs what a lockfile says into the venv of `entry`, and removes nothing."""
    return ["--frozen", "--inexact", *pip_options(entry)]


def plan_of(spec: EnvSpec, project: Project, executable: str, ray: AnyRay, *, check_current: bool) -> EnvironmentPlan:
    """The plan of the environment that `spec` means, for the base interpreter at `executable`.

    With `check_current` the lockfile has to match the project. Raises LockfileError, InterpreterError, RayVersionError.
    """
    python, resolved = _resolve(spec, project, executable, ray, check_current=check_current)
    added = additions(ray, resolved, python)
    version = resolved.version_of("ray") or added["ray"]
    resolved, added, inherited = from_cluster.split(resolved, added, spec)
    resolved = resolved.with_packages(located(added, python))
    return EnvironmentPlan(
        key=key.compute_key(resolved, python, [one.identity() for one in inherited]),
        resolved=resolved,
        added=added,
        interpreter=python,
        folder=project.folder,
        project=project.name(),
        ray=version,
        selection=tuple(export.selection(spec, project)) if project.kind is Kind.UV else None,
        inherited=tuple(inherited),
    )


def require_buildable(spec: EnvSpec, ray: AnyRay) -> ResolvedSet:
    """Raise what `Store.acquire` would raise for bad input, without a store and without building anything."""
    executable = interpreter.base_executable(spec.python)
    project = Project.locate(Path(spec.path), spec.package)
    python, resolved = _resolve(spec, project, executable, ray, check_current=True)
    additions(ray, resolved, python)
    return resolved


def _resolve(
    spec: EnvSpec, project: Project, executable: str, ray: AnyRay, *, check_current: bool
) -> tuple[Interpreter, ResolvedSet]:
    python = interpreter.probe(executable)
    ray.require_fit(python)
    resolved = lockfile.resolve(spec, project, python)
    if check_current:
        # Last: what is wrong with the interpreter or the lockfile itself says more.
        export.require_current(project, executable)
    return python, resolved

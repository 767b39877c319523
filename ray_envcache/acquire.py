"""The store: from a field value to a lease on the one environment of this host that fits it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError
from typing import TYPE_CHECKING, NamedTuple

from ray_envcache.checkout.project import Project
from ray_envcache.errors import ChangedError, LockfileError
from ray_envcache.resolve import interpreter
from ray_envcache.store import journal
from ray_envcache.store.key import Memo, layer_key, memo_name, recall, remember
from ray_envcache.store.layout import Entry, Layout, newest_first, only_key
from ray_envcache.store.leases import Holder, Lease, claim
from ray_envcache.store.roots import opened
from ray_envcache.system import children, flock
from ray_envcache.system.files import file_identity

if TYPE_CHECKING:
    from ray_envcache.build.plan import EnvironmentPlan
    from ray_envcache.build.progress import Observer
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.resolve.interpreter import AnyRay
    from ray_envcache.resolve.lockfile import ResolvedSet

_TRIES = 3
"""How often an environment is asked for while the files that say which one change."""


class Inputs(NamedTuple):
    """What a lookup depends on. `project` is None where only the pinned digest is known on this node.

    `memo` is the name of the memo for them. With `editable` local packages are imported from where they are developed.
    """

    spec: EnvSpec
    project: Project | None
    executable: str
    memo: str
    editable: bool = False

    @property
    def folder(self) -> str:
        """The project's folder, "" where it is not on this node."""
        return os.fspath(self.project.folder) if self.project else ""


class Store:
    """The environments of one user on one host. Any number of processes may use one store at the same time.

    `readonly` are the read-only stores whose environments are used too, where they are, and never changed.
    """

    def __init__(self, layout: Layout, readonly: tuple[Layout, ...] = ()) -> None:
        self.layout = layout
        self.readonly = readonly

    @classmethod
    def open(cls, root: Path | None = None) -> Store:
        """Open the store at `root` (default: $RAY_ENVCACHE_DIR, else the user's cache directory), made if need be.

        With the read-only stores that $RAY_ENVCACHE_READONLY_DIRS names. Raises StoreError where the store cannot be
        private, shared between processes, or written; and where a read-only one is not to be trusted.
        """
        return cls(*opened(root))

    @journal.noted
    def lookup(self, spec: EnvSpec, ray: AnyRay, holder: Holder) -> Lease | None:
        """A lease on the environment if it is there and a memo leads to it, else None.

        The warm path: one hash of the files, one read, one claim. Starts no process and imports nothing that builds.
        Raises LockfileError (no such file, wrong digest), InterpreterError, BusyError, and StoreError where a read-only
        store cannot be trusted.
        """
        return self._claim_known(self._inputs(spec, ray), holder, may_look=False)

    @journal.noted
    def acquire(
        self,
        spec: EnvSpec,
        ray: AnyRay,
        holder: Holder,
        observer: Observer | None = None,
        *,
        check_current: bool = False,
        editable: bool = False,
        finish: bool = True,
    ) -> Lease:
        """A lease on the environment for `spec`, which is built first if need be, once on this host however many ask.

        `spec.path` is absolute. That the lockfile matches pyproject.toml is checked with `check_current`, or where no
        digest is pinned: a pinned one was checked where it was made, and on a node the indexes may be configured
        otherwise. With `editable` local packages are imported from their folders, and edits show at once. With `finish`
        missing bytecode is compiled in the background. Raises the errors of `lookup`, RayVersionError and BuildError;
        then the store is as before.
        """

        def of_files_now() -> Lease:
            inputs = self._inputs(spec, ray)._replace(editable=editable)
            if lease := self._claim_known(inputs, holder, may_look=True):
                return lease
            plan = self._plan(inputs, ray, check_current=check_current or spec.digest is None)
            return self._build(inputs, plan, holder, observer)

        lease = _while_they_change(of_files_now)
        if finish:
            self.finish(lease, dict(os.environ))
        return lease

    def _inputs(self, spec: EnvSpec, ray: AnyRay) -> Inputs:
        executable = interpreter.base_executable(spec.python)
        project, digest = _digest_of(spec)
        depends = [digest, spec.selection(), interpreter.fingerprint(executable), ray.fingerprint()]
        return Inputs(spec, project, executable, memo_name(depends))

    def _claim_known(self, inputs: Inputs, holder: Holder, *, may_look: bool) -> Lease | None:
        """Claim what a memo leads to; None where none does, or the environment is gone.

        The layer with local packages is known by their content: as pinned, else, if it `may_look`, as it is now.
        """
        known = recall(inputs.memo, inputs.folder, self.layout, self.readonly)
        if known is None:
            return None
        noted, entry = known
        if noted.local and inputs.spec.install_project:
            content = inputs.spec.content or (_content(inputs, noted) if may_look else None)
            if content is None:
                return None
            entry = self.layout.first_entry(layer_key(entry.key, content, noted.build_settings))
        # Evicted and built again since the memo was written, it has another number, or lies in a read-only store.
        return claim(entry, self.layout, holder) or self._claim_any(entry.key, holder)

    def _claim_any(self, key: str, holder: Holder) -> Lease | None:
        """Claim any build of the key, in this store or a read-only one."""
        for layout in (self.layout, *self.readonly):
            for entry in layout.entries_of(key):
                if lease := claim(entry, self.layout, holder):
                    return lease
        return None

    def _plan(self, inputs: Inputs, ray: AnyRay, *, check_current: bool) -> EnvironmentPlan:
        """The plan of the files. Raises ChangedError where they changed after we hashed them: uv reads them later."""
        from ray_envcache.build.plan import plan_of  # builds: not on the agent's warm path

        project = inputs.project or _locate_pinned(inputs.spec)
        plan = plan_of(inputs.spec, project, inputs.executable, ray, check_current=check_current)
        if self._inputs(inputs.spec, ray).memo != inputs.memo:
            where = f"The files in `{project.folder}` change all the time"
            raise ChangedError(where, "try again when nobody writes them")
        return plan

    def _build(self, inputs: Inputs, plan: EnvironmentPlan, holder: Holder, observer: Observer | None) -> Lease:
        """A lease on the environment of `plan`, or on the layer with the project's own packages on top of it."""
        from ray_envcache.build.builder import Builder  # builds: not on the agent's warm path
        from ray_envcache.build.layers import layer_plan
        from ray_envcache.build.progress import Observer

        observer = observer or Observer()
        lease = self._claim_any(plan.key, holder)
        if lease is None:
            lease = Builder(self.layout, plan, holder, observer).lease()
        self._remember(inputs, lease.entry, plan)
        if not (plan.resolved.local and inputs.spec.install_project):
            return lease
        with lease:
            layer = layer_plan(inputs.spec, plan, lease.entry, editable=inputs.editable)
            return self._claim_any(layer.key, holder) or Builder(self.layout, layer, holder, observer).lease()

    def _remember(self, inputs: Inputs, entry: Entry, plan: EnvironmentPlan) -> None:
        stamps = {path: file_identity(path) for path in plan.resolved.local_files()}
        known = tuple((path, *stamp) for path, stamp in stamps.items() if stamp)
        if len(known) < len(stamps):
            return  # one was removed meanwhile
        # Relative: another checkout of the same project has its packages elsewhere.
        local = tuple((one.name, os.path.relpath(one.path, plan.folder), one.editable) for one in plan.resolved.local)
        name, settings = self.layout.name_of(entry), plan.resolved.build_settings
        memo = Memo(name, os.fspath(plan.folder), local, known, settings, inputs.spec.to_field())
        remember(inputs.memo, self.layout, memo)

    def entries(self) -> list[Entry]:
        """All entries, finished or not, of each key the newest first, those of read-only stores last."""
        return [entry for layout in (self.layout, *self.readonly) for entry in newest_first(layout.all_entries())]

    def find(self, prefix: str) -> list[Entry]:
        """The entries of the one key that starts with `prefix`, in this order. Raises UnknownKeyError.

        The name of an entry, which errors show, will do too: that one is found.
        """
        found = [entry for entry in self.entries() if entry.name.startswith(prefix)]
        only_key(prefix, (entry.key for entry in found))
        return found

    def finish(self, lease: Lease, environ: Mapping[str, str]) -> None:
        """Start the compilers of the entries of a lease that need one; each outlives us and delays nothing.

        Where one cannot be started (no memory, no processes left), the next user of the entry tries again.
        """
        program: list[str | Path] = [sys.executable, "-m", "ray_envcache.build.bytecode", self.layout.root]
        for entry in lease.entries:
            if not (entry.readonly or entry.compiled.exists() or flock.is_held(entry.finishing_flock)):
                with suppress(OSError, CalledProcessError):
                    children.start_detached([*program, entry.path.name], environ=environ)


def _while_they_change(lease: Callable[[], Lease]) -> Lease:
    """What `lease` returns. It is called again where files changed meanwhile; the last time it may raise that."""
    for _ in range(_TRIES - 1):
        with suppress(ChangedError):
            return lease()
    return lease()


def _content(inputs: Inputs, known: Memo) -> str | None:
    """The digest of the local packages as they are now, None where their folders cannot be known."""
    from ray_envcache.build import layers  # builds: not on the agent's warm path
    from ray_envcache.resolve.lockfile import LocalPackage

    if inputs.project is None:
        return None
    folder = inputs.project.folder
    packages = [LocalPackage(name, (folder / path).resolve(), editable) for name, path, editable in known.local]
    editable = inputs.editable
    return layers.digest_of(layers.sources_of(packages, editable=editable), editable=editable)


def _locate_pinned(spec: EnvSpec) -> Project:
    """The project whose content was pinned elsewhere, mostly on the driver's host."""
    try:
        return Project.locate(Path(spec.path), spec.package)
    except LockfileError as error:
        where = "this node needs the files at the same path (image, shared disk), or the job a working_dir with them"
        raise LockfileError(error.message, f"{where} and a relative path; {error.hint}") from error


def digest_of_files(spec: EnvSpec) -> str:
    """The digest of the project files that `spec` (with an absolute path) means. Raises LockfileError."""
    return _digest_of(spec)[1]


def digest_of_local(spec: EnvSpec, resolved: ResolvedSet) -> str | None:
    """The digest of the local packages that `spec` installs, as they are now; None where there are none."""
    from ray_envcache.build import layers  # builds: not on the agent's warm path

    if not (resolved.local and spec.install_project):
        return None
    return layers.digest_of(layers.sources_of(resolved.local))


def _digest_of(spec: EnvSpec) -> tuple[Project | None, str]:
    """The project and the digest of its files; no project where its lockfile is missing and a digest is pinned."""
    try:
        project = Project.locate(Path(spec.path), spec.package)
    except LockfileError:
        # A git-ignored uv.lock does not travel in a working_dir; a known environment can be used without it.
        if spec.digest is None:
            raise
        return None, spec.digest
    return project, project.checked_digest(spec.digest)

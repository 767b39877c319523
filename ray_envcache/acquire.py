"""The store: from a field value to a lease on the one environment of this host that fits it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_envcache.errors import ChangedError, LockfileError, UnknownKeyError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter
from ray_envcache.resolve.project import Project
from ray_envcache.store.key import digest_of, layer_key
from ray_envcache.store.layout import Entry, Layout, layout_of, newest_first
from ray_envcache.store.leases import Holder, Lease, claim_whole, told
from ray_envcache.store.readonly import opened
from ray_envcache.system import files, flock
from ray_envcache.system.files import file_identity, is_unchanged

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray_envcache.build.builder import Observer
    from ray_envcache.build.plan import EnvironmentPlan
    from ray_envcache.resolve.cluster_ray import AnyRay
    from ray_envcache.resolve.lockfile import ResolvedSet

_MEMO_SCHEMA = 4
_PLANNINGS = 3  # at most, while somebody writes the files that say what is to be built


class Inputs(NamedTuple):
    """What a lookup depends on. `project` is None where only the pinned digest is known on this node.

    With `editable` local packages are imported from where they are developed.
    """

    spec: EnvSpec
    project: Project | None
    executable: str
    memo: str
    editable: bool = False

    def memos(self) -> Iterator[str]:
        """The names of the memos that may tell: the one of all checkouts with these files, and that of this one."""
        yield self.memo
        if self.project is not None:
            yield self.memo_in(self.project.folder)

    def memo_in(self, folder: Path) -> str:
        """The name of the memo for one checkout alone."""
        return digest_of([self.memo, os.fspath(folder)])[:32]

    def agree(self, memo: dict[str, Any]) -> bool:
        """Whether what a memo says holds here.

        Artifacts without a hash in the lockfile are those of one checkout: another has its own under the same names.
        """
        noted = memo.get("files", {})
        is_here = not noted or (self.project is not None and memo.get("folder") == os.fspath(self.project.folder))
        return is_here and all(was and is_unchanged(path, was) for path, was in noted.items())


class Store:
    """The environments of one user on one host. Any number of processes may use one store at the same time.

    `lower` are the stores whose environments are used too, where they are, and never changed.
    """

    def __init__(self, layout: Layout, lower: tuple[Layout, ...] = ()) -> None:
        self.layout = layout
        self.lower = lower

    @classmethod
    def open(cls, root: Path | None = None) -> Store:
        """Open the store at `root` (default: $RAY_ENVCACHE_DIR, else the user's cache directory), made if need be.

        With the lower stores that $RAY_ENVCACHE_READONLY_DIRS names. Raises StoreError where it cannot be private,
        shared between processes, or written; and where a lower one is not to be trusted.
        """
        return cls(*opened(root))

    def lookup(self, spec: EnvSpec, ray: AnyRay) -> Lease | None:
        """The warm path: one hash, one read, and a lease where the environment is there; else None.

        Nobody is told of it yet: `Lease.announce` makes a file. Starts no process, imports little. Raises LockfileError
        (no such file, wrong digest), InterpreterError, and StoreError where a lower store cannot be trusted.
        """
        return self._warm(self._inputs(spec, ray), may_look=False)

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
        """A lease on the environment for `spec`, which is built first if need be, once on this host whoever asks.

        `spec.path` is absolute. That the lockfile matches pyproject.toml is checked with `check_current`, or where no
        digest is pinned: a pinned one was checked where it was made, and on a node the indexes may be configured
        otherwise. With `editable` local packages are imported from their folders, and edits show at once. With `finish`
        missing bytecode is compiled in the background. Raises the errors of `lookup`, RayVersionError and BuildError;
        then the store is as before.
        """
        inputs = self._inputs(spec, ray)._replace(editable=editable)
        lease = self._warm(inputs, may_look=True)
        if lease is not None:
            told(lease, self.layout, holder)
        else:
            inputs, plan = self._plan(inputs, ray, check_current=check_current or spec.digest is None)
            lease = self._build(inputs, plan, holder, observer)
        if finish:
            self.finish_all(lease)
        return lease

    def _plan(self, inputs: Inputs, ray: AnyRay, *, check_current: bool) -> tuple[Inputs, EnvironmentPlan]:
        """The plan, and the inputs it was made from: uv reads the files after we hashed them, and they may change."""
        from ray_envcache.build.plan import plan_of  # not on the warm path

        spec = inputs.spec
        for _ in range(_PLANNINGS):
            project = inputs.project or _locate_pinned(spec)
            plan = plan_of(spec, project, inputs.executable, ray, check_current=check_current)
            before, inputs = inputs, self._inputs(spec, ray)._replace(editable=inputs.editable)
            if inputs.memo == before.memo:
                return inputs, plan
        raise ChangedError(f"The files in `{project.folder}` change all the time", "try again when nobody writes them")

    def _build(self, inputs: Inputs, plan: EnvironmentPlan, holder: Holder, observer: Observer | None) -> Lease:
        from ray_envcache.build import room  # not on the warm path
        from ray_envcache.build.builder import Builder, Silent

        observer = observer or Silent()
        lease = self._claim_lower(plan.key, holder)
        if lease is None:
            room.ensure_room(self.layout, plan)
            lease = Builder(self.layout, plan, holder, observer).lease()
        self._remember(inputs, lease.entry, plan)
        if not (plan.resolved.local and inputs.spec.install_project):
            return lease
        with lease:
            from ray_envcache.build import layers  # for local packages only

            make = layers.editable_plan if inputs.editable else layers.layer_plan

            def of_content_now() -> Lease:
                layer = make(inputs.spec, plan, lease.entry)
                return self._claim_lower(layer.key, holder) or Builder(self.layout, layer, holder, observer).lease()

            for _ in range(_PLANNINGS - 1):
                with suppress(ChangedError):
                    return of_content_now()
            return of_content_now()

    def _claim_lower(self, key: str, holder: Holder) -> Lease | None:
        """A lease on an environment of ours or, before it would be built, of a lower store."""
        lease = self._claim_any(key) if self.lower else None
        return lease and told(lease, self.layout, holder)

    def _claim_any(self, key: str) -> Lease | None:
        entries = (entry for layout in (self.layout, *self.lower) for entry in layout.entries_of(key))
        return next(filter(None, map(claim_whole, entries)), None)

    def find(self, prefix: str) -> list[Entry]:
        """The entries of the key that starts with `prefix`, newest first, those of lower stores last.

        Raises UnknownKeyError: none, or several keys.
        """
        everything = [newest_first(layout.all_entries()) for layout in (self.layout, *self.lower)]
        found = [entry for entries in everything for entry in entries if entry.path.name.startswith(prefix)]
        keys = {entry.key for entry in found}
        if len(keys) != 1 or not prefix:
            trouble = "No environment" if not keys else f"{len(keys)} environments"
            raise UnknownKeyError(
                f"{trouble} in the store with a key that starts with `{prefix}`", "ray-envcache list shows the keys"
            )
        return found

    def finish_all(self, lease: Lease) -> None:
        """Start what finishes the entries of a lease, where that is missing."""
        for entry in lease.entries:
            if self.wants_finishing(entry):
                self.finish(entry)

    def wants_finishing(self, entry: Entry) -> bool:
        """Whether bytecode and sizes are missing and nobody is at it, in a store that we may write to."""
        if entry.readonly or entry.compiled.exists():
            return False
        return not flock.is_held(self.layout.finishing_flock(entry))

    def finish(self, entry: Entry) -> None:
        """Start the process that compiles bytecode and measures sizes; it outlives us and delays nobody.

        Where it cannot be started (no memory, no processes left), whoever uses the entry next tries again.
        """
        from subprocess import CalledProcessError  # not on the warm path

        from ray_envcache.system import children

        command: list[str | Path] = [
            sys.executable,
            "-m",
            "ray_envcache.build.bytecode",
            self.layout.root,
            entry.path.name,
        ]
        with suppress(OSError, CalledProcessError):
            children.start_detached(command, environ=dict(os.environ))

    def _inputs(self, spec: EnvSpec, ray: AnyRay) -> Inputs:
        executable = interpreter.base_executable(spec.python)
        project, digest = _digest_of(spec)
        depends = [_MEMO_SCHEMA, digest, spec.selection(), interpreter.fingerprint(executable), ray.fingerprint()]
        return Inputs(spec, project, executable, digest_of(depends)[:32])

    def _warm(self, inputs: Inputs, *, may_look: bool) -> Lease | None:
        memo, entry = self._recall(inputs)
        if entry is None:
            return None
        if memo.get("local") and inputs.spec.install_project:
            content = inputs.spec.content or (may_look and _content(inputs, memo["local"]))
            if not content:
                return None
            entry = self.layout.first_entry(layer_key(entry.key, content, memo["build_settings"]))
        # Else evicted and built again since the memo was written, or in a lower store.
        return claim_whole(entry) or self._claim_any(entry.key)

    def _recall(self, inputs: Inputs) -> tuple[dict[str, Any], Entry | None]:
        """What our memo says, else that of a lower store; and the environment, None where nothing said holds."""
        for layout in (self.layout, *self.lower):
            for name in inputs.memos():
                memo = files.read_json(layout.memo_of(name))
                if memo and inputs.agree(memo):
                    entry = layout.entry(str(memo.get("entry")))
                    # In a store that is searched now, not only when somebody noted it.
                    if entry and (not entry.readonly or layout_of(entry) in self.lower):
                        return memo, entry
        return {}, None

    def _remember(self, inputs: Inputs, entry: Entry, plan: EnvironmentPlan) -> None:
        stamps = {path: file_identity(path) for path in plan.resolved.local_files()}
        # Relative: another checkout of the same project has its packages elsewhere.
        local = [[one.name, os.path.relpath(one.path, plan.folder), one.editable] for one in plan.resolved.local]
        memo = {
            "entry": self.layout.name_of(entry),
            "folder": os.fspath(plan.folder),
            "files": stamps,
            "local": local,
            "build_settings": plan.resolved.build_settings,
        }
        known = files.read_json(self.layout.memo_of(inputs.memo)) or memo
        is_taken = bool(stamps) and known.get("folder") != memo["folder"]
        # Without room for it the next lookup is merely slower.
        with suppress(OSError):
            place = inputs.memo_in(plan.folder) if is_taken else inputs.memo
            files.write_json(self.layout.memo_of(place), memo, durable=False)


def _content(inputs: Inputs, local: list[list[Any]]) -> str | None:
    """The digest of the local packages as they are now, None where their folders cannot be known."""
    from ray_envcache.build import layers
    from ray_envcache.resolve import lockfile  # not on the warm path of an agent

    if inputs.project is None:
        return None
    folder = inputs.project.folder
    packages = [lockfile.LocalPackage(name, (folder / path).resolve(), editable) for name, path, editable in local]
    return layers.digest_of_editable(packages) if inputs.editable else layers.digest_of(layers.contents_of(packages))


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
    from ray_envcache.build import layers  # for drivers only

    if not (resolved.local and spec.install_project):
        return None
    return layers.digest_of(layers.contents_of(resolved.local))


def _digest_of(spec: EnvSpec) -> tuple[Project | None, str]:
    try:
        project = Project.locate(Path(spec.path), spec.package)
    except LockfileError:
        # An ignored uv.lock does not travel in a working_dir; where the environment it pins is known, nobody needs it.
        if spec.digest is None:
            raise
        return None, spec.digest
    return project, project.checked_digest(spec.digest)

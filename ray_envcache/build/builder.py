"""Building one environment: once, at its final place, published by one rename.

A builder that dies, at any moment, leaves either a complete entry or a directory without a ready record, which the next
builder of the key, or a collector, throws away.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from ray_envcache.build import bytecode, venv
from ray_envcache.build.plan import Plan, pip_options
from ray_envcache.build.progress import Observer
from ray_envcache.build.venv import UvCalls
from ray_envcache.errors import BuildError, DiskFullError, EnvCacheError, PassingError
from ray_envcache.gc.collector import make_room
from ray_envcache.inside import check
from ray_envcache.remote.bucket import Bucket, Manifest
from ray_envcache.remote.fetch import find, offered
from ray_envcache.resolve import uv, uv_errors
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, Lease, claim, hold
from ray_envcache.store.record import ReadyRecord, write_facts
from ray_envcache.survey.nearest import why_new
from ray_envcache.system import children, disk, files
from ray_envcache.system.files import file_identity
from ray_envcache.system.flock import exclusive_flock, is_free
from ray_envcache.system.processes import boot_id
from ray_envcache.system.texts import format_size, utc_now

UNPACKED = 3.0
"""Bytes on the disk per byte to download: wheels of numpy, pandas, scipy and torch unpack to 1.7 to 3.8 times."""

CHECK_MINUTES = 5.0
"""How long `import ray` may take in a new environment; it takes half a second, on slow disks half a minute."""

# uv writes the prompt unquoted into bin/activate, where a shell would run `$(...)`.
_UNQUOTED = re.compile(r"[^\w.-]")
_logger = logging.getLogger(__name__)


@dataclass
class Builder:
    """Has the environment of `plan` built, by itself or by waiting for the process that builds it.

    One of those `after` the number of an entry that is damaged.
    """

    layout: Layout
    plan: Plan
    holder: Holder
    observer: Observer = field(default_factory=Observer)
    after: int = 0

    def lease(self) -> Lease:
        """A lease on the environment, built if need be. Raises BuildError and its kin; then nothing is left behind."""
        self._ensure_room()
        try:
            return self._lease()
        except OSError as error:
            if error.errno not in files.FULL_DISK:
                raise
            raise self._disk_full() from error

    def _ensure_room(self) -> None:
        """Collect idle environments where the disk may be too small for this one.

        Raises DiskFullError where even the download has no room afterwards. Where only the unpacked packages may have
        none the build is tried: then uv says so.
        """
        entries, download = self.layout.entries, self.plan.download_size
        if disk.free_space(entries).free >= download * UNPACKED or self.plan.is_cached(entries):
            return
        make_room(self.layout, int(download * UNPACKED))
        if disk.free_space(entries).free < download:
            raise self._disk_full()

    def _disk_full(self) -> DiskFullError:
        entries, megabytes = self.layout.entries, self.plan.download_size / 1e6
        # Not every lockfile has sizes; less than a megabyte cannot be all of an environment with ray.
        need = f"its packages are {megabytes:,.0f} MB to download and more once unpacked, " if megabytes >= 1 else ""
        return DiskFullError(
            f"No space left for the environment in `{entries}`: {need}{disk.room_left(entries)}",
            "make room (ray-envcache list shows what the store holds), or move the store: RAY_ENVCACHE_DIR",
        )

    def _lease(self) -> Lease:
        with exclusive_flock(self.layout.builder_flock(self.plan.key), self._tell_waiting) as flock:
            # Another builder may have built it while we waited for its flock.
            for entry in self.layout.entries_of(self.plan.key):
                if entry.number > self.after and (lease := claim(entry, self.layout, self.holder)):
                    lease.how = "waited"
                    return lease
            self._sweep()
            return self._build(flock)

    def _tell_waiting(self) -> None:
        records = (files.read_json(entry.building) for entry in self.layout.entries_of(self.plan.key))
        builder = next((Holder.read(record) for record in records if record), None)
        # It has its flock a moment before it says who it is.
        who = f"{builder} has been building it since {builder.since}" if builder else "another process builds it"
        self.observer.say(f"Waiting for the environment: {who}")

    def _sweep(self) -> None:
        """Throw away what dead builders of this key left; its flock is ours, so no builder lives.

        A collector that died may have left an entry without its record while a process still runs from it: that one
        stays until the process ends.
        """
        for entry in self.layout.entries_of(self.plan.key):
            if not entry.ready.exists() and is_free(entry.in_use):
                files.discard(entry.path, self.layout.trash)

    def _build(self, flock: int) -> Lease:
        entry, facts, began = self.layout.next_entry(self.plan.key), self.plan.facts(), time.monotonic()
        try:
            with self._start(entry):
                why = "in place of the damaged one" if self.after else why_new(self.layout, self.plan.project, facts)
                self.observer.say(self.plan.headline)
                if why:
                    self.observer.say(f"  {why}")
                write_facts(entry, facts)
                fetched = self._fill(entry, flock)
                self._publish(entry, time.monotonic() - began, fetched=fetched)
                lease = self._claim(entry)
        except BaseException:
            # Also on Ctrl-C and cancellation. Once it is published it is complete, and others may run from it.
            if not entry.ready.exists():
                self._discard(entry)
            raise
        lease.how, seconds = "fetched" if fetched else "built", time.monotonic() - began
        event = "fetch" if fetched else "build"
        journal.note(self.layout, event, key=entry.key, project=self.plan.project, seconds=round(seconds, 3))
        self.observer.say(f"{lease.how.capitalize()} in {seconds:.1f} s: {entry.venv}")
        return lease

    def _discard(self, entry: Entry) -> None:
        try:
            files.discard(entry.path, self.layout.trash)
        except OSError as error:
            # The failure of the build is what the user must hear; the next builder of the key, or a collector, sweeps.
            _logger.warning("%s of a failed build is left: %s", entry.path, error)

    def _claim(self, entry: Entry) -> Lease:
        """A lease as for an entry that was found: of a layer, also on the environment below it."""
        lease = claim(entry, self.layout, self.holder)
        if lease is None:
            raise PassingError(f"`{entry.path}` vanished right after it was built", "try again")
        return lease

    def _start(self, entry: Entry) -> Lease:
        entry.path.mkdir(mode=0o700)
        entry.in_use.touch(mode=0o600)
        files.write_json(entry.building, asdict(self.holder), durable=False)
        lease = hold(entry)
        if lease is None:
            raise PassingError(f"Another process removed `{entry.path}` while it was being built", "try again")
        return lease

    def _fill(self, entry: Entry, flock: int) -> bool:
        """Fill the entry, and say whether from the remote tier. Where that fails, it is built."""
        run_uv, fetched = self._uv_calls(entry, flock), False
        try:
            # What was found damaged is made from the packages themselves.
            if not self.after and (found := find(self.plan.key, self.plan.versions)):
                self._make(entry, run_uv, partial(self._fetch, *found))
                if found[1].packs:
                    bytecode.compile_all(self.layout, entry, [flock], background=False)
                fetched = True
        except EnvCacheError as error:
            if isinstance(error, DiskFullError):
                raise
            self.observer.say(f"  The environment of {self.plan.project} is not fetched, but built: {error.message}")
            journal.note(self.layout, "fetch", result="failed", key=entry.key, error=error.message)
            for path in (entry.venv, entry.staged_bytecode):
                files.remove_tree(path)
        if not fetched:
            self._make(entry, run_uv, self.plan.install)
        files.freeze(entry.venv)
        return fetched

    def _fetch(self, remote: Bucket, manifest: Manifest, entry: Entry, run_uv: UvCalls) -> None:
        size = format_size(sum(wheel.size for wheel in manifest.wheels))
        self.observer.line(f"Fetching it from {remote.url}: {len(manifest.wheels)} wheels, {size}")
        with offered(remote, manifest, entry) as (lines, environ):
            options = ("--no-index", "--no-offline", "--preview-features=pylock", *pip_options(entry))
            # Without the user's settings: a proxy in a uv.toml counts more than variables.
            apart = replace(run_uv, folder=Path("/"), environ=environ, scope=uv.Scope.PROJECT)
            apart("pip", "sync", *options, lines)

    def _make(self, entry: Entry, run_uv: UvCalls, install: Callable[[Entry, UvCalls], None]) -> None:
        prompt = _UNQUOTED.sub("_", self.plan.project)
        options = [f"--python={self.plan.interpreter.executable}", f"--prompt={prompt}"]
        run_uv("venv", "--quiet", "--no-project", "--no-config", *options, entry.venv)
        install(entry, run_uv)
        self.plan.link(entry)
        venv.add_hold(entry)
        venv.add_pip_guard(entry)
        self._check(entry)

    def _uv_calls(self, entry: Entry, flock: int) -> UvCalls:
        plan, cache = self.plan, uv.cache_directory(entry.path) or self.layout.uv_cache
        return UvCalls(entry, plan.folder, plan.project, cache, flock, self.observer.line)

    def _check(self, entry: Entry) -> None:
        """Raise BuildError where a worker could not start: Ray would start it again without end."""
        plan = self.plan
        wanted = json.dumps([plan.ray, plan.interpreter.version, os.fspath(entry.venv), plan.holds])
        done = self._run_check(entry)
        if done.killed:
            raise uv_errors.killed(done, "The Python that checks the new environment")
        if done.returncode != 0:
            raise BuildError(
                f"`import ray` fails in the new environment:\n{done.stderr.strip()[-1500:]}",
                "a package of the lockfile breaks ray on this platform; `uv run python -c 'import ray'` shows the same",
            )
        # After what packages print when they are imported.
        found = done.stdout.rpartition("\n\n")[2]
        if found != wanted:
            raise BuildError(
                f"The new environment has ray, Python, prefix and holds `{found[-1500:]}` instead of `{wanted}`",
                "see that nothing on this node (a sitecustomize, a wrapper of Python) changes what a venv is, "
                "and that no package ends Python when ray imports it: `uv run python -c 'import ray'`",
            )

    def _run_check(self, entry: Entry) -> children.Completed:
        request = {
            "import_ray": self.plan.import_ray,
            "site": os.fspath(entry.site_packages),
            "shared": os.fspath(self.layout.bytecode),
            "staged": os.fspath(entry.staged_bytecode),
            "twins": _own_packages() if self.plan.interpreter.build == sys.version else "",
        }
        # Python itself writes no bytecode there: before 3.12.8 and 3.13.1 it does not notice when a full disk cuts it
        # off (gh-126606 of CPython), and that module could never be imported again.
        command: list[str | Path] = [entry.python, "-I", "-B", check.__file__, json.dumps(request)]
        try:
            return children.run(command, environ=children.clean_environ(), cwd=Path("/"), seconds=CHECK_MINUTES * 60)
        except TimeoutError as error:
            raise BuildError(
                f"`import ray` takes more than {CHECK_MINUTES:g} minutes in the new environment",
                "a package of the lockfile hangs when ray imports it: `uv run python -X importtime -c 'import ray'`",
            ) from error

    def _publish(self, entry: Entry, seconds: float, *, fetched: bool) -> None:
        identity = file_identity(os.fspath(entry.python))
        if identity is None:
            raise PassingError(f"`{entry.python}` vanished during the build", "try again")
        record = ReadyRecord(
            key=self.plan.key,
            path=os.fspath(entry.path),
            created_at=utc_now(),
            project=self.plan.project,
            source=os.fspath(self.plan.folder),
            python=self.plan.interpreter.version,
            base_python=self.plan.interpreter.executable,
            base_python_file=identity,
            ray=self.plan.ray,
            build_seconds=round(seconds, 3),
            boot_id=boot_id(),
            fetched=fetched,
            **self.plan.recorded(entry),
        )
        entry.building.unlink()
        record.write(entry)


def _own_packages() -> str:
    """Where this Python has the ray of the cluster, "" where it has none."""
    found = importlib.util.find_spec("ray")
    return os.path.dirname(os.path.dirname(found.origin)) if found and found.origin else ""

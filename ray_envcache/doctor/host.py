"""Is this host set up? Checks what environments need: the store, uv, Python, Ray, the settings."""

from __future__ import annotations

import os
import platform
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path
from typing import TypeVar

from packaging.requirements import Requirement

from ray_envcache.build.plan import require_buildable
from ray_envcache.doctor import variables
from ray_envcache.doctor.findings import ERROR, OK, WARN, Finding, finding_of
from ray_envcache.errors import EnvCacheError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve import interpreter, uv
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import readonly
from ray_envcache.store.layout import Layout, default_root
from ray_envcache.store.root import prepare_root
from ray_envcache.survey.uv_cache import UvCache
from ray_envcache.system import disk, flock
from ray_envcache.system.texts import format_size
from ray_envcache.version import __version__

T = TypeVar("T")
_FEW_INODES = 10_000  # one environment may have as many files


@dataclass(frozen=True)
class Facts:
    """What `examine` found, as this process sees the host; None: it could not be found out."""

    plugin: str
    store: str
    free_bytes: int | None
    ray: str | None
    python: str
    uv: str | None
    findings: tuple[Finding, ...]


def check_lockfile(path: str) -> Finding:
    """Whether the lockfile at `path` is one that this host could build. Builds nothing."""
    return finding_of("lockfile", _lockfile, path)


def examine() -> Facts:
    """Check this host, with the environment variables of this process. Makes a missing store; raises nothing."""
    layout = Layout(default_root())
    findings = [*_store(layout), *_tools(), *variables.settings(os.environ), *variables.of_python(os.environ)]
    findings += variables.token(os.environ)
    return Facts(
        plugin=__version__,
        store=os.fspath(layout.root),
        free_bytes=_attempt(lambda: disk.free_space(layout.root).free),
        ray=_attempt(lambda: installed_ray().version),
        python=platform.python_version(),
        uv=_attempt(lambda: _uv_version(uv.find())),
        findings=tuple(findings),
    )


def _store(layout: Layout) -> Iterator[Finding]:
    found = finding_of("store", _root, layout)
    yield found
    if found.state != ERROR:
        yield finding_of("flocks", _flocks, layout)
        yield finding_of("space", _space, layout)
        yield finding_of("uv's cache", _cache, layout)
        if os.environ.get(readonly.VARIABLE):
            yield finding_of("read-only stores", _readonly_stores, layout)


def _root(layout: Layout) -> Finding:
    prepare_root(layout)
    kind = disk.free_space(layout.root).kind
    mode = stat.S_IMODE(layout.root.stat().st_mode)
    text = f"{layout.root}: {kind or 'unknown file system'}, yours, mode {mode:o}"
    if not disk.is_network(kind):
        return Finding("store", OK, text)
    text += "; a file system between hosts or virtual machines, allowed by RAY_ENVCACHE_ALLOW_NETWORK_FS"
    return Finding("store", WARN, text, "flocks may not exclude across it: let one host alone use this store")


def _flocks(layout: Layout) -> Finding:
    # A flock belongs to an open file, not to a process: two descriptors here are like two processes.
    with flock.exclusive_flock(layout.doctor_flock, lambda: None):
        if flock.is_held(layout.doctor_flock):
            return Finding("flocks", OK, "they exclude each other in the store")
    raise StoreError(
        f"Flocks do not exclude each other in `{layout.flocks}`: two builds could write one environment",
        "choose a local disk for the store: RAY_ENVCACHE_DIR=/path/to/store",
    )


def _space(layout: Layout) -> Finding:
    found = disk.free_space(layout.root)
    text = f"{format_size(found.free)} of {format_size(found.total)} are free"
    if found.inodes_free is not None and found.inodes_free < _FEW_INODES:
        return Finding("space", WARN, f"{text}, but only {found.inodes_free} inodes", "an environment needs thousands")
    limit = None
    with suppress(EnvCacheError):  # `variables.settings` reports it
        limit = Limits.from_environ(os.environ).min_free_space
    if limit is None or found.free >= limit.bytes_of(found.total):
        return Finding("space", OK, text)
    hint = "make room: until then every collection removes unused environments of any age"
    return Finding("space", WARN, f"{text}, less than {limit} (RAY_ENVCACHE_MIN_FREE_SPACE)", hint)


def _cache(layout: Layout) -> Finding:
    name = "uv's cache"
    if os.environ.get("UV_LINK_MODE") == "copy":
        return Finding(name, WARN, "UV_LINK_MODE=copy: packages are copied into environments", "unset it to link them")
    cache = uv.cache_directory(layout.entries)
    if cache:
        return Finding(name, OK, f"{cache}: packages are linked from there")
    text = f"{layout.uv_cache}: your own is on another file system, so packages are downloaded once more"
    return Finding(name, OK, text)


def users_cache(layout: Layout) -> UvCache | None:
    """The user's cache, that uv links from into this store; None where it is on another disk, or there is none.

    Walks through it and through all environments, 5 us for each file: a cache of 500,000 takes 3 s, cold some more.
    """
    cache = uv.cache_directory(layout.entries)
    if cache is None or not cache.is_dir():
        return None
    cached = {(found.st_dev, found.st_ino): found.st_blocks * 512 for _, found in disk.walk(cache)}
    in_entries = {(found.st_dev, found.st_ino) for _, found in disk.walk(layout.entries) if found.st_nlink > 1}
    shared = sum(cached[inode] for inode in cached.keys() & in_entries)
    return UvCache(os.fspath(cache), False, sum(cached.values()), shared)


def _readonly_stores(layout: Layout) -> Finding:
    name = "read-only stores"
    found = ", ".join(str(one.root) for one in readonly.readonly_stores(layout, os.environ)) or "none"
    missing = ", ".join(map(str, readonly.missing_stores(layout, os.environ)))
    if not missing:
        return Finding(name, OK, found)
    hint = f"ray-envcache build makes one there; or take it out of {readonly.VARIABLE}"
    return Finding(name, WARN, f"{found}; there is no store at {missing}", hint)


def _tools() -> Iterator[Finding]:
    yield finding_of("uv", _uv_finding)
    yield finding_of("python", _python)
    yield finding_of("ray", _ray)


def _uv_finding() -> Finding:
    path = uv.find()
    version = _uv_version(path)
    return _versioned("uv", version, f"uv {version}: {path}")


def _uv_version(path: str) -> str:
    done = uv.run(["--version"], cwd=Path("/"))
    words = done.stdout.split()
    if done.returncode != 0 or len(words) < 2:
        raise StoreError(f"`{path} --version` fails: {done.stderr.strip()[-200:]}", "python -m pip install -U uv")
    return words[1]


def _python() -> Finding:
    found = interpreter.probe(interpreter.base_executable(None))
    return Finding("python", OK, f"{found.implementation} {found.version}: {found.executable}")


def _ray() -> Finding:
    version = installed_ray().version
    return _versioned("ray", version, f"ray {version}")


def _lockfile(path: str) -> Finding:
    ray = installed_ray()
    resolved = require_buildable(EnvSpec.parse(os.path.abspath(path)), ray)
    count = len(resolved.packages)
    return Finding("lockfile", OK, f"{path}: {count} package{'' if count == 1 else 's'}, fits ray {ray.version}")


def _versioned(name: str, version: str, text: str) -> Finding:
    """A finding about a version: OK if it is one that this package declares to need."""
    for needed in map(Requirement, requires("ray-envcache") or ()):
        if needed.name == name and not needed.specifier.contains(version, prereleases=True):
            hint = f"python -m pip install '{needed}'"
            return Finding(name, ERROR, f"{text}; ray-envcache needs {needed.specifier}", hint)
    return Finding(name, OK, text)


def _attempt(ask: Callable[[], T]) -> T | None:
    with suppress(EnvCacheError, OSError):
        return ask()
    return None

"""Is this host set up? Checks what environments need: the store, uv, Python, Ray, the variables."""

from __future__ import annotations

import importlib.util
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from ray_envcache.build.plan import require_buildable
from ray_envcache.doctor.findings import ERROR, OK, VERSION, WARN, Finding, finding_of
from ray_envcache.errors import EnvCacheError, FieldValueError, StoreError
from ray_envcache.field import guard, registration
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.policy import VARIABLES, Limits
from ray_envcache.resolve import interpreter, uv
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import roots
from ray_envcache.store.layout import Layout, default_root
from ray_envcache.survey.uv_cache import UvCache
from ray_envcache.system import disk
from ray_envcache.system.testpoints import FOLDER
from ray_envcache.system.texts import format_size, is_off, needs_extra, parse_duration, without_credentials

_PREFIX = "RAY_ENVCACHE_"
_REMOTE = ("REMOTE", "REMOTE_PUSH", "REMOTE_SIGN", "REMOTE_TRUST")
_OTHERS = ("DIR", "READONLY_DIRS", "ALLOW_NETWORK_FS", "GC_INTERVAL", *_REMOTE)
SETTINGS = (*(f"{_PREFIX}{name}" for name in _OTHERS), *VARIABLES)
"""The variables that people set."""
_INTERNAL = frozenset({guard.PROBE_ANSWER, FOLDER})


def check_lockfile(path: str) -> Finding:
    """Whether the lockfile at `path` is one that this host could build. Builds nothing."""
    return finding_of("lockfile", _lockfile, path)


def examine() -> list[Finding]:
    """Check this host, with the environment variables of this process. Makes a missing store.

    Raises StoreError where there can be none at the place that was chosen.
    """
    ours, variables = Finding("plugin", OK, VERSION), os.environ
    found = [ours, *_store(Layout(default_root())), *_tools(), *settings(variables), *_of_python(variables)]
    return [*found, *_token(variables)]


def _store(layout: Layout) -> Iterator[Finding]:
    found = finding_of("store", _root, layout)
    yield found
    if found.state != ERROR:
        yield finding_of("space", _space, layout)
        yield finding_of("uv's cache", _cache, layout)
        if os.environ.get(roots.READONLY):
            yield finding_of("read-only stores", _readonly_stores, layout)


def _root(layout: Layout) -> Finding:
    roots.prepare_root(layout)
    kind = disk.free_space(layout.root).kind
    mode = stat.S_IMODE(layout.root.stat().st_mode)
    text = f"{layout.root}: {kind or 'unknown file system'}, yours, mode {mode:o}"
    if not disk.is_network(kind):
        return Finding("store", OK, text)
    text += "; a file system between hosts or virtual machines, allowed by RAY_ENVCACHE_ALLOW_NETWORK_FS"
    return Finding("store", WARN, text, "flocks may not exclude across it: let one host alone use this store")


def _space(layout: Layout) -> Finding:
    found = disk.free_space(layout.root)
    text = f"{format_size(found.free)} of {format_size(found.total)} are free"
    limit = None
    with suppress(EnvCacheError):  # `settings` reports it
        limit = Limits.from_environ(os.environ).min_free_space
    if limit is None or found.free >= limit.bytes_of(found.total):
        return Finding("space", OK, text)
    hint = "make room: until then every collection removes unused environments of any age"
    return Finding("space", WARN, f"{text}: less than {limit} (RAY_ENVCACHE_MIN_FREE_SPACE)", hint)


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
    found = ", ".join(str(one.root) for one in roots.readonly_stores(layout, os.environ)) or "none"
    missing = ", ".join(map(str, roots.missing_stores(layout, os.environ)))
    if not missing:
        return Finding(name, OK, found)
    hint = f"ray-envcache build makes one there; or take it out of {roots.READONLY}"
    return Finding(name, WARN, f"{found}; there is no store at {missing}", hint)


def _tools() -> Iterator[Finding]:
    yield finding_of("uv", _uv)
    yield finding_of("python", _python)
    yield finding_of("ray", _ray)


def _uv() -> Finding:
    path = uv.find()
    done = uv.run(["--version"], cwd=Path("/"))
    words = done.stdout.split()
    if done.returncode != 0 or len(words) < 2:
        raise StoreError(f"`{path} --version` fails: {done.stderr.strip()[-200:]}", "python -m pip install -U uv")
    return Finding("uv", OK, f"uv {words[1]}: {path}")


def _python() -> Finding:
    found = interpreter.probe(interpreter.base_executable(None))
    return Finding("python", OK, f"{found.implementation} {found.version}: {found.executable}")


def _ray() -> Finding:
    return Finding("ray", OK, f"ray {installed_ray().version}")


def _lockfile(path: str) -> Finding:
    ray = installed_ray()
    resolved = require_buildable(EnvSpec.parse(os.path.abspath(path)), ray)
    count = len(resolved.packages)
    return Finding("lockfile", OK, f"{path}: {count} package{'' if count == 1 else 's'}, fits ray {ray.version}")


def settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A finding for each setting that does not exist or does not parse; if all do, one that names them."""
    names = sorted(name for name in environ if name.startswith(_PREFIX) and name not in _INTERNAL)
    wrong = [finding for name in names if (finding := _setting(name, environ[name]))]
    yield from wrong
    if not wrong:
        text = without_credentials(", ".join(f"{name}={environ[name]}" for name in names))
        yield Finding("settings", OK, text or "the defaults")


def _of_python(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A warning for each variable that puts other packages before those of an environment, or instead of them."""
    for name in ("PYTHONPATH", "PYTHONHOME"):
        if environ.get(name):
            text = f"{name}={environ[name]}: programs, nodes and workers inherit it, and may import other packages"
            yield Finding(name, WARN, text, f"unset {name} before a program or a node starts")


def _token(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Which token Ray sends, where there is one, or where nodes and drivers are told to ask for one."""
    mode, place = environ.get("RAY_AUTH_MODE"), place_of_token(environ)
    if place == "$RAY_AUTH_TOKEN" or os.path.isfile(place):
        yield Finding("token", OK, f"{place}, RAY_AUTH_MODE{f'={mode}' if mode else ' is not set'}")
    elif mode == "token":
        hint = "`ray get-auth-token --generate` makes one; all nodes and drivers of a cluster need the same"
        yield Finding("token", ERROR, f"RAY_AUTH_MODE=token, and there is none at {place}", hint)


def place_of_token(environ: Mapping[str, str]) -> str:
    """Where Ray looks for its token: the variable itself, or a path."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "$RAY_AUTH_TOKEN"
    return environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")


def registered(environ: Mapping[str, str]) -> Finding:
    """Whether `ray start` in a shell with these variables makes a node that knows the field."""
    name = "registration"
    try:
        registration.other_plugins(environ)
    except FieldValueError as error:
        return Finding(name, ERROR, error.message, error.hint)
    if registration.PLUGIN_CLASS in environ.get(registration.PLUGINS, ""):
        return Finding(name, OK, "nodes that `ray start` makes from this shell know the field")
    text = "nodes that `ray start` makes from this shell do not know the field; those of `ray.init` do"
    return Finding(name, WARN, text, 'eval "$(ray-envcache env)" before ray start')


def _setting(name: str, value: str) -> Finding | None:
    if name not in SETTINGS:
        hint = f"the settings are {', '.join(SETTINGS)}"
        return Finding("settings", WARN, f"There is no setting {name}: it has no effect", hint)
    try:
        _parse(name, value)
    except FieldValueError as error:
        message = error.message if name in error.message else f"{name}: {error.message}"
        return Finding("settings", ERROR, message, error.hint)
    return None


def _parse(name: str, value: str) -> None:
    if name == f"{_PREFIX}GC_INTERVAL" and value.strip() and not is_off(value):
        parse_duration(value)
    if name in {f"{_PREFIX}ALLOW_NETWORK_FS", f"{_PREFIX}REMOTE_PUSH"} and value not in {"", "0", "1"}:
        raise FieldValueError(f"Neither 0 nor 1: `{value}`", "1 allows it, anything else does not")
    if name == f"{_PREFIX}REMOTE" and value and importlib.util.find_spec("obstore") is None:
        raise FieldValueError("The remote tier needs the library obstore", needs_extra("remote"))
    Limits.from_environ({name: value})

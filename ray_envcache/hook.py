"""The driver's side: inside `ray.init`, build the environment where people see its progress, and pin what was built."""

from __future__ import annotations

import io
import os
import pkgutil
import sys
import threading
from typing import TYPE_CHECKING, Any

from ray_envcache.acquire import Store, digest_of_files, digest_of_local
from ray_envcache.errors import FieldValueError
from ray_envcache.field import registration
from ray_envcache.field.guard import guarded
from ray_envcache.field.spec import FIELD, EnvSpec, refuse_combinations
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import ClusterRay, installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import ReadyRecord

if TYPE_CHECKING:
    from ray_envcache.resolve.lockfile import ResolvedSet

HAND_OVER_SECONDS = 60.0
"""How long the driver keeps its lease: until then an agent of its cluster has one, if there is one on this host."""

_checked: dict[tuple[Any, ...], ResolvedSet] = {}


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """The job's runtime_env, as `ray.init` takes it: with our field pinned, guarded, and its environment built.

    The extended `ray.init` calls it, or Ray itself where RAY_RUNTIME_ENV_HOOK names it. A runtime_env without our field
    comes back as it is. Raises EnvCacheError.
    """
    if not runtime_env or runtime_env.get(FIELD) is None:
        return runtime_env
    prepared = dict(_by_users_hook(dict(runtime_env)) or {})
    refuse_combinations(prepared)
    with uv.variables(prepared.get("env_vars") or {}):
        prepared[FIELD] = _prepare(prepared[FIELD], prepared.get("working_dir"))
    # The cluster may have nodes without the plugin.
    return guarded(prepared)


def pinned_field(value: Any) -> dict[str, Any]:
    """A checked field value (its path is absolute) with the digest of its files. Raises EnvCacheError."""
    spec = EnvSpec.parse(value)
    ray = installed_ray()
    digest = digest_of_files(spec)
    state = (spec, digest, ray)
    if state not in _checked:
        from ray_envcache.build.plan import require_buildable

        _checked[state] = require_buildable(spec, ray)
    return spec._replace(digest=digest, content=digest_of_local(spec, _checked[state])).to_field()


def _by_users_hook(runtime_env: dict[str, Any]) -> dict[str, Any] | None:
    """What the user's own hook makes of the runtime_env, where RAY_RUNTIME_ENV_HOOK names one."""
    name = os.environ.get(registration.HOOK, registration.HOOK_FUNCTION)
    if name == registration.HOOK_FUNCTION:
        return runtime_env
    changed: dict[str, Any] | None = pkgutil.resolve_name(name)(runtime_env)
    return changed


def _prepare(value: Any, working_dir: Any) -> dict[str, Any]:
    spec = EnvSpec.parse(value).expanded()
    home = _home(spec, working_dir)
    if home is None:
        return spec.to_field()
    local = spec._replace(path=os.path.join(home, spec.path))
    pinned = local._replace(digest=digest_of_files(local))
    pinned = pinned._replace(content=_build(pinned, installed_ray()))
    # Inside a working_dir the path stays relative: Ray unpacks it elsewhere on every node.
    return pinned.to_field() if working_dir is None else pinned._replace(path=spec.path).to_field()


def _home(spec: EnvSpec, working_dir: Any) -> str | None:
    """The folder that a relative path starts from, or None where only the nodes will see it."""
    if os.path.isabs(spec.path):
        return "/"
    if working_dir is None:
        return os.getcwd()
    if isinstance(working_dir, str | os.PathLike) and "://" not in os.fspath(working_dir):
        home = os.path.abspath(os.path.expanduser(working_dir))
        if os.path.isdir(home):
            return home
    if isinstance(working_dir, str):
        return None
    raise FieldValueError(
        f"The working_dir is not a path: `{working_dir!r}`", "see the documentation of Ray's runtime_env"
    )


def _build(spec: EnvSpec, ray: ClusterRay) -> str | None:
    """Build or find the environment, and return the digest of the local packages in it."""
    from ray_envcache.build.progress import observer

    store = Store.open()
    # A daemon has no stderr.
    with observer(sys.stderr or io.StringIO()) as shown:
        lease = store.acquire(spec, ray, Holder("driver"), shown, check_current=True)
    # The agent takes its own lease when the job starts. Until then this one keeps the environment from a collector.
    release = threading.Timer(HAND_OVER_SECONDS, lease.release)
    release.daemon = True
    release.start()
    record = ReadyRecord.read(lease.entry)
    return record.content or None if record else None

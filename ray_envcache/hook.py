"""The driver's side: inside `ray.init`, build the environment where people can see it, and pin what was built."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from ray_envcache.acquire import Store, digest_of_files, digest_of_local
from ray_envcache.errors import FieldValueError
from ray_envcache.field import registration
from ray_envcache.field.guard import guarded
from ray_envcache.field.spec import FIELD, EnvSpec, refuse_combinations
from ray_envcache.resolve import uv
from ray_envcache.resolve.cluster_ray import ClusterRay, installed_ray
from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.store.record import ReadyRecord

if TYPE_CHECKING:
    from ray_envcache.resolve.lockfile import ResolvedSet

HAND_OVER_SECONDS = 60.0
"""How long the driver keeps its lease for an agent that has not taken one."""

_checked: dict[tuple[Any, ...], ResolvedSet] = {}


def runtime_env_hook(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """What Ray calls in `ray.init` with the job's runtime_env (RAY_RUNTIME_ENV_HOOK).

    With our field: builds or finds the environment, and returns the runtime_env with the field pinned. Without it:
    whatever would have happened without us.
    """
    if not runtime_env or runtime_env.get(FIELD) is None:
        return _without_us(runtime_env)
    prepared = dict(_chained(dict(runtime_env)) or {})
    refuse_combinations(prepared)
    with uv.variables(prepared.get("env_vars") or {}):
        prepared[FIELD] = _prepare(prepared[FIELD], prepared.get("working_dir"))
    # The cluster may have been started by others, without the plugin.
    return guarded(prepared)


def pinned_field(value: Any) -> dict[str, Any]:
    """A checked field value (its path is absolute) with the digest of its files. Raises EnvCacheError."""
    spec = EnvSpec.parse(value)
    ray = installed_ray()
    digest = digest_of_files(spec)
    state = (spec, digest, ray)
    if state not in _checked:
        from ray_envcache.build.plan import require_buildable  # once for each project

        _checked[state] = require_buildable(spec, ray)
    return spec.with_digest(digest).with_content(digest_of_local(spec, _checked[state])).to_field()


def _prepare(value: Any, working_dir: Any) -> dict[str, Any]:
    spec = EnvSpec.parse(value)
    home = _home(spec, working_dir)
    if home is None:
        return spec.to_field()
    local = spec.with_path(os.path.join(home, os.path.expanduser(spec.path)))
    pinned = local.with_digest(digest_of_files(local))
    pinned = pinned.with_content(_build(pinned, installed_ray()))
    # Inside a working_dir the path stays relative: it is unpacked elsewhere on every node.
    return pinned.to_field() if working_dir is None else pinned.with_path(spec.path).to_field()


def _home(spec: EnvSpec, working_dir: Any) -> str | None:
    """The folder that a relative path starts from, or None where only the nodes will see it."""
    if working_dir is None or os.path.isabs(spec.path):
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
    """Have the environment built; the digest of the local packages in it."""
    from ray_envcache.build.progress import observer

    store = Store.open()
    # A daemon has no stderr.
    with observer(sys.stderr or io.StringIO()) as shown:
        lease = store.acquire(spec, ray, Holder("driver"), shown, check_current=True)
    # The agent takes a lease of its own when the job starts; until then nobody may collect what was just built.
    threading.Thread(target=_hand_over, args=(store.layout, lease), daemon=True, name="envcache-hand-over").start()
    record = ReadyRecord.read(lease.entry)
    return record.content or None if record else None


def _hand_over(layout: Layout, lease: Lease) -> None:
    deadline = time.monotonic() + HAND_OVER_SECONDS
    with lease:
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if any(holder.get("kind") == "agent" for holder in leases.live_leases(layout, lease.entry.key)):
                return


def _without_us(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """What Ray does without our hook: its own for `uv run` first, else the user's."""
    if registration.original_uv_run(os.environ):
        from ray._private.runtime_env import uv_runtime_env_hook

        if uv_runtime_env_hook._get_uv_run_cmdline():  # noqa: SLF001  # what Ray asks itself in worker.py
            changed: dict[str, Any] = uv_runtime_env_hook.hook(runtime_env)
            return changed
    return _chained(runtime_env)


def _chained(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    name = os.environ.get(registration.CHAINED_HOOK)
    if not name:
        return runtime_env
    from ray._common.utils import load_class

    changed: dict[str, Any] | None = load_class(name)(runtime_env)
    return changed

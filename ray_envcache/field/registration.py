"""Making us known to Ray: the plugin by a variable that Ray reads when it starts a node, the hook inside `ray.init`.

Child processes inherit the variable. A Python without ray_envcache cannot import what it names, and a `ray.init()`
there that starts a cluster fails. So workers in a cached environment start without it (`cluster.worker`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ray_envcache.errors import FieldValueError
from ray_envcache.field.spec import FIELD

PLUGINS = "RAY_RUNTIME_ENV_PLUGINS"
HOOK = "RAY_RUNTIME_ENV_HOOK"
UV_RUN = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"

PLUGIN_CLASS = "ray_envcache.plugin.EnvCachePlugin"
HOOK_FUNCTION = "ray_envcache.hook.runtime_env_hook"

WORKER_MODULE = "ray._private.worker"
WORKER_FUNCTION = "_maybe_modify_runtime_env"


def register(environ: MutableMapping[str, str]) -> None:
    """Add our plugin to those that are registered. Twice is once. Raises FieldValueError."""
    environ.update(exports(environ))


def exports(environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that a node needs, with the other plugins that `environ` registers. Raises FieldValueError."""
    return {PLUGINS: json.dumps([*other_plugins(environ), {"class": PLUGIN_CLASS}])}


def other_plugins(environ: Mapping[str, str]) -> list[Any]:
    """The registered plugins without ours. Raises FieldValueError where Ray could not read the variable either."""
    text = environ.get(PLUGINS) or "[]"
    try:
        plugins = json.loads(text)
    except ValueError:
        plugins = None
    if not isinstance(plugins, list):
        raise FieldValueError(
            f"{PLUGINS} is not a JSON list: `{text[:200]}`",
            f'unset it, or write it as Ray reads it: {PLUGINS}=\'[{{"class": "package.module.Class"}}]\'',
        )
    return [plugin for plugin in plugins if not (isinstance(plugin, dict) and plugin.get("class") == PLUGIN_CLASS)]


def without_us(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables without our plugin, and without our hook, which some units and pods name."""
    ours = {PLUGINS, *([HOOK] if environ.get(HOOK) == HOOK_FUNCTION else [])}
    others = other_plugins(environ)
    kept = {name: value for name, value in environ.items() if name not in ours}
    return {**kept, PLUGINS: json.dumps(others)} if others else kept


def extend() -> None:
    """Extend the function of Ray that asks hooks, now or when Ray is imported: it asks ours first. Twice is once.

    Ray's own way is the variable HOOK. Below `uv run` Ray ignores it, and all child processes inherit it, also those
    whose Python lacks this package: their `ray.init()` fails. The extension is of this process alone.
    """
    worker = sys.modules.get(WORKER_MODULE)
    if worker is not None:
        extend_in(worker)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """Finds nothing itself: it extends Ray's function right after the others have loaded its module."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002  # Python calls it so
        if name != WORKER_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_extend(module: ModuleType) -> None:
                load(module)
                extend_in(module)

            spec.loader.exec_module = load_and_extend  # type: ignore[method-assign]
        return spec


def extend_in(worker: ModuleType) -> None:
    """Extend the function in Ray's module. A Ray without that function gets our hook by its variable."""
    ask_hooks = getattr(worker, WORKER_FUNCTION, None)
    if ask_hooks is None:
        os.environ.setdefault(HOOK, HOOK_FUNCTION)
        return
    if hasattr(ask_hooks, "__wrapped__"):
        return

    @functools.wraps(ask_hooks)
    def ask_ours_first(runtime_env: Any, _skip_env_hook: bool = False) -> Any:  # noqa: FBT001, FBT002  # as Ray's
        if _skip_env_hook or not isinstance(runtime_env, Mapping) or runtime_env.get(FIELD) is None:
            return ask_hooks(runtime_env, _skip_env_hook)
        return pkgutil.resolve_name(HOOK_FUNCTION)(runtime_env)

    setattr(worker, WORKER_FUNCTION, ask_ours_first)

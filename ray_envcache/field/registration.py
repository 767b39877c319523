"""Making the plugin known: an environment variable that Ray reads when it starts a node.

Child processes inherit it. A Python without ray_envcache cannot import what it names, and a `ray.init()` there that
starts a cluster fails. So workers in a cached environment start without it (`cluster.worker`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from typing import Any

from ray_envcache.errors import FieldValueError

PLUGINS = "RAY_RUNTIME_ENV_PLUGINS"
HOOK = "RAY_RUNTIME_ENV_HOOK"
UV_RUN = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"

PLUGIN_CLASS = "ray_envcache.plugin.EnvCachePlugin"
HOOK_FUNCTION = "ray_envcache.hook.runtime_env_hook"


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

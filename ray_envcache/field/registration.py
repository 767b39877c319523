"""Making the field known: two environment variables that Ray reads when it starts a node and when it initializes.

They are inherited by all child processes. A Python without ray_envcache cannot import what they name and its
`ray.init()` would take its whole node down, so workers in a cached environment get them removed (`worker_prefix`).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

from ray_envcache.errors import FieldValueError

PLUGINS = "RAY_RUNTIME_ENV_PLUGINS"
HOOK = "RAY_RUNTIME_ENV_HOOK"
UV_RUN = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
CHAINED_HOOK = "RAY_ENVCACHE_CHAINED_HOOK"
CHAINED_UV_RUN = "RAY_ENVCACHE_CHAINED_UV_RUN"

PLUGIN_CLASS = "ray_envcache.plugin.EnvCachePlugin"
HOOK_FUNCTION = "ray_envcache.hook.runtime_env_hook"
_OURS = frozenset({PLUGINS, HOOK, UV_RUN, CHAINED_HOOK, CHAINED_UV_RUN})


def register(environ: MutableMapping[str, str]) -> None:
    """Register plugin and hook beside whatever is registered already; twice is once. Raises FieldValueError."""
    environ.update(exports(environ))
    _take_over_uv_run_here()


def exports(environ: MutableMapping[str, str]) -> dict[str, str]:
    """The variables, as whoever starts a node must have them, given what is in `environ`."""
    others = other_plugins(environ)
    wanted = {PLUGINS: json.dumps([*others, {"class": PLUGIN_CLASS}]), HOOK: HOOK_FUNCTION, UV_RUN: "0"}
    if environ.get(HOOK, HOOK_FUNCTION) != HOOK_FUNCTION:
        wanted[CHAINED_HOOK] = environ[HOOK]
    if CHAINED_UV_RUN not in environ:
        # Ray's own hook for `uv run` would run instead of ours; ours calls it where our field is absent.
        wanted[CHAINED_UV_RUN] = environ.get(UV_RUN, "1")
    return wanted


def other_plugins(environ: Mapping[str, str]) -> list[Any]:
    """What others registered. Raises FieldValueError where Ray could not read it either."""
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
    """The variables as they were before anybody registered this package."""
    restored = {name: value for name, value in environ.items() if name not in _OURS}
    others = other_plugins(environ)
    if others:
        restored[PLUGINS] = json.dumps(others)
    if CHAINED_HOOK in environ or environ.get(HOOK, HOOK_FUNCTION) != HOOK_FUNCTION:
        restored[HOOK] = environ.get(CHAINED_HOOK) or environ[HOOK]
    if CHAINED_UV_RUN in environ or UV_RUN in environ:
        restored[UV_RUN] = environ.get(CHAINED_UV_RUN, environ.get(UV_RUN, "1"))
    return restored


def worker_prefix(environ: MutableMapping[str, str]) -> list[str]:
    """Shell words in front of a worker's command that undo `register` there. The environment may lack this package."""
    words = ["unset", CHAINED_HOOK, CHAINED_UV_RUN, *([HOOK] if CHAINED_HOOK not in environ else []), "&&"]
    restored = {PLUGINS: json.dumps(other_plugins(environ)), UV_RUN: environ.get(CHAINED_UV_RUN, "1")}
    if CHAINED_HOOK in environ:
        restored[HOOK] = environ[CHAINED_HOOK]
    return [*words, "export", *(f"{name}={shlex.quote(value)}" for name, value in restored.items()), "&&"]


def _take_over_uv_run_here() -> None:
    # Ray reads the variable once, when it is imported; `import ray` commonly stands in the line above ours.
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is not None:
        constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # type: ignore[attr-defined]


def original_uv_run(environ: MutableMapping[str, str]) -> bool:
    """Whether Ray's own hook for `uv run` is to act where our field is absent."""
    return environ.get(CHAINED_UV_RUN, "1").lower() in {"1", "true"}

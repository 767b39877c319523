"""How `ray.init` comes to call our hook: this module extends the function of Ray that asks hooks.

Ray's own way is the variable RAY_RUNTIME_ENV_HOOK. Below `uv run` Ray ignores it, and all child processes inherit it,
also those whose Python lacks this package: their `ray.init()` fails. The extension is of this process alone, and leaves
everything to Ray where the runtime_env lacks our field.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from ray_envcache.field import registration
from ray_envcache.field.spec import FIELD

MODULE = "ray._private.worker"
FUNCTION = "_maybe_modify_runtime_env"


def extend() -> None:
    """Extend Ray's function, now or when Ray is imported. Twice is once."""
    worker = sys.modules.get(MODULE)
    if worker is not None:
        extend_in(worker)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


class _WhenImported:
    """Finds nothing itself: it extends Ray's function right after the others have loaded its module."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:  # noqa: ARG002  # Python calls it so
        if name != MODULE:
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
    ask_hooks = getattr(worker, FUNCTION, None)
    if ask_hooks is None:
        os.environ.setdefault(registration.HOOK, registration.HOOK_FUNCTION)
    elif not hasattr(ask_hooks, "__wrapped__"):
        setattr(worker, FUNCTION, _extended(ask_hooks))


def _extended(ask_hooks: Any) -> Any:
    @functools.wraps(ask_hooks)
    def ask_ours_first(runtime_env: Any, _skip_env_hook: bool = False) -> Any:  # noqa: FBT001, FBT002  # as Ray's
        if _skip_env_hook or not isinstance(runtime_env, Mapping) or runtime_env.get(FIELD) is None:
            return ask_hooks(runtime_env, _skip_env_hook)
        return pkgutil.resolve_name(registration.HOOK_FUNCTION)(runtime_env)

    return ask_ours_first

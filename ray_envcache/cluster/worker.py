"""How Ray starts a worker from an environment: what the plugin writes into Ray's context for it.

Ray runs `bash -c "<prefix> exec <py_executable> default_worker.py ..."` with the raylet's variables and the context's.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Any

from ray_envcache.field import registration
from ray_envcache.store.layout import Entry

_PATH = "PYTHONPATH"
_HOME = "PYTHONHOME"
_MACOS = "DYLD_LIBRARY_PATH"


def use(entry: Entry, runtime_env: Mapping[str, Any], context: Any, environ: Mapping[str, str]) -> None:
    """Have workers run the environment's interpreter, with its `bin` first on their PATH. `environ` is the node's."""
    context.py_executable = shlex.quote(os.fspath(entry.python))
    context.env_vars["VIRTUAL_ENV"] = os.fspath(entry.venv)
    context.env_vars["PATH"] = f"{entry.bin}:{context.env_vars.get('PATH') or '${PATH}'}"
    context.command_prefix += prefix(runtime_env, environ)


def prefix(runtime_env: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Shell words in front of a worker's command: they undo our registration, and what the node's own Python needs.

    The environment need not have this package. PYTHONHOME and PYTHONPATH of the node would put its packages before the
    locked ones; what the user's `env_vars` say stays.
    """
    given = runtime_env.get("env_vars") or {}
    before = registration.without_us(environ)
    others = shlex.quote(before.pop(registration.PLUGINS, "[]"))
    removed = sorted({registration.HOOK, _HOME} - (before.keys() - {_HOME}) - given.keys())
    # Begins with a plain assignment: on macOS Ray puts `DYLD_LIBRARY_PATH=...` in front of the whole command, which
    # would otherwise hold for our first command alone.
    begin = [f"{registration.PLUGINS}={others}", "&&", "export", registration.PLUGINS, _MACOS, "&&"]
    return [*begin, *_python_path(runtime_env, given, environ.get(_PATH)), "unset", *removed, "&&"]


def _python_path(runtime_env: Mapping[str, Any], given: Mapping[str, str], inherited: str | None) -> list[str]:
    """Words that take the node's PYTHONPATH out of the worker's.

    Ray appends it once for a working_dir and once for py_modules; without them the worker inherits it, unless the user
    gave another.
    """
    appended = sum(bool(runtime_env.get(name)) for name in ("working_dir", "py_modules"))
    if inherited is None or (_PATH in given and not appended):
        return []
    if not appended:
        return ["unset", _PATH, "&&"]
    return [f"{_PATH}=${{{_PATH}%:{shlex.quote(inherited)}}}", "&&"] * appended

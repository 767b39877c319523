"""Two of Ray's own fields that travel beside ours: Ray merges, inherits and forwards them as it does with our field.

The guard. Ray ignores a field whose plugin is not loaded on a node, but for a line in that node's log, and would run
the task in the node's Python. The guard is a value in `java_jars` that no node can set up: without our plugin the task
fails with its text. Our plugin takes it away before Ray reads it. Of Ray's fields it is `java_jars` because no Python
worker uses that.

An empty `py_executable`. A task with our field would inherit the one that Ray sets for the job of a driver under `uv
run`: the empty one replaces it. And Ray Client, which would set one, leaves a runtime_env alone that has the field.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

CARRIER = "java_jars"
EXECUTABLE = "py_executable"
ABSENT = "this node runs without the plugin of ray-envcache"
# Ray quotes an address that it cannot read in the error that reaches the driver.
GUARD = (
    f"envcache://{ABSENT} and cannot set up the `envcache` field. "
    'hint: start it with the variables of `ray-envcache env`, as in: eval "$(ray-envcache env)"; ray start ...; '
    "`ray-envcache doctor --address ADDRESS` shows which nodes lack it"
)


def guarded(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime_env with both fields; twice is once."""
    return {**runtime_env, CARRIER: [*_others(runtime_env), GUARD], EXECUTABLE: runtime_env.get(EXECUTABLE) or ""}


def disarm(runtime_env: MutableMapping[str, Any]) -> None:
    """Take away what `guarded` added, before Ray reads it; what users put into the same fields stays."""
    others = _others(runtime_env)
    if others:
        runtime_env[CARRIER] = others
    else:
        runtime_env.pop(CARRIER, None)
    if not runtime_env.get(EXECUTABLE):
        runtime_env.pop(EXECUTABLE, None)


def _others(runtime_env: Mapping[str, Any]) -> list[Any]:
    return [jar for jar in runtime_env.get(CARRIER) or [] if jar != GUARD]

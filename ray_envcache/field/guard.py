"""What travels in a runtime_env besides what users write: two of Ray's own fields beside ours, and the doctor's probe.

The guard. Ray ignores a field whose plugin is not loaded on a node, but for a line in that node's log, and would run
the task in the node's Python. The guard is a value in `java_jars` that no node can set up: without our plugin the task
fails with its text. Our plugin takes it away before Ray reads it. Of Ray's fields it is `java_jars` because no Python
worker uses that.

An empty `py_executable`. A task with our field would inherit the one that Ray sets for the job of a driver under `uv
run`: the empty one replaces it. And Ray Client, which would set one, leaves a runtime_env alone that has the field.

The probe. A field value that builds nothing: the plugin answers it by an environment variable of the probe's task. A
task without that variable runs on a node whose agent has no plugin.

The prefetch. A field value in another one: the plugin completes all bytecode, and says how the environment came there.
"""

from __future__ import annotations

import json
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
PROBE_ANSWER = "RAY_ENVCACHE_PROBE"
_PROBE, _PREFETCH = "probe", "prefetch"


def guarded(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime_env with both fields; twice is once."""
    return {**runtime_env, CARRIER: [*_others(runtime_env), GUARD], EXECUTABLE: runtime_env.get(EXECUTABLE) or ""}


def disarm(runtime_env: MutableMapping[str, Any]) -> None:
    """Take away what `guarded` added, before Ray reads it; what users put into the same fields stays."""
    if others := _others(runtime_env):
        runtime_env[CARRIER] = others
    else:
        runtime_env.pop(CARRIER, None)
    if not runtime_env.get(EXECUTABLE):
        runtime_env.pop(EXECUTABLE, None)


def _others(runtime_env: Mapping[str, Any]) -> list[Any]:
    return [jar for jar in runtime_env.get(CARRIER) or [] if jar != GUARD]


def probe(nonce: str) -> dict[str, str]:
    """The field value of a probe. Each has its own `nonce`: Ray asks the agent only about new runtime_envs."""
    return {_PROBE: nonce}


def is_probe(value: Any) -> bool:
    """Whether a field value is one of `probe`. Pure, and never raises."""
    return isinstance(value, dict) and value.keys() == {_PROBE}


def prefetch(field: Mapping[str, Any], nonce: str) -> dict[str, Any]:
    """The field value that prefetches the environment of `field`; `nonce` as for a probe."""
    return {_PREFETCH: field, "nonce": nonce}


def prefetched(value: Any) -> Any:
    """The field value in one of `prefetch`, else None. Pure, and never raises."""
    return value.get(_PREFETCH) if isinstance(value, dict) else None


def encode_answer(answer: Any) -> str:
    """The answer to a probe or a prefetch, as JSON in which Ray finds no `$` to expand."""
    return json.dumps(answer).replace("$", "\\u0024")

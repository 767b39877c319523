"""The guard: a node without the plugin refuses a task that has our field, instead of running it in the wrong place.

Ray ignores a field whose plugin is not loaded on a node, but for a line in that node's logs. So one of Ray's own
fields travels beside ours, with a value that Ray cannot set up and refuses with its text. Where our plugin is loaded it
comes first and takes the value away. It costs nothing, a worker needs nothing installed for it, and it is merged,
inherited and forwarded by Ray, as our field is. Of Ray's fields it is `java_jars`: no Python worker has a use for it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

CARRIER = "java_jars"
ABSENT = "this node runs without the plugin of ray-envcache"
# Ray quotes an address that it cannot read in the error that reaches the driver.
GUARD = (
    f"envcache://{ABSENT} and cannot set up the `envcache` field. "
    'hint: start it with the variables of `ray-envcache env`, as in: eval "$(ray-envcache env)"; ray start ...; '
    "`ray-envcache doctor --address ADDRESS` shows which nodes lack it"
)


def guarded(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """The runtime_env with the guard; twice is once."""
    return {**runtime_env, CARRIER: [*_others(runtime_env), GUARD]}


def disarm(runtime_env: MutableMapping[str, Any]) -> None:
    """Take the guard away, before Ray gets to it; what others put into the same field stays."""
    others = _others(runtime_env)
    if others:
        runtime_env[CARRIER] = others
    else:
        runtime_env.pop(CARRIER, None)


def _others(runtime_env: Mapping[str, Any]) -> list[Any]:
    return [jar for jar in runtime_env.get(CARRIER) or [] if jar != GUARD]

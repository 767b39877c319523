"""The question of `ray-envcache doctor` to a node: a field value that builds nothing and that the plugin answers.

The answer reaches the probe's task as an environment variable. A task without that variable runs on a node whose agent
has no plugin, because Ray ignores the field there.
"""

from __future__ import annotations

import json
from typing import Any

VARIABLE = "RAY_ENVCACHE_PROBE"
_OPTION = "probe"


def field(nonce: str) -> dict[str, str]:
    """The field value of a probe. Each has its own `nonce`: Ray asks the agent only about new runtime_envs."""
    return {_OPTION: nonce}


def is_probe(value: Any) -> bool:
    """Whether a field value is one of `field`. Pure, and never raises."""
    return isinstance(value, dict) and value.keys() == {_OPTION}


def encode(facts: dict[str, Any]) -> str:
    """The answer as the value of a variable."""
    # Ray expands `$` in the variables of a runtime_env.
    return json.dumps(facts).replace("$", "\\u0024")


def decode(text: str) -> dict[str, Any]:
    """The answer from the variable's value."""
    facts: dict[str, Any] = json.loads(text)
    return facts

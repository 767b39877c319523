"""The guard: carried beside the field, taken away by the plugin, and in nobody's way."""

from __future__ import annotations

from typing import Any

import pytest
from ray._private.runtime_env import packaging
from ray.runtime_env import RuntimeEnv

from ray_envcache.field import guard

FIELD = {"envcache": {"path": "/p"}}


@pytest.mark.parametrize("jars", [{}, {"java_jars": ["s3://bucket/a.jar"]}])
def test_there_and_back(jars: dict[str, Any]) -> None:
    """Guarded twice is guarded once; disarmed, all is as before, whatever else stands in the same field."""
    env = {**FIELD, **jars}
    guarded = guard.guarded(guard.guarded(env))
    assert guarded["java_jars"] == [*jars.get("java_jars", []), guard.GUARD]
    # As the node has it.
    there = RuntimeEnv.deserialize(RuntimeEnv(**guarded).serialize())
    guard.disarm(there)
    assert dict(there) == env
    guard.disarm(there)
    assert dict(there) == env


def test_ray_refuses_it_and_says_why() -> None:
    """What reads such a field on a node without the plugin cannot set it up, and repeats its text."""
    with pytest.raises(ValueError, match="this node runs without the plugin of ray-envcache"):
        packaging.get_local_dir_from_uri(guard.GUARD, "/anywhere")

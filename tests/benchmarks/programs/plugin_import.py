"""What importing and making the plugin costs an agent that has imported everything of Ray's own: prints milliseconds."""

from __future__ import annotations

import importlib
import json
import sys
import time


def milliseconds(module: str) -> float:
    began = time.perf_counter()
    importlib.import_module(module)
    return (time.perf_counter() - began) * 1000


if __name__ == "__main__":
    own = milliseconds("ray._private.runtime_env.agent.main") + milliseconds(
        "ray._private.runtime_env.agent.runtime_env_agent"
    )
    before = set(sys.modules)
    ours = milliseconds("ray_envcache.plugin")
    print(json.dumps({"ray": own, "plugin": ours, "modules": sorted(set(sys.modules) - before)}))

"""`create()` of the plugin, warm, in a fresh process: `python plugin_create.py PROJECT CALLS` prints milliseconds.

Each call has a URI of its own, as different field values have, and is given back as Ray does when a job has ended:
some calls later, when people were told of it. The first pays for what a process does once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time

from ray._private.runtime_env.context import RuntimeEnvContext

from ray_envcache.plugin import EnvCachePlugin

HELD = 20
"""How many leases are held at a time: each for longer than it takes until people are told of it."""


async def measure(project: str, calls: int) -> list[float]:
    plugin, logger = EnvCachePlugin(), logging.getLogger("runtime_env_01000000")
    taken = []
    for number in range(calls):
        context = RuntimeEnvContext()
        began = time.perf_counter()
        await plugin.create(f"envcache://{number}", {"envcache": {"path": project}}, context, logger)
        taken.append((time.perf_counter() - began) * 1000)
        if number >= HELD:
            plugin.delete_uri(f"envcache://{number - HELD}", logger)
        await asyncio.sleep(0.002)
    return taken


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(sys.argv[1], int(sys.argv[2])))))

"""The driver of every alternative: `python first_tasks.py WORK`, where WORK is JSON.

It says, with the moment, when Ray is imported, when the cluster is up, when its first task has its result, and what
the rest of the work took. Only how the workers get their environment differs between the alternatives.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

MARK = "@bench "
STORE_BYTES = 80 << 20  # the least that Ray takes: no alternative uses objects


def say(event: str, **more: Any) -> None:
    print(f"{MARK}{json.dumps({'event': event, 'moment': time.monotonic(), **more})}", flush=True)


def main() -> None:
    work = json.loads(sys.argv[1])
    if work["envcache"]:
        import ray_envcache  # noqa: F401  # registers the field
    import ray

    say("imported")
    # Bound to this module's namespace, so that they travel by value: the workers have other files.
    ray.init(
        runtime_env=work["runtime_env"],
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=STORE_BYTES,
    )
    say("up")
    found = ray.get(ray.remote(about).remote())
    say("first", python=found[0], session=ray._private.worker._global_node.get_session_dir_path())
    if work["more"]:
        more_workers(ray, work["more"])
    if work["many"]:
        many_workers(ray, work["many"])
    if work["module"]:
        first_import(ray, work["module"], work["env_vars"])
    if work["hold"]:
        say("holding")
        sys.stdin.readline()
    ray.shutdown()
    say("down")


def about() -> list[str]:
    return [sys.executable, str(os.getpid())]


def more_workers(ray: Any, count: int) -> None:
    """One after the other: actors in runtime_envs that are new each time, so that each needs a new worker."""
    for number in range(count):
        began = time.monotonic()
        actor = ray.remote(Worker).options(num_cpus=0, runtime_env={"env_vars": {"BENCHMARK": str(number)}}).remote()
        ray.get(actor.ready.remote())
        say("more", seconds=time.monotonic() - began)
        ray.kill(actor)


def many_workers(ray: Any, count: int) -> None:
    """All at once, in the runtime_env of the job."""
    say("before-many")
    began = time.monotonic()
    actors = [ray.remote(Worker).options(num_cpus=0).remote() for _ in range(count)]
    ray.get([actor.ready.remote() for actor in actors])
    say("many", seconds=time.monotonic() - began)
    for actor in actors:
        ray.kill(actor)


def first_import(ray: Any, module: str, env_vars: dict[str, str]) -> None:
    actor = ray.remote(Worker).options(num_cpus=0, runtime_env={"env_vars": {"BENCHMARK": "m", **env_vars}}).remote()
    say("import", seconds=ray.get(actor.load.remote(module)))


class Worker:
    def ready(self) -> bool:
        return True

    def load(self, module: str) -> float:
        import importlib

        began = time.perf_counter()
        importlib.import_module(module)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()

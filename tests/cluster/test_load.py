"""Many tasks, actors and environments at once on one node."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_envcache.field import registration
from tests import support
from tests.cluster.conftest import NEWEST, WITH_TOKEN, Host

pytestmark = [pytest.mark.cluster, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

# Ends with its stdin. The plugin is the one that the environment names: nobody imports the package here.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 4, "include_dashboard": False, "object_store_memory": 200_000_000,
})
print(cluster.address, flush=True)
sys.stdin.read()
"""

# Every task and actor says which environment it has, and finds the package of its own project there.
JOB = """
import json, sys
import ray, ray_envcache

address, tasks, actors, projects = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
ray.init(address=address, log_to_driver=False)
envs = [ray_envcache.runtime_env(project) for project in projects]

def where(number):
    import importlib, sys
    importlib.import_module(f"envcache_own{number}")
    return number, sys.prefix

@ray.remote(num_cpus=0)
class Actor:
    def where(self, number):
        return where(number)

task = ray.remote(where)
numbers = range(len(envs))
working = [
    Actor.options(runtime_env=envs[number % len(envs)]).remote() for number in range(actors)
]
found = [actor.where.remote(number % len(envs)) for number, actor in enumerate(working)]
found += [task.options(runtime_env=envs[number % len(envs)]).remote(number % len(envs)) for number in range(tasks)]
print(json.dumps(ray.get(found)), flush=True)
"""


class Node:
    """A living cluster of one node whose agent times our steps."""

    def __init__(self, host: Host, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.host = host
        self.address = process.stdout.readline().strip()
        self.agent = agent_of(process)
        self.witness = host.folder / "witness.log"
        self._idle = descriptors(self.agent)

    def projects(self, count: int) -> list[Path]:
        """Projects with an environment each; its name ends with its number."""
        support.make_witness(self.host.wheels, self.witness)
        for number in range(count):
            support.make_wheel(self.host.wheels, f"envcache-own{number}")
        return [
            self.host.project(f"p{number}", ["envcache-witness", f"envcache-own{number}"]) for number in range(count)
        ]

    def run_jobs(self, jobs: int, tasks: int, actors: int, projects: list[Path]) -> None:
        """Run so many jobs at once, each with so many tasks and actors, and check what they found."""
        drivers = [
            self.host.start(JOB, self.address, str(tasks), str(actors), *projects, before=(), **WITH_TOKEN)
            for _ in range(jobs)
        ]
        outputs = [driver.communicate() for driver in drivers]
        assert [driver.returncode for driver in drivers] == [0] * jobs, outputs
        # Ray prints warnings beside it.
        found = [json.loads(line) for out, _ in outputs for line in out.splitlines() if line.startswith("[[")]
        assert [len(one) for one in found] == [tasks + actors] * jobs
        prefixes = {(number, prefix) for one in found for number, prefix in one}
        assert len({number for number, _ in prefixes}) == len(prefixes) == len(projects)

    def check_nothing_leaked(self, builds: int) -> None:
        """One build per key; and of ended jobs no lease, no descriptor and no process of the agent's is left.

        But for what Ray still refers to. That is nothing, mostly; where it creates several environments at once the
        raylet now and then forgets to give one back, with any plugin. Such a lease ends with the node.
        """
        assert support.count_builds(self.witness) == builds
        support.wait_until(lambda: not workers(self.agent), "the workers are gone")
        with suppress(AssertionError):
            support.wait_until(lambda: not self.referenced, "Ray gave back everything", seconds=5)
        # The last act of a detached child's starter, which nobody waits for, is reaped with the next child.
        support.wait_until(lambda: not any(map(title_of, self.agent.children())), "the agent's children are gone")
        # Given back by a thread, after Ray was answered.
        support.wait_until(lambda: len(self.host.holders()) == self.referenced, "what Ray gave back is held by nobody")
        left = descriptors(self.agent)
        # The entry's, and the lease's own.
        assert left.pop("store", 0) == 2 * self.referenced
        assert left == self._idle

    @property
    def referenced(self) -> int:
        """How many environments Ray refers to."""
        return len(self.noted["referenced"])

    @property
    def noted(self) -> dict[str, Any]:
        """What the timed plugin noted."""
        noted: dict[str, Any] = json.loads((self.host.folder / "steps.json").read_text())
        return noted


def agent_of(cluster: subprocess.Popen[str]) -> psutil.Process:
    def found() -> list[psutil.Process]:
        family = psutil.Process(cluster.pid).children(recursive=True)
        return [one for one in family if title_of(one).startswith("ray::RuntimeEnvAgent")]

    support.wait_until(lambda: len(found()) == 1, "the agent is up: its last act is to call itself so")
    return found()[0]


def workers(agent: psutil.Process) -> list[str]:
    """What the other children of the agent's raylet call themselves; the dashboard's agent is no worker."""
    raylet = agent.parent()
    assert raylet is not None
    return [title for one in raylet.children() if (title := title_of(one)) and "Agent" not in title]


def title_of(process: psutil.Process) -> str:
    return " ".join(support.command_of(process))


def descriptors(process: psutil.Process) -> Counter[str]:
    """What a process has open: by name, with all that is in the store as one.

    Without its sockets: those to the raylet come and go. Of pipes and the like the kind counts, they have no names.
    """
    found: Counter[str] = Counter()
    for number in os.listdir(f"/proc/{process.pid}/fd"):
        with suppress(FileNotFoundError):
            name = os.readlink(f"/proc/{process.pid}/fd/{number}")
            found["store" if "/store/v1/" in name else name.partition(":[")[0]] += 1
    del found["socket"]
    return found


@pytest.fixture
def node(host: Host) -> Iterator[Node]:
    timed: dict[str, Any] = {
        registration.PLUGINS: json.dumps([{"class": "timed_plugin.TimedPlugin"}]),
        "PYTHONPATH": os.path.dirname(__file__),
        "ENVCACHE_TEST_STEPS": str(host.folder / "steps.json"),
    }
    process = host.start(CLUSTER, before=(), **timed, **WITH_TOKEN)
    try:
        yield Node(host, process)
    finally:
        if process.poll() is None:
            support.kill_tree(process.pid)


def test_many_at_once(node: Node) -> None:
    """40 tasks and 8 actors with 4 environments in one job: each is built once, and nothing is left open or held."""
    node.run_jobs(1, 40, 8, node.projects(4))
    node.check_nothing_leaked(builds=4)
    assert node.noted["steps"].keys() >= {"validate", "get_uris", "create, first step", "modify_context", "delete_uri"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("jobs", [1, 4])
def test_full_load(node: Node, jobs: int) -> None:
    """200 tasks and 50 actors with 10 environments, in one job or in four at once. Shows figures with `-s`."""
    projects = node.projects(10)
    began = time.monotonic()
    node.run_jobs(jobs, 200, 50, projects)
    print(f"\n{jobs} jobs, each 200 tasks and 50 actors, 10 environments: {time.monotonic() - began:.1f} s")
    node.check_nothing_leaked(builds=10)
    show(node.noted["steps"])


def show(steps: dict[str, dict[str, Any]]) -> None:
    print(f"{'longest step in the loop':<24} {'wall ms':>8} {'ours ms':>8} {'times':>6}")
    for name, one in sorted(steps.items()):
        print(f"{name:<24} {one['wall'] * 1e3:8.2f} {one['ours'] * 1e3:8.2f} {one['count']:6}")

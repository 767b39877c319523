"""Nodes that `ray start` starts with the exports, as a service manager would: in the foreground, ended by SIGTERM."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator

import psutil
import pytest

from tests import support
from tests.cluster.conftest import NEWEST, WITH_TOKEN, Host, end_nodes, free_port, start_node

pytestmark = [pytest.mark.cluster, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

# Nothing but the variables tells these nodes of the plugin. Ports of workers are free ones: by default they are those
# of any other cluster on the host.
NODE = """
export PATH={bin}:$PATH
eval "$(ray-envcache env)"
exec ray start {role} --block --node-ip-address=127.0.0.1 --num-cpus=1 --resources='{{"{name}": 9}}' \
  --min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000
"""

WHERE = """
import json, sys
import ray, ray_envcache
ray.init(address=sys.argv[1], runtime_env={"envcache": sys.argv[2]}, log_to_driver=False)

@ray.remote(num_cpus=0)
def where():
    import os, sys
    return sys.executable, "RAY_RUNTIME_ENV_HOOK" in os.environ

print(json.dumps(ray.get([where.options(resources={name: 1}).remote() for name in ["head", "worker"]], timeout=120)))
"""


@pytest.fixture
def nodes(host: Host) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """The address of a cluster of a head and a worker, each a `ray start --block`, and these processes."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    roles = {"head": f"--head --port={port} --include-dashboard=false", "worker": f"--address={address}"}
    started: list[subprocess.Popen[str]] = []
    try:
        for name, role in roles.items():
            command = NODE.format(bin=host.python.parent, role=role, name=name)
            started.append(start_node(command, host.environ(**WITH_TOKEN)))
        yield address, started
    finally:
        end_nodes(started)


def test_ray_start_with_the_exports(host: Host, nodes: tuple[str, list[subprocess.Popen[str]]]) -> None:
    """A driver that connects by address gets its environment on both nodes; SIGTERM ends all of it, and every lease."""
    address, started = nodes
    found = host.run(WHERE, address, host.project("project"), **WITH_TOKEN)
    (entry,) = host.layout.all_entries()
    assert found == [[str(entry.python), False]] * 2
    family = [process for child in started for process in psutil.Process(child.pid).children(recursive=True)]
    for child in reversed(started):
        child.send_signal(signal.SIGTERM)
        child.wait()
    # As the unit file in the README says.
    assert [child.returncode for child in started] == [1, 1]
    support.wait_until(lambda: all(map(support.is_gone, family)), "all that the nodes started is gone")
    assert host.holders() == []


def test_another_home(host: Host, nodes: tuple[str, list[subprocess.Popen[str]]]) -> None:
    """A driver whose home has not the token of the cluster is refused by Ray, with words about the token."""
    address, _ = nodes
    project, other = host.project("project"), host.folder / "other home"
    other.mkdir()
    for variables in ({}, WITH_TOKEN):
        driver = host.start(WHERE, address, project, before=(), HOME=str(other), **variables)
        _, err = driver.communicate()
        assert driver.returncode == 1
        assert "authentication token" in err.lower()
    assert host.holders() == []

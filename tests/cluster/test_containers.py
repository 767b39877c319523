"""Two containers of one host, each with a Ray cluster of its own, and one store."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import support
from tests.cluster.conftest import NEWEST, Host

pytestmark = [pytest.mark.cluster, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

STAY = """
import sys
import ray, ray_envcache
ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
print(ray.get(ray.remote(lambda: sys.executable).remote()), flush=True)
sys.stdin.read()
"""


def test_a_cluster_in_each_container(host: Host) -> None:
    """Both start at once on an empty store: one build; a collector takes nothing before both containers are dead."""
    log = host.folder / "log"
    support.make_witness(host.wheels, log)
    project = host.project("project", ["envcache-witness"])
    drivers = []
    for name in "ab":
        # A container has a temp directory of its own.
        (host.temp / name).mkdir()
        drivers.append(host.start(STAY, project, before=tuple(support.container()), RAY_TMPDIR=str(host.temp / name)))
    found = [last_line(driver) for driver in drivers]
    (entry,) = host.layout.all_entries()
    assert found == [str(entry.python)] * 2
    assert support.count_builds(log) == 1
    support.wait_until(lambda: {holder.kind for holder in host.holders()} == {"agent"}, "the drivers handed over")
    for driver in drivers:
        said = collect(host)
        assert "Removed 0 environments" in said
        assert "; 1 in use" in said
        support.first_of_container(driver.pid).kill()
        driver.wait()
    assert "Removed 1 environment," in collect(host)
    assert [*host.layout.all_entries()] == []


def last_line(driver: subprocess.Popen[str]) -> str:
    """What a task of the driver found, behind whatever Ray says at its start."""
    assert driver.stdout is not None
    return next((line.strip() for line in driver.stdout if line.startswith("/")), "")


def collect(host: Host) -> str:
    """What a collector says in a third container."""
    command: list[str | Path] = [*support.container(), host.python, "-m", "ray_envcache", "gc", "--all"]
    return subprocess.run(command, env=host.environ(), capture_output=True, text=True, check=True).stdout

"""Containers that share a folder of their host: processes of several pid namespaces, and one store."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.store.layout import Layout
from tests import support

pytestmark = pytest.mark.host

# As an agent and its worker do: a lease, and an interpreter of the environment.
USE = """
import subprocess, sys
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

lease = Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("agent"))
subprocess.run([lease.python, "-c", "import sys; print(sys.prefix, flush=True); sys.stdin.read()"])
"""


def start(
    children: list[subprocess.Popen[str]], *arguments: str | Path, said: Path | None = None
) -> subprocess.Popen[str]:
    """Start a Python in a container of its own; what it says on stderr goes to the file `said`."""
    command = [*support.container(), sys.executable, *map(str, arguments)]
    with (said or Path("/dev/null")).open("w") as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
        )
    children.append(child)
    return child


def collect(children: list[subprocess.Popen[str]]) -> str:
    """What a collector in a container says that shall remove all it can."""
    return start(children, "-m", "ray_envcache", "gc", "--all").communicate()[0]


def test_one_builds_and_all_use(
    store: Store, wheels: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """Two containers ask for one key at the same moment: one builds, the other waits for it, both get the same."""
    started, blocked, log = tmp_path / "started", tmp_path / "blocked", tmp_path / "log"
    blocked.touch()
    code = f"p = pathlib.Path; p({str(started)!r}).touch(); [time.sleep(0.02) for _ in iter(p({str(blocked)!r}).exists, False)]"
    support.make_sdist(wheels, "slow", code=code)
    support.make_witness(wheels, log)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "slow", "envcache-witness"])
    said = [tmp_path / "said-1", tmp_path / "said-2"]
    containers = [start(children, "-m", "ray_envcache", "build", project, said=file) for file in said]
    support.wait_until(
        lambda: started.exists() and any("Waiting for the environment" in file.read_text() for file in said),
        "one builds, the other waits",
    )
    blocked.unlink()
    found = [container.communicate()[0].strip() for container in containers]
    (entry,) = store.layout.all_entries()
    assert found == [str(entry.python)] * 2
    assert support.count_builds(log) == 1


@pytest.fixture
def project(wheels: Path, tmp_path: Path) -> Path:
    support.make_wheel(wheels, "wanted")
    return support.make_project(tmp_path / "project", wheels, ["ray", "wanted"])


def entries(layout: Layout) -> list[Path]:
    return [entry.path for entry in layout.all_entries()]


def test_collector_in_another_container(store: Store, project: Path, children: list[subprocess.Popen[str]]) -> None:
    """While any container runs from it, no collector of another one takes it; when the last is killed, it goes."""
    users = [start(children, "-c", textwrap.dedent(USE), project) for _ in range(2)]
    prefixes = {user.stdout.readline().strip() for user in users if user.stdout is not None}
    (entry,) = store.layout.all_entries()
    assert prefixes == {str(entry.venv)}
    for user in users:
        said = collect(children)
        assert "Removed 0 environments" in said
        assert "; 1 in use" in said
        assert entries(store.layout) == [entry.path]
        support.first_of_container(user.pid).kill()
        user.wait()
    assert "Removed 1 environment," in collect(children)
    assert entries(store.layout) == []

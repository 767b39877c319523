"""One cluster with all that Ray can have, for all doors: its drivers, jobs, clients and applications come and go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import support
from tests.cluster.conftest import NEWEST, OLDEST, REPOSITORY, WITH_TOKEN, Host, run_host

EXTRAS = "default,serve,data,train,tune"

# Ends with its stdin, so also with the tests. The ports are free, and nobody's default.
CLUSTER = """
import json, socket, sys
import ray_envcache
from ray.cluster_utils import Cluster

taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
dashboard, agent, client, serve = (one.getsockname()[1] for one in taken)
for one in taken:
    one.close()
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 64, "object_store_memory": 200_000_000, "include_dashboard": True, "dashboard_port": dashboard,
    "dashboard_agent_listen_port": agent, "ray_client_server_port": client,
})
print(json.dumps([cluster.address, f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}", serve]), flush=True)
sys.stdin.read()
"""

# What all drivers start with. `where` runs in tasks, actors, replicas and trials: it needs a package that only the
# environments have.
DRIVER = """
import json, os, sys
import ray, ray_envcache

projects = json.loads(os.environ["PROJECTS"])

def where():
    import sys
    import envcache_dep
    return sys.prefix

def error(function):
    try:
        return f"no error: {function()}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def tell(found):
    # First, since the threads of a connected driver write to stdout too.
    ray.shutdown()
    print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package."""
    folder = tmp_path_factory.mktemp("wheel")
    support.run_uv("build", "--wheel", f"--out-dir={folder}", REPOSITORY, cwd=REPOSITORY)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session", params=[pytest.param(OLDEST, marks=pytest.mark.slow), NEWEST])
def python(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a venv with that Ray, all its libraries and this package."""
    venv = tmp_path_factory.mktemp("doors") / "venv"
    # The old Serve does not run with a newer protobuf.
    ray = [f"ray[{EXTRAS}]"] if request.param == NEWEST else [f"ray[{EXTRAS}]=={request.param}", "protobuf<7"]
    support.run_uv("venv", f"--python={sys.executable}", venv, cwd=REPOSITORY)
    support.run_uv("pip", "install", f"--python={venv}", *ray, wheel, cwd=REPOSITORY)
    return venv / "bin" / "python"


@dataclass(frozen=True)
class Project:
    """A project that is built already."""

    folder: Path
    prefix: str


@dataclass(frozen=True)
class Cluster:
    """A living cluster, and what drivers, jobs and clients need to find it."""

    host: Host
    projects: dict[str, Project]
    address: str
    dashboard: str
    client: str
    serve_port: int

    def prefix(self, project: str) -> str:
        """The environment of this project."""
        return self.projects[project].prefix

    def start(self, code: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a driver, whose bare `ray.init()` connects to the cluster."""
        environ = {**WITH_TOKEN, "RAY_ADDRESS": self.address, "DASHBOARD": self.dashboard, "CLIENT": self.client}
        projects = json.dumps({name: str(project.folder) for name, project in self.projects.items()})
        code = DRIVER + textwrap.dedent(code)
        environ |= {"SERVE": str(self.serve_port), "PROJECTS": projects}
        return self.host.start(code, *arguments, before=(), **environ)

    def run(self, code: str, *arguments: str | Path) -> Any:
        """Run such a driver to its end; the last line of its stdout is JSON."""
        return answer(self.start(code, *arguments))


def answer(driver: subprocess.Popen[str]) -> Any:
    """The JSON in the last line of a driver's stdout, when it has ended."""
    out, err = driver.communicate()
    assert driver.returncode == 0, f"{out}\n{err}"
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="package")  # it is gone before other tests begin
def cluster(python: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with run_host(python, tmp_path_factory.mktemp("host")) as host:
        projects = make_projects(host, wheel)
        # Without the first, one in ten servers that Ray's proxy for clients forks dies before it starts. Without the
        # second, Serve gives up on a proxy that has not started after five seconds, which a busy machine may take.
        tuned = {**WITH_TOKEN, "GRPC_ENABLE_FORK_SUPPORT": "false", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
        process = host.start(CLUSTER, before=(), **tuned)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("["), process.communicate()
            yield Cluster(host, projects, *json.loads(line))
        finally:
            if process.poll() is None:
                support.kill_tree(process.pid)


def make_projects(host: Host, wheel: Path) -> dict[str, Project]:
    """Two with ray's core only, of which the second has this package too; one with ray's libraries and an application."""
    for version in ("1.0", "2.0"):
        support.make_wheel(host.wheels, "envcache-dep", version)
    application = (
        "from ray import serve\n\n@serve.deployment\nclass Where:\n    def __call__(self, request):\n"
        "        import sys\n        return [sys.prefix]\n\napp = Where.bind()\n"
    )
    support.make_wheel(host.wheels, "envcache-app", modules={"envcache_app.py": application})
    shutil.copy(wheel, host.wheels)
    versions = "import ray, google.protobuf; print(ray.__version__, google.protobuf.__version__)"
    ray, protobuf = support.run_python(versions, python=host.python).split()
    dependencies = {
        "one": ["envcache-dep==1.0"],
        "two": ["envcache-dep==2.0", "ray-envcache", f"ray=={ray}"],
        "libraries": ["envcache-dep", "envcache-app", f"ray[{EXTRAS}]=={ray}", f"protobuf=={protobuf}"],
    }
    return {name: make_project(host, name, needs) for name, needs in dependencies.items()}


def make_project(host: Host, name: str, dependencies: list[str]) -> Project:
    """A project whose packages come from the host's wheels and the index, and its environment."""
    folder = host.folder / name
    pyproject = support.make_project(folder, host.wheels, dependencies, lock=False)
    pyproject.write_text(pyproject.read_text().replace("no-index = true\n", ""))
    support.run_uv("lock", cwd=folder)
    built = support.run(host.python, "-m", "ray_envcache", "build", folder, env=host.environ())
    return Project(folder, str(Path(built.strip()).parents[1]))

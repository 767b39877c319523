"""The doors of Ray Serve: `serve.run`, and the config file of `serve run` and `serve deploy`."""

from __future__ import annotations

import pytest

from tests.cluster.doors.conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]

SERVE = """
import time, urllib.request
from ray import serve

port = int(os.environ["SERVE"])

def fetch(route):
    return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}{route}", timeout=60).read())
"""


def test_serve_run(cluster: Cluster) -> None:
    """A deployment has the runtime_env of its `ray_actor_options`, else that of the driver which deploys it."""
    run = (
        SERVE
        + """
ray.init(runtime_env=ray_envcache.runtime_env(projects["libraries"]) if sys.argv[1] == "job" else {}, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": port})
own = {} if sys.argv[1] == "job" else {"runtime_env": ray_envcache.runtime_env(projects["libraries"])}

@serve.deployment(ray_actor_options=own)
class Behind:
    def __call__(self):
        return where()

@serve.deployment
class Front:
    def __init__(self, behind):
        self.behind = behind

    async def __call__(self, request):
        import sys
        return [sys.prefix, await self.behind.remote()]

serve.run(Front.bind(Behind.bind()), name=sys.argv[1], route_prefix="/" + sys.argv[1])
found = fetch("/" + sys.argv[1])
serve.delete(sys.argv[1])
tell(found)
"""
    )
    inside, outside = cluster.prefix("libraries"), str(cluster.host.python.parents[1])
    # The first driver gives Serve's own actors their environment: here the cluster's.
    assert cluster.run(run, "own") == [outside, inside]
    assert cluster.run(run, "job") == [inside, inside]


def test_config_file(cluster: Cluster) -> None:
    """An application of a config file is imported and served in its environment; one with a relative path says why not."""
    deploy = (
        SERVE
        + """
import subprocess

config = f"{projects['libraries']}/serve.json"
application = {"import_path": "envcache_app:app"}
applications = [
    {"name": "good", "route_prefix": "/good", **application, "runtime_env": ray_envcache.runtime_env(projects["libraries"])},
    {"name": "bad", "route_prefix": "/bad", **application, "runtime_env": {"envcache": "pyproject.toml"}},
]

def status(name):
    with open(os.path.expanduser("~/.ray/auth_token")) as file:
        token = {"Authorization": f"Bearer {file.read()}"}
    request = urllib.request.Request(os.environ["DASHBOARD"] + "/api/serve/applications/", headers=token)
    with urllib.request.urlopen(request) as answer:
        found = json.load(answer)["applications"].get(name, {})
    return found.get("status"), found.get("message")

def deployed(applications, *command):
    with open(config, "w") as file:  # JSON is YAML
        json.dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}, file)
    command = [os.path.join(os.path.dirname(sys.executable), "serve"), *command, config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [one["name"] for one in applications]
    while not all(status(name)[0] in {"RUNNING", "DEPLOY_FAILED", "UNHEALTHY"} for name in names):
        time.sleep(0.2)
    return [status(name) for name in names]

found = [deployed(applications, "deploy", "-a", os.environ["DASHBOARD"]), fetch("/good")]
applications[0].update(name="run", route_prefix="/run")
found += [deployed(applications[:1], "run", "--non-blocking", "-a", os.environ["RAY_ADDRESS"]), fetch("/run")]
print(json.dumps(found))
"""
    )
    ((good, _), (bad, why)), deployed, ((run, _),), served = cluster.run(deploy)
    assert (good, bad, run) == ("RUNNING", "DEPLOY_FAILED", "RUNNING")
    assert deployed == served == [cluster.prefix("libraries")]
    assert "A relative path without a working_dir to start from: `pyproject.toml`" in why

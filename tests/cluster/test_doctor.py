"""`doctor` on clusters: what it says of nodes that can, and of each kind that cannot."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from typing import Any

import pytest

from ray_envcache.cli import doctor
from tests.cluster.conftest import NEWEST, Host
from tests.cluster.test_nodes import run

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]

BODY = """
import subprocess
(folder,) = arguments

def doctor(*more, **environ):
    command = [sys.executable, "-m", "ray_envcache", "doctor", "--json", "--timeout=120", *more]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environ}, cwd=folder)
    return [done.returncode, done.stdout, done.stderr]

@ray.remote
def busy():
    time.sleep(1000)

add("two", RAY_ENVCACHE_DIR=f"{folder}/two")
cluster.wait_for_nodes()
said = {"healthy": doctor("--address", "auto", RAY_ADDRESS=cluster.address)}
add("no_plugin", RAY_RUNTIME_ENV_PLUGINS="[]")
add("no_store", RAY_ENVCACHE_DIR=f"{folder}/file/store")
add("other", RAY_ENVCACHE_DIR=f"{folder}/another", PYTHONPATH=f"{folder}/other version")
cluster.wait_for_nodes()
kept = busy.remote()
said["broken"] = doctor("--address", cluster.address)
print(json.dumps(said))
"""


TOKEN_BODY = """
import json, os, subprocess, sys
import ray, ray_envcache

ray.init(num_cpus=1, include_dashboard=False)
named = ray.get_runtime_context().gcs_address
kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
token = os.path.expanduser("~/.ray/auth_token")

def doctor(address, **environ):
    command = [sys.executable, "-m", "ray_envcache", "doctor", "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, env={**kept, **environ})
    return [done.returncode, done.stdout, done.stderr]

print(json.dumps({
    "own": doctor(named, RAY_AUTH_MODE="token"),
    "copied": doctor("auto", RAY_ADDRESS=named, RAY_AUTH_MODE="token", HOME="/nowhere", RAY_AUTH_TOKEN_PATH=token),
    "no token": doctor(named, HOME="/nowhere"),
    "no token, asked for": doctor(named, HOME="/nowhere", RAY_AUTH_MODE="token"),
    "not sent": doctor(named),
    "another": doctor(named, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
}))
"""


def wrong(node: dict[str, Any], state: str) -> dict[str, str]:
    return {found["name"]: found["text"] for found in node["findings"] if found["state"] == state}


def store_of(node: dict[str, Any]) -> str:
    """The beginning of what the node says of its store."""
    said = [found["text"] for found in node["findings"] if found["name"] == "store"]
    return str(said[0]).partition(": ")[0] if said else ""


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_doctor(host: Host) -> None:
    """Every node is asked at once, with its CPUs taken too; what is wrong on one is said of that one, and what to do."""
    host.store("two")
    (host.folder / "file").touch()
    (host.folder / "other version").mkdir()
    (host.folder / "other version" / "sitecustomize.py").write_text(
        "import ray_envcache.version\nray_envcache.version.__version__ = '0.0.1'\n"
    )
    said = run(host, BODY, host.folder)
    _check_healthy(host, *said["healthy"])
    _check_broken(host, *said["broken"])
    _check_table(host, json.loads(said["broken"][1]))


def _check_healthy(host: Host, status: int, out: str, err: str) -> None:
    data = json.loads(out)
    assert (status, data["schema_version"], data["ok"]) == (0, 1, True)
    # The second has a store of its own, on the same host.
    wanted = {str(host.layout.root): set(), str(host.folder / "two"): {"store"}}
    assert {store_of(node): {*wrong(node, "warn")} for node in data["nodes"]} == wanted
    assert [wrong(node, "error") for node in data["nodes"]] == [{}, {}]
    names = {found["name"] for node in data["nodes"] for found in node["findings"]}
    assert names > {"plugin", "store", "space", "uv", "python", "ray", "settings"}
    assert err == ""


def _check_broken(host: Host, status: int, out: str, err: str) -> None:
    nodes = json.loads(out)["nodes"]
    assert (status, len(nodes)) == (1, 5)
    assert err == ""
    by_store = {store_of(node): node for node in nodes}
    for healthy in (str(host.layout.root), f"{host.folder}/two"):
        assert not wrong(by_store[healthy], "error")
    no_plugin = by_store[""]
    assert wrong(no_plugin, "error") == {"plugin": "The plugin is not loaded: Ray ignores the field there"}
    assert 'eval "$(ray-envcache env)"' in no_plugin["findings"][0]["hint"]
    no_store = wrong(by_store[f"Cannot use the store at `{host.folder}/file/store`"], "error")
    assert no_store == {"store": f"Cannot use the store at `{host.folder}/file/store`: Not a directory"}
    other = by_store[f"{host.folder}/another"]
    assert wrong(other, "ok")["plugin"] == "ray-envcache 0.0.1"
    assert wrong(other, "warn")["plugin"].startswith("ray-envcache 0.0.1 is there, ")
    assert wrong(other, "warn")["PYTHONPATH"].startswith(f"PYTHONPATH={host.folder}/other version")
    assert not wrong(other, "error")


def _check_table(host: Host, data: dict[str, Any]) -> None:
    with redirect_stdout(io.StringIO()) as out:
        doctor._print_cluster(data)
    head, *lines = out.getvalue().splitlines()
    assert head.split() == ["NODE", "HOST", "PLUGIN", "STORE", "SPACE", "UV"]
    assert [line for line in lines[:5] if f" {host.folder}/two " in line]
    assert sum(bool(re.search(r"  error +- +- +-$", line)) for line in lines[:5]) == 1
    assert sum(bool(re.search(r"  ray-envcache \S+  error +- +uv ", line)) for line in lines[:5]) == 1
    assert sum(line.startswith("error  ") for line in lines) == 2
    others = [line for line in lines if line.startswith("warn   ") and ": the node uses the store at /" in line]
    assert len(others) == 2
    assert sum(line.startswith("warn   ") for line in lines) - len(others) == 2
    assert sum(line.startswith("       hint: ") for line in lines) - len(others) == 4
    assert lines[-1].startswith("5 nodes of ")
    assert lines[-1].endswith(", 2 with errors")


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_doctor_with_a_token(host: Host) -> None:
    """The doctor asks a cluster with the user's token; without it Ray says at once what it lacks."""
    said = host.run(TOKEN_BODY, RAY_AUTH_MODE="token", HOME=str(host.folder))
    for healthy in ("own", "copied"):
        status, out, err = said.pop(healthy)
        assert (status, err) == (0, ""), healthy
        assert out.endswith(", 0 with errors\n")
    wrong, mode = "Authentication token is missing or incorrect.", " Note: RAY_AUTH_MODE is currently 'disabled'"
    causes = {
        "no token": wrong + mode,
        "no token, asked for": "Token authentication is enabled but no authentication token was found. ",
        "not sent": wrong + mode,
        "another": wrong,
    }
    assert said.keys() == causes.keys()
    for name, cause in causes.items():
        status, out, err = said[name]
        assert (status, out) == (1, "")
        assert err.startswith("error: Cannot ask the cluster at `")
        assert cause in err
        assert "~/.ray/auth_token or via RAY_AUTH_TOKEN_PATH" in err
        assert re.search(r"\nhint: Ray looks for the token in `[/$]\S+`, with RAY_AUTH_MODE=token", err)

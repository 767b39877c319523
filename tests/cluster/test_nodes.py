"""Several nodes, each with a store of its own, or with one between them; and what one node cannot do."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.store.layout import Layout
from tests import support
from tests.cluster.conftest import NEWEST, WITH_TOKEN, Host

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]

# Each raylet stands for a host: what `add` is given is in its environment, and in nobody else's.
CLUSTER = """
import json, os, sys, time
import ray, ray_envcache
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
ray.init(address=cluster.address)

def add(name, **environ):
    cluster.add_node(num_cpus=2, resources={name: 100}, env_vars=environ, wait=False)

@ray.remote(num_cpus=0, max_retries=0)
def where():
    import sys
    return sys.prefix

def on(name, env, function=where):
    return function.options(resources={name: 1}, runtime_env=env).remote()

def error(reference):
    try:
        return f"no error: {ray.get(reference, timeout=120)}"
    except ray.exceptions.RuntimeEnvSetupError as error:
        return str(error)
"""


def run(host: Host, body: str, *arguments: Any) -> Any:
    """Run a driver that makes such a cluster; arguments reach it as JSON."""
    prelude = f"arguments = json.loads({json.dumps(arguments, default=str)!r})"
    return host.run(CLUSTER + prelude + textwrap.dedent(body), **WITH_TOKEN)


def test_every_host_builds_once(host: Host) -> None:
    """Three hosts build once each, two raylets on one host once together, and a node that joins later too."""
    log = host.folder / "log"
    support.make_witness(host.wheels, log)
    project = host.project("project", ["envcache-witness"])
    body = """
    project, roots = arguments
    for name, root in [("a", "a"), ("b1", "b"), ("b2", "b"), ("c", "c")]:
        add(name, RAY_ENVCACHE_DIR=roots[root])
    cluster.wait_for_nodes()
    env = ray_envcache.runtime_env(project)
    found = ray.get([on(name, env) for name in ["a", "b1", "b2", "c"] for _ in range(2)])
    add("d", RAY_ENVCACHE_DIR=roots["d"])
    found.append(ray.get(on("d", env)))
    print(json.dumps(sorted(set(found))))
    """
    roots = {name: str(host.store(f"store-{name}")) for name in "abcd"}
    found = run(host, body, project, roots)
    key = Path(found[0]).parent.name
    assert found == [f"{root}/v1/entries/{key}/venv" for root in roots.values()]
    builds = [line.split()[0] for line in log.read_text().splitlines() if line.endswith(" 1")]
    assert sorted(builds) == found
    assert [*host.layout.all_entries()] == []


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_lockfile_by_working_dir(host: Host) -> None:
    """A relative path means the lockfile that travels in the working_dir, on every node; whose own files do not count."""
    folder = host.project("project").parent
    body = """
    folder, roots = arguments
    ray.shutdown()
    ray.init(address=cluster.address, runtime_env={"working_dir": folder, "envcache": "pyproject.toml"})
    for name, root in roots.items():
        add(name, RAY_ENVCACHE_DIR=root)
    cluster.wait_for_nodes()
    os.rename(folder, folder + "-moved")
    print(json.dumps(ray.get([on(name, {}) for name in roots])))
    """
    roots = {name: str(host.store(f"store-{name}")) for name in "ab"}
    found = run(host, body, folder, roots)
    assert [prefix.partition("/v1/")[0] for prefix in found] == [*roots.values()]
    assert len({Path(prefix).parent.name for prefix in found}) == 1


def test_nodes_that_cannot(host: Host) -> None:
    """What one node cannot do is an error with the node, the cause and the remedy; the others go on."""
    support.make_wheel(host.wheels, "anything")
    project = host.project("project", ["anything"])
    (host.folder / "no uv").mkdir()
    (host.folder / "no uv" / "uv.py").write_text("def find_uv_bin():\n    raise FileNotFoundError\n")
    (host.folder / "file").touch()
    host.store("store-good")
    body = """
    project, folder = arguments
    at = lambda name: {"RAY_ENVCACHE_DIR": f"{folder}/store-{name}"}
    add("good", **at("good"))
    add("no_plugin", RAY_RUNTIME_ENV_PLUGINS="[]")
    add("no_store", RAY_ENVCACHE_DIR=f"{folder}/file/store")
    add("no_network", **at("no_network"), UV_OFFLINE="1", UV_CACHE_DIR=f"{folder}/empty")
    add("no_uv", **at("no_uv"), PYTHONPATH=f"{folder}/no uv")
    add("no_file", **at("no_file"))
    add("other_file", **at("other_file"))
    cluster.wait_for_nodes()
    env = ray_envcache.runtime_env(project)
    said = {name: error(on(name, env)) for name in ["no_plugin", "no_store", "no_network", "no_uv"]}
    lock = os.path.join(os.path.dirname(project), "uv.lock")
    text = open(lock).read()
    os.rename(lock, lock + ".away")
    said["no_file"] = error(on("no_file", env))
    with open(lock, "w") as file:
        file.write(text + "# edited")
    said["other_file"] = error(on("other_file", env))
    os.rename(lock + ".away", lock)
    said["good"] = error(on("good", env))
    said["unguarded"] = error(on("no_plugin", {"envcache": env["envcache"]}))
    said["inherited"] = error(on("no_plugin", {**env, "env_vars": {"A": "1"}}))
    print(json.dumps(said))
    """
    said = run(host, body, project, host.folder)
    assert said["good"].startswith(f"no error: {host.folder}/store-good/v1/entries/")
    # The reason for the guard.
    assert said["unguarded"] == f"no error: {host.python.parents[1]}"
    for name in ("no_plugin", "inherited"):
        assert "this node runs without the plugin of ray-envcache" in said[name]
        assert 'eval "$(ray-envcache env)"' in said[name]
    cause = {
        "no_store": f"Cannot use the store at `{host.folder}/file/store`: Not a directory",
        "no_network": "not found in the cache",
        "no_uv": "There is no uv on this node",
        "no_file": f"No uv.lock beside `{project}`\nhint: this node needs the files at the same path",
        "other_file": "the field value pins",
    }
    for name, expected in cause.items():
        assert f"({os.uname().nodename}): " in said[name]
        assert expected in said[name]
        assert "hint: " in said[name]
        assert said[name].count("Traceback") == 1
    # Nothing half done is left behind.
    for name in ("no_network", "no_uv", "no_file", "other_file"):
        assert [*Layout(host.folder / f"store-{name}").all_entries()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with support.small_disk(tmp_path / "small", "32m") as place:
        yield place


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_full_disk_of_one_node(host: Host, small_disk: Path) -> None:
    """A node without room says so, with figures, and keeps nothing; the other one does the work."""
    body = """
    project, small, roomy = arguments
    add("small", RAY_ENVCACHE_DIR=small)
    add("roomy", RAY_ENVCACHE_DIR=roomy)
    cluster.wait_for_nodes()
    env = ray_envcache.runtime_env(project)
    print(json.dumps([error(on(name, env)) for name in ["small", "roomy"]]))
    """
    small, roomy = run(host, body, host.project("project"), small_disk / "store", host.folder / "store")
    assert f"({os.uname().nodename}): " in small
    assert "MB" in small
    assert roomy.startswith("no error: ")
    assert [*Layout(small_disk / "store").all_entries()] == []

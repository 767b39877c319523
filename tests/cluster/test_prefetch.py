"""`prefetch` on clusters whose nodes stand for hosts: what it says of those that are ready, and of each kind that is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_envcache.store import journal
from ray_envcache.store.layout import Layout
from tests import support
from tests.cluster.conftest import NEWEST, Host
from tests.cluster.test_nodes import run

pytestmark = [pytest.mark.cluster, pytest.mark.pypi, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

COMMAND = """
import signal, subprocess, threading
def prefetch(*more):
    command = [sys.executable, "-m", "ray_envcache", "prefetch", "--address", cluster.address, *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "COLUMNS": "200"})

def end(child):
    out, err = child.communicate()
    return [child.returncode, out, err]

@ray.remote(max_retries=0)
def busy():
    time.sleep(1000)
"""

BODY = """
one, two, folder, small = arguments
at = lambda name: {"RAY_ENVCACHE_DIR": f"{folder}/store-{name}"}
add("shared", **at("shared"))
cluster.add_node(num_cpus=0, env_vars=at("shared"), wait=False)
add("no_plugin", RAY_RUNTIME_ENV_PLUGINS="[]")
add("small", RAY_ENVCACHE_DIR=small)
add("other", **at("other"), PYTHONPATH=f"{folder}/older")
cluster.wait_for_nodes()
kept = [busy.remote() for _ in range(3)]
said = {"mixed": end(prefetch("--json", one, two)), "again": end(prefetch(one))}
print(json.dumps(said))
"""

FOLLOWING = """
project, slow, go, folder = arguments
at = lambda name: {"RAY_ENVCACHE_DIR": f"{folder}/store-{name}"}
doomed = cluster.add_node(num_cpus=1, env_vars=at("doomed"))
found = []
thread = threading.Thread(target=lambda: found.extend(ray_envcache.prefetch([slow])))
thread.start()
while not os.path.exists(f"{go}-started"):
    time.sleep(0.1)
cluster.remove_node(doomed, allow_graceful=False)
time.sleep(1)
open(go, "w").close()
thread.join()
child = prefetch("--follow", project)
lines = []
while sum(" built " in line for line in lines) < 1:
    lines.append(child.stderr.readline())
cluster.add_node(num_cpus=0, env_vars=at("late"))
while sum(" built " in line for line in lines) < 2:
    lines.append(child.stderr.readline())
child.send_signal(signal.SIGINT)
print(json.dumps({"rows": [vars(row) for row in found], "lines": lines, "followed": end(child)}, default=vars))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with support.small_disk(tmp_path / "small", "32m") as place:
        yield place


def test_mixed_cluster(host: Host, small_disk: Path) -> None:
    """All nodes at once, also without free CPUs: one set-up per host, and a reason for each node that is not ready."""
    support.make_wheel(host.wheels, "anything")
    one, two = host.project("one"), host.project("two", ["anything"])
    for name in ("shared", "other"):
        host.store(f"store-{name}")
    # What is beside ray on a node is installed with it there.
    older = host.folder / "older" / "typing_extensions-4.15.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: typing_extensions\nVersion: 4.15.0\n")
    said = run(host, COMMAND + BODY, one, two, host.folder, small_disk / "store")
    _check_mixed(host, *said["mixed"])
    _check_table(host, *said["again"])


def _check_mixed(host: Host, status: int, out: str, err: str) -> None:
    data = json.loads(out)
    rows = data["environments"]
    assert (status, data["schema_version"], data["ok"], len(rows)) == (1, 1, False, 12)
    ready = [row for row in rows if row["ok"]]
    keys = {(Path(row["path"]).parent.name, row["key"]) for row in ready}
    assert (len(ready), len(keys)) == (6, 2)
    assert all(row["bytecode"] and row["seconds"] > 0 for row in ready)
    assert all(any(one.startswith("ray 2.") for one in row["packages"]) for row in ready)
    wrong = [(found["name"], found["text"], found["hint"]) for row in rows for found in row["findings"]]
    assert sorted(name for name, *_ in wrong) == ["answer", "answer", "key", "key", "plugin", "plugin"]
    assert all(hint for *_, hint in wrong)
    texts = dict(each[:2] for each in wrong)
    assert texts["plugin"] == "The plugin is not loaded: Ray ignores the field there"
    assert "MB" in texts["answer"]
    assert "They differ in typing_extensions 4." in texts["key"]
    assert "typing_extensions 4.15.0" in texts["key"]
    _check_stores(host, dict(keys))
    lines = [line.split()[3:] for line in err.splitlines()]
    assert sum(line[1] == "running" for line in lines) == 12
    assert sum(line[1] == "failed" for line in lines) == 6


def _check_stores(host: Host, keys: dict[str, str]) -> None:
    """Each host has built each environment once, with all bytecode; and holds what it has prefetched no more."""
    for layout in (host.layout, Layout(host.folder / "store-shared")):
        built = [event.text("key") for event in journal.read(layout).events if event.name == "build"]
        assert sorted(built) == sorted(keys.values())
        assert all(entry.compiled.exists() for entry in layout.all_entries())


def _check_table(host: Host, status: int, out: str, err: str) -> None:
    assert status == 1
    head, *lines = out.splitlines()
    assert head.split() == ["NODE", "HOST", "ENVIRONMENT", "STATE", "KEY", "SECONDS", "BYTECODE"]
    assert sum("  found  " in line and line.endswith("  complete") for line in lines) == 3
    assert sum("  failed  " in line for line in lines[:6]) == 3
    assert sum(line.startswith("error  ") for line in lines) == 3
    assert sum(line.startswith("       hint: ") for line in lines) == 3
    assert lines[-1] == "3 of 6 ready"


def test_nodes_that_come_and_go(host: Host) -> None:
    """A node that dies meanwhile is a result like others; one that joins is set up, until the command is interrupted."""
    go = host.folder / "go"
    # uv builds it once for both hosts, which share its cache: one waits for the other.
    started = f"import os; open('{go}-started', 'w').close()"
    code = f"{started}\n    while not os.path.exists('{go}'): time.sleep(0.1)"
    support.make_sdist(host.wheels, "slow-one", code=code)
    slow, project = host.project("slow", ["slow-one"]), host.project("project")
    for name in ("doomed", "late"):
        host.store(f"store-{name}")
    said = run(host, COMMAND + FOLLOWING, project, slow, go, host.folder)
    ready, lost = sorted(said["rows"], key=lambda row: not row["ok"])
    assert (ready["how"], ready["bytecode"]) == ("built", True), json.dumps(said["rows"])
    assert lost["key"] is None
    assert "The node specified via NodeAffinitySchedulingStrategy" in lost["findings"][0]["text"]
    assert lost["findings"][0]["hint"].startswith("is the node alive")
    assert lost["seconds"] < 100
    status, out, _ = said["followed"]
    assert status == 0, out
    assert out.splitlines()[-1] == "2 of 2 ready"

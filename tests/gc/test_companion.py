"""Collecting without cron: what an agent starts, whatever becomes of the agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ray_envcache.acquire import Store
from ray_envcache.gc import collector, companion
from ray_envcache.store.layout import Entry, Layout
from tests import support
from tests.store.test_leases import start

pytestmark = pytest.mark.host

Children = list[subprocess.Popen[str]]

AGENT = """
import os
from pathlib import Path
from ray_envcache.gc import companion
from ray_envcache.store.layout import Layout
companion.SETTLING_SECONDS = float(sys.argv[2])
layout = Layout(Path(sys.argv[1]))
open_until_the_end = companion.start(layout, os.environ)
"""


@pytest.fixture
def entry(store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """An environment which is due as soon as nobody uses it."""
    monkeypatch.setenv("RAY_ENVCACHE_UNUSED_FOR", "0")
    monkeypatch.setenv(companion.INTERVAL, "0")
    return support.build_finished(store, support.make_project(tmp_path / "project", wheels, ["ray"]))


def start_agent(layout: Layout, children: Children, settling: float = 0) -> subprocess.Popen[str]:
    return support.start_python(children, AGENT, layout.root, str(settling))


def started(layout: Layout) -> list[psutil.Process]:
    """What agents started for this store: shells that wait, and collections."""
    wanted = {"ray_envcache.gc.collector", os.fspath(layout.root)}
    return [one for one in psutil.process_iter(["cmdline"]) if wanted <= set(one.info["cmdline"] or [])]


def close(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    child.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_agent_killed(number: signal.Signals, store: Store, entry: Entry, children: Children) -> None:
    """What a cluster used is collected after its end, whatever ended the agent, once its workers had time to end."""
    worker = start(entry, "", children)
    agent = start_agent(store.layout, children, settling=2)
    support.wait_until(lambda: [one.name() for one in started(store.layout)] == ["sh"], "the first one collected")
    assert entry.ready.exists(), "a worker uses it"
    agent.send_signal(number)
    agent.wait()
    close(worker)
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")
    support.wait_until(lambda: not started(store.layout), "nothing is left running")


def test_start(store: Store, entry: Entry, children: Children) -> None:
    """With the agent a collection starts, and beside it only a shell stays, of less than two megabytes."""
    agent = start_agent(store.layout, children)
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")
    support.wait_until(lambda: [one.name() for one in started(store.layout)] == ["sh"], "only the shell is left")
    (shell,) = started(store.layout)
    assert shell.memory_full_info().uss < 2_000_000
    close(agent)
    support.wait_until(lambda: not started(store.layout), "nothing is left running")


def test_last_release(store: Store, entry: Entry, children: Children) -> None:
    """After the last release of a cluster that lives on there is a collection, which first lets the workers end."""
    worker = start(entry, "", children)
    companion.collect_soon(store.layout, os.environ, 1)
    assert entry.ready.exists()
    close(worker)
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")


def test_once_in_an_interval(store: Store, entry: Entry, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters collect at most so often; 0 is always, "off" is never: then no process is started."""
    monkeypatch.setenv(companion.INTERVAL, "off")
    start_agent(store.layout, children)
    companion.collect_soon(store.layout, os.environ, 0)
    assert started(store.layout) == []
    monkeypatch.setenv(companion.INTERVAL, "1h")
    store.layout.last_collection.touch()
    before = store.layout.last_collection.stat().st_mtime_ns
    companion.collect_soon(store.layout, os.environ, 0)
    close(start_agent(store.layout, children))
    support.wait_until(lambda: not started(store.layout), "nothing is left running")
    assert (store.layout.last_collection.stat().st_mtime_ns, entry.path.exists()) == (before, True)
    monkeypatch.setenv(companion.INTERVAL, "0")
    close(start_agent(store.layout, children))
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")


def test_two_clusters_that_end_together_collect_once(
    store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process finds the interval begun by the first, and ends."""
    monkeypatch.setenv(companion.INTERVAL, "1h")
    command = [os.fspath(store.layout.root), "0"]
    assert collector.main(command) == 0
    assert not entry.path.exists()
    before = store.layout.last_collection.stat().st_mtime_ns
    assert collector.main(command) == 0
    assert store.layout.last_collection.stat().st_mtime_ns == before


def test_an_agent_never_fails_for_want_of_it(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a wrong interval, or where no process can be started, the agent goes on, and no descriptor is lost."""
    wrong = {**os.environ, companion.INTERVAL: "sometimes"}
    assert companion.start(store.layout, wrong) is None
    companion.collect_soon(store.layout, wrong, 0)
    monkeypatch.setattr(companion, "_SHELL", "/no/such/shell")
    store.layout.last_collection.touch()
    monkeypatch.setenv(companion.INTERVAL, "1h")
    opened = len(os.listdir("/proc/self/fd"))
    assert companion.start(store.layout, os.environ) is None
    assert len(os.listdir("/proc/self/fd")) == opened
    monkeypatch.setenv(companion.INTERVAL, "0")
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    companion.collect_soon(store.layout, os.environ, 0)
    assert entry.ready.exists()

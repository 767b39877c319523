"""Collecting by itself: the process beside an agent, whatever becomes of the agent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ray_envcache.acquire import Store
from ray_envcache.gc import automatic, companion
from ray_envcache.gc.collector import Report, collect
from ray_envcache.gc.policy import Limits
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, claim
from tests import support
from tests.store.test_leases import start

pytestmark = pytest.mark.host

Children = list[subprocess.Popen[str]]

AGENT = """\
import os, sys
from pathlib import Path
from ray_envcache.gc import companion
from ray_envcache.store.layout import Layout
told = companion.start(Layout(Path(sys.argv[1])), os.environ)
print("up", flush=True)
for _ in sys.stdin:
    assert told is not None
    companion.tell(told, "released")
    print("told", flush=True)
"""

IMPATIENT = """\
import sys
from ray_envcache.gc import companion
companion.PATIENCE_SECONDS = 0.1
companion.main([*sys.argv[1:], "released"])
"""


@pytest.fixture
def entry(store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """An environment which is due as soon as nobody uses it."""
    monkeypatch.setenv("RAY_ENVCACHE_UNUSED_FOR", "0")
    monkeypatch.setenv(companion.INTERVAL, "0")
    return support.build_finished(store, support.make_project(tmp_path / "project", wheels, ["ray"]))


def run(code: str, layout: Layout, children: Children) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", code, layout.root], stdin=pipe, stdout=pipe, text=True)
    children.append(child)
    return child


def start_agent(layout: Layout, children: Children) -> subprocess.Popen[str]:
    agent = run(AGENT, layout, children)
    assert agent.stdout is not None
    assert agent.stdout.readline() == "up\n"
    return agent


def companions(layout: Layout) -> list[psutil.Process]:
    wanted = {"ray_envcache.gc.companion", os.fspath(layout.root)}
    return [one for one in psutil.process_iter(["cmdline"]) if wanted <= set(one.info["cmdline"] or [])]


def listens(companion: psutil.Process) -> bool:
    """Whether it is a shell whose stdin is the pipe."""
    return companion.name() == "sh" and os.readlink(f"/proc/{companion.pid}/fd/0").startswith("pipe:")


def close(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_agent_killed(number: signal.Signals, store: Store, entry: Entry, children: Children) -> None:
    """What a cluster used goes by itself after its end, whatever ended the agent, and though it told nobody.

    Workers end when the agent is gone already: they are waited for.
    """
    worker = start(entry, "", children)
    agent = start_agent(store.layout, children)
    agent.send_signal(number)
    agent.wait()
    support.wait_until(store.layout.last_collection.exists, "a collection has begun")
    assert entry.ready.exists()
    close(worker)
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")
    support.wait_until(lambda: not companions(store.layout), "the companion ends")


def test_last_release(store: Store, entry: Entry, children: Children) -> None:
    """After the last release of a cluster that lives on, a collection comes too; then it listens again."""
    worker = start(entry, "", children)
    child = run(IMPATIENT, store.layout, children)
    assert child.stdin is not None
    support.wait_until(lambda: listens(psutil.Process(child.pid)), "it has collected, and is a shell again")
    assert store.layout.last_collection.exists()
    assert entry.ready.exists()
    close(worker)
    worker.wait()
    child.stdin.write("started\n")
    child.stdin.flush()
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")
    support.wait_until(lambda: listens(psutil.Process(child.pid)), "it is a shell once more")
    close(child)
    assert child.wait() == 0


def test_once_in_an_interval(store: Store, entry: Entry, children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters collect at most so often; 0 is always, "off" is never: then no process is started."""
    monkeypatch.setenv(companion.INTERVAL, "off")
    start_agent(store.layout, children)
    assert companions(store.layout) == []
    monkeypatch.setenv(companion.INTERVAL, "1h")
    store.layout.last_collection.touch()
    before = store.layout.last_collection.stat().st_mtime_ns
    agent = start_agent(store.layout, children)
    close(agent)
    support.wait_until(lambda: not companions(store.layout), "the companion ends")
    assert (store.layout.last_collection.stat().st_mtime_ns, entry.path.exists()) == (before, True)
    monkeypatch.setenv(companion.INTERVAL, "0")
    start_agent(store.layout, children)
    support.wait_until(lambda: not entry.path.exists(), "the environment is collected by itself")


def test_nobody_fails_for_want_of_it(
    store: Store, entry: Entry, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a companion, or with one that somebody killed, the agent goes on."""
    store.layout.last_collection.touch()
    monkeypatch.setenv(companion.INTERVAL, "1h")
    agent = start_agent(store.layout, children)
    (one,) = companions(store.layout)
    support.wait_until(lambda: listens(one), "it listens")
    one.kill()
    support.wait_until(lambda: not companions(store.layout), "nobody reads")
    assert agent.stdin is not None
    assert agent.stdout is not None
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "told\n"
    assert companion.start(store.layout, {**os.environ, companion.INTERVAL: "sometimes"}) is None
    monkeypatch.setattr(companion, "_SHELL", "/no/such/shell")
    opened = len(os.listdir("/proc/self/fd"))
    assert companion.start(store.layout, os.environ) is None
    assert len(os.listdir("/proc/self/fd")) == opened


def test_user_gone_between_two_looks(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is there when the collector comes, and gone when it looks whether to wait, is waited for all the same."""
    lease = claim(entry, store.layout, Holder("test"))
    assert lease is not None
    seen: list[Report] = []

    def collect_then_leave(layout: Layout, limits: Limits) -> Report:
        seen.append(collect(layout, limits))
        lease.release()
        return seen[-1]

    monkeypatch.setattr(automatic, "collect", collect_then_leave)
    automatic.run(store.layout, Limits.from_environ(os.environ), patience=10)
    assert [(report.in_use, len(report.removed)) for report in seen] == [(1, 0), (0, 1)]

"""The plugin in an agent's event loop, without an agent: it never keeps the loop waiting, and loses no lease."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_envcache import _flock, leases, registration
from ray_envcache.autogc import INTERVAL
from ray_envcache.layout import Entry
from ray_envcache.plugin import EnvCachePlugin
from ray_envcache.store import Store
from tests import support

URI = "envcache://0"
LOGGER = logging.getLogger("test")


@pytest.fixture
def plugin(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[EnvCachePlugin]:
    monkeypatch.setenv(INTERVAL, "off")
    # Set by the plugin for good: its process is the agent's, mostly.
    monkeypatch.setenv("RAY_RUNTIME_ENV_ENVCACHE_CACHE_SIZE_GB", "0")
    monkeypatch.delenv(registration.PLUGINS, raising=False)
    made = EnvCachePlugin()
    yield made
    made._threads.shutdown()


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    return support.make_project(tmp_path / "project", wheels, ["ray"])


@pytest.fixture
def entry(store: Store, project: Path) -> Entry:
    """The environment of the project: ready, finished, and used by nobody."""
    return support.build_finished(store, project)


def create(plugin: EnvCachePlugin, project: Path) -> asyncio.Task[float]:
    context = SimpleNamespace(command_prefix=[], env_vars={})
    return asyncio.create_task(plugin.create(URI, {"envcache": os.fspath(project)}, context, LOGGER))


def test_given_back_and_taken_again(plugin: EnvCachePlugin, store: Store, entry: Entry, project: Path) -> None:
    """A URI that Ray gives back is released by and by, though it is created again in the same moment."""

    async def run() -> None:
        await create(plugin, project)
        plugin.delete_uri(URI, LOGGER)
        await create(plugin, project)

    asyncio.run(run())
    support.wait_until(lambda: len(leases.live_leases(store.layout, entry.key)) == 1, "one lease is left")
    plugin.delete_uri(URI, LOGGER)
    support.wait_until(lambda: _flock.is_free(entry.in_use), "none is left")
    assert list(store.layout.leases_of(entry.key).iterdir()) == []


def test_slow_disk(plugin: EnvCachePlugin, store: Store, entry: Entry, project: Path) -> None:
    """A disk that does not answer keeps the set-up waiting, not the loop; cancelled, it gives back what it gets later."""
    (memo,) = store.layout.memo.iterdir()
    text = memo.read_bytes()
    memo.unlink()
    # Whoever opens it to read waits for somebody who writes.
    os.mkfifo(memo)
    os.utime(entry.in_use, (0, 0))

    async def run() -> None:
        creating = create(plugin, project)
        await asyncio.sleep(0.1)
        assert not creating.done()
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(run())
    assert entry.in_use.stat().st_mtime == 0
    memo.write_bytes(text)
    support.wait_until(lambda: entry.in_use.stat().st_mtime > 0, "the lease was taken")
    support.wait_until(lambda: _flock.is_free(entry.in_use), "it was given back")
    assert plugin._leases == {}

"""Each set-up is in the journal once, with how it ended: with real uv, small wheels, no index."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build.progress import Observer
from ray_envcache.errors import BuildError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal
from ray_envcache.store.journal import Event
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import read_record
from ray_envcache.system.disk import DiskUse
from tests import support
from tests.build.test_layers import make_package
from tests.test_acquire import read_until, start_acquirer

pytestmark = pytest.mark.host


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    return support.make_project(tmp_path / "my-project", wheels, ["ray"])


def events(store: Store, name: str = "setup") -> list[Event]:
    return [event for event in journal.read(store.layout).events if event.name == name]


def acquire(store: Store, project: Path) -> str:
    """Acquire and give back; the key."""
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("agent", "c1"), finish=False) as lease:
        return lease.entry.key


def test_built_and_found(store: Store, project: Path) -> None:
    """The first set-up is built, the next found, by a look-up too; a look-up that finds nothing is no set-up."""
    spec, ray = EnvSpec.parse(project), installed_ray()
    assert store.lookup(spec, ray, Holder("agent", "c1")) is None
    entry = support.build_finished(store, project)
    lease = store.lookup(spec, ray, Holder("agent", "c1"))
    assert lease is not None
    lease.release()
    acquire(store, project)
    found = events(store)
    assert [event.text("result") for event in found] == ["built", "found", "found"]
    assert {event.text("key") for event in found} == {entry.key}
    assert {event.text("project") for event in found} == {"my-project"}
    assert {event.text("path") for event in found} == {str(project)}
    assert [event.text("kind") for event in found] == ["test", "agent", "agent"]
    assert [event.text("cluster") for event in found] == ["", "c1", "c1"]
    measured = read_record(DiskUse, entry.measured)
    assert measured is not None
    assert [event.number("bytes") for event in found] == [0, measured.size, measured.size]
    (build,) = events(store, "build")
    assert 0 < build.number("seconds") <= found[0].number("seconds")
    assert (build.text("key"), build.text("project")) == (entry.key, "my-project")


def test_waited(tmp_path: Path, wheels: Path, store: Store, children: list[subprocess.Popen[str]]) -> None:
    """Of two that ask at once one builds, and the other waits for it."""
    support.make_witness(wheels, tmp_path / "witness.log")
    project = support.make_project(tmp_path / "project", wheels, ["ray", "envcache-witness"])
    first = start_acquirer(project, children)
    read_until(first, "Building the environment")
    first.send_signal(signal.SIGSTOP)
    second = start_acquirer(project, children)
    read_until(second, "Waiting for the environment")
    first.send_signal(signal.SIGCONT)
    for child in (first, second):
        child.communicate()
    assert sorted(event.text("result") for event in events(store)) == ["built", "waited"]
    assert len(events(store, "build")) == 1


def test_a_layer_is_one_setup_and_a_build_of_its_own(tmp_path: Path, wheels: Path, store: Store) -> None:
    """Environment and layer are built apart; the set-up is one, and names both."""
    make_package(tmp_path / "mine", "mine")
    extra = "[tool.uv.sources]\nmine = {path = '../mine'}\n"
    project = support.make_project(tmp_path / "project", wheels, ["ray", "mine"], extra=extra)
    key = acquire(store, project)
    (setup,) = events(store)
    assert (setup.text("result"), setup.text("key")) == ("built", key)
    assert [event.text("key") for event in events(store, "build")] == [setup.text("base"), key]


def test_refused_and_failed(tmp_path: Path, wheels: Path, store: Store) -> None:
    """Bad input is refused, a failed build failed, each with the kind of its error and no word of its message."""
    with pytest.raises(LockfileError):
        acquire(store, tmp_path / "nowhere" / "pyproject.toml")
    broken = support.make_wheel(wheels, "ray", support.RAY_VERSION, modules={"ray/__init__.py": "1 / 0"})
    project = support.make_project(tmp_path / "broken", broken.parent, ["ray"])
    with pytest.raises(BuildError):
        acquire(store, project)
    assert [event.text("result") for event in events(store)] == ["refused", "failed"]
    assert [event.text("error") for event in events(store)] == ["LockfileError", "BuildError"]
    assert events(store, "build") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_cancelled(store: Store, project: Path, error: type[BaseException]) -> None:
    """A set-up that was cancelled has neither failed nor led to anything: the journal has no line of it."""

    class Cancelling(Observer):
        def say(self, text: str) -> None:
            raise error(text)

    with pytest.raises(error):
        store.acquire(EnvSpec.parse(project), installed_ray(), Holder("run"), Cancelling())
    assert journal.read(store.layout).events == []


def test_found_in_a_readonly_store(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment of a read-only store is `lower`, in the user's own journal; that store's stays as it is."""
    owner = Store.open(tmp_path / "lower")
    support.build_finished(owner, project)
    before = journal.read(owner.layout)
    monkeypatch.setenv("RAY_ENVCACHE_READONLY_DIRS", str(tmp_path / "lower"))
    store = Store.open(tmp_path / "own")
    acquire(store, project)
    (setup,) = events(store)
    assert setup.text("result") == "lower"
    assert setup.number("bytes") > 0
    assert journal.read(owner.layout) == before


def test_sizes_that_cannot_be_read_fail_nothing(store: Store, project: Path) -> None:
    """A broken record of sizes is no reason to fail: then there is no size."""
    entry = support.build_finished(store, project)
    for text in (
        "",
        json.dumps({"schema_version": 1, "size": "x", "reclaimable": 0, "exact": 1}),
    ):
        entry.measured.write_text(text)
        acquire(store, project)
    entry.measured.unlink()
    entry.measured.mkdir()
    acquire(store, project)
    assert [event.number("bytes") for event in events(store)][1:] == [0, 0, 0]


def test_removals_and_collections(store: Store, project: Path) -> None:
    """Who removes what, why, and what became free."""
    entry = support.build_finished(store, project)
    use = evict(store.layout, entry)
    support.build_finished(store, project)
    report = collect(store.layout, Limits(everything=True))
    by_hand, collected = events(store, "removal")
    assert (by_hand.text("reason"), by_hand.number("freed_bytes")) == ("by hand", use.reclaimable)
    freed = report.removed[0].freed_bytes
    assert (collected.text("reason"), collected.number("freed_bytes")) == ("all were asked for", freed)
    (collection,) = events(store, "collection")
    assert (collection.number("removed"), collection.number("failed")) == (1, 0)
    collect(store.layout, Limits(everything=True), dry_run=True)
    assert len(events(store, "collection")) == 1


def test_a_journal_that_cannot_be_written_fails_nothing(store: Store, project: Path) -> None:
    """With something else in the journal's place environments are built, found and removed as ever."""
    store.layout.journal.mkdir()
    acquire(store, project)
    acquire(store, project)
    report = collect(store.layout, Limits(everything=True))
    assert (len(report.removed), report.failed) == (1, [])
    assert [*store.layout.journal.iterdir()] == []

"""Removing one entry, beside processes that begin to use it at the worst moment, and on a disk without room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import InUseError
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict_idle
from ray_envcache.gc.policy import Limits
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder
from ray_envcache.system import files, flock
from tests import support
from tests.cli.test_commands import run
from tests.gc.fabricated import add_file, make_entry, make_layout

pytestmark = pytest.mark.host

ALL = Limits(everything=True)

Children = list[subprocess.Popen[str]]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.setenv("RAY_ENVCACHE_DIR", str(tmp_path / "store"))
    return make_layout(tmp_path / "store")


def program_in(entry: Entry) -> Path:
    """A program that is no Python and holds no flock, such as raylet."""
    program = entry.bin / "raylet"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    return program


def run_from(program: Path, children: Children) -> subprocess.Popen[str]:
    child = subprocess.Popen([program, "600"], text=True)
    children.append(child)
    support.wait_until(lambda: os.readlink(f"/proc/{child.pid}/exe") == str(program), "it runs")
    return child


def collect_until(point: str, points: Path, children: Children) -> subprocess.Popen[str]:
    """A collector that stands still at a point until the file `stop-...` is removed."""
    (points / f"stop-{point}").touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(points)}
    command = [sys.executable, "-m", "ray_envcache", "gc", "--all"]
    collector = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    children.append(collector)
    support.wait_until((points / f"reached-{point}").exists, "the collector is there")
    return collector


def test_program_that_starts_after_the_look(layout: Layout, tmp_path: Path, children: Children) -> None:
    """A program without a hold that starts between the look at all processes and the rename gets its files back."""
    entry = make_entry(layout, 1)
    add_file(entry, 1000)
    collector = collect_until("evict-locked", tmp_path, children)
    child = run_from(program_in(entry), children)
    (tmp_path / "stop-evict-locked").unlink()
    out, _ = collector.communicate()
    assert (collector.returncode, "Removed 0 environments" in out, "1 in use" in out) == (0, True, True)
    assert (entry.site_packages / "data").exists()
    assert os.readlink(f"/proc/{child.pid}/exe") == str(entry.bin / "raylet")
    lease = leases.claim(entry, layout, Holder("test"))
    assert lease is not None, "it is handed out as before"
    lease.release()
    child.kill()
    child.wait()
    assert len(collect(layout, ALL).removed) == 1


def test_collector_that_dies_before_it_gives_back(layout: Layout, tmp_path: Path, children: Children) -> None:
    """Files in the trash from which a process runs stay until it ends."""
    entry = make_entry(layout, 1)
    collector = collect_until("evict-renamed", tmp_path, children)
    (moved,) = layout.trash.iterdir()
    child = run_from(program_in(Entry(entry.key, 1, moved)), children)
    collector.kill()
    collector.wait()
    collect(layout, ALL)
    assert os.path.exists(f"/proc/{child.pid}/exe")
    assert list(layout.trash.iterdir()) == [moved]
    child.kill()
    child.wait()
    collect(layout, ALL)
    assert list(layout.trash.iterdir()) == []


def test_builder_that_comes_before_it_is_given_back(layout: Layout, tmp_path: Path, children: Children) -> None:
    """Where a builder of the key is at work, it may take the place: the entry is not put there."""
    entry = make_entry(layout, 1)
    collector = collect_until("evict-renamed", tmp_path, children)
    (moved,) = layout.trash.iterdir()
    child = run_from(program_in(Entry(entry.key, 1, moved)), children)
    builder = flock.try_flock(layout.builder_flock(entry.key), exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    assert builder is not None
    again = make_entry(layout, 1)
    (tmp_path / "stop-evict-renamed").unlink()
    assert collector.wait() == 0
    os.close(builder)
    assert again.path == entry.path
    assert not (again.bin / "raylet").exists()
    assert os.readlink(f"/proc/{child.pid}/exe") == str(moved / "venv/bin/raylet")


def no_room(_path: Path, _trash: Path) -> Path:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_without_room_for_a_name(layout: Layout, monkeypatch: pytest.MonkeyPatch, children: Children) -> None:
    """Where not even the rename into the trash has room, an entry is deleted where it is, but none that is used."""
    used, idle = make_entry(layout, 1), make_entry(layout, 2)
    child = run_from(program_in(used), children)
    monkeypatch.setattr(files, "to_trash", no_room)
    report = collect(layout, ALL)
    assert (len(report.removed), report.failed, report.in_use) == (1, [], 1)
    assert (idle.path.exists(), used.ready.exists()) == (False, True)
    child.kill()
    child.wait()


def test_program_that_starts_on_a_disk_without_room(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    """There is nothing to give back where nothing is renamed: the second look comes before anything is deleted."""
    entry = make_entry(layout, 1)
    started: list[subprocess.Popen[str]] = []

    def begins_now() -> bool:
        started.append(run_from(program_in(entry), children))
        return True

    monkeypatch.setattr(files, "to_trash", no_room)
    with pytest.raises(InUseError, match="in use by process"):
        evict_idle(layout, entry, still_due=begins_now)
    assert entry.ready.exists()
    assert entry.in_use.exists()


@pytest.mark.parametrize("pinned", [False, True])
def test_rm_beside_a_build(
    store: Store, tmp_path: Path, wheels: Path, children: Children, monkeypatch: pytest.MonkeyPatch, *, pinned: bool
) -> None:
    """`rm` refuses an environment that `ray-envcache build` just compiles, and the build goes on to its end."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    (tmp_path / "stop-finishing-leased").touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(tmp_path)}
    command = [sys.executable, "-m", "ray_envcache", "build", str(project)]
    build = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    children.append(build)
    support.wait_until((tmp_path / "reached-finishing-leased").exists, "the build compiles")
    (entry,) = store.layout.all_entries()
    if pinned:
        assert run("pin", entry.key).returncode == 0
    refused = run("rm", entry.key)
    assert (refused.returncode, "cannot be removed" in refused.stderr) == (1, True)
    assert build.poll() is None
    (tmp_path / "stop-finishing-leased").unlink()
    out, _ = build.communicate()
    assert (build.returncode, out.strip()) == (0, str(entry.python))
    assert entry.compiled.exists()

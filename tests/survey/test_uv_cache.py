"""uv's cache inside of a store: counted, collected and purged with what is linked from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import uv

from ray_envcache.acquire import Store
from ray_envcache.gc.collector import collect, make_room
from ray_envcache.gc.policy import DAY, Limits
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.survey import uv_cache
from ray_envcache.survey.inventory import record_sizes, survey
from ray_envcache.system import disk, flock
from ray_envcache.system.texts import Space
from tests import support
from tests.gc.fabricated import make_entry, make_layout

MB = 1_000_000
AGE_ONLY = Limits(min_free_space=None)


def add_package(layout: Layout, entry: Entry | None, name: str = "torch", size: int = 5 * MB) -> Path:
    """A package that uv unpacked into its cache and, with an entry, linked into it; returns the archive."""
    archive = layout.uv_cache / "archive-v0" / name
    (archive / name).mkdir(parents=True)
    (archive / name / "lib.so").write_bytes(os.urandom(size))
    if entry is not None:
        os.link(archive / name / "lib.so", entry.site_packages / f"{name}.so")
    return archive


def age(entry: Entry, days: float = 15) -> None:
    then = time.time() - days * DAY
    os.utime(entry.in_use, (then, then))


def test_an_entry_frees_what_the_cache_has_too(tmp_path: Path) -> None:
    """RECLAIMABLE counts the files that the store's own cache of uv has too: they go with the last entry."""
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    add_package(layout, entry)
    use = record_sizes(layout, entry)
    assert use.reclaimable == use.size >= 5 * MB
    other = make_entry(layout, 2)
    os.link(entry.site_packages / "torch.so", other.site_packages / "torch.so")
    assert record_sizes(layout, entry).reclaimable < MB, "another entry keeps it"


def test_a_package_goes_with_the_last_entry_that_has_it(tmp_path: Path) -> None:
    """What a collection says that it frees is free afterwards; packages of other entries stay."""
    layout = make_layout(tmp_path / "store")
    old, fresh = make_entry(layout, 1), make_entry(layout, 2)
    gone, kept = add_package(layout, old, "torch"), add_package(layout, fresh, "numpy")
    age(old)
    would = collect(layout, AGE_ONLY, dry_run=True)
    journal.note(layout, "test")  # its block, which the collection would take
    before = disk.measure(layout.root).size
    did = collect(layout, AGE_ONLY)
    assert (gone.exists(), kept.exists()) == (False, True)
    assert did.freed_bytes == before - disk.measure(layout.root).size >= 5 * MB
    assert 0 <= did.freed_bytes - would.freed_bytes < 20_000, "the directories of the cache"
    assert did.failed == []


def test_what_leads_to_a_package_goes_before_it(tmp_path: Path) -> None:
    """A collector that is killed on its way leaves the link by which the next one finds the rest."""
    layout = make_layout(tmp_path / "store")
    archive = add_package(layout, None)
    link = layout.uv_cache / "wheels-v8" / "url" / "hash" / "torch" / "1.0-py3-none-any"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(archive, link.parent))
    notes = [link.with_name(f"{link.name}.{kind}") for kind in ("rev", "http")]
    for path in (*notes, link.with_name("1.0-py3-none-any.msgpack"), link.with_name("2.0-py3-none-any.rev")):
        path.write_text(archive.name)
    found = [*uv_cache._leading_to([archive], layout)]
    assert found == [*notes, link]
    uv_cache.retire(layout, lambda name, error: pytest.fail(f"{name}: {error}"))
    assert not any(os.path.lexists(path) for path in (*found, archive))


def test_packages_that_no_entry_has_go_by_age_or_for_space(tmp_path: Path) -> None:
    """Such as what was needed to build others: it stays until it is as old as an environment may be, or space is short."""
    layout = make_layout(tmp_path / "store")
    archive = add_package(layout, None)
    collect(layout, AGE_ONLY)
    assert archive.exists()
    collect(layout, Limits(unused_for=0, min_free_space=None))
    assert not archive.exists()
    archive = add_package(layout, None)
    entry = make_entry(layout, 1)
    collect(layout, Limits(unused_for=None, min_free_space=Space(share=1.0)))
    assert not archive.exists()
    assert not entry.path.exists()


def test_idle_environments_go_for_space_though_the_cache_links_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For free space an environment counts with what the store's own cache of uv frees with it."""
    layout = make_layout(tmp_path / "store")
    old, young = make_entry(layout, 1), make_entry(layout, 2)
    archives = [add_package(layout, old, "torch"), add_package(layout, young, "numpy")]
    age(old, 1)
    space = disk.free_space(layout.root)
    monkeypatch.setattr(disk, "free_space", lambda _: space)  # other processes write to this disk
    make_room(layout, space.free + 4 * MB)
    assert [path.exists() for path in (*archives, old.path, young.path)] == [False, True, False, True]


def test_everything_is_removed_on_demand(tmp_path: Path) -> None:
    """`gc --all` and `purge` leave of the cache nothing but the file of uv's flock; environments in use keep theirs."""
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    add_package(layout, entry)
    (layout.uv_cache / "wheels-v8" / "pypi").mkdir(parents=True)
    descriptor = flock.try_flock(entry.in_use, exclusive=False)
    assert descriptor is not None
    report = collect(layout, Limits(everything=True))
    os.close(descriptor)
    assert os.listdir(layout.uv_cache) == [".lock"]
    assert (entry.site_packages / "torch.so").stat().st_size == 5 * MB
    assert (report.in_use, report.failed, list(layout.trash.iterdir())) == (1, [], [])


def test_nothing_goes_while_uv_runs(tmp_path: Path) -> None:
    """uv unpacks what it links a moment later: while it holds its flock the cache stays as it is."""
    layout = make_layout(tmp_path / "store")
    archive = add_package(layout, None)
    (layout.uv_cache / ".lock").touch()
    descriptor = flock.try_flock(layout.uv_cache / ".lock", exclusive=False)
    assert descriptor is not None
    report = collect(layout, Limits(everything=True))
    assert (archive.exists(), report.failed) == (True, [])
    os.close(descriptor)
    collect(layout, Limits(everything=True))
    assert not archive.exists()


def test_a_cache_that_is_mounted_there(tmp_path: Path) -> None:
    """Where a rename into the trash is impossible, because the cache is on another disk, it is deleted in place."""
    layout = make_layout(tmp_path / "store")
    with support.small_disk(layout.uv_cache):
        archive = add_package(layout, None, size=100_000)
        report = collect(layout, Limits(unused_for=0, min_free_space=None))
        assert (archive.exists(), report.failed) == (False, [])


@pytest.mark.parametrize("has_flock", [True, False])
def test_disk_without_inodes(tmp_path: Path, *, has_flock: bool) -> None:
    """Where no file can be made the cache is collected all the same, or stays where not even its flock has a file."""
    with support.small_disk(tmp_path / "disk") as place:
        layout = make_layout(place / "store")
        archive = add_package(layout, None, size=100_000)
        if has_flock:
            (layout.uv_cache / ".lock").touch()
        (place / "ballast").mkdir()
        for number in range(disk.free_space(place).inodes_free or 0):
            (place / "ballast" / str(number)).touch()
        assert collect(layout, Limits(everything=True)).failed == []
        assert archive.exists() != has_flock


@pytest.mark.host
def test_uv_itself(store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """uv waits for the flock that the collector takes, links again what is there, and unpacks again what is not."""
    monkeypatch.setenv("UV_CACHE_DIR", str(store.layout.uv_cache))
    support.make_wheel(wheels, "aa", modules={"aa.py": f"DATA = '{'a' * MB}'\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray", "aa"])
    entry = support.build_finished(store, project)
    assert (entry.site_packages / "aa.py").stat().st_nlink == 2
    (one,) = survey(store.layout)
    assert one.reclaimable_bytes == one.size_bytes
    flock_file = store.layout.uv_cache / ".lock"
    descriptor = flock.try_flock(flock_file, exclusive=True)
    assert descriptor is not None, "no uv runs"
    command: list[str | Path] = [
        uv.find_uv_bin(),
        "pip",
        "install",
        "--offline",
        "--target",
        tmp_path / "x",
        next(wheels.glob("aa-*")),
    ]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        child.communicate(timeout=1)
    os.close(descriptor)
    _, said = child.communicate()
    assert child.returncode == 0, said
    shutil.rmtree(tmp_path / "x")
    age(entry)
    assert len(collect(store.layout, AGE_ONLY).removed) == 1
    assert disk.measure(store.layout.uv_cache).size < MB
    again = support.build_finished(store, project)
    assert (again.site_packages / "aa.py").stat().st_nlink == 2

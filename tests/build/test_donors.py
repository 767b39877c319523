"""Bytecode from earlier environments that have the very same files: taken unread, and only where that is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.build.bytecode import compile_tree
from ray_envcache.build.donors import Donors, donors_for
from ray_envcache.inside import pyc
from ray_envcache.inside.pyc import Places
from ray_envcache.store import shared_bytecode
from ray_envcache.store.layout import Entry, Layout

MODULES = ("one.py", "package/__init__.py", "package/two.py")


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "store")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Uv's cache: what environments link."""
    folder = tmp_path / "cache"
    for module in MODULES:
        (folder / module).parent.mkdir(parents=True, exist_ok=True)
        (folder / module).write_text(f"NAME = {module!r}\n")
        os.utime(folder / module, (1, 1))
    return folder


def make(layout: Layout, number: int, cache: Path) -> Entry:
    """An environment with the packages of the cache, ready."""
    entry = layout.entry(f"{number:032x}-1")
    assert entry is not None
    site = entry.venv / "lib/python3.11/site-packages"
    for module in MODULES:
        (site / module).parent.mkdir(parents=True, exist_ok=True)
        os.link(cache / module, site / module)
    entry.ready.touch()
    os.utime(entry.ready, (number, number))
    return entry


def finish(layout: Layout, entry: Entry, donors: Donors) -> None:
    shared = shared_bytecode.folder_of_this_python(layout)
    entry.staged_bytecode.mkdir()
    places = Places(str(shared), str(entry.staged_bytecode))
    compile_tree(entry.site_packages, places, 1, donors)
    shared_bytecode.publish(places.staged, shared)
    entry.compiled.touch()


def donors(layout: Layout, entry: Entry) -> Donors:
    return donors_for(layout, entry, shared_bytecode.folder_of_this_python(layout))


def inodes(entry: Entry) -> dict[str, int]:
    site = entry.site_packages
    return {name: Path(pyc.place_of(f"{site}/{name}")).stat().st_ino for name in MODULES}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of modules whose text is read."""
    names: list[str] = []
    original = pyc.read

    def noted(path: str) -> bytes:
        names.append(path.rpartition("site-packages/")[2])
        return original(path)

    monkeypatch.setattr(pyc, "read", noted)
    return names


def test_the_same_files_are_not_read(layout: Layout, cache: Path, read: list[str]) -> None:
    """All bytecode of a finished environment is linked; what is not the same file is read."""
    first, second = make(layout, 5, cache), make(layout, 6, cache)
    finish(layout, first, donors(layout, first))
    read.clear()
    (second.site_packages / "one.py").unlink()
    (second.site_packages / "one.py").write_text("NAME = 'one.py'\n")
    finish(layout, second, donors(layout, second))
    assert read == ["one.py"]
    assert inodes(first) == inodes(second)


def edited(first: Entry, cache: Path) -> None:
    with (cache / "one.py").open("a") as file:
        file.write("NAME = 'edited'\n")


def foreign(first: Entry, cache: Path) -> None:
    place = Path(pyc.place_of(f"{first.site_packages}/one.py"))
    place.unlink()
    place.write_bytes(b"came with the package")


def bare(first: Entry, cache: Path) -> None:
    Path(pyc.place_of(f"{first.site_packages}/one.py")).unlink()


@pytest.mark.parametrize("spoil", [edited, foreign, bare])
def test_doubtful_donor(layout: Layout, cache: Path, read: list[str], spoil: Callable[[Entry, Path], None]) -> None:
    """A file that was edited in place later, bytecode that we did not make, or none: then the text is read."""
    first, second = make(layout, 5, cache), make(layout, 6, cache)
    finish(layout, first, donors(layout, first))
    spoil(first, cache)
    read.clear()
    finish(layout, second, donors(layout, second))
    assert set(read) == {"one.py"}
    place = Path(pyc.place_of(f"{second.site_packages}/one.py"))
    text = (second.site_packages / "one.py").read_bytes()
    # The header has the hash of the text.
    assert place.read_bytes()[:16] == pyc.made("one.py", text)[:16]


def test_donor_that_is_removed_meanwhile(layout: Layout, cache: Path, read: list[str]) -> None:
    """Others take its place: the next one, or the text."""
    entries = [make(layout, number, cache) for number in (5, 6, 7)]
    for entry in entries[:2]:
        finish(layout, entry, donors(layout, entry))
    chosen = donors(layout, entries[2])
    assert [Path(one.packages).parents[3].name[-3:] for one in chosen.donors] == ["6-1", "5-1"]
    os.rename(entries[1].path, entries[1].path.with_name("gone"))
    read.clear()
    finish(layout, entries[2], chosen)
    assert read == []
    assert inodes(entries[2]) == inodes(entries[0])


def test_who_is_no_donor(layout: Layout, cache: Path) -> None:
    """Unfinished environments, those of another Python, and oneself; of many the latest."""
    make(layout, 5, cache)
    other = make(layout, 6, cache)
    os.rename(other.venv / "lib/python3.11", other.venv / "lib/python3.12")
    for number in range(10, 20):
        make(layout, number, cache).compiled.touch()
    other.compiled.touch()
    last = layout.entry(f"{19:032x}-1")
    assert last is not None
    found = [int(Path(one.packages).parents[3].name[:-2], 16) for one in donors(layout, last).donors]
    assert found == [18, 17, 16]

"""A disk that is full at every moment of a build: an error with figures or a working environment, never a half one.

The store lies on a small file system of its own. A ballast leaves so many kilobytes, or so many inodes; from one build
to the next a little more, from nothing to more than the whole build needs.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.errors import DiskFullError, EnvCacheError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal, pins
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder
from ray_envcache.survey.inventory import status
from tests import support

pytestmark = [pytest.mark.host, pytest.mark.attack]

KIB = 1024
# More than one page of a disk each, so that their bytecode can be cut off in the middle.
BULK = f"DATA = {random.Random(0).randbytes(15_000).hex()!r}\n"
# Without bytecode of its own making: what is there must work, and nobody but the package under test makes it.
USE = ["-B", "-c", "import ray, wanted, wanted.deep"]


Disk = Callable[[], AbstractContextManager[Path]]


@dataclass(frozen=True)
class Free:
    """What a disk has left."""

    bytes: int
    inodes: int

    @classmethod
    def of(cls, disk: Path) -> Free:
        found = os.statvfs(disk)
        return cls(found.f_bavail * found.f_frsize, found.f_favail)


@contextmanager
def ballast(disk: Path, *, kib: int | None = None, inodes: int | None = None) -> Iterator[None]:
    """Fill the disk up to so many free kilobytes or inodes, for as long as the context lasts."""
    folder = disk / "ballast"
    folder.mkdir()
    free = Free.of(disk)
    if inodes is not None:
        for number in range(free.inodes - inodes):
            (folder / str(number)).touch()
    elif kib is not None:
        with (folder / "file").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free.bytes - kib * KIB)
    yield
    shutil.rmtree(folder)


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    text = f"__version__ = {support.RAY_VERSION!r}\n{BULK}"
    support.make_wheel(wheels, "ray", support.RAY_VERSION, modules={"ray/__init__.py": text})
    support.make_wheel(wheels, "wanted", modules={"wanted/__init__.py": BULK, "wanted/deep/__init__.py": BULK})
    return support.make_project(tmp_path / "project", wheels, ["ray", "wanted"])


def wait_for_background(disk: Path) -> None:
    """Wait until no process compiles bytecode for a store on this disk, whether it came to an end or not."""

    def is_quiet() -> bool:
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return not any(bytecode.__name__ in words and str(disk) in "".join(words) for words in commands)

    support.wait_until(is_quiet, "the background process is gone")


def use(python: Path) -> None:
    done = subprocess.run([python, *USE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def build(disk: Path, project: Path) -> Entry:
    """Acquire, use, and release; then it works as well as before, however the background process fared."""
    store = Store.open(disk / "store")
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        use(lease.python)
        wait_for_background(disk)
        use(lease.python)
    return lease.entry


def attempt(disk: Path, project: Path) -> str:
    """Build on a disk that may be full; how it went."""
    try:
        entry = build(disk, project)
    except EnvCacheError as error:
        require_good(error)
        assert entries(disk) == []
        return type(error).__name__
    if not entry.compiled.exists():
        return "not compiled"
    return "measured" if entry.measured.exists() else "not measured"


def require_good(error: EnvCacheError) -> None:
    """Of the two kinds that speak of disks, with figures and a hint."""
    assert type(error) in {DiskFullError, StoreError}, error
    assert "No space left" in error.message
    assert re.search(r"\d MB( and \d+ inodes)? are free", error.message), error
    assert "make room" in error.hint


def entries(disk: Path) -> list[Path]:
    """All that is there of entries, whole or half."""
    layout = Layout(disk / "store")
    return [path for folder in (layout.entries, layout.trash) if folder.exists() for path in folder.iterdir()]


def recover(disk: Path, project: Path) -> None:
    """With room again a build succeeds, is finished, and a collection leaves no trace of it all."""
    entry = build(disk, project)
    assert entry.compiled.exists()
    layout = Layout(disk / "store")
    assert collect(layout, Limits(everything=True)).failed == []
    assert [*entries(disk), *layout.leases.iterdir(), *layout.memo.iterdir()] == []
    journal.remove(layout)  # which stays until then, and has a bound of its own
    assert [path.name for path in layout.top.iterdir() if not path.is_dir()] == ["CACHEDIR.TAG"]
    assert layout.cachedir_tag.read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")


@pytest.fixture(params=["uv elsewhere", "uv on it", pytest.param("uv on it, warm", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """A new small disk for every build; uv's cache and the temporary files lie on another one, or on it."""
    place = tmp_path / "disk"
    if request.param != "uv elsewhere":
        monkeypatch.setenv("UV_CACHE_DIR", str(place / "uv"))
        monkeypatch.setenv("TMPDIR", str(place / "temporary"))
        monkeypatch.setattr(tempfile, "tempdir", str(place / "temporary"))

    @contextmanager
    def mounted() -> Iterator[Path]:
        with support.small_disk(place):
            (place / "temporary").mkdir()
            if request.param == "uv on it, warm":
                with Store.open(place / "warming").acquire(EnvSpec.parse(project), installed_ray(), Holder("test")):
                    pass
                wait_for_background(place)
            yield place

    return mounted


def sweep(disk: Disk, project: Path, *, steps: int | None) -> Counter[str]:
    """Builds with more and more room, in so many steps or page by page; what came of them, counted."""
    with disk() as place:
        before = Free.of(place)
        build(place, project)
        after = Free.of(place)
    # What is written anew is there twice for a moment.
    enough = (before.bytes - after.bytes) // KIB * 4 // 3
    outcomes: Counter[str] = Counter()
    for kib in range(0, enough, enough // steps if steps else 4):
        with disk() as place:
            with ballast(place, kib=kib):
                outcomes[attempt(place, project)] += 1
            recover(place, project)
    print(dict(outcomes))
    return outcomes


def test_every_stage_of_a_build_on_a_full_disk(disk: Disk, project: Path) -> None:
    """With too little room there is an error with figures and nothing else; with just enough the environment works."""
    outcomes = sweep(disk, project, steps=5)
    assert outcomes["DiskFullError"] > 0
    assert outcomes["measured"] + outcomes["not compiled"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_page_of_a_full_disk(disk: Disk, project: Path) -> None:
    """The same for every single page of room."""
    outcomes = sweep(disk, project, steps=None)
    assert {"StoreError", "DiskFullError", "not compiled", "measured"} <= outcomes.keys()


@pytest.mark.parametrize("disk", ["uv elsewhere"], indirect=True)
@pytest.mark.parametrize("inodes", [6, 9, 50])
def test_disk_without_inodes(disk: Disk, project: Path, inodes: int) -> None:
    """Where bytes are left but no inodes, the error says so."""
    with disk() as place:
        with ballast(place, inodes=inodes):
            print(attempt(place, project))
        recover(place, project)


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["uv elsewhere", "uv on it"], indirect=True)
def test_every_inode(disk: Disk, project: Path) -> None:
    """The same for every single inode that a build needs."""
    outcomes: Counter[str] = Counter()
    for inodes in range(160):
        with disk() as place:
            with ballast(place, inodes=inodes):
                outcomes[attempt(place, project)] += 1
            recover(place, project)
    print(dict(outcomes))
    assert {"StoreError", "DiskFullError", "not compiled", "measured"} <= outcomes.keys()


@pytest.mark.parametrize("disk", ["uv elsewhere"], indirect=True)
def test_full_disk_and_everything_else(disk: Disk, project: Path) -> None:
    """What is there works on without a byte left: it is found, listed, and removed; only a pin needs room."""
    with disk() as place:
        entry = build(place, project)
        store = Store.open(place / "store")
        with ballast(place, kib=0):
            with pytest.raises(OSError, match="No space left on device"):
                pins.pin(store.layout, entry)
            assert build(place, project) == entry
            assert status(store.layout, entry).state == "ready"
            assert len(collect(store.layout, Limits(everything=True)).removed) == 1
        with ballast(place, inodes=0):
            assert collect(store.layout, Limits(everything=True)).failed == []
        recover(place, project)


@pytest.mark.parametrize("disk", ["uv on it"], indirect=True)
def test_no_room_to_ask_what_is_cached(disk: Disk, project: Path) -> None:
    """A disk on which not even the question fits whether uv has the packages is a full disk like others."""
    lock = project.with_name("uv.lock")
    lock.write_text(lock.read_text().replace('.whl" }', '.whl", size = 9000000 }'))
    with disk() as place:
        build(place, project)
        collect(Layout(place / "store"), Limits(everything=True))
        with ballast(place, kib=0), pytest.raises(DiskFullError, match=r"18 MB to download .* 0 MB"):
            build(place, project)


@pytest.mark.parametrize("disk", ["uv elsewhere"], indirect=True)
def test_another_collector_makes_room(disk: Disk, project: Path, children: list[subprocess.Popen[str]]) -> None:
    """A build on a full disk waits for the collector that is at work, such as the one of its own cluster's start."""
    lock = project.with_name("uv.lock")
    lock.write_text(lock.read_text().replace('.whl" }', '.whl", size = 9000000 }'))
    code = """
import shutil, threading
from pathlib import Path
from ray_envcache.store.layout import Layout
from ray_envcache.system import flock
disk = Path(sys.argv[1])
held = flock.try_flock(Layout(disk / "store").collector_flock, exclusive=True)
def finish():
    shutil.rmtree(disk / "deleted slowly")
    os.close(held)
threading.Timer(2, finish).start()
"""
    with disk() as place:
        Store.open(place / "store")
        ballasted = place / "deleted slowly"
        ballasted.mkdir()
        with (ballasted / "file").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, Free.of(place).bytes - 5_000_000)
        support.start_python(children, f"import os\n{code}", place)
        assert build(place, project).ready.exists()


def test_compiled_is_what_all_helpers_compiled(tmp_path: Path) -> None:
    """A helper that finds no room fails the whole, and what it cut off is not there."""
    program = """if True:
        import os, sys
        from ray_envcache.inside import pyc
        os.mkdir(os.path.join(sys.argv[1], "b"))
        pyc.compile_tree(sys.argv[1], pyc.Places(*(os.path.join(sys.argv[1], name) for name in "ab")), workers=2)
    """
    with support.small_disk(tmp_path / "disk") as place:
        # The top comes first, and the package is the second helper's share.
        (place / "small.py").write_text("X = 1\n")
        (place / "package").mkdir()
        (place / "package" / "__init__.py").write_text(BULK)
        with ballast(place, kib=16):
            done = subprocess.run([sys.executable, "-c", program, place], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == f"OSError: [Errno 28] No space left on device: '{place}'"
        assert [path.name.split(".")[0] for path in place.rglob("__pycache__/*.pyc*")] == ["small"]

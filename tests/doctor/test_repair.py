"""Repairs with real uv: a sound environment beside the damaged one, whatever dies in between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build.progress import Observer
from ray_envcache.doctor.repair import Repaired, chosen, repair
from ray_envcache.errors import BuildError, ReadOnlyError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from ray_envcache.inside import pyc
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import pins
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder
from ray_envcache.survey.inventory import status
from ray_envcache.survey.verification import Verified, verify
from tests import support

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def _uv_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file is one of the cache too, and the cleaning of a cache waits for all that use it."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))


@pytest.fixture
def project(wheels: Path, tmp_path: Path) -> Path:
    support.make_wheel(wheels, "tool", modules={"tool/__init__.py": "X = 1\n", "tool/data": "x\n"})
    return support.make_project(tmp_path / "project", wheels, ["ray", "tool"])


@pytest.fixture
def entry(store: Store, project: Path) -> Entry:
    return support.build_finished(store, project)


def look(entry: Entry) -> Verified:
    return verify(entry)


def repaired(store: Store, entry: Entry) -> Repaired:
    return repair(store, look(entry), installed_ray(), Observer())


def handed_out(store: Store, project: Path) -> Entry:
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=False) as lease:
        return lease.entry


def damage(entry: Entry) -> None:
    """Write into a file in place: every hard link of it, that of uv's cache too, has it then."""
    with (entry.site_packages / "tool" / "data").open("a") as file:
        file.write("damaged\n")


def archives() -> set[Path]:
    """The unpacked wheels in uv's cache: each time that uv unpacks one, it has another name."""
    return set(Path(os.environ["UV_CACHE_DIR"]).glob("archive-v*/*"))


def test_uv_cache_has_the_damaged_file(store: Store, entry: Entry, project: Path) -> None:
    """uv takes its cache for whole: the package is unpacked anew. New users get the sound environment at once."""
    damage(entry)
    assert (entry.site_packages / "tool" / "data").stat().st_nlink > 1
    done = repaired(store, entry)
    assert (done.damaged, done.unpacked, done.users, done.bytecode) == (entry, ("tool",), (), 0)
    assert done.sound.name == f"{entry.key}-2"
    assert (done.sound.site_packages / "tool" / "data").read_text() == "x\n"
    assert look(done.sound).state == "sound"
    assert handed_out(store, project) == done.sound
    assert status(store.layout, entry).state == "broken"


def test_uv_cache_is_sound(store: Store, entry: Entry) -> None:
    """Where a file was replaced or is gone, the cache has the right one, and is left alone."""
    (entry.site_packages / "ray" / "__init__.py").unlink()
    data = entry.site_packages / "tool" / "data"
    data.unlink()
    data.write_text("replaced")
    before = archives()
    done = repaired(store, entry)
    assert done.unpacked == ()
    assert archives() == before
    assert look(done.sound).state == "sound"


def test_a_mode_is_one_of_the_cache_too(store: Store, entry: Entry) -> None:
    """The mode of a file belongs to all its links."""
    (entry.site_packages / "tool" / "data").chmod(0o4777)
    assert repaired(store, entry).unpacked == ("tool",)


def test_running_users_keep_theirs(
    store: Store, entry: Entry, project: Path, children: list[subprocess.Popen[str]]
) -> None:
    """A process that runs from the damaged environment is named, and keeps it; a collector removes it afterwards."""
    running = support.start_python(children, "import tool", python=entry.python)
    damage(entry)
    done = repaired(store, entry)
    assert [user.pid for user in done.users] == [running.pid]
    pins.pin(store.layout, done.sound)  # a pin is for the sound one
    collect(store.layout, Limits())
    assert entry.python.exists()
    running.communicate("")
    assert [one.name for one in collect(store.layout, Limits()).removed] == [entry.name]
    assert not entry.path.exists()
    assert handed_out(store, project) == done.sound


def test_shared_bytecode_is_replaced(store: Store, entry: Entry) -> None:
    """Damaged bytecode is offered no more, and nothing is written into it: who has it may run it."""
    shared = store.layout.bytecode / pyc.tag() / pyc.name_of(b"X = 1\n")
    shared.chmod(0o644)
    with shared.open("ab") as file:
        file.write(b"x")
    wrong, inode = shared.read_bytes(), shared.stat().st_ino
    done = repaired(store, entry)
    assert done.bytecode == 1
    assert shared.stat().st_ino != inode
    assert pyc.proven_source(shared.read_bytes())
    mine = next((entry.site_packages / "tool" / "__pycache__").glob("__init__.*.pyc"))
    assert mine.read_bytes() == wrong
    assert look(done.sound).state == "sound"


def test_inputs_that_changed(store: Store, entry: Entry, project: Path, wheels: Path) -> None:
    """Where the project needs another environment by now, an error says what to run; the damaged one stays."""
    damage(entry)
    support.make_wheel(wheels, "tool", "2.0")
    support.run_uv("lock", "--upgrade", cwd=project.parent)
    with pytest.raises(BuildError, match="lead to another one by now") as error:
        repaired(store, entry)
    assert f"ray-envcache build {project.parent}" in error.value.hint
    assert entry.ready.exists()


def test_inputs_that_are_gone(store: Store, entry: Entry, project: Path) -> None:
    """The same without the project, and without a note of what was built."""
    damage(entry)
    shutil.rmtree(project.parent)
    with pytest.raises(BuildError, match=r"cannot be built again: .*project"):
        repaired(store, entry)
    for memo in store.layout.memo.iterdir():
        memo.unlink()
    with pytest.raises(BuildError, match="no note of what it was built from"):
        repaired(store, entry)
    assert entry.ready.exists()


def test_options_are_known(store: Store, wheels: Path, tmp_path: Path) -> None:
    """An environment with extras and groups is built with the same ones."""
    support.make_wheel(wheels, "more")
    project = support.make_project(
        tmp_path / "project", wheels, ["ray"], extra='[project.optional-dependencies]\nx = ["more"]\n'
    )
    spec = EnvSpec.parse({"path": str(project), "extras": ["x"]})
    with store.acquire(spec, installed_ray(), Holder("test"), finish=False) as lease:
        entry = lease.entry
    (entry.site_packages / "more.py").unlink()
    assert (repaired(store, entry).sound.site_packages / "more.py").exists()


def test_readonly(store: Store, entry: Entry) -> None:
    """A read-only store is verified, never repaired."""
    below = Layout(store.layout.root, readonly=True).entry(entry.name)
    assert below is not None
    damage(entry)
    with pytest.raises(ReadOnlyError, match="is read-only here"):
        repaired(store, below)
    assert [path.name for path in store.layout.entries.iterdir()] == [entry.name]


def test_a_new_one_that_is_damaged_too(store: Store, entry: Entry, project: Path) -> None:
    """What uv's cache has got wrong without a link to it is noticed, and not handed out."""
    data = entry.site_packages / "tool" / "data"
    (in_cache,) = Path(os.environ["UV_CACHE_DIR"]).glob("archive-v*/*/tool/data")
    data.unlink()
    in_cache.write_text("wrong in the cache\n")
    with pytest.raises(BuildError, match=r"new environment is damaged too: .*tool/data") as error:
        repaired(store, entry)
    assert "uv cache clean tool" in error.value.hint
    assert handed_out(store, project) == entry


PROGRAM = """
from pathlib import Path
import sys
from ray_envcache.acquire import Store
from ray_envcache.build.progress import Observer
from ray_envcache.doctor.repair import repair
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.survey.verification import verify

store = Store.open()
found = verify(store.layout.entry(sys.argv[1]))
repair(store, found, installed_ray(), Observer())
"""


@pytest.mark.parametrize(
    "point", ["repair-cleaned", "repair-built", "finishing-leased", "repair-checked", "repair-retired"]
)
def test_killed(
    store: Store, entry: Entry, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """SIGKILL at any step: the damaged one is as before, or retired beside a sound one; the next repair ends it."""
    damage(entry)
    points = tmp_path / "points"
    points.mkdir()
    (points / f"stop-{point}").touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(points)}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, entry.name], env=environ)
    support.wait_until((points / f"reached-{point}").exists, "there")
    child.send_signal(signal.SIGKILL)
    child.wait()
    new = store.layout.entry(f"{entry.key}-2")
    assert new is not None
    assert entry.ready.exists() == (point != "repair-retired")
    assert new.ready.exists() == (point != "repair-cleaned")
    if not entry.ready.exists():
        assert handed_out(store, project) == new
        assert look(new).state == "sound"
    else:
        done = repaired(store, entry)
        assert done.sound == new
        assert look(new).state == "sound"
    assert handed_out(store, project) == new
    assert [one.name for one in collect(store.layout, Limits()).removed] == [entry.name]


def test_two_builds_that_are_damaged(store: Store, entry: Entry) -> None:
    """As a repair that was killed leaves them: in the order in which they are repaired one sound one takes the place of both."""
    record = entry.ready.read_bytes()
    damage(entry)
    newer = repaired(store, entry).sound
    entry.ready.write_bytes(record)
    damage(newer)
    assert chosen(store, []) == [newer, entry]
    sound = [repaired(store, one).sound for one in chosen(store, [])]
    assert [one.name for one in sound] == [f"{entry.key}-3"] * 2
    assert (look(sound[0]).state, newer.ready.exists(), entry.ready.exists()) == ("sound", False, False)


def test_two_at_once(store: Store, entry: Entry, tmp_path: Path) -> None:
    """Two repairs of one environment build one."""
    damage(entry)
    stop, reached = tmp_path / "stop-repair-cleaned", tmp_path / "reached-repair-cleaned"
    stop.touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, entry.name], env=environ) for _ in range(2)]
    support.wait_until(lambda: reached.exists() and len(reached.read_text().split()) == 2, "both are there")
    stop.unlink()
    assert [child.wait() for child in both] == [0, 0]
    assert sorted(path.name for path in store.layout.entries.iterdir()) == [entry.name, f"{entry.key}-2"]


def test_layer(store: Store, wheels: Path, tmp_path: Path) -> None:
    """A layer is built again on what it lies on; one on a repaired environment, when it is needed next."""
    project = support.make_project_with_own_package(tmp_path / "project", wheels, ["ray"])
    layer = handed_out(store, project)
    (layer.site_packages / "own-1.0.dist-info" / "METADATA").unlink()
    done = repaired(store, layer)
    assert (done.sound.key, done.sound.number) == (layer.key, 2)
    assert look(done.sound).state == "sound"
    (base,) = [one for one in store.layout.all_entries() if one.key != layer.key]
    (base.site_packages / "ray" / "__init__.py").unlink()
    repaired(store, base)
    assert look(done.sound).state == "skipped"
    assert handed_out(store, project).name == f"{layer.key}-3"


def test_editable_layer(store: Store, wheels: Path, tmp_path: Path) -> None:
    """One whose packages are imported from where they are developed stays such a one."""
    project = support.make_project_with_own_package(tmp_path / "project", wheels, ["ray"])
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), editable=True, finish=False) as lease:
        layer = lease.entry
    (layer.site_packages / "own-1.0.dist-info" / "METADATA").unlink()
    assert repaired(store, layer).sound.name == f"{layer.key}-2"

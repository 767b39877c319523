"""Bytecode compiled once: linked into every environment that has the same text, and gone with the last of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode as bytecode_of_entry
from ray_envcache.errors import InUseError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits
from ray_envcache.inside import pyc
from ray_envcache.resolve.interpreter import LockedRay, installed_ray
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder
from ray_envcache.survey.inventory import record_sizes
from ray_envcache.system import files, flock
from tests import support

pytestmark = pytest.mark.host

Build = Callable[..., Entry]
COMMON = {
    "common/__init__.py": "",
    "common/inner/__init__.py": "",
    "common/deep.py": "def outer():\n    def fail():\n        1 / 0\n    fail()\n",
}


@pytest.fixture
def build(tmp_path: Path, wheels: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Build an environment with these packages and nobody who finishes it: that, a test does itself."""
    monkeypatch.setattr(Store, "finish", lambda *_: None)
    support.make_wheel(wheels, "common", modules=COMMON)

    def build(name: str, *packages: str) -> Entry:
        support.make_wheel(wheels, name, modules={f"{name}.py": f"NAME = {name!r}\n"})
        project = support.make_project(tmp_path / f"project-{name}", wheels, ["ray", name, *packages])
        with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
            return lease.entry

    return build


def start_finishing(store: Store, *entries: Entry) -> list[subprocess.Popen[bytes]]:
    command: list[str | Path] = [sys.executable, "-m", "ray_envcache.build.bytecode", store.layout.root]
    return [subprocess.Popen([*command, entry.path.name]) for entry in entries]


def finish(store: Store, *entries: Entry) -> None:
    """Finish entries, all at the same time."""
    assert [child.wait() for child in start_finishing(store, *entries)] == [0] * len(entries)
    assert all(entry.compiled.exists() for entry in entries)


def bytecode(entry: Entry) -> dict[str, os.stat_result]:
    return {str(path.relative_to(entry.site_packages)): path.stat() for path in entry.site_packages.rglob("*.pyc")}


def offered(layout: Layout) -> set[str]:
    return {path.name for path in layout.bytecode.rglob("*.pyc")}


def traceback(entry: Entry) -> str:
    code = (
        "import common.deep, sys, traceback\ntry: common.deep.outer()\nexcept ZeroDivisionError: traceback.print_exc()"
    )
    done = subprocess.run([entry.python, "-v", "-c", code], capture_output=True, text=True, check=True)
    cached = f"code object from '{entry.site_packages / 'common/__pycache__/deep.'}"
    assert cached in done.stderr, "it was run from its bytecode"
    return done.stderr


def test_compiled_once_and_gone_with_the_last(store: Store, build: Build) -> None:
    """A second environment links what the first compiled; tracebacks are its own; what is shared goes with the last."""
    first = build("aa", "common")
    finish(store, first)
    before = offered(store.layout)
    second = build("bb", "common")
    finish(store, second)
    assert offered(store.layout) - before == {pyc.name_of(b"NAME = 'bb'\n")}
    mine, yours = bytecode(first), bytecode(second)
    same = {name for name in mine.keys() & yours.keys() if mine[name].st_ino == yours[name].st_ino}
    assert {name for name in mine.keys() & yours.keys() if "_hold_" not in name} == same
    assert len([name for name in same if name.startswith("common/")]) == 3
    assert not first.staged_bytecode.exists()

    would = collect(store.layout, Limits(everything=True), dry_run=True)
    exclusive = mine[next(name for name in mine if name.startswith("__pycache__/aa."))].st_blocks * 512
    told = record_sizes(store.layout, first).reclaimable
    gone = evict(store.layout, first)
    assert gone.reclaimable == told > exclusive
    assert {f"{second.site_packages}/common/deep.py"} == {
        line.split('"')[1] for line in traceback(second).splitlines() if line.startswith("  File") and "deep" in line
    }
    assert bytecode(second).keys() == yours.keys()
    report = collect(store.layout, Limits(everything=True))
    assert sum(one.freed_bytes for one in would.removed) == gone.reclaimable + report.removed[0].freed_bytes
    assert report.swept_bytes == 0
    assert list(store.layout.bytecode.iterdir()) == []


def test_elsewhere_for_us(store: Store, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPYCACHEPREFIX of whoever builds says where our bytecode goes, not that of environments."""
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path / "prefix"))
    entry = build("aa", "common")
    finish(store, entry)
    assert {name.rsplit("/", 1)[-1].partition(".")[0] for name in bytecode(entry)} >= {"aa", "deep", "__init__"}


def test_first_workers_find_bytecode(store: Store, build: Build) -> None:
    """What the check of a new environment imports has bytecode when it is handed out: its own, then the shared one."""
    first = build("aa")
    (mine,) = bytecode(first).values()
    assert [path.stat().st_ino for path in first.staged_bytecode.rglob("*.pyc")] == [mine.st_ino]
    finish(store, first)
    second = build("bb")
    (yours,) = bytecode(second).values()
    assert yours.st_ino == mine.st_ino
    assert list(second.staged_bytecode.rglob("*.pyc")) == []


def test_two_at_once(store: Store, build: Build) -> None:
    """Two that compile the same at the same time come to their ends, and the third links all of it."""
    entries = [build("aa", "common"), build("bb", "common")]
    finish(store, *entries)
    before = offered(store.layout)
    finish(store, third := build("cc", "common"))
    assert offered(store.layout) - before == {pyc.name_of(b"NAME = 'cc'\n")}
    for entry in (*entries, third):
        assert "ZeroDivisionError" in traceback(entry)


def test_packages_with_the_same_file(store: Store, build: Build, wheels: Path) -> None:
    """What a package puts in place of another's module, or its bytecode, is nothing to an environment without it."""
    tag = sys.implementation.cache_tag
    for name, text in (("honest", "VALUE = 'honest'\n"), ("hostile", "VALUE = 'hostile'\n")):
        more = {"honest_too/__init__.py": "", f"honest_too/__pycache__/__init__.{tag}.pyc": "evil"}
        modules = {"honest.py": text, **(more if name == "hostile" else {"honest_too/__init__.py": ""})}
        support.make_wheel(wheels, name, modules=modules)
    both, one = build("aa", "honest", "hostile"), build("bb", "honest")
    finish(store, both)
    finish(store, one)
    show = "import honest, honest_too; print(honest.VALUE)"
    assert support.run_python(show, python=one.python) == "honest\n"
    # Whichever uv let win.
    installed = (both.site_packages / "honest.py").read_text().split("'")[1]
    assert support.run_python(show, python=both.python) == f"{installed}\n"


@pytest.mark.parametrize("point", ["bytecode-let-go", "bytecode-sweep"])
def test_somebody_links_what_is_being_removed(
    store: Store, build: Build, tmp_path: Path, children: list[subprocess.Popen[str]], point: str
) -> None:
    """An environment that links a file at the moment when the collector takes its name keeps it, whole."""
    finish(store, old := build("aa", "common"))
    new = build("bb", "common")
    if point == "bytecode-sweep":
        files.remove_tree(old.path)  # as after a crash between the removal of an entry and the next look
    points = tmp_path / "points"
    points.mkdir()
    (points / f"stop-{point}").touch()
    command = [sys.executable, "-m", "ray_envcache", *(["gc"] if point == "bytecode-sweep" else ["rm", old.key])]
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(points), "RAY_ENVCACHE_MIN_FREE_SPACE": "off"}
    collector = subprocess.Popen(command, env=environ, text=True)
    children.append(collector)
    support.wait_until((points / f"reached-{point}").exists, "the collector has looked at a file")
    finish(store, new)
    linked = {found.st_ino for found in bytecode(new).values()}
    (points / f"stop-{point}").unlink()
    assert collector.wait() == 0
    assert {found.st_ino for found in bytecode(new).values()} == linked
    assert all(found.st_nlink >= 1 for found in bytecode(new).values())
    assert "ZeroDivisionError" in traceback(new)
    finish(store, build("cc", "common"))
    assert collect(store.layout, Limits(everything=True)).failed == []
    assert offered(store.layout) == set()


def other_python() -> str:
    """A Python of this system that is not ours, and compiles under another name."""
    for path in ("/usr/bin/python3", "/usr/local/bin/python3"):
        if (
            os.path.exists(path)
            and support.run_python("import sys; print(sys.version)", python=Path(path)).strip() != sys.version
        ):
            return path
    pytest.skip("there is one Python only")


def test_compiled_by_the_environments_python(
    store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an environment of another Python than ours gets is bytecode of its own, and nothing else counts as done."""
    monkeypatch.setattr(Store, "finish", lambda *_: None)
    python = other_python()
    support.make_wheel(wheels, "common", modules=COMMON)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "common"])
    with store.acquire(EnvSpec.parse({"path": project, "python": python}), LockedRay(), Holder("test")) as lease:
        finish(store, entry := lease.entry)
    program = f"import sys; sys.path.insert(0, {os.path.dirname(pyc.__file__)!r}); import pyc; print(pyc.tag())"
    (folder,) = store.layout.bytecode.iterdir()
    assert folder.name == support.run_python(program, python=entry.python).strip() != pyc.tag()
    assert "ZeroDivisionError" in traceback(entry)


def test_environment_whose_python_cannot(
    store: Store, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its Python cannot compile, an entry does not count as compiled, and the error has its last words."""
    entry = build("aa")
    (tmp_path / "broken.py").write_text("raise SystemExit('not today')\n")
    monkeypatch.setattr(pyc, "__file__", str(tmp_path / "broken.py"))
    with pytest.raises(ChildProcessError, match="not today"):
        bytecode_of_entry.finish(store.layout, entry, background=False)
    assert not entry.compiled.exists()


def test_what_compiles_keeps_the_entry(
    store: Store, build: Build, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """If the compiler's parent is killed, the entry stays held, and no other compiler begins, until it is done."""
    entry, slow = build("aa"), tmp_path / "slow.py"
    slow.write_text(
        f"""if True:
        import os, runpy, time
        open("{tmp_path}/began", "w").close()
        while not os.path.exists("{tmp_path}/go"):
            time.sleep(0.05)
        runpy.run_path("{pyc.__file__}", run_name="__main__")
        """
    )
    program = (
        "import sys; from ray_envcache.build import bytecode; bytecode.pyc.__file__ = sys.argv.pop(1);"
        "bytecode.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, str(slow), str(store.layout.root), entry.path.name]
    finisher = subprocess.Popen(command, text=True)
    children.append(finisher)
    support.wait_until((tmp_path / "began").exists, "it compiles")
    finisher.kill()
    finisher.wait()
    with pytest.raises(InUseError):
        evict(store.layout, entry)
    assert not bytecode_of_entry.finish(store.layout, entry, background=True)
    (tmp_path / "go").touch()
    support.wait_until(lambda: flock.is_free(entry.finishing_flock), "it is done")
    assert "__pycache__/aa" in " ".join(bytecode(entry))
    assert bytecode_of_entry.finish(store.layout, entry, background=True)


@pytest.mark.parametrize(("processors", "background", "found"), [(1, False, 1), (96, False, 4), (96, True, 1)])
def test_number_of_processes(monkeypatch: pytest.MonkeyPatch, processors: int, *, background: bool, found: int) -> None:
    """One for each processor that we may use, at most four; in the background one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(processors)}, raising=False)
    assert bytecode_of_entry._workers(background=background) == found

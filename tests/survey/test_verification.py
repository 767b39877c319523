"""Verifying real entries: whatever differs is named, nothing else is, and nothing outside is read."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.doctor.repair import chosen
from ray_envcache.errors import InUseError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.evict import evict
from ray_envcache.inside import pyc
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder
from ray_envcache.survey.verification import Difference, Verified, verify
from ray_envcache.system import flock
from tests import support

pytestmark = pytest.mark.host


def look(entry: Entry, *, quick: bool = False) -> Verified:
    return verify(entry, quick=quick)


def kinds(found: Verified) -> set[tuple[str, str]]:
    """What was found, with paths from site-packages where they lie there."""
    return {(one.kind, one.path.rpartition("site-packages/")[2]) for one in found.differences}


@pytest.fixture
def entry(store: Store, wheels: Path, tmp_path: Path) -> Entry:
    """A finished entry with a package of all kinds of files, which nobody holds."""
    modules = {
        "tool/__init__.py": "X = 1\n",
        "tool/same.py": "X = 1\n",
        "tool/broken.py": "def (:\n",
        "tool/data": "x\n",
    }
    data = {"tool-1.0.data/data/share/tool/data": "shared\n"}
    support.make_wheel(wheels, "tool", modules={**modules, **data}, scripts={"tool": "tool:main"})
    return support.build_finished(store, support.make_project(tmp_path / "project", wheels, ["ray", "tool"]))


def test_sound(entry: Entry) -> None:
    """A fresh environment is as it should be, and a look at it is no use of it."""
    before = entry.in_use.stat().st_mtime_ns
    done: list[int] = []
    found = verify(entry, lambda now, total: done.append(total * 1000 + now))
    assert (found.state, found.differences, found.project) == ("sound", (), "project")
    assert found.files > 30
    assert found.bytes > 1000
    assert sum(one % 1000 for one in done) == done[0] // 1000
    assert look(entry, quick=True).state == "sound"
    assert entry.in_use.stat().st_mtime_ns == before
    assert flock.is_free(entry.in_use)


def test_kept_meanwhile(store: Store, entry: Entry) -> None:
    """No collector takes an environment away while it is looked at."""
    refused: list[str] = []

    def try_to_remove(_done: int, _all: int) -> None:
        with pytest.raises(InUseError) as error:
            evict(store.layout, entry)
        refused.append(error.value.message)

    assert verify(entry, try_to_remove).state == "sound"
    assert refused
    evict(store.layout, entry)


def test_each_damage_is_named(entry: Entry, tmp_path: Path) -> None:
    """Changed, missing, foreign, links and modes: each file once, with its package."""
    site = entry.site_packages
    with (site / "tool" / "data").open("r+") as file:
        file.write("y")
    (site / "ray" / "__init__.py").unlink()
    (site / "tool" / "foreign.py").write_text("X = 1\n")
    os.mkfifo(site / "tool" / "pipe")
    (site / "tool" / "away").symlink_to("/etc/passwd")
    (site / "tool" / "same.py").chmod(0o4755)
    (entry.bin / "tool").write_text("#!/bin/sh\n")
    (entry.venv / "share" / "tool" / "data").write_text("longer than it was\n")
    (entry.venv / "lib64").unlink()
    (entry.venv / "lib64").symlink_to("/lib")
    found = look(entry)
    assert kinds(found) == {
        ("changed", "tool/data"), ("missing", "ray/__init__.py"), ("foreign", "tool/foreign.py"), ("foreign", "tool/pipe"),
        ("foreign", "tool/away"), ("mode", "tool/same.py"), ("changed", "bin/tool"), ("changed", "share/tool/data"),
        ("link", "lib64"),
    }  # fmt: skip
    packages = {one.package for one in found.differences if one.kind != "foreign" and one.path != "lib64"}
    assert packages == {"ray", "tool"}
    assert [one.kind for one in found.differences] == sorted(
        (one.kind for one in found.differences), key=["record", "changed", "missing", "foreign", "link", "mode"].index
    )


def test_what_we_added_is_compared_too(entry: Entry) -> None:
    """The hold, pip's guard, and lists of files themselves have a hash in the seal."""
    (hold,) = entry.site_packages.glob("_ray_envcache_hold_*.pth")
    record = next(entry.site_packages.glob("tool-*.dist-info/RECORD"))
    hold.write_text("import os\n")
    (entry.bin / "pip").write_text("#!/bin/sh\n")
    record.write_text(record.read_text().replace("\ntool/data", "\ntool/atad"))
    (entry.venv / "pyvenv.cfg").unlink()
    assert kinds(look(entry)) == {
        ("changed", hold.name), ("changed", "bin/pip"), ("missing", "pyvenv.cfg"),
        ("changed", f"{record.parent.name}/RECORD"),
    }  # fmt: skip
    record.unlink()
    assert ("missing", f"{record.parent.name}/RECORD") in kinds(look(entry))


def test_damaged_seal(entry: Entry) -> None:
    """A list that is damaged, or gone, is the one difference; of one with a line less, what that line was for."""
    lines = entry.sealed.read_text().splitlines(keepends=True)
    entry.sealed.write_text("".join(line for line in lines if "/tool/data" not in line))
    assert kinds(look(entry)) == {("foreign", "tool/data"), ("foreign", "share/tool/data")}
    for mode in ("-1", "7" * 30):
        entry.sealed.write_text(f"pyvenv.cfg,,1,{mode},\n")
        assert ("changed", "pyvenv.cfg") in kinds(look(entry))
    entry.sealed.write_text("no list")
    assert kinds(look(entry)) == {("record", "../seal.csv")}
    entry.sealed.unlink()
    assert kinds(look(entry)) == {("record", "../seal.csv")}


def test_damage_before_the_seal(store: Store, entry: Entry) -> None:
    """What was damaged between installation and seal differs from what the package notes."""
    for path in (entry.sealed, entry.compiled):
        path.unlink()
    data = entry.site_packages / "tool" / "data"
    data.unlink()
    data.write_text("y\n")
    (entry.bin / "tool").write_text("right from now on")
    (entry.site_packages / "tool" / "same.py").unlink()
    (entry.site_packages / "tool" / "same.py").write_text("longer than it was\n")
    (entry.venv / "share" / "tool" / "data").unlink()
    bytecode.finish(store.layout, entry, background=False)
    by_size = {("changed", "tool/same.py"), ("missing", "share/tool/data")}
    assert kinds(look(entry, quick=True)) == by_size
    assert by_size | {("changed", "tool/data")} == {one for one in kinds(look(entry)) if "__pycache__" not in one[1]}


def test_modes(entry: Entry) -> None:
    """Others may be let read, as the owner of a shared store does; nothing may be lost, and no others may write."""
    subprocess.run(["chmod", "-R", "a+rX", entry.venv], check=True)
    assert look(entry).state == "sound"
    site = entry.site_packages
    for path, mode in (("same.py", 0o666), ("broken.py", 0o2644), ("data", 0o000)):
        (site / "tool" / path).chmod(mode)
    (entry.bin / "tool").chmod(0o644)
    (site / "ray").chmod(0o777)
    found = look(entry, quick=True)
    assert {one.kind for one in found.differences} == {"mode"}
    assert {one.path.rpartition("/")[2] for one in found.differences} == {"same.py", "broken.py", "data", "tool", "ray"}
    assert "has the mode 0666 instead of 0644" in {one.detail for one in found.differences}


def cached(entry: Entry, module: str) -> Path:
    return entry.site_packages / "tool" / "__pycache__" / f"{module}.{sys.implementation.cache_tag}.pyc"


def replace(path: Path, data: bytes) -> None:
    path.unlink()
    path.write_bytes(data)


def test_bytecode(entry: Entry) -> None:
    """Bytecode is that of its module's text and whole; one byte of it, another module's, or one without any is named."""
    mine, other = cached(entry, "__init__"), next((entry.site_packages / "ray" / "__pycache__").glob("*.pyc"))
    assert mine.stat().st_ino == cached(entry, "same").stat().st_ino
    whole = mine.read_bytes()
    flipped = whole[:20] + bytes([whole[20] ^ 1]) + whole[21:]
    for data in (other.read_bytes(), whole[:-1], flipped, whole[:-64], b""):
        replace(mine, data)
        assert kinds(look(entry)) == {("changed", f"tool/__pycache__/{mine.name}")}
    replace(mine, whole)
    assert look(entry).state == "sound"
    lonely = mine.with_name(mine.name.replace("__init__", "nothing"))
    lonely.write_bytes(whole)
    assert kinds(look(entry)) == {("foreign", f"tool/__pycache__/{lonely.name}")}


def test_bytecode_of_an_interpreter_with_options(entry: Entry) -> None:
    """What an interpreter has written there, as root, beside the compiler or with other options, is sound too."""
    subprocess.run([entry.python, "-O", "-c", "import tool"], check=True)
    made = {str(path.relative_to(entry.site_packages)) for path in entry.site_packages.rglob("*.opt-1.pyc")}
    assert bool(made) == (os.geteuid() == 0)
    assert look(entry).state == "sound"
    mine, module = cached(entry, "same"), entry.site_packages / "tool" / "same.py"
    mine.parent.chmod(0o700)
    mine.unlink()
    py_compile.compile(str(module), str(mine), invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    mine.parent.chmod(0o500)
    assert look(entry).state == "sound"
    os.utime(mine.parent.parent / "same.py", (1, 1))
    assert kinds(look(entry)) == {("changed", f"tool/__pycache__/{mine.name}")}


def test_damaged_shared_bytecode(store: Store, entry: Entry) -> None:
    """Bytecode that all share, and that one of them wrote to, is not sound because it is everywhere the same."""
    shared = store.layout.bytecode / pyc.tag() / pyc.name_of(b"X = 1\n")
    shared.chmod(0o644)
    with shared.open("ab") as file:
        file.write(b"x")
    assert {path for _, path in kinds(look(entry))} == {
        f"tool/__pycache__/{cached(entry, one).name}" for one in ("__init__", "same")
    }


def test_root_may_write(entry: Entry) -> None:
    """A program that runs from the environment as root can write into it, whatever the modes say: it is found out."""
    if os.geteuid() != 0:
        pytest.skip("only root can write into a frozen folder")
    program = "import tool, os; open(os.path.join(os.path.dirname(tool.__file__), 'cache.bin'), 'w').write('x')"
    subprocess.run([entry.python, "-c", program], check=True)
    assert kinds(look(entry)) == {("foreign", "tool/cache.bin")}
    patch = "import tool, os; open(tool.__file__, 'a').write('# patched')"
    subprocess.run([entry.python, "-c", patch], check=True)
    assert kinds(look(entry)) == {("foreign", "tool/cache.bin"), ("changed", "tool/__init__.py")}


def test_quick(entry: Entry) -> None:
    """A quick look sees other sizes, and reads only what is newer than the entry."""
    data = entry.site_packages / "tool" / "data"
    was = data.stat()
    data.write_text("y\n")
    assert kinds(look(entry, quick=True)) == {("changed", "tool/data")}
    data.write_text("x\n")
    assert look(entry, quick=True).state == "sound"
    data.write_text("y\n")
    os.utime(data, ns=(was.st_mtime_ns, was.st_mtime_ns))
    assert look(entry, quick=True).state == "sound"
    assert kinds(look(entry)) == {("changed", "tool/data")}
    data.write_text("longer")
    os.utime(data, ns=(was.st_mtime_ns, was.st_mtime_ns))
    assert kinds(look(entry, quick=True)) == {("changed", "tool/data")}


def test_nothing_outside_is_read(entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that became a link is not looked into, and the interpreter of the environment is not run."""
    outside = tmp_path / "elsewhere"
    (entry.site_packages / "tool").rename(outside)
    (entry.site_packages / "tool").symlink_to(outside)
    replace(entry.python, b"#!/bin/sh\ntouch /tmp/ran\n")
    os.utime(entry.python, ns=(0, 0))
    opened: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and active:
            opened.append(str(arguments[0]))
        assert not (active and event in {"subprocess.Popen", "os.fork", "os.posix_spawn"})

    record = entry.ready.read_text()
    size = entry.python.stat().st_size
    entry.ready.write_text(record.replace(record.partition('"base_python_file": [')[2].partition("]")[0], f"{size}, 0"))
    active = False
    sys.addaudithook(note)
    active = True
    found = look(entry)
    active = False
    assert ("foreign", "tool") in kinds(found)
    assert ("missing", "tool/data") in kinds(found)
    assert ("changed", "bin/python") in kinds(found) or ("foreign", "bin/python") in kinds(found)
    assert opened
    assert not [path for path in opened if "elsewhere" in path or "/site-packages/tool/" in path]


def test_before_the_bytecode_is_there(store: Store, entry: Entry) -> None:
    """An entry that is not finished is skipped, with a sentence that says when it can be compared."""
    entry.compiled.unlink()
    found = look(entry)
    assert (found.state, found.differences, found.project) == ("skipped", (), "project")
    assert "its next use" in found.reason
    bytecode.finish(store.layout, entry, background=False)
    assert look(entry).state == "sound"


def test_skipped(store: Store, entry: Entry) -> None:
    """What is built, or gone, at this moment is no failure: a sentence says so."""
    entry.ready.rename(entry.path / "kept")
    with flock.exclusive_flock(store.layout.builder_flock(entry.key), lambda: None):
        found = look(entry)
    assert (found.state, found.differences) == ("skipped", ())
    assert found.reason.startswith("it is being built, or broken, or was removed: ")
    evict(store.layout, entry)
    assert look(entry) == found


@pytest.fixture
def layer(store: Store, wheels: Path, tmp_path: Path) -> Entry:
    """A finished layer with the project's own package, on an environment with `tool`."""
    support.make_wheel(wheels, "tool", modules={"tool/__init__.py": "X = 1\n"}, scripts={"tool": "tool:main"})
    project = support.make_project_with_own_package(tmp_path / "project", wheels, ["ray", "tool"])
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=False) as lease:
        for one in lease.entries:
            bytecode.finish(store.layout, one, background=False)
        return lease.entry


def test_layer(store: Store, layer: Entry, tmp_path: Path) -> None:
    """A layer is sound with what it lies on; its links lead there and nowhere else."""
    base, top = chosen(store, [layer.key])
    assert top == layer
    assert set(chosen(store, [])) == {base, top}
    assert (look(base).differences, look(top).differences) == ((), ())
    links = [path for path in layer.venv.rglob("*") if path.is_symlink() and str(base.venv) in os.readlink(path)]
    evil = tmp_path / "evil"
    evil.write_text("")
    for path in links:
        target = os.readlink(path)
        path.unlink()
        assert {one for one in look(layer).differences if one.kind == "missing"}
        path.symlink_to(evil)
        (wrong,) = look(layer).differences
        assert wrong == Difference("link", str(path.relative_to(layer.venv)), f"leads to `{evil}`")
        path.unlink()
        path.symlink_to(target)
    assert look(layer).state == "sound"
    base.ready.unlink()
    assert look(layer).state == "skipped"


def test_inherited(store: Store, wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to packages of the cluster's Python lead to these packages; what lies there is not ours to compare."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    support.unpack(
        support.make_wheel(wheels, "lib", modules={"lib/__init__.py": "X = 1\n", "flat.py": "Y = 1\n"}), site
    )
    project = support.make_project(tmp_path / "project", wheels, ["ray", "lib"])
    spec = EnvSpec.parse({"path": str(project), "inherit": ["lib"]})
    with store.acquire(spec, installed_ray(), Holder("test"), finish=False) as lease:
        entry = lease.entry
    bytecode.finish(store.layout, entry, background=False)
    assert (entry.site_packages / "lib").is_symlink()
    assert (entry.site_packages / "flat.py").is_symlink()
    (site / "lib" / "__init__.py").write_text("changed there\n")
    assert look(entry).differences == ()
    (entry.site_packages / "lib").unlink()
    (entry.site_packages / "lib").symlink_to(site / "lib-1.0.dist-info")
    assert kinds(look(entry)) == {("link", "lib")}

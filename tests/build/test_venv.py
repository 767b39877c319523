"""The files added to a fresh venv, run for real."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import tomli
from packaging.pylock import Pylock

from ray_envcache.build.venv import add_hold, add_pip_guard, pylock_text
from ray_envcache.resolve.lockfile import LocalPackage, ResolvedPackage, ResolvedSet
from ray_envcache.store.layout import Entry
from tests import support

KEY = "0123456789abcdef" * 2
PIP = "import sys; print('pip of', sys.prefix, sys.argv[1:])"


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """An entry in a folder with spaces, with a venv that has a pip of a few bytes."""
    entry = Entry(KEY, 1, tmp_path_factory.mktemp("a store") / f"{KEY}-1")
    venv.create(entry.venv, symlinks=True)
    entry.in_use.touch()
    (entry.site_packages / "pip").mkdir()
    (entry.site_packages / "pip" / "__main__.py").write_text(PIP)
    # As uv leaves it: a script that is a hard link into uv's cache.
    cached = entry.path.with_name("cached")
    cached.write_text("of uv's cache")
    for name in ("pip", "pip3.12"):
        (entry.bin / name).hardlink_to(cached)
    add_pip_guard(entry)
    add_hold(entry)
    return entry


def pip(entry: Entry, *arguments: str, name: str = "pip") -> subprocess.CompletedProcess[str]:
    return subprocess.run([entry.bin / name, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["pip", "pip3", "pip3.12"])
@pytest.mark.parametrize(
    "arguments", [["install", "x"], ["-q", "install"], ["uninstall", "-y", "x"], ["--isolated", "install", "-r", "a b"]]
)
def test_install_is_refused(entry: Entry, name: str, arguments: list[str]) -> None:
    """pip, by each of its names, refuses to change what all share, and says what to do instead."""
    done = pip(entry, *arguments, name=name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: this environment is shared")
    assert "hint: add the package to pyproject.toml, run `uv lock`" in done.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["list"], ["show", "a b", "it's", ""], ["freeze", "--path", "an install folder"], ["list", "*"]]
)
def test_the_rest_passes(entry: Entry, arguments: list[str]) -> None:
    """Everything else reaches the pip of this venv with its arguments as they were."""
    done = pip(entry, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"pip of {entry.venv} {arguments}\n"


def test_through_path(entry: Entry) -> None:
    """Found through PATH, and from another folder, it is the same pip."""
    environ = {"PATH": f"{entry.bin}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", "pip list"], env=environ, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout == f"pip of {entry.venv} ['list']\n"


def test_uv_cache_is_untouched(entry: Entry) -> None:
    """The guard does not write through a hard link into uv's cache."""
    assert entry.path.with_name("cached").read_text() == "of uv's cache"


def shared_by_others(entry: Entry) -> bool:
    with entry.in_use.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_hold(entry: Entry, children: list[subprocess.Popen[str]]) -> None:
    """An interpreter of the venv holds the entry from its start to its end, however it ends."""
    assert not shared_by_others(entry)
    command = [str(entry.python), "-I", "-c", "print('up', flush=True); input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    assert shared_by_others(entry)
    child.kill()
    child.wait()
    assert not shared_by_others(entry)


def test_hold_has_its_own_name(entry: Entry) -> None:
    """The hold's module is named after its entry, so that stacked environments have one each."""
    code = "import sys; print([n for n, m in sys.modules.items() if 'hold' in n and m.HELD >= 64])"
    assert support.run_python(code, python=entry.python) == f"['_ray_envcache_hold_{KEY[:12]}_1']\n"


@pytest.mark.parametrize("limit", [16, 64, 1024])
def test_hold_with_few_descriptors(entry: Entry, children: list[subprocess.Popen[str]], limit: int) -> None:
    """However few the system allows, the entry is held, and by no descriptor of a standard stream, open or not."""
    code = (
        "import sys, time; print([m.HELD for n, m in sys.modules.items() if '_hold_' in n], flush=True); time.sleep(60)"
    )
    few = ["sh", "-c", f'ulimit -n {limit}; exec "$0" -I -c "$1" <&-', str(entry.python), code]
    child = subprocess.Popen(few, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    (held,) = json.loads(child.stdout.readline())
    assert held >= (64 if limit > 64 else 3)
    assert shared_by_others(entry)
    child.kill()
    child.wait()
    assert not shared_by_others(entry)


def test_hold_breaks_nothing(entry: Entry) -> None:
    """Where there is nothing to hold, or no descriptor for it, the interpreter starts in silence all the same."""
    moved = entry.in_use.rename(entry.path / "moved")
    try:
        done = subprocess.run([entry.python, "-c", "print(1)"], capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (b"1\n", b"")
    finally:
        moved.rename(entry.in_use)
    few = ["sh", "-c", 'ulimit -n 32; exec "$0" -c "print(2)"', str(entry.python)]
    done = subprocess.run(few, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"2\n", b"")


def test_pylock() -> None:
    """The list for uv is valid pylock.toml with exactly the artifacts of the resolved set."""
    digest = "0" * 64
    wheel = {
        "name": "a-1.0-py3-none-any.whl",
        "url": "https://example.org/a-1.0-py3-none-any.whl",
        "hashes": {"sha256": digest},
    }
    artifact = {"name": "a", "version": "1.0", "wheels": [wheel]}
    vcs = {"name": "b", "vcs": {"type": "git", "url": "https://example.org/b", "commit-id": "c0ffee"}}
    packages = (
        ResolvedPackage("a", "1.0", "wheel", f"sha256:{digest}", 1, artifact),
        ResolvedPackage("b", "", "vcs", "c0ffee", 0, vcs),
    )
    data = tomli.loads(
        pylock_text(ResolvedSet(packages, local=(LocalPackage("mine", Path("/somewhere"), editable=False),)))
    )
    assert data["packages"] == [artifact, vcs]
    assert [package.name for package in Pylock.from_dict(data).packages] == ["a", "b"]

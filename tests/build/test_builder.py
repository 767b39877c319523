"""One build: what its check finds, and what is left and said where it fails."""

from __future__ import annotations

import errno
import logging
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import builder, bytecode
from ray_envcache.build.progress import Observer
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.system import files
from tests import support

pytestmark = pytest.mark.host


class Told(Observer):
    """Keeps what is said of a build."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.passing: list[str | Callable[[], str]] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def line(self, text: str | Callable[[], str]) -> None:
        self.passing.append(text)


def build(tmp_path: Path, store: Store, ray: str, name: str = "app", observer: Observer | None = None) -> Lease:
    """Build an environment with a ray of this text."""
    wheels = tmp_path / "wheels"
    modules = {"ray/__init__.py": f"__version__ = {support.RAY_VERSION!r}\n{ray}"}
    support.make_wheel(wheels, "ray", support.RAY_VERSION, modules=modules)
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    exported = support.run_uv("export", "-q", "--no-header", cwd=project.parent)
    (folder := tmp_path / name).mkdir()
    (folder / "requirements.txt").write_text(f"--no-index\n--find-links {wheels}\n{exported}")
    spec = EnvSpec.parse(folder / "requirements.txt")
    return store.acquire(spec, installed_ray(), Holder("test"), observer, finish=False)


def test_what_is_said_of_a_build(tmp_path: Path, store: Store) -> None:
    """What is built, how long it took and where it is; that it is compiled, and how much so far; of a find nothing."""
    told = Told()
    with build(tmp_path, store, "", observer=told) as lease:
        head, done = told.said
        assert head == "Building the environment of app: 1 packages"
        assert re.fullmatch(rf"Built in \d+\.\d s: {re.escape(str(lease.entry.venv))}", done)
        assert "Installed 1 package" in " ".join(map(str, told.passing))
        bytecode.finish_lease_now(store.layout, lease, told)
        assert told.said[2:] == ["Compiling bytecode"]
        ask = told.passing[-1]
        assert callable(ask)
        assert ask() == ""
        staged = lease.entry.staged_bytecode / "cpython-312-0"
        staged.mkdir(parents=True)
        for number in range(1234):
            (staged / f"{number}.pyc").touch()
        assert ask() == "1,234 modules compiled"
        bytecode.finish_lease_now(store.layout, lease, told)
    spec = EnvSpec.parse(tmp_path / "app" / "requirements.txt")
    store.acquire(spec, installed_ray(), Holder("test"), told).release()
    assert len(told.said) == 3


def test_import_that_hangs(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ray whose import hangs ends the build in bounded time, says so, and lets the next builder begin."""
    monkeypatch.setattr(builder, "CHECK_MINUTES", 0.02)
    with pytest.raises(BuildError, match=r"takes more than 0\.02 minutes") as error:
        build(tmp_path, store, "import time; time.sleep(600)")
    assert "importtime" in error.value.hint
    assert list(store.layout.all_entries()) == []


@pytest.mark.parametrize("last_words", ["", "[1, 2"])
def test_import_that_ends_python(tmp_path: Path, store: Store, last_words: str) -> None:
    """A ray that ends Python without an error is a BuildError that has what was printed."""
    with pytest.raises(BuildError, match=r"holds .* instead of") as error:
        build(tmp_path, store, f"import os; os.write(1, {last_words!r}.encode()); os._exit(0)")
    assert f"holds `{last_words}` instead" in error.value.message


def test_import_that_prints_a_lot_and_ends_python(tmp_path: Path, store: Store) -> None:
    """Of what was printed the error has the end."""
    with pytest.raises(BuildError, match=r"holds .* instead of") as error:
        build(tmp_path, store, "import os; os.write(1, b'x' * 50_000 + b'end'); os._exit(0)")
    assert "xend` instead" in error.value.message
    assert len(error.value.message) < 3000


def test_import_that_prints(tmp_path: Path, store: Store) -> None:
    """What packages print when they are imported, also without an end of line, is no answer and no harm."""
    with build(tmp_path, store, "print('hello'); print('world', end='')") as lease:
        assert lease.python.exists()


@pytest.mark.parametrize("name", ["$(touch pwned)", "a`touch pwned`", 'quo"te', "it's", "back\\slash", "ü"])
def test_activate(tmp_path: Path, store: Store, name: str) -> None:
    """Whatever a project's folder is called, bin/activate runs nothing of it and does its work."""
    with build(tmp_path, store, "", name) as lease:
        script = 'source "$1" && echo "$VIRTUAL_ENV"'
        command: list[str | Path] = ["bash", "-c", script, "bash", lease.entry.bin / "activate"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == (f"{lease.entry.venv}\n", "")
    assert not (tmp_path / "pwned").exists()


def test_failure_that_cannot_be_cleaned_up(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Why a build failed is what its user hears, also where its remains cannot be removed; the next build sweeps."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "not today")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(files, "discard", refuse)
        with pytest.raises(BuildError, match="no such luck"):
            build(tmp_path, store, "raise SystemError('no such luck')")
    assert "not today" in caplog.text
    (left,) = store.layout.all_entries()
    assert str(left.path) in caplog.text
    spec = EnvSpec.parse(tmp_path / "app" / "requirements.txt")
    with pytest.raises(BuildError, match="no such luck"):
        store.acquire(spec, installed_ray(), Holder("test"))
    assert list(store.layout.all_entries()) == []

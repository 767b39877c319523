"""One build: what its check finds, and what is left and said where it fails."""

from __future__ import annotations

import errno
import logging
import subprocess
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import builder
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.system import files
from tests import support

pytestmark = pytest.mark.host


def build(tmp_path: Path, store: Store, ray: str, name: str = "app") -> Lease:
    """Build an environment with a ray of this text."""
    wheels = tmp_path / "wheels"
    modules = {"ray/__init__.py": f"__version__ = {support.RAY_VERSION!r}\n{ray}"}
    support.make_wheel(wheels, "ray", support.RAY_VERSION, modules=modules)
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    exported = support.run_uv("export", "-q", "--no-header", cwd=project.parent)
    (folder := tmp_path / name).mkdir()
    (folder / "requirements.txt").write_text(f"--no-index\n--find-links {wheels}\n{exported}")
    spec = EnvSpec.parse(folder / "requirements.txt")
    return store.acquire(spec, installed_ray(), Holder("test"), finish=False)


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

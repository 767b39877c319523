"""What happens to the files of a project, and to an environment, while somebody is at it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store, digest_of_files
from ray_envcache.build import plan as planning
from ray_envcache.errors import DigestError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from ray_envcache.store import leases
from ray_envcache.store.leases import Holder
from tests import support
from tests.build.test_layers import make_package
from tests.conftest import Acquire

pytestmark = pytest.mark.host

Checkout = Callable[[int], None]


def version_in(python: Path, package: str) -> str:
    return support.run_python(f"import {package}; print({package}.VERSION)", python=python).strip()


def test_checkouts_with_the_same_lock_and_wheels_of_their_own(tmp_path: Path, acquire: Acquire) -> None:
    """uv locks wheels of a folder without their hash: each checkout gets what lies in its own, also when found again."""
    projects = [tmp_path / name / "app" for name in "ab"]
    for number, folder in enumerate(projects):
        support.make_fake_ray(folder / "dist")
        support.make_wheel(folder / "dist", "mylib", "1.0", modules={"mylib.py": f"VERSION = 'build {number}'\n"})
        support.make_project(folder, Path("dist"), ["ray", "mylib"])
    assert (projects[0] / "uv.lock").read_bytes() == (projects[1] / "uv.lock").read_bytes()
    found = [version_in(acquire(folder).python, "mylib") for folder in (*projects, *projects)]
    assert found == ["build 0", "build 1"] * 2


def test_a_hash_in_the_lockfile_is_enough() -> None:
    """Only files that it leaves open bind an environment to one checkout."""
    table = {"wheels": [{"path": "/somewhere/wanted-1.0-py3-none-any.whl", "hashes": {"sha256": "0"}}]}
    for pinned, files in ((True, []), (False, ["/somewhere/wanted-1.0-py3-none-any.whl"])):
        package = ResolvedPackage("wanted", "1.0", "wheel", "sha256:0", 0, table, is_pinned=pinned)
        assert ResolvedSet((package,)).local_files() == files


def test_last_checkout_is_remembered(tmp_path: Path, wheels: Path, store: Store, acquire: Acquire) -> None:
    """Of two checkouts that install the same from files the one that asked last is remembered, and both are right."""
    projects = [support.make_project(tmp_path / name / "app", wheels, ["ray"]) for name in "ab"]
    first, second = (acquire(project) for project in projects)
    assert first.entry == second.entry
    specs = [EnvSpec.parse(project) for project in projects]
    with store.lookup(specs[1], installed_ray(), Holder("test")) or pytest.fail("not remembered") as lease:
        assert lease.entry == first.entry
    assert store.lookup(specs[0], installed_ray(), Holder("test")) is None
    assert acquire(projects[0]).entry == first.entry


@pytest.fixture
def two_states(tmp_path: Path, wheels: Path) -> tuple[Path, Checkout]:
    """A project, and how to check out one of its two states, as git does: by renames."""
    states = []
    for number in (1, 2):
        support.make_wheel(wheels, "wanted", f"{number}.0", modules={"wanted.py": f"VERSION = '{number}'\n"})
        support.make_project(tmp_path / f"state-{number}" / "app", wheels, ["ray", f"wanted=={number}.0"])
        states.append(tmp_path / f"state-{number}" / "app")
    project = tmp_path / "app"
    shutil.copytree(states[0], project)

    def checkout(number: int) -> None:
        for name in ("uv.lock", "pyproject.toml"):
            shutil.copy(states[number - 1] / name, project / ".new")
            os.replace(project / ".new", project / name)

    return project / "pyproject.toml", checkout


def before_planning(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Have `act` done each time when the files are hashed, and uv has not read them yet."""
    plan_of = planning.plan_of

    def late(*arguments: Any, **options: Any) -> Any:
        act()
        return plan_of(*arguments, **options)

    monkeypatch.setattr(planning, "plan_of", late)


def test_checkout_beside_a_build(
    two_states: tuple[Path, Checkout], acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who builds while another state is checked out gets that one, and it is remembered as that one."""
    project, checkout = two_states
    with monkeypatch.context() as patch:
        before_planning(patch, lambda: checkout(2))
        assert version_in(acquire(project).python, "wanted") == "2"
    checkout(1)
    assert version_in(acquire(project).python, "wanted") == "1"


def test_checkout_beside_a_pinned_build(
    two_states: tuple[Path, Checkout], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who pinned the content of the files gets that or an error."""
    project, checkout = two_states
    pinned = EnvSpec.parse({"path": project, "digest": digest_of_files(EnvSpec.parse(project))})
    before_planning(monkeypatch, lambda: checkout(2))
    with pytest.raises(DigestError):
        store.acquire(pinned, installed_ray(), Holder("test"))
    assert list(store.layout.all_entries()) == []


def test_files_that_change_all_the_time(
    two_states: tuple[Path, Checkout], acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is an end to planning anew."""
    project, _ = two_states

    def edit() -> None:
        with project.open("a") as file:
            file.write("# another line\n")

    before_planning(monkeypatch, edit)
    with pytest.raises(LockfileError, match="change all the time"):
        acquire(project)


@pytest.fixture
def app(tmp_path: Path, wheels: Path) -> Path:
    """A packaged project, without git."""
    folder = make_package(tmp_path / "app", "app", text="VERSION = 1\n", dependencies=["ray"])
    project = folder / "pyproject.toml"
    with project.open("a") as file:
        file.write(f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n')
    support.run_uv("lock", cwd=folder)
    return project


def test_edit_beside_the_build_of_a_layer(app: Path, store: Store, acquire: Acquire) -> None:
    """A save while uv builds a local package never becomes the layer of the content before: it is built once more."""
    source, once = app.parent / "src" / "app" / "__init__.py", app.parent.parent / "edited"
    with (app.parent / "backend.py").open("a") as file:
        # The first build itself plays the person who saves.
        file.write(
            f"if not pathlib.Path({str(once)!r}).exists():\n"
            f"    pathlib.Path({str(once)!r}).touch()\n    pathlib.Path({str(source)!r}).write_text('VERSION = 99\\n')\n"
        )
    assert version_in(acquire(app).python, "app") == "99", "built once more"
    assert len(list(store.layout.all_entries())) == 2, "the environment below, and no layer of the content before"
    source.write_text("VERSION = 1\n")
    assert version_in(acquire(app).python, "app") == "1"


def test_what_we_write_beside_the_code_is_no_edit(app: Path) -> None:
    """The log of the command, and the store itself, may lie in a package whose files are all its content."""
    folder = app.parent.rename(app.parent.parent / "clone")
    environ = {**os.environ, "RAY_ENVCACHE_DIR": str(folder / ".cache" / "store")}
    with open(folder / "build.log", "w") as log:
        command: list[str | Path] = [sys.executable, "-m", "ray_envcache", "build", folder]
        subprocess.run(command, env=environ, stdout=log, stderr=log, check=True)
    said = (folder / "build.log").read_text()
    assert "Building the local packages of app: app\n" in said  # not the name of its folder
    assert version_in(Path(said.splitlines()[-1]), "app") == "1"


def test_published_is_published(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A builder that fails after the ready record is there leaves the environment: others may run from it already."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])

    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(leases, "_claim_base", fail)
        with pytest.raises(OSError, match="Too many open files"):
            store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=False)
    (entry,) = store.layout.all_entries()
    assert acquire(project).entry == entry


def test_remains_that_somebody_runs_from(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire, children: list[subprocess.Popen[str]]
) -> None:
    """A collector that died halfway left an entry without its record: while a process runs from it, it stays."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    lease = acquire(project)
    support.start_python(children, "", python=lease.python)
    lease.release()
    lease.entry.ready.unlink()
    assert acquire(project).entry != lease.entry
    assert lease.python.exists(), "it is there for the one who runs"

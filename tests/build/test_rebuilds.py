"""Which local packages are built for a new layer: those that changed, and no others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.system import files
from tests import support
from tests.build.test_layers import make_package

pytestmark = pytest.mark.host

Acquire = Callable[[Path], Lease]
PROGRAM = "import app, slow; print(app.X, slow.X)"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A file with a line for each build of a package."""
    return tmp_path / "builds"


@pytest.fixture
def project(tmp_path: Path, wheels: Path, log: Path) -> Path:
    """A workspace of two packages that note each of their builds."""
    root = tmp_path / "root"
    for name in ("app", "slow"):
        folder = make_package(root / name, name)
        with (folder / "backend.py").open("a") as file:
            file.write(
                f"plain = build_wheel\ndef build_wheel(*given):\n"
                f"    with open({str(log)!r}, 'a') as file: file.write('{name}\\n')\n    return plain(*given)\n"
                "build_editable = build_wheel\n"
            )
    (root / "pyproject.toml").write_text(
        '[project]\nname = "root"\nversion = "1.0"\nrequires-python = ">=3.10"\ndependencies = ["ray", "app", "slow"]\n'
        f'[tool.uv]\npackage = false\nno-index = true\nfind-links = ["{wheels}"]\n'
        '[tool.uv.workspace]\nmembers = ["app", "slow"]\n'
        "[tool.uv.sources]\napp = { workspace = true }\nslow = { workspace = true }\n"
    )
    support.run_uv("lock", cwd=root)
    log.unlink(missing_ok=True)
    return root


def edit(project: Path, name: str, text: str) -> None:
    (project / name / "src" / name / "__init__.py").write_text(f"X = {text!r}\ndef main(): pass\n")


def says(lease: Lease) -> str:
    return support.run_python(PROGRAM, python=lease.python).strip()


def test_a_neighbour_is_not_built_again(project: Path, acquire: Acquire, log: Path) -> None:
    """Of two packages the edited one alone is built, and content that came back is not built either."""
    assert (says(acquire(project)), sorted(log.read_text().split())) == ("1 1", ["app", "slow"])
    log.unlink()
    edit(project, "app", "2")
    assert (says(acquire(project)), log.read_text().split()) == ("2 1", ["app"])
    log.unlink()
    edit(project, "slow", "3")
    assert (says(acquire(project)), log.read_text().split()) == ("2 3", ["slow"])


def test_another_uv_has_built_other_content(project: Path, acquire: Acquire, tmp_path: Path) -> None:
    """What uv's cache has of a package is taken only where it is the build of this content."""
    assert says(acquire(project)) == "1 1"
    original = (project / "slow" / "src" / "slow" / "__init__.py").read_text()
    edit(project, "slow", "other")
    support.run_uv(
        *("sync", "-q", "--frozen", "--no-editable", "--reinstall-package=slow"),
        cwd=project,
        UV_PROJECT_ENVIRONMENT=str(tmp_path / "elsewhere"),
    )
    (project / "slow" / "src" / "slow" / "__init__.py").write_text(original)
    edit(project, "app", "2")
    assert says(acquire(project)) == "2 1"


def test_without_earlier_layers(project: Path, acquire: Acquire, store: Store, log: Path) -> None:
    """Where the layers that knew went, packages are built again: uv's cache alone does not know their content."""
    lease = acquire(project)
    lease.release()
    files.remove_tree(lease.entry.path)
    log.unlink()
    edit(project, "app", "2")
    assert (says(acquire(project)), sorted(log.read_text().split())) == ("2 1", ["app", "slow"])


def test_another_checkout(project: Path, acquire: Acquire, tmp_path: Path) -> None:
    """Packages of another checkout are built there, whatever was built of the same content here."""
    acquire(project)
    other = tmp_path / "other"
    shutil.copytree(project, other)
    edit(other, "app", "2")
    assert says(acquire(other)) == "2 1"


def test_editable_packages(project: Path, store: Store, log: Path) -> None:
    """A layer of editable packages is made anew for another definition, and then of that package alone."""

    def entry() -> Entry:
        spec = EnvSpec.parse(project)
        with store.acquire(spec, installed_ray(), Holder("test"), finish=False, editable=True) as lease:
            return lease.entry

    first = entry()
    log.unlink()
    edit(project, "app", "2")
    assert entry() == first
    with (project / "app" / "pyproject.toml").open("a") as file:
        file.write("# another comment\n")
    assert entry() != first
    assert log.read_text().split() == ["app"]

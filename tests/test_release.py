"""What people install: the wheel and the sdist that `uv build` makes of this checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from readme_renderer import markdown

from ray_envcache.version import __version__
from tests import support

pytestmark = [pytest.mark.host, pytest.mark.pypi]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both. The wheel is made from the sdist, as indexes' users do it."""
    folder = tmp_path_factory.mktemp("dist")
    support.run_uv("build", "--out-dir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh venv with the wheel, away from its source."""
    folder = tmp_path_factory.mktemp("installed")
    support.run_uv("venv", f"--python={sys.executable}", folder / "venv", cwd=folder)
    support.run_uv("pip", "install", f"--python={folder / 'venv'}", wheel, cwd=folder)
    return folder / "venv" / "bin" / "python"


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode())


def test_wheel(wheel: Path) -> None:
    """The package, its marker for type checkers, its license, and nothing else; the guard called `uv` is executable."""
    with zipfile.ZipFile(wheel) as archive:
        modes = {one.filename: one.external_attr >> 16 for one in archive.infolist()}
    tops = {name.partition("/")[0] for name in modes}
    assert tops == {"ray_envcache", f"ray_envcache-{__version__}.dist-info"}
    packaged = {str(path.relative_to(ROOT)) for path in (ROOT / "ray_envcache").rglob("*") if path.suffix == ".py"}
    assert modes.keys() >= packaged | {"ray_envcache/py.typed", "ray_envcache/inside/path/uv"}
    assert modes["ray_envcache/inside/path/uv"] & 0o111 == 0o111
    assert f"ray_envcache-{__version__}.dist-info/licenses/ray_envcache/LICENSE" in modes
    assert not any(name.endswith((".pyc", ".lock")) for name in modes)


def test_sdist(built: Path) -> None:
    """All that is needed to build and to test it, and no file of a workplace."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "tests/conftest.py",
        "examples/quickstart.py",
    }
    assert {name.partition("/")[0] for name in names if "/" in name} == {"ray_envcache", "tests", "examples"}
    assert not any(re.search(r"\.pyc$|uv\.lock$|\.venv|__pycache__", name) for name in names)


def test_metadata(wheel: Path) -> None:
    """The version is that of the code, and README is what an index can show."""
    found = metadata(wheel)
    assert (found["Version"], found["License-Expression"]) == (__version__, "Apache-2.0")
    assert found["Description-Content-Type"] == "text/markdown"
    shown = markdown.render(str(found.get_payload()))
    assert shown is not None
    assert "<h1" in shown


def test_installed(installed: Path, tmp_path: Path) -> None:
    """It runs without its source, and importing it warns of nothing."""
    environ = {**os.environ, "RAY_ENVCACHE_DIR": str(tmp_path / "store")}

    def run(*command: str | Path) -> str:
        done = subprocess.run(list(command), cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    assert __version__ in run(installed.with_name("ray-envcache"), "--version")
    where = run(installed, "-W", "error", "-c", "import ray_envcache; print(ray_envcache.__file__)")
    assert Path(where).is_relative_to(installed.parents[1])
    guard = Path(where).parent / "inside" / "path" / "uv"
    assert os.access(guard, os.X_OK)


def test_tests_stay_in_the_checkout() -> None:
    """No test or example asks for a folder above the checkout by its own place."""
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        depth = len(path.relative_to(ROOT).parts)
        for number in re.findall(r"__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\]", path.read_text()):
            assert int(number) < depth, path

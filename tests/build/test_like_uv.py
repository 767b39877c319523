"""Side by side with uv: what is handed out is what `uv sync --no-editable` would install, and uv itself says so.

File by file, contents included. Not compared is what is documented to differ: bytecode, our own additions (the hold, the
guard of pip), activation scripts, and in packages that are local, or from git, the file that says where they are from.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from tests import support
from tests.build.shapes import ALL, Shape, Shapes

pytestmark = pytest.mark.host

OURS = ("pip", "python", "activate", "deactivate", "pydoc", "_ray_envcache_", "uv_cache.json", "uv_build.json")
TOPS = ("lib64/", "pyvenv.cfg", ".lock", ".gitignore", "CACHEDIR.TAG")
NOTES = re.compile(rb"uv_(cache|build)\.json")
ORIGIN = ("direct_url.json", "RECORD")


def contents(venv: Path, local: list[str]) -> dict[str, str]:
    """{path below the venv: digest} of scripts and packages; scripts as if every venv lay in one place."""
    found = {}
    for directory, _, names in os.walk(venv, followlinks=True):
        for path in (Path(directory, name) for name in names):
            name = path.relative_to(venv).as_posix()
            if name.startswith(TOPS) or "__pycache__" in path.parts or path.name.startswith(OURS):
                continue
            if path.name in ORIGIN and any(f"/{package}-" in name for package in local):
                continue
            text = path.read_bytes().replace(os.fsencode(venv), b"<venv>")
            if path.name == "RECORD":
                # Hashes of scripts, which name the place of their interpreter; and uv's note on local sources.
                lines = sorted(line for line in text.splitlines() if b"/bin/" not in line and not NOTES.search(line))
                text = b"\n".join(lines)
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def of_uv(folder: Path, venv: Path, command: list[str]) -> None:
    if command[0] == "sync":
        support.run_uv(*command, cwd=folder, UV_PROJECT_ENVIRONMENT=os.fspath(venv))
    else:
        support.run_uv("venv", "-q", venv, cwd=folder)
        support.run_uv(*command, f"--python={venv}", cwd=folder)


@pytest.fixture
def short() -> Iterator[Path]:
    """A short place: where the path of an interpreter is long, scripts begin otherwise."""
    with support.short_folder() as folder:
        yield folder


@pytest.mark.parametrize("shape", ALL)
def test_same_as_uv(shape: str, tmp_path: Path, wheels: Path, short: Path) -> None:
    """Files and metadata equal those of `uv sync --no-editable`, which would change nothing; all packages fit."""
    shapes = Shapes(tmp_path / "app", wheels)
    make: Callable[[], Shape] = getattr(shapes, shape)
    with shapes.exits:
        _compare(shapes, *make(), short)


def _compare(shapes: Shapes, options: dict[str, Any], command: list[str], local: list[str], short: Path) -> None:
    of_uv(shapes.folder, short / "venv", command)
    wanted = contents(short / "venv", local)
    store = Store.open(short / "store")
    with store.acquire(EnvSpec.parse(options), installed_ray(), Holder("test")) as lease:
        venv = lease.entry.venv
        found = contents(venv, local)
        assert found == wanted
        assert len(wanted) > 8
        support.run_uv("pip", "check", f"--python={venv}", cwd=short)
        if command[0] == "sync":
            environ = {"UV_PROJECT_ENVIRONMENT": os.fspath(venv)}
            support.run_uv(*command, "--check", f"--python={lease.python}", cwd=shapes.folder, **environ)


def test_what_was_installed_by_hand_is_not_there(tmp_path: Path, wheels: Path, store: Store) -> None:
    """What `uv pip install` put into a project's own .venv is in no lockfile, so workers do not have it; `uv add` is."""
    support.make_wheel(wheels, "byhand")
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    support.run_uv("sync", "-q", cwd=project.parent)
    support.run_uv("pip", "install", "-q", "byhand", cwd=project.parent, UV_PYTHON=str(project.parent / ".venv"))
    program = "import importlib.util; print(importlib.util.find_spec('byhand') is not None)"
    assert support.run_python(program, python=project.parent / ".venv" / "bin" / "python") == "True\n"
    for found in ("False\n", "True\n"):
        with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=False) as lease:
            assert support.run_python(program, python=lease.python) == found
        support.run_uv("add", "-q", "byhand", cwd=project.parent)

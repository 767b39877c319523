"""Side by side with uv: what an environment and its layer have is what `uv sync --no-editable` would install.

File by file, contents included. Not compared is what is documented to differ: bytecode, our own additions (the hold, the
guard of pip), activation scripts, and in packages that are local, or from git, the file that says where they are from.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from tests import support

pytestmark = pytest.mark.host

OURS = ("pip", "python", "activate", "deactivate", "pydoc", "_ray_envcache_")
ORIGIN = ("direct_url.json", "RECORD")


def contents(venv: Path, local: list[str]) -> dict[str, str]:
    """{path below the venv: digest} of scripts and packages; scripts as if every venv lay in one place."""
    found = {}
    for top in (venv / "bin", next((venv / "lib").glob("python*")) / "site-packages"):
        for path in top.rglob("*"):
            name = path.relative_to(venv).as_posix()
            if (
                path.is_dir()
                or "__pycache__" in path.parts
                or path.name.startswith(OURS)
                or path.name == "uv_cache.json"
            ):
                continue
            if path.name in ORIGIN and any(f"/{package}-" in name for package in local):
                continue
            text = path.read_bytes().replace(os.fsencode(venv), b"<venv>")
            if path.name == "RECORD":
                # Hashes of scripts, which name the place of their interpreter; and uv's note on local sources.
                lines = sorted(
                    line for line in text.splitlines() if b"/bin/" not in line and b"uv_cache.json" not in line
                )
                text = b"\n".join(lines)
            found[name] = hashlib.sha256(text).hexdigest()
    return found


def of_uv(folder: Path, venv: Path, command: list[str]) -> None:
    if command[0] == "sync":
        support.run_uv(*command, cwd=folder, UV_PROJECT_ENVIRONMENT=os.fspath(venv))
    else:
        support.run_uv("venv", "-q", venv, cwd=folder)
        support.run_uv(*command, f"--python={venv}", cwd=folder)


Shape = tuple[dict[str, Any], list[str], list[str]]
"""Options of the field, the command of uv, names of the local packages."""


class Shapes:
    """Projects of many kinds; each method makes one in `folder`."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder = folder
        self.wheels = wheels
        for name, version in (
            ("one", "1.0"),
            ("one", "2.0"),
            ("two", "1.0"),
            ("three", "1.0"),
            ("old", "1.0"),
            ("new", "1.0"),
        ):
            support.make_wheel(wheels, name, version, scripts={f"{name}-run": f"{name}:main"})
        folder.mkdir()

    def write(
        self, project: str, uv: str = "", *, name: str = "app", build: bool = False, place: Path | None = None
    ) -> Path:
        folder = place or self.folder
        folder.mkdir(parents=True, exist_ok=True)
        system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n' if build else ""
        head = f'[project]\nname = "{name}"\nversion = "1.0"\nrequires-python = ">=3.10"\n'
        index = "" if place else f'[tool.uv]\nno-index = true\nfind-links = ["{self.wheels}"]\n'
        (folder / "pyproject.toml").write_text(f"{head}{project}\n{system}{index}{uv}\n")
        if build:
            (folder / "src" / name).mkdir(parents=True)
            (folder / "src" / name / "__init__.py").write_text(f"def main(): print({name!r})\n")
            (folder / "src" / name / "data.py").write_text(f"NAME = {name!r}\n")
            (folder / "backend.py").write_text(support.SRC_BACKEND.format(name=name))
        return folder

    def sync(self, *more: str, local: list[str] | None = None, **options: Any) -> Shape:
        support.run_uv("lock", cwd=self.folder)
        return (
            {"path": str(self.folder), **options},
            ["sync", "-q", "--frozen", "--no-editable", "--no-dev", *more],
            local or [],
        )

    def plain(self) -> Shape:
        self.write('dependencies = ["ray", "one", "two==1.0"]')
        return self.sync()

    def src_layout(self) -> Shape:
        self.write('dependencies = ["ray", "one"]', build=True)
        return self.sync(local=["app"])

    def workspace(self) -> Shape:
        for name, needs in (("a", '["b", "one"]'), ("b", '["two", "ray"]'), ("c", '["three"]')):
            sources = "[tool.uv.sources]\nb = { workspace = true }" if name == "a" else ""
            self.write(f"dependencies = {needs}", sources, name=name, build=True, place=self.folder / "packages" / name)
        self.write(
            'dependencies = ["ray", "a"]',
            'package = false\n[tool.uv.workspace]\nmembers = ["packages/*"]\n[tool.uv.sources]\na = { workspace = true }',
        )
        return self.sync(local=["a", "b"])

    def workspace_member(self) -> Shape:
        self.workspace()
        return self.sync("--package", "b", package="b", local=["b"])

    def extras(self) -> Shape:
        self.write(
            'dependencies = ["ray"]\n[project.optional-dependencies]\nx = ["one"]\ny = ["two"]', "package = false"
        )
        return self.sync("--extra", "x", extras=["x"])

    def groups(self) -> Shape:
        self.write(
            'dependencies = ["ray"]\n[dependency-groups]\ndev = ["three"]\ntrain = ["one", {include-group = "more"}]\nmore = ["two"]'
        )
        return self.sync("--group", "train", groups=["train"])

    def default_groups(self) -> Shape:
        self.write(
            'dependencies = ["ray"]\n[dependency-groups]\ndev = ["three"]\nalways = ["one"]',
            'default-groups = ["dev", "always"]',
        )
        return self.sync()

    def conflicting_extras(self) -> Shape:
        self.write(
            'dependencies = ["ray"]\n[project.optional-dependencies]\ncpu = ["one==1.0"]\ngpu = ["one==2.0"]',
            'conflicts = [[{ extra = "cpu" }, { extra = "gpu" }]]',
        )
        return self.sync("--extra", "gpu", extras=["gpu"])

    def markers(self) -> Shape:
        self.write(
            'dependencies = ["ray", "one==1.0; sys_platform == \'win32\'", "one==2.0; sys_platform != \'win32\'", '
            "\"old; python_version < '3.12'\", \"new; python_version >= '3.12'\", \"three; implementation_name == 'pypy'\"]"
        )
        return self.sync()

    def git_dependency(self) -> Shape:
        repository = self.write(
            "dependencies = []", name="fromgit", build=True, place=self.folder.parent / "repository"
        )
        git = ["git", "-C", os.fspath(repository), "-c", "user.name=x", "-c", "user.email=x@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
            subprocess.run([*git, *command], check=True)
        self.write(
            'dependencies = ["ray", "fromgit"]', f'[tool.uv.sources]\nfromgit = {{ git = "file://{repository}" }}'
        )
        return self.sync(local=["fromgit"])

    def path_dependency(self) -> Shape:
        self.write("dependencies = []", name="lib", build=True, place=self.folder.parent / "lib")
        self.write(
            'dependencies = ["ray", "lib"]', '[tool.uv.sources]\nlib = { path = "../lib", editable = true }', build=True
        )
        return self.sync(local=["app", "lib"])

    def local_wheel(self) -> Shape:
        wheel = support.make_wheel(self.folder.parent / "elsewhere", "byhand")
        self.write('dependencies = ["ray", "byhand"]', f'[tool.uv.sources]\nbyhand = {{ path = "{wheel}" }}')
        return self.sync()

    def source_package(self) -> Shape:
        support.make_sdist(self.wheels, "onlysource")
        self.write('dependencies = ["ray", "onlysource"]')
        return self.sync()

    def script(self) -> Shape:
        path = self.folder / "job.py"
        uv = f'# [tool.uv]\n# no-index = true\n# find-links = ["{self.wheels}"]\n'
        path.write_text(f'# /// script\n# requires-python = ">=3.10"\n# dependencies = ["ray", "one"]\n{uv}# ///\n')
        support.run_uv("lock", "--script", path, cwd=self.folder)
        exported = support.run_uv("export", "-q", "--script", path, "--no-header", cwd=self.folder)
        (self.folder / "same.txt").write_text(exported)
        return {"path": str(path)}, self.pip_sync("same.txt"), []

    def pylock(self) -> Shape:
        self.write('dependencies = ["ray", "one", "two"]')
        support.run_uv("lock", cwd=self.folder)
        support.run_uv("export", "-q", "--format=pylock.toml", "-o", "pylock.toml", cwd=self.folder)
        return {"path": str(self.folder / "pylock.toml")}, self.pip_sync("--preview-features=pylock", "pylock.toml"), []

    def requirements(self) -> Shape:
        self.write('dependencies = ["ray", "one", "two"]')
        support.run_uv("lock", cwd=self.folder)
        text = support.run_uv("export", "-q", "--no-header", cwd=self.folder)
        (self.folder / "requirements.txt").write_text(f"--no-index\n--find-links {self.wheels}\n{text}")
        return {"path": str(self.folder / "requirements.txt")}, self.pip_sync("requirements.txt"), []

    def pip_sync(self, *arguments: str) -> list[str]:
        return ["pip", "sync", "-q", "--no-index", "--find-links", os.fspath(self.wheels), *arguments]


ALL = [
    name
    for name, value in vars(Shapes).items()
    if not name.startswith("_") and name not in {"write", "sync", "pip_sync"}
]


@pytest.fixture
def short() -> Iterator[Path]:
    """A short place: where the path of an interpreter is long, scripts begin otherwise."""
    with support.short_folder() as folder:
        yield folder


@pytest.mark.parametrize("shape", ALL)
def test_same_files_as_uv(shape: str, tmp_path: Path, wheels: Path, short: Path) -> None:
    """The files and metadata of environment plus layer equal those of `uv sync --no-editable`, file by file."""
    shapes = Shapes(tmp_path / "app", wheels)
    make: Callable[[], Shape] = getattr(shapes, shape)
    options, command, local = make()
    of_uv(shapes.folder, short / "venv", command)
    wanted = contents(short / "venv", local)
    store = Store.open(short / "store")
    with store.acquire(EnvSpec.parse(options), installed_ray(), Holder("test")) as lease:
        found: dict[str, str] = {}
        for entry in reversed(lease.entries):
            found |= contents(entry.venv, local)
    assert found == wanted
    assert len(wanted) > 8

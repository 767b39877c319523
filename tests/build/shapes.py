"""Projects of the shapes that people have, each with what uv itself does with it."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests import index, support

VERSION_FROM_GIT = """
import subprocess
if subprocess.run(["git", "describe", "--tags"], capture_output=True, text=True).stdout != "v1.2.3\\n":
    raise SystemExit("git does not know the version")
"""
MORE_FILES = """
plain = build_wheel
def build_wheel(directory, settings=None, metadata=None):
    name = plain(directory, settings, metadata)
    with zipfile.ZipFile(pathlib.Path(directory) / name, "a") as wheel:
        wheel.write("{source}", "{target}")
    return name
"""

Shape = tuple[dict[str, Any], list[str], list[str]]
"""Options of the field, the command of uv, names of the local packages."""


class Shapes:
    """Projects of many kinds; each method makes one in `folder`."""

    def __init__(self, folder: Path, wheels: Path) -> None:
        self.folder = folder
        self.wheels = wheels
        self.exits = ExitStack()
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

    def git(self, folder: Path, *arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "protocol.file.allow=always"]
        support.run("git", *who, "-C", folder, *arguments)

    def repository(self, folder: Path) -> Path:
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1.2.3"]):
            self.git(folder, *command)
        return folder

    def submodule(self) -> Shape:
        """Its version comes from git, and its `.git` is a file."""
        library = self.write("dependencies = []", name="lib", build=True, place=self.folder.parent / "library")
        with (library / "backend.py").open("a") as file:
            file.write(VERSION_FROM_GIT)
        self.repository(library)
        self.write('dependencies = ["ray", "lib"]', '[tool.uv.sources]\nlib = { path = "deps/lib" }\n', build=True)
        self.git(self.folder, "init", "-q")
        self.git(self.folder, "submodule", "--quiet", "add", os.fspath(library), "deps/lib")
        return self.sync(local=["app", "lib"])

    def worktree(self) -> Shape:
        self.write('dependencies = ["ray"]', build=True)
        with (self.folder / "backend.py").open("a") as file:
            file.write(VERSION_FROM_GIT)
        elsewhere = self.repository(self.folder.rename(self.folder.with_name("elsewhere")))
        self.git(elsewhere, "worktree", "add", "-q", os.fspath(self.folder))
        return self.sync(local=["app"])

    def build_requirement_of_the_workspace(self) -> Shape:
        """A member's backend is another member."""
        self.write("dependencies = []", name="tool", build=True, place=self.folder / "packages" / "tool")
        self.write('dependencies = ["ray"]', build=True)
        text = (self.folder / "pyproject.toml").read_text().replace("requires = []", 'requires = ["tool"]')
        workspace = '[tool.uv.workspace]\nmembers = ["packages/*"]\n[tool.uv.sources]\ntool = { workspace = true }\n'
        (self.folder / "pyproject.toml").write_text(text + workspace)
        with (self.folder / "backend.py").open("a") as file:
            file.write("import tool\n")
        with (self.folder / "packages" / "tool" / "backend.py").open("a") as file:
            file.write("build_editable = build_wheel\n")
        return self.sync(local=["app"])

    def files_beside_the_package(self) -> Shape:
        self.write('dependencies = ["ray"]', build=True)
        (self.folder.parent / "shared").mkdir()
        (self.folder.parent / "shared" / "beside.py").write_text("BESIDE = 1\n")
        with (self.folder / "backend.py").open("a") as file:
            file.write(MORE_FILES.format(source="../shared/beside.py", target="app/beside.py"))
        return self.sync(local=["app"])

    def build_that_sees_the_environment(self) -> Shape:
        """Without isolation a backend imports what is locked, and runs its scripts."""
        self.write('dependencies = ["ray", "one"]', 'no-build-isolation-package = ["app"]', build=True)
        with (self.folder / "backend.py").open("a") as file:
            file.write("import one, subprocess\nsubprocess.run(['one-run', '--version'], check=False)\n")
        return self.sync(local=["app"])

    def build_dependency_of_the_running_version(self) -> Shape:
        served = self.exits.enter_context(index.serve(self.wheels))
        matching = '[tool.uv.extra-build-dependencies]\napp = [{ requirement = "one", match-runtime = true }]'
        self.write('dependencies = ["ray", "one==1.0"]', matching, build=True)
        text = (self.folder / "pyproject.toml").read_text()
        found = f'no-index = true\nfind-links = ["{self.wheels}"]\n'
        (self.folder / "pyproject.toml").write_text(text.replace(found, f'index-url = "{served.url}"\n'))
        with (self.folder / "backend.py").open("a") as file:
            file.write("import one\nassert one.VERSION == '1.0'\n")
        return self.sync(local=["app"])

    def compiled_module_with_cache_keys(self) -> Shape:
        self.write('dependencies = ["ray"]', 'cache-keys = [{ file = "*.c" }]', build=True)
        (self.folder / "fast.c").write_text("int x;\n")
        with (self.folder / "backend.py").open("a") as file:
            file.write(MORE_FILES.format(source="fast.c", target="fast.so"))
        return self.sync(local=["app"])

    def no_wheel_wanted(self) -> Shape:
        """The lockfile has wheel and source; the project wants the source built."""
        support.make_sdist(self.wheels, "both")
        support.make_wheel(self.wheels, "both")
        self.write('dependencies = ["ray", "both"]', 'no-binary-package = ["both"]')
        return self.sync()

    def conflicting_default_groups(self) -> Shape:
        self.write(
            'dependencies = ["ray"]\n[dependency-groups]\nold = ["one==1.0"]\nnew = ["one==2.0"]',
            'default-groups = ["old"]\nconflicts = [[{ group = "old" }, { group = "new" }]]',
        )
        return self.sync()

    def split_package(self) -> Shape:
        """A regular package of which a wheel has one half, and the project the other."""
        support.make_wheel(
            self.wheels, "acme-core", modules={"acme/__init__.py": "", "acme/core.py": "", "acme/deep/a.py": ""}
        )
        self.write('dependencies = ["ray", "acme-core"]', name="acme", build=True)
        (self.folder / "src" / "acme" / "deep").mkdir()
        (self.folder / "src" / "acme" / "deep" / "b.py").write_text("")
        (self.folder / "src" / "acme" / "__init__.py").write_text("")
        return self.sync(local=["acme"])

    def shared_data(self) -> Shape:
        """Both have files below share/, in folders of the same name."""
        support.make_wheel(self.wheels, "data", modules={"data.py": "", "data-1.0.data/data/share/x/theirs.txt": "1"})
        self.write('dependencies = ["ray", "data"]', build=True)
        (self.folder / "ours.txt").write_text("2")
        with (self.folder / "backend.py").open("a") as file:
            file.write(MORE_FILES.format(source="ours.txt", target="app-1.0.data/data/share/x/ours.txt"))
        return self.sync(local=["app"])

    def linked_sources(self) -> Shape:
        self.write('dependencies = ["ray"]', build=True)
        (self.folder / "src").rename(self.folder.parent / "real")
        (self.folder / "src").symlink_to("../real")
        return self.sync(local=["app"])

    def ignored_folder(self) -> Shape:
        """The repository around ignores the package."""
        self.write("dependencies = []", name="lib", build=True, place=self.folder / "vendored" / "lib")
        self.write('dependencies = ["ray", "lib"]', '[tool.uv.sources]\nlib = { path = "vendored/lib" }', build=True)
        (self.folder / ".gitignore").write_text("vendored/\n")
        self.repository(self.folder)
        return self.sync(local=["app", "lib"])

    def generated_files(self) -> Shape:
        """git ignores a module that the package needs."""
        self.write('dependencies = ["ray"]', build=True)
        (self.folder / ".gitignore").write_text("*_pb2.py\n")
        self.repository(self.folder)
        (self.folder / "src" / "app" / "x_pb2.py").write_text("")
        return self.sync(local=["app"])

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
    if not name.startswith("_") and name not in {"write", "sync", "pip_sync", "git", "repository"}
]

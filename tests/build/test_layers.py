"""Layers: local packages in front of a shared environment, keyed by their content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError, DigestError, InUseError, LockfileError, UnknownKeyError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import pins
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import files
from tests import support

pytestmark = pytest.mark.host

Acquire = Callable[[Path], Lease]


def make_package(folder: Path, name: str, *, text: str = "X = 1\n", dependencies: list[str] | None = None) -> Path:
    """A local package whose build backend needs nothing: it packs `src/`, and gives it a console script."""
    source = folder / "src" / name
    source.mkdir(parents=True)
    (source / "__init__.py").write_text(f"{text}def main(): print({name!r}, X)\n")
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\nversion = "1.0"\nrequires-python = ">=3.10"\n'
        f"dependencies = {dependencies or []!r}\n"
        f'[project.scripts]\n{name}-script = "{name}:main"\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "backend.py").write_text(support.SRC_BACKEND.format(name=name))
    return folder


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    """A packaged project that needs a wheel and a path dependency."""
    support.make_wheel(wheels, "wanted", scripts={"wanted-script": "wanted:main"}, modules={
        "wanted.py": "import sys\ndef main():\n    import app\n    print('wanted sees', app.X)\n"
    })  # fmt: skip
    make_package(tmp_path / "lib", "lib")
    folder = make_package(tmp_path / "app", "app", dependencies=["ray", "wanted", "lib"])
    with (folder / "pyproject.toml").open("a") as file:
        file.write(
            f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n[tool.uv.sources]\nlib = {{ path = "../lib" }}\n'
        )
    support.run_uv("lock", cwd=folder)
    return folder


def edit(package: Path, text: str) -> None:
    (module,) = (package / "src").glob("*/__init__.py")
    module.write_text(module.read_text().replace("X = 1", text))


def says(lease: Lease, program: str) -> str:
    return support.run_python(program, python=lease.python).strip()


def base_of(store: Store, lease: Lease) -> Entry:
    record = ReadyRecord.read(lease.entry)
    assert record is not None
    base = store.layout.entry(record.base)
    assert base is not None
    return base


def test_local_packages_are_installed_in_front_of_the_environment(
    store: Store, project: Path, acquire: Acquire
) -> None:
    """All are in one site-packages, with metadata; the locked packages are links into the environment below."""
    lease = acquire(project)
    program = """
    import app, importlib.metadata as metadata, lib, os, site, sys, wanted
    print(app.X, lib.X, metadata.version("app"), sys.prefix, *{os.path.dirname(wanted.__file__), *site.getsitepackages()})
    """
    assert says(lease, program).split() == ["1", "1", "1.0", str(lease.entry.venv), str(lease.entry.site_packages)]
    below = base_of(store, lease).site_packages
    assert (lease.entry.site_packages / "wanted.py").readlink() == below / "wanted.py"
    assert len(list(store.layout.all_entries())) == 2


def test_console_scripts_of_both_see_the_packages_of_both(project: Path, acquire: Acquire) -> None:
    """Scripts of the layer and of the environment below are the layer's own, run by its interpreter."""
    lease = acquire(project)
    said = [subprocess.check_output([lease.entry.bin / name], text=True) for name in ("app-script", "wanted-script")]
    assert said == ["app 1\n", "wanted sees 1\n"]


def test_an_edit_costs_a_layer_and_no_environment(store: Store, project: Path, acquire: Acquire) -> None:
    """New content, of the project or of a path dependency, is a new layer on the same environment."""
    first = acquire(project)
    edit(project, "X = 2")
    second = acquire(project)
    edit(project.parent / "lib", "X = 3")
    third = acquire(project)
    assert [says(lease, "import app, lib; print(app.X, lib.X)") for lease in (first, second, third)] == [
        "1 1",
        "2 1",
        "2 3",
    ]
    assert {base_of(store, lease) for lease in (first, second, third)} == {base_of(store, first)}


def test_the_same_content_elsewhere_is_the_same_layer(project: Path, acquire: Acquire, tmp_path: Path) -> None:
    """Another checkout, times of change, caches and ignored files make no difference."""
    first = acquire(project)
    elsewhere = tmp_path / "elsewhere"
    for name in ("app", "lib"):
        shutil.copytree(project.parent / name, elsewhere / name)
    (elsewhere / "app" / "src" / "app" / "__pycache__").mkdir(exist_ok=True)
    (elsewhere / "app" / "src" / "app" / "__pycache__" / "x.pyc").touch()
    assert acquire(elsewhere / "app").entry == first.entry
    subprocess.run(["git", "init", "-q", elsewhere / "app"], check=True)
    (elsewhere / "app" / ".gitignore").write_text("*.log\n")
    third = acquire(elsewhere / "app")
    assert third.entry != first.entry  # .gitignore is part of it
    (elsewhere / "app" / "noise.log").touch()
    assert acquire(elsewhere / "app").entry == third.entry


def test_a_build_leaves_what_uv_leaves(project: Path, acquire: Acquire, tmp_path: Path) -> None:
    """uv builds in the folder of a package: nothing is there afterwards that `uv sync` would not leave."""
    same = tmp_path / "same"
    for name in ("app", "lib"):
        shutil.copytree(project.parent / name, same / name)
    support.run_uv(
        "sync", "-q", "--frozen", "--no-editable", cwd=same / "app", UV_PROJECT_ENVIRONMENT=str(tmp_path / "venv")
    )
    acquire(project)
    found = [
        {path.relative_to(folder).as_posix() for name in ("app", "lib") for path in (folder / name).rglob("*")}
        for folder in (project.parent, same)
    ]
    assert found[0] == found[1]


def test_install_project_false_leaves_the_code_alone(store: Store, project: Path) -> None:
    """No layer, only the environment of the locked packages."""
    spec = EnvSpec.parse({"path": str(project), "install_project": False})
    with store.acquire(spec, installed_ray(), Holder("test")) as lease:
        assert (
            says(lease, "import importlib.util as u; print(u.find_spec('app'), bool(u.find_spec('wanted')))")
            == "None True"
        )
    assert len(list(store.layout.all_entries())) == 1


def test_an_interpreter_holds_the_layer_and_what_it_lies_on(
    store: Store, project: Path, acquire: Acquire, children: list[subprocess.Popen[str]]
) -> None:
    """A process without any lease keeps both; when it ends both may go, in one run of the collector."""
    lease = acquire(project)
    base = base_of(store, lease)
    child = subprocess.Popen([lease.python, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1, text=True)
    children.append(child)
    assert child.stdout is not None
    child.stdout.readline()
    lease.release()
    for entry in (lease.entry, base):
        with pytest.raises(InUseError):
            evict(store.layout, entry)
    assert collect(store.layout, Limits(everything=True)).removed == []
    child.kill()
    child.wait()
    assert len(collect(store.layout, Limits(everything=True)).removed) == 2
    assert list(store.layout.all_entries()) == []


def test_settings_of_the_root(store: Store, tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """How a member is built, which the root of its workspace says, makes another layer; anything else there does not."""
    member = make_package(tmp_path / "root" / "member", "member", dependencies=["ray"])
    with (member / "backend.py").open("a") as file:
        file.write(
            "\nplain = build_wheel\n"
            "def build_wheel(directory, settings=None, metadata=None):\n"
            "    path = pathlib.Path('src/member/setting.py')\n"
            '    path.write_text(f\'CHOSEN = {(settings or {}).get("accelerator", "none")!r}\\n\')\n'
            "    try: return plain(directory, settings, metadata)\n"
            "    finally: path.unlink()\n"
        )
    root = tmp_path / "root" / "pyproject.toml"
    text = f'[tool.uv.workspace]\nmembers = ["member"]\n[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'
    found, keys = [], []
    for more in ("", '[tool.uv.config-settings-package]\nmember = { accelerator = "some" }\n', "# a comment\n"):
        root.write_text(text + more)
        support.run_uv("lock", cwd=root.parent)
        for _ in range(2):
            lease = acquire(member)
            found.append(says(lease, "from member.setting import CHOSEN; print(CHOSEN)"))
            keys.append(lease.entry.key)
    assert found == ["none", "none", "some", "some", "none", "none"]
    assert keys[0] == keys[1] == keys[4] == keys[5] != keys[2] == keys[3]


def test_folder_among_the_scripts(store: Store, tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """A wheel that has a folder in bin/ is no trouble for a layer: it finds what is in it."""
    support.make_wheel(wheels, "tools", modules={"tools.py": "", "tools-1.0.data/data/bin/kit/part.txt": "a part"})
    folder = make_package(tmp_path / "app", "app", dependencies=["ray", "tools"])
    with (folder / "pyproject.toml").open("a") as file:
        file.write(f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n')
    support.run_uv("lock", cwd=folder)
    assert (acquire(folder).entry.bin / "kit" / "part.txt").read_text() == "a part"


def test_a_lease_keeps_what_a_layer_lies_on(store: Store, project: Path, acquire: Acquire) -> None:
    """The environment below cannot go while somebody has the layer, found or just built."""
    for _ in range(2):
        lease = acquire(project)
        with pytest.raises(InUseError):
            evict(store.layout, base_of(store, lease))
        lease.release()


def test_files_beside_a_package(tmp_path: Path, wheels: Path, store: Store, acquire: Acquire) -> None:
    """A build sees those that `cache-keys` names where they belong, and none of them is left in the store."""
    version = tmp_path / "repo" / "common" / "version.txt"
    version.parent.mkdir(parents=True)
    version.write_text("1")
    package = make_package(tmp_path / "repo" / "libs" / "app", "app", dependencies=["ray"])
    make_package(tmp_path / "repo" / "tools", "tools")
    with (package / "pyproject.toml").open("a") as file:
        file.write(
            f'[dependency-groups]\ntools = ["tools"]\n[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'
            'cache-keys = [{ file = "../../common/*.txt" }]\n[tool.uv.sources]\ntools = { path = "../../tools" }\n'
        )
    with (package / "backend.py").open("a") as file:
        file.write('assert pathlib.Path("../../common/version.txt").exists()\n')
    support.run_uv("lock", cwd=package)
    before = {path.name for path in store.layout.entries.parent.iterdir()}
    first = acquire(package)
    version.write_text("2")
    second = acquire(package)
    assert first.entry.key != second.entry.key
    assert {path.name for path in store.layout.entries.parent.iterdir()} == before | {"journal.jsonl"}
    entries = {entry.path for lease in (first, second) for entry in lease.entries}
    assert {*store.layout.entries.iterdir()} == entries
    assert not any((entry / name).exists() for entry in entries for name in ("common", "tools", "sources"))


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "posix"])
def test_list_in_any_encoding(store: Store, project: Path, acquire: Acquire, encoding: str) -> None:
    """A layer stands below its environment, marked by a letter, or its code where the output cannot have it."""
    with acquire(project) as lease:
        key = lease.entry.key
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    environ = {**os.environ, **(plain if encoding == "posix" else {"PYTHONIOENCODING": encoding})}
    command = [sys.executable, "-m", "ray_envcache", "list"]
    _, _, layer, _ = subprocess.check_output(command, env=environ).decode().splitlines()
    assert layer.split()[:3] == [key[:12], "└" if encoding == "utf-8" else r"\u2514", "app"]
    assert len(json.loads(subprocess.check_output([*command, "--json"], env=environ))["envs"]) == 2


def test_a_pinned_layer_keeps_what_it_lies_on(store: Store, project: Path, acquire: Acquire) -> None:
    """Nothing but `unpin` of the layer gives the environment below free."""
    lease = acquire(project)
    base = base_of(store, lease)
    pins.pin(store.layout, lease.entry)
    lease.release()
    with pytest.raises(InUseError, match="pinned"):
        evict(store.layout, base)
    assert collect(store.layout, Limits(everything=True)).removed == []
    pins.unpin(store.layout, lease.entry.key)
    assert len(collect(store.layout, Limits(everything=True)).removed) == 2
    assert list(store.layout.all_entries()) == []


def test_pin_while_what_is_below_is_removed(
    store: Store, project: Path, acquire: Acquire, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """A layer is pinned with the environment below it, or not at all; a pin waits for the collector at work."""
    lease = acquire(project)
    base = base_of(store, lease)
    lease.release()
    (tmp_path / "stop-evict-locked").touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(tmp_path)}
    # As a collector does; `rm` removes first what lies on it.
    program = "import sys; from ray_envcache.acquire import Store; from ray_envcache.gc.evict import evict; "
    program += "store = Store.open(); evict(store.layout, store.find(sys.argv[1])[0])"
    command = [sys.executable, "-c", program, base.key]
    children.append(subprocess.Popen(command, env=environ, text=True))
    support.wait_until((tmp_path / "reached-evict-locked").exists, "it has looked for pins")
    threading.Timer(1, (tmp_path / "stop-evict-locked").unlink).start()
    with pytest.raises(UnknownKeyError, match="broken, or just removed"):
        pins.pin(store.layout, lease.entry)
    assert children[0].wait() == 0
    assert pins.pinned_keys(store.layout) == set()


def test_a_layer_whose_environment_went_is_no_good_without(store: Store, project: Path, acquire: Acquire) -> None:
    """It is never handed out without what it lies on; the same environment at the same place will do again."""
    lease = acquire(project)
    base = base_of(store, lease)
    lease.release()
    evict(store.layout, base)
    assert ReadyRecord.read(lease.entry) is None
    again = acquire(project)
    assert says(again, "import app, wanted; print(app.X)") == "1"
    assert base_of(store, again).python.exists()


def test_pinned_content_is_looked_up_without_a_look_at_the_files(store: Store, project: Path, acquire: Acquire) -> None:
    """A node that has the layer needs only the field value; one that has other files says so."""
    import ray_envcache

    with acquire(project) as lease:
        field = ray_envcache.runtime_env(project)["envcache"]
        assert set(field) == {"path", "digest", "content"}
        edit(project, "X = 2")
        with store.acquire(EnvSpec.parse(field), installed_ray(), Holder("test"), finish=False) as same:
            assert same.entry == lease.entry
    files.remove_tree(lease.entry.path)
    with pytest.raises(DigestError, match="local packages"):
        store.acquire(EnvSpec.parse(field), installed_ray(), Holder("test"))


def test_a_local_package_that_fails_to_build(store: Store, project: Path) -> None:
    """The backend's words reach the user; the environment stays, the half layer does not."""
    backend = project / "backend.py"
    backend.write_text("raise SystemExit('no compiler today')\n")
    with pytest.raises(BuildError, match="no compiler today"):
        store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"))
    assert len(list(store.layout.all_entries())) == 1


def test_a_path_dependency_that_is_not_here(store: Store, project: Path) -> None:
    """The error names the folder, and how it gets here."""
    shutil.rmtree(project.parent / "lib")
    field = EnvSpec.parse({"path": str(project), "digest": None})
    with pytest.raises(LockfileError, match="lib"):
        store.acquire(field, installed_ray(), Holder("test"))


def test_data_files_and_loops_do_no_harm(store: Store, project: Path, acquire: Acquire) -> None:
    """Symbolic links in a circle are no trouble; a huge file is neither read nor copied."""
    (project / "loop").symlink_to(project)
    (project / "dangling").symlink_to("nowhere")
    (project / "data").mkdir()
    with (project / "data" / "huge.bin").open("wb") as file:
        file.truncate(5_000_000_000)
    lease = acquire(project)
    assert says(lease, "import app; print(app.X)") == "1"


def test_list_shows_layers_below_their_environment(store: Store, project: Path, acquire: Acquire) -> None:
    """In the table and in JSON."""
    import sys

    lease = acquire(project)
    command = [sys.executable, "-m", "ray_envcache", "list"]
    envs = json.loads(subprocess.check_output([*command, "--json"], text=True))["envs"]
    by_key = {one["key"]: one for one in envs}
    base = base_of(store, lease)
    assert by_key[lease.entry.key]["base"] == base.key
    assert by_key[base.key]["base"] is None
    rows = subprocess.check_output(command, text=True).splitlines()
    assert rows[1].startswith(base.key[:12])
    assert rows[2].startswith(lease.entry.key[:12])
    assert "└ app" in rows[2]


@pytest.mark.pypi
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_compiled_extension(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """A package with a module in C is compiled for the layer, and again after an edit."""
    folder = tmp_path / "native"
    folder.mkdir()
    source = (
        "#include <Python.h>\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, NAME, NULL, -1, NULL};\n"
        "PyMODINIT_FUNC PyInit_native(void) { PyObject *m = PyModule_Create(&d);"
        ' PyModule_AddIntConstant(m, "X", 1); return m; }\n'
    ).replace("NAME", '"native"')
    (folder / "native.c").write_text(source)
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "native"\nversion = "1.0"\nrequires-python = ">=3.10"\ndependencies = ["ray"]\n'
        '[build-system]\nrequires = ["setuptools>=74.1"]\nbuild-backend = "setuptools.build_meta"\n'
        '[tool.setuptools]\next-modules = [{name = "native", sources = ["native.c"]}]\npy-modules = []\n'
        f'[tool.uv]\nfind-links = ["{wheels}"]\n[tool.uv.sources]\nray = {{ path = "{next(wheels.iterdir())}" }}\n'
    )
    support.run_uv("lock", cwd=folder)
    assert says(acquire(folder), "import native; print(native.X)") == "1"
    (folder / "native.c").write_text(source.replace('"X", 1', '"X", 2'))
    assert says(acquire(folder), "import native; print(native.X)") == "2"


@pytest.mark.pypi
def test_version_from_git(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """A backend that asks git for the version gets its answer, though it runs on a copy."""
    folder = tmp_path / "versioned"
    (folder / "src" / "versioned").mkdir(parents=True)
    (folder / "src" / "versioned" / "__init__.py").touch()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "versioned"\ndynamic = ["version"]\nrequires-python = ">=3.10"\ndependencies = ["ray"]\n'
        '[build-system]\nrequires = ["hatchling", "hatch-vcs"]\nbuild-backend = "hatchling.build"\n'
        '[tool.hatch.version]\nsource = "vcs"\n[tool.uv]\ncache-keys = [{ git = { commit = true, tags = true } }]\n'
        f'[tool.uv.sources]\nray = {{ path = "{next(wheels.iterdir())}" }}\n'
    )
    (folder / ".gitignore").write_text("uv.lock\n")
    git: list[str | Path] = ["git", "-C", folder, "-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1.2.3"]):
        subprocess.run([*git, *command], check=True)
    support.run_uv("lock", cwd=folder)
    program = "import importlib.metadata as m; print(m.version('versioned'))"
    assert says(acquire(folder), program) == "1.2.3"
    for command in (["commit", "-q", "--allow-empty", "-m", "second"], ["tag", "v1.3.0"]):
        subprocess.run([*git, *command], check=True)
    assert says(acquire(folder), program) == "1.3.0"

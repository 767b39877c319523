"""What uv is told by files: what reaches indexes counts, and nothing else decides what is installed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import tomli
import uv as uv_package

from ray_envcache.build.plan import EnvironmentPlan, plan_of
from ray_envcache.checkout.project import Project
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter, settings
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.uv import Scope
from tests import index, support
from tests.conftest import Acquire

# From pyproject.toml, for any call.
READ_BY_UV = {
    "build-backend", "cache-keys", "conflicts", "default-groups", "dependency-groups", "dev-dependencies",
    "environments", "managed", "minimum-libc-version", "package", "required-environments", "sources", "workspace",
}  # fmt: skip
# Or given with each call.
FOR_OTHER_COMMANDS = {
    "add-bounds", "audit", "check-url", "compile-bytecode", "graalpy-install-mirror", "no-cache", "pip", "publish-url",
    "pyodide-install-mirror", "pypy-install-mirror", "python-downloads", "python-downloads-json-url",
    "python-install-mirror", "reinstall", "reinstall-package", "trusted-publishing", "upgrade", "upgrade-package",
}  # fmt: skip
# That of a user or a system is about their own uv.
OF_PROJECTS = {"required-version"}


def expected_in(error: str) -> set[str]:
    return set(re.findall(r"`([a-z-]+)`", error.partition("expected one of")[2]))


def test_every_setting_of_uv_is_decided(tmp_path: Path) -> None:
    """For each setting that the installed uv knows, the module says from which files it counts, or these lists why not."""
    (tmp_path / "uv.toml").write_text("unknown = 1\n")
    command: list[str | Path] = [uv_package.find_uv_bin(), "lock", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = expected_in(done.stderr)
    assert len(known) > 60
    kinds = (settings.REACH, settings.RESOLVE, settings.BUILD, READ_BY_UV, FOR_OTHER_COMMANDS, OF_PROJECTS)
    assert sorted(known) == sorted(name for kind in kinds for name in kind), "each in one list, and none that is gone"


def read_back(folder: Path, scope: Scope = Scope.REACH) -> dict[str, object]:
    return tomli.loads(settings.for_uv(folder, scope.value)[0])


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The uv.toml of the user, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "system"))
    path = tmp_path / "config" / "uv" / "uv.toml"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_settings_of_the_user(tmp_path: Path, user: Path) -> None:
    """Those that reach indexes are added to the project's, from where they are; those that decide do not count."""
    (tmp_path / "uv.toml").write_text('find-links = ["a"]\nno-build = true\npip = { no-deps = true }\n')
    user.write_text('find-links = ["b"]\nno-index = true\nno-binary = true\nlink-mode = "symlink"\n')
    found = read_back(tmp_path)
    places = [f"../..{tmp_path}/a", f"../..{user.parent}/b"]
    assert found == {"find-links": places, "no-build": True, "no-index": True}
    assert read_back(tmp_path, Scope.PROJECT) == {"find-links": places[:1], "no-build": True}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, "user system"),
        ({"UV_CONFIG_FILE": "given"}, "given"),
    ],
)
def test_where_settings_of_the_node_are(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    """They are where uv looks for them, in the order of their weight; variables that say otherwise are heeded."""
    system, given = tmp_path / "system" / "uv" / "uv.toml", tmp_path / "given.toml"
    system.parent.mkdir(parents=True)
    for path, name in ((user, "user"), (system, "system"), (given, "given")):
        path.write_text(f'extra-index-url = ["https://{name}"]\n')
    for name, value in variables.items():
        monkeypatch.setenv(name, str(given) if value == "given" else value)
    (tmp_path / "project").mkdir()
    assert read_back(tmp_path / "project").get("extra-index-url", []) == [f"https://{one}" for one in found.split()]


def test_settings_of_a_folder_above(tmp_path: Path, user: Path) -> None:
    """They count where the folder has none, as for uv; but what a build gives depends on the folder alone."""
    (tmp_path / "pyproject.toml").write_text('[tool.uv]\nindex-url = "./index"\nconfig-settings = { a = "b" }\n')
    inner = tmp_path / "requirements"
    inner.mkdir()
    assert read_back(inner) == {"index-url": f"../..{tmp_path}/index"}
    (inner / "uv.toml").touch()
    assert read_back(inner) == {}


def test_relative_index_of_a_project(tmp_path: Path) -> None:
    """A relative index is found from the project's folder, and the lockfile that has it is current."""
    support.make_fake_ray(tmp_path / "project" / "dist")
    pyproject = support.make_project(tmp_path / "project", tmp_path / "none", ["ray"], lock=False)
    own = '[[tool.uv.index]]\nurl = "./dist"\nformat = "flat"\ndefault = true\n'
    pyproject.write_text(pyproject.read_text().partition("no-index")[0] + own)
    support.run_uv("lock", cwd=pyproject.parent)
    (found,) = plan(pyproject).resolved.packages
    assert str(tmp_path / "project" / "dist") in str(found.artifact["wheels"])


GROUPS = """
[dependency-groups]
train = ["wanted"]
[tool.uv.pip]
all-extras = true
require-hashes = true
target = "elsewhere"
"""


def plan(pyproject: Path) -> EnvironmentPlan:
    spec = EnvSpec.parse(pyproject)
    project, executable = Project.locate(pyproject), interpreter.base_executable(None)
    return plan_of(spec, project, executable, installed_ray(), check_current=True)


@pytest.mark.parametrize(
    "variable",
    [
        "UV_NO_DEFAULT_GROUPS=1",
        "UV_NO_GROUP=train",
        "UV_NO_SOURCES=1",
        "UV_REQUIRE_HASHES=1",
        "UV_OVERRIDE=/nonexistent",
        "UV_CONFIG_FILE=/dev/null",
        "UV_FROZEN=1",
        "UV_NO_CACHE=1",
    ],
)
def test_no_variable_of_uv_changes_an_environment(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """One key for all users, whatever they have in their shells."""
    support.make_wheel(wheels, "wanted")
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray"], extra=GROUPS, lock=False)
    text = pyproject.read_text().replace("[tool.uv]\n", '[tool.uv]\ndefault-groups = ["train"]\n')
    pyproject.write_text(text)
    support.run_uv("lock", cwd=pyproject.parent)
    before = plan(pyproject)
    assert before.resolved.version_of("wanted") == "1.0"
    monkeypatch.setenv(*variable.split("="))
    assert plan(pyproject).key == before.key


def test_settings_of_the_pip_interface_do_not_matter(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """`[tool.uv.pip]` has no effect on environments, as it has none on `uv sync`."""
    support.make_wheel(wheels, "wanted")
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray"], extra=GROUPS)
    support.run_python("import ray", python=acquire(pyproject).python)


@pytest.mark.parametrize(
    ("place", "setting"),
    [
        ("shell", "UV_EXCLUDE_NEWER=2020-01-01"),
        ("shell", "UV_RESOLUTION=lowest"),
        ("shell", "UV_PRERELEASE=allow"),
        ("file", 'exclude-newer = "7 days"'),
        ("file", 'resolution = "lowest"'),
    ],
)
def test_lockfile_is_current_whatever_this_user_would_lock(
    tmp_path: Path, wheels: Path, user: Path, monkeypatch: pytest.MonkeyPatch, place: str, setting: str
) -> None:
    """A lockfile that matches its project is taken, although `uv lock` of this user would write another one."""
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray"])
    if place == "shell":
        monkeypatch.setenv(*setting.split("="))
    else:
        user.write_text(setting)
    assert plan(pyproject).resolved.version_of("ray")


def test_lockfile_is_current_beside_a_mirror(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lockfile that matches its project is taken, although this node gets packages from another index."""
    with index.serve(wheels) as served:
        pyproject = support.make_project(tmp_path / "project", wheels, ["ray"], lock=False)
        own = f'[[tool.uv.index]]\nurl = "{served.url}"\ndefault = true\n'
        pyproject.write_text(pyproject.read_text().partition("no-index")[0] + own)
        support.run_uv("lock", cwd=pyproject.parent)
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mirror.invalid/simple")
    assert plan(pyproject).resolved.version_of("ray")


def test_lockfile_made_with_settings_of_the_user(tmp_path: Path, wheels: Path, user: Path) -> None:
    """A lockfile that the user's own settings have shaped is current for this user."""
    user.write_text('exclude-newer = "2024-01-01T00:00:00Z"\n')
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray"])
    assert "exclude-newer" in (pyproject.parent / "uv.lock").read_text()
    assert plan(pyproject).resolved.version_of("ray")


@pytest.mark.parametrize("setting", ['no-binary-package = ["Both"]', "no-binary = true"])
def test_refused_wheels(tmp_path: Path, wheels: Path, setting: str) -> None:
    """A package whose wheels the project refuses is its source package, in the key too; without one nothing changes."""
    support.make_wheel(wheels, "both")
    support.make_sdist(wheels, "both")
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray", "both"])
    support.run_uv("export", "-q", "--format=pylock.toml", "-o", "pylock.toml", cwd=pyproject.parent)
    text, kinds, keys = pyproject.read_text(), [], set()
    for more in ("", setting):
        pyproject.write_text(text.replace("[tool.uv]\n", f"[tool.uv]\n{more}\n"))
        for lock in (pyproject, pyproject.with_name("pylock.toml")):
            found = plan(lock)
            kinds.append([package.kind for package in found.resolved.packages])
            keys.add(found.key)
    assert kinds == [["wheel", "wheel"]] * 2 + [["sdist", "wheel"]] * 2
    assert len(keys) == 2

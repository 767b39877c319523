"""What uv is told by variables and files: what reaches indexes passes, and nothing else decides what is installed."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import uv as uv_package

from ray_envcache.build.plan import EnvironmentPlan, plan_of
from ray_envcache.checkout import toml
from ray_envcache.checkout.project import Project
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter, settings, uv
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.uv import Scope
from tests import index, support
from tests.conftest import Acquire

# Every variable of uv, and what becomes of it. A new one is to be put into one of these lists before a new uv is used.
REACHES = """
    UV_API_KEY UV_AUTH_TOKEN UV_AZURE_ENDPOINT_URL UV_CONCURRENT_BUILDS UV_CONCURRENT_CACHE_READS
    UV_CONCURRENT_DOWNLOADS UV_CONCURRENT_INSTALLS UV_CREDENTIALS_DIR UV_DEFAULT_INDEX UV_EXTRA_INDEX_URL
    UV_FIND_LINKS UV_GCS_ENDPOINT_URL UV_GITHUB_FAST_PATH_URL UV_GITHUB_TOKEN UV_HTTP_CONNECT_TIMEOUT UV_HTTP_RETRIES
    UV_HTTP_TIMEOUT UV_INDEX UV_INDEX_NAME_PASSWORD UV_INDEX_NAME_USERNAME UV_INDEX_STRATEGY UV_INDEX_URL
    UV_INSECURE_HOST UV_KEYRING_PROVIDER UV_NATIVE_TLS UV_NO_GITHUB_FAST_PATH UV_NO_HF_TOKEN UV_REQUEST_TIMEOUT
    UV_REQUIRE_METADATA_RANGE_REQUESTS UV_S3_ENDPOINT_URL UV_SYSTEM_CERTS
"""
PLACES_AND_REFUSALS = """
    UV_CACHE_DIR UV_LINK_MODE UV_LOCK_TIMEOUT UV_MALWARE_CHECK UV_MALWARE_CHECK_URL UV_OFFLINE UV_PYTHON_CACHE_DIR
    UV_PYTHON_INSTALL_DIR UV_PYTHON_SEARCH_PATH UV_STACK_SIZE
"""
SET_BY_US = "UV_NO_PROGRESS UV_PYTHON_DOWNLOADS"
READ_BY_US = "UV_CONFIG_FILE UV_NO_CONFIG UV_NO_SYSTEM_CONFIG"
CHOOSES_VERSIONS = "UV_EXCLUDE_NEWER UV_FORK_STRATEGY UV_PRERELEASE UV_RESOLUTION"
REMOVED = """
    UV_ACTIVE UV_AMD_GPU_ARCHITECTURE UV_ASTRAL_MIRROR_URL UV_BREAK_SYSTEM_PACKAGES UV_BUILD_CONSTRAINT
    UV_COMPILE_BYTECODE UV_COMPILE_BYTECODE_TIMEOUT UV_CONSTRAINT UV_CUDA_DRIVER_VERSION UV_CUSTOM_COMPILE_COMMAND UV_DEV
    UV_DOWNLOAD_URL UV_ENV_FILE UV_EXCLUDE UV_FROZEN UV_GIT_LFS UV_HIDE_BUILD_OUTPUT UV_INIT_BARE UV_INIT_BUILD_BACKEND
    UV_INSECURE_NO_ZIP_VALIDATION UV_INSTALLER_GHE_BASE_URL UV_INSTALLER_GITHUB_BASE_URL UV_INSTALL_DIR
    UV_ISOLATED
    UV_LEGACY_TAR_BACKEND UV_LOCKED UV_LOG_CONTEXT UV_MANAGED_PYTHON UV_NO_BINARY UV_NO_BINARY_PACKAGE UV_NO_BUILD
    UV_NO_BUILD_ISOLATION UV_NO_BUILD_PACKAGE UV_NO_CACHE UV_NO_DEFAULT_GROUPS UV_NO_DEV UV_NO_EDITABLE UV_NO_ENV_FILE
    UV_NO_GROUP UV_NO_INSTALLER_METADATA UV_NO_INSTALL_LOCAL UV_NO_INSTALL_PROJECT UV_NO_INSTALL_WORKSPACE
    UV_NO_MANAGED_PYTHON UV_NO_PROJECT UV_NO_SOURCES UV_NO_SOURCES_PACKAGE UV_NO_SYNC UV_NO_VERIFY_HASHES UV_NO_WRAP
    UV_ONLY_INSTALL_LOCAL UV_ONLY_INSTALL_PROJECT UV_ONLY_INSTALL_WORKSPACE UV_OVERRIDE UV_PREVIEW UV_PREVIEW_FEATURES
    UV_PROJECT UV_PROJECT_ENVIRONMENT UV_PUBLISH_CHECK_URL UV_PUBLISH_INDEX UV_PUBLISH_NO_ATTESTATIONS
    UV_PUBLISH_PASSWORD UV_PUBLISH_TOKEN UV_PUBLISH_URL UV_PUBLISH_USERNAME UV_PYPY_INSTALL_MIRROR
    UV_GRAALPY_INSTALL_MIRROR UV_PYODIDE_INSTALL_MIRROR UV_PYTHON UV_PYTHON_BIN_DIR UV_PYTHON_CPYTHON_BUILD
    UV_PYTHON_DOWNLOADS_JSON_URL UV_PYTHON_GRAALPY_BUILD UV_PYTHON_INSTALL_BIN UV_PYTHON_INSTALL_MIRROR
    UV_PYTHON_INSTALL_REGISTRY UV_PYTHON_NO_REGISTRY UV_PYTHON_PREFERENCE UV_PYTHON_PYODIDE_BUILD UV_PYTHON_PYPY_BUILD
    UV_REQUIRE_BUILD_HASHES UV_REQUIRE_HASHES UV_RUN_MAX_RECURSION_DEPTH UV_RUN_RECURSION_DEPTH UV_RUN_RLIMIT_NOFILE
    UV_SHOW_RESOLUTION UV_SKIP_WHEEL_FILENAME_CHECK UV_SYSTEM_PYTHON UV_TOOL_BIN_DIR UV_TOOL_DIR UV_TORCH_BACKEND
    UV_UPLOAD_HTTP_TIMEOUT UV_VENV_CLEAR UV_VENV_RELOCATABLE UV_VENV_SEED UV_WORKING_DIR UV_WORKING_DIRECTORY
"""
PASSING = {*REACHES.split(), *PLACES_AND_REFUSALS.split()}
DECIDED = PASSING.union(*(text.split() for text in (SET_BY_US, READ_BY_US, CHOOSES_VERSIONS, REMOVED)))
# In the binary the end of a name may be cut off, or followed by what lies behind it.
SHORTEST = len("UV_C")


def variables_of_uv() -> Iterator[str]:
    """All that may be the name of a variable, in uv's help and in its binary."""
    binary = Path(uv_package.find_uv_bin())
    for found in re.findall(rb"(?<![A-Z_])UV_[A-Z0-9_]+", binary.read_bytes()):
        yield from (f"UV_{rest}" for rest in found.decode().split("UV_")[1:] if rest)
    commands = (
        "",
        "cache",
        "export",
        "lock",
        "pip compile",
        "pip install",
        "pip sync",
        "python find",
        "run",
        "sync",
        "venv",
    )
    for command in commands:
        help_text = subprocess.run(
            [binary, "help", *command.split()], capture_output=True, text=True, check=True
        ).stdout
        yield from re.findall(r"env:\s*\"?(UV_\w+)", help_text)


def is_decided(name: str) -> bool:
    if name.startswith("UV_INTERNAL__"):
        return True
    begins = any(name.startswith(known) and name[len(known) :][:1] != "_" for known in DECIDED)
    return begins or any(known.startswith(name[:-1]) for known in DECIDED)


def test_every_variable_of_uv_is_decided() -> None:
    """For each variable that the installed uv knows, the lists above say whether it reaches our calls."""
    found = {name for name in variables_of_uv() if len(name) > SHORTEST}
    assert len(found) > 100
    assert not is_decided("UV_NO_BUILD_ON_MARS")
    assert sorted(name for name in found if not is_decided(name)) == []


def test_variables_that_reach_our_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses, credentials and places pass; what decides about packages does not, whatever the user has set."""
    for name in DECIDED:
        monkeypatch.setenv(name, "of the user")
    passed = {name for name, value in uv._environ(Scope.REACH).items() if value == "of the user"}
    assert passed == PASSING
    assert {*uv.relevant(dict.fromkeys(DECIDED, ""))} == {*REACHES.split()}


def expected_in(error: str) -> set[str]:
    return set(re.findall(r"`([a-z-]+)`", error.partition("expected one of")[2]))


def test_every_setting_of_uv_is_decided(tmp_path: Path) -> None:
    """For each setting that the installed uv knows, the module says from which files it counts."""
    (tmp_path / "uv.toml").write_text("unknown = 1\n")
    command: list[str | Path] = [uv_package.find_uv_bin(), "lock", "--directory", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    known = expected_in(done.stderr)
    assert len(known) > 60
    assert settings.unknown(known) == []
    kinds = (settings.REACH, settings.RESOLVE, settings.BUILD, settings.UNUSED)
    assert sorted(known) == sorted(name for kind in kinds for name in kind), "each in one list, and none that is gone"


def read_back(folder: Path, scope: Scope = Scope.REACH) -> dict[str, object]:
    return toml.parse(settings.for_uv(folder, scope.value).text)


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
        ({"UV_NO_SYSTEM_CONFIG": "1"}, "user"),
        ({"UV_NO_CONFIG": "1"}, ""),
        ({"UV_NO_CONFIG": "0"}, "user system"),
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


def test_setting_of_a_later_uv(tmp_path: Path, wheels: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A setting that this version does not know has no effect, and a warning says so."""
    pyproject = support.make_project(tmp_path / "project", wheels, ["ray"])
    before = plan(pyproject).key
    pyproject.write_text(pyproject.read_text().replace("[tool.uv]\n", "[tool.uv]\nbuild-on-mars = true\n"))
    assert plan(pyproject).key == before
    assert "`build-on-mars`" in caplog.text

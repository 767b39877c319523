"""Which uv is called, with which variables, and whether environments can have links into its cache."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import uv as uv_package

from ray_envcache.acquire import Store
from ray_envcache.build.plan import require_buildable
from ray_envcache.errors import BuildError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.uv import Scope
from tests import support

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
READ_BY_US = "UV_CONFIG_FILE"
CHOOSES_VERSIONS = "UV_EXCLUDE_NEWER UV_FORK_STRATEGY UV_PRERELEASE UV_RESOLUTION"
REMOVED = """
    UV_ACTIVE UV_AMD_GPU_ARCHITECTURE UV_ASTRAL_MIRROR_URL UV_BREAK_SYSTEM_PACKAGES UV_BUILD_CONSTRAINT
    UV_COMPILE_BYTECODE UV_COMPILE_BYTECODE_TIMEOUT UV_CONSTRAINT UV_CUDA_DRIVER_VERSION UV_CUSTOM_COMPILE_COMMAND UV_DEV
    UV_DOWNLOAD_URL UV_ENV_FILE UV_EXCLUDE UV_FROZEN UV_GIT_LFS UV_HIDE_BUILD_OUTPUT UV_INIT_BARE UV_INIT_BUILD_BACKEND
    UV_INSECURE_NO_ZIP_VALIDATION UV_INSTALLER_GHE_BASE_URL UV_INSTALLER_GITHUB_BASE_URL UV_INSTALL_DIR
    UV_ISOLATED
    UV_LEGACY_TAR_BACKEND UV_LOCKED UV_LOG_CONTEXT UV_MANAGED_PYTHON UV_NO_BINARY UV_NO_BINARY_PACKAGE UV_NO_BUILD
    UV_NO_BUILD_ISOLATION UV_NO_BUILD_PACKAGE UV_NO_CACHE UV_NO_CONFIG UV_NO_DEFAULT_GROUPS UV_NO_DEV UV_NO_EDITABLE UV_NO_ENV_FILE
    UV_NO_GROUP UV_NO_INSTALLER_METADATA UV_NO_INSTALL_LOCAL UV_NO_INSTALL_PROJECT UV_NO_INSTALL_WORKSPACE
    UV_NO_MANAGED_PYTHON UV_NO_PROJECT UV_NO_SOURCES UV_NO_SOURCES_PACKAGE UV_NO_SYNC UV_NO_SYSTEM_CONFIG UV_NO_VERIFY_HASHES UV_NO_WRAP
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


OURS = metadata.version("uv")


def requiring(folder: Path, wheels: Path, version: str) -> Path:
    """A project that requires this version of uv, locked without that."""
    pyproject = support.make_project(folder, wheels, ["ray"])
    text = pyproject.read_text().replace("[tool.uv]\n", f'[tool.uv]\nrequired-version = "{version}"\n')
    pyproject.write_text(text)
    return pyproject


@pytest.mark.parametrize("required", [f"=={OURS}", OURS, ">=0.9", "", ">=0.1,!=0.3.*"])
def test_required_version_that_ours_is(tmp_path: Path, wheels: Path, required: str) -> None:
    """A project may require a version of uv; a bare one is exact."""
    require_buildable(EnvSpec.parse(requiring(tmp_path / "project", wheels, required)), installed_ray())


@pytest.mark.parametrize("required", ["==0.99.1", "0.8.3"])
def test_required_version_that_is_not_here(tmp_path: Path, wheels: Path, required: str) -> None:
    """The error has what is required and what is here, and how to get it here: nothing is wrong with the lockfile."""
    project = requiring(tmp_path / "project", wheels, required)
    with pytest.raises(BuildError) as caught:
        require_buildable(EnvSpec.parse(project), installed_ray())
    exact = f"=={required.removeprefix('==')}"
    assert f"Required uv version `{exact}` does not match the running version `{OURS}`" in caught.value.message
    assert caught.value.hint.startswith(f'python -m pip install "uv{exact}"')
    assert "in uv.toml or `[tool.uv]`" in caught.value.hint
    assert "uv lock" not in caught.value.hint


def test_required_version_that_is_none(tmp_path: Path, wheels: Path) -> None:
    """What is no version is named with its file."""
    project = requiring(tmp_path / "project", wheels, "newest")
    with pytest.raises(LockfileError, match='required-version = "newest"') as caught:
        require_buildable(EnvSpec.parse(project), installed_ray())
    assert str(project) in caught.value.hint


def test_required_version_of_the_user(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users require of their own uv says nothing about ours."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    (tmp_path / "config" / "uv").mkdir(parents=True)
    (tmp_path / "config" / "uv" / "uv.toml").write_text('required-version = "==0.8.3"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    require_buildable(EnvSpec.parse(project), installed_ray())


def test_settings_above_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store may lie below a folder of any project: which uv that one requires, or what it breaks, moves no cache."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "store").mkdir()
    for text in ('required-version = "==0.8.3"\n', "["):
        (tmp_path / "uv.toml").write_text(text)
        assert uv.cache_directory(tmp_path / "store") == tmp_path / "cache"


def test_links_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache is taken where it is on the file system of the store, also before it is made; nothing is left."""
    near, cache = tmp_path / "store", tmp_path / "cache"
    near.mkdir()
    monkeypatch.setenv("UV_CACHE_DIR", str(cache))
    assert uv.cache_directory(near) == cache
    support.run_uv("cache", "prune", cwd=tmp_path)
    assert uv.cache_directory(near) == cache
    assert [*near.iterdir()] == []
    with support.small_disk(tmp_path / "disk") as disk:
        monkeypatch.setenv("UV_CACHE_DIR", str(disk))
        assert uv.cache_directory(near) is None
        assert [*disk.iterdir()] == [*near.iterdir()] == []


MOUNTS = """
import os, subprocess, sys
from pathlib import Path
from ray_envcache.resolve import uv

disk, one, other = map(Path, sys.argv[1:])
for place in (one, other):
    subprocess.run(["mount", "--bind", disk, place], check=True)
os.environ["UV_CACHE_DIR"] = str(one / "cache")
assert (one / "store").stat().st_dev == (other / "store").stat().st_dev
print(uv.cache_directory(one / "store"), uv.cache_directory(other / "store"))
"""


def test_two_mounts_of_one_disk(tmp_path: Path) -> None:
    """The kernel links nothing from mount to mount, although the device is the same: then the store has its own cache."""
    disk, one, other = (tmp_path / name for name in ("disk", "one", "other"))
    for folder in (disk, one, other, disk / "cache", disk / "store"):
        folder.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount"]
    if subprocess.run([*unshare, "mount", "--bind", one, other], check=False).returncode:
        pytest.skip("this system lets no test mount anything")
    done = support.run(*unshare, sys.executable, "-c", MOUNTS, disk, one, other)
    assert done == f"{one}/cache None\n"
    assert [*(disk / "store").iterdir()] == [*(disk / "cache").iterdir()] == []


@pytest.mark.host
def test_store_that_cannot_link(tmp_path: Path, wheels: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files of the user's cache cannot be linked, those of the store's own cache are."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    with support.small_disk(tmp_path / "disk") as disk:
        monkeypatch.setenv("UV_CACHE_DIR", str(disk))
        entry = support.build_finished(store, project)
    assert store.layout.uv_cache.is_dir()
    assert (entry.site_packages / "ray" / "__init__.py").stat().st_nlink > 1

"""Which uv is called, and whether environments can have links into its cache."""

from __future__ import annotations

import os
import subprocess
import sys
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
from ray_envcache.store.record import ReadyRecord
from tests import support
from tests.conftest import Acquire

OURS = metadata.version("uv")


def put_uv(folder: Path, version: str, log: Path) -> Path:
    """A uv in `folder` that says it is of this version, is the real one, and notes its calls in `log`."""
    folder.mkdir()
    path = folder / "uv"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec echo "uv {version} (of a test)"\n'
        f'echo "$1" >> {log}\nexec {uv_package.find_uv_bin()} "$@"\n'
    )
    path.chmod(0o755)
    return path


def requiring(folder: Path, wheels: Path, version: str) -> Path:
    """A project that requires this version of uv, locked without that."""
    pyproject = support.make_project(folder, wheels, ["ray"])
    text = pyproject.read_text().replace("[tool.uv]\n", f'[tool.uv]\nrequired-version = "{version}"\n')
    pyproject.write_text(text)
    return pyproject


@pytest.mark.host
@pytest.mark.parametrize("required", ["==0.12.3", "0.12.3", ">=0.12,<0.13"])
def test_required_version_on_path(
    tmp_path: Path, wheels: Path, acquire: Acquire, monkeypatch: pytest.MonkeyPatch, required: str
) -> None:
    """The first uv on $PATH that fits builds the environment, where ours does not; the ready record has its version."""
    log = tmp_path / "calls"
    places = [put_uv(tmp_path / version, version, log).parent for version in ("0.11.9", "0.12.3", "0.12.4")]
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "nowhere"), *map(str, places), os.environ["PATH"]]))
    lease = acquire(requiring(tmp_path / "project", wheels, required))
    assert {"export", "venv", "sync"} <= {*log.read_text().split()}
    record = ReadyRecord.read(lease.entry)
    assert record is not None
    assert record.uv == "0.12.3"


@pytest.mark.parametrize("required", [f"=={OURS}", OURS, ">=0.9", "", ">=0.1,!=0.3.*"])
def test_required_version_that_ours_is(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, required: str
) -> None:
    """Where the uv beside us fits, no other one is looked for."""
    log = tmp_path / "calls"
    put_uv(tmp_path / "bin", OURS, log)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    require_buildable(EnvSpec.parse(requiring(tmp_path / "project", wheels, required)), installed_ray())
    assert not log.exists()
    assert uv.version_in(tmp_path / "project") == OURS


@pytest.mark.parametrize("required", ["==0.99.1", "==0.8.3"], ids=["missing", "too old for us"])
def test_required_version_that_is_not_here(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, required: str
) -> None:
    """The error has what is required, by which file, and each uv that is here; a shim that does not start is none."""
    found = put_uv(tmp_path / "bin", "0.8.3", tmp_path / "calls")
    (tmp_path / "shims").mkdir()
    (tmp_path / "shims" / "uv").write_text("#!/bin/sh\necho 'no version of uv is set' >&2\nexit 127\n")
    (tmp_path / "shims" / "uv").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/shims:{tmp_path}/bin:/usr/bin:/bin")
    project = requiring(tmp_path / "project", wheels, required)
    with pytest.raises(BuildError) as caught:
        require_buildable(EnvSpec.parse(project), installed_ray())
    assert f"`{project}` requires uv {required}, ray-envcache >=0.9; " in caught.value.message
    assert f"here are {OURS} ({uv_package.find_uv_bin()}), 0.8.3 ({found})" in caught.value.message
    assert "shims" not in caught.value.message
    assert caught.value.hint.startswith(f'python -m pip install "uv{required},>=0.9"')
    assert "uv lock" not in caught.value.hint


def test_what_we_need_of_uv() -> None:
    """It is what pip installs beside us."""
    assert f"uv{uv.NEEDED}" in (metadata.requires("ray-envcache") or ())


def test_required_version_that_is_none(tmp_path: Path, wheels: Path) -> None:
    """What is no version is named with its file."""
    project = requiring(tmp_path / "project", wheels, "newest")
    with pytest.raises(LockfileError, match=f"`required-version` in `{project}`: .*newest"):
        require_buildable(EnvSpec.parse(project), installed_ray())


def test_required_version_of_the_user(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users require of their own uv says nothing about ours."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    (tmp_path / "config" / "uv").mkdir(parents=True)
    (tmp_path / "config" / "uv" / "uv.toml").write_text('required-version = "==0.8.3"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    require_buildable(EnvSpec.parse(project), installed_ray())


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

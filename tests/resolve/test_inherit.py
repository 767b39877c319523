"""Packages used from the cluster's own Python instead of being installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ray_envcache
from ray_envcache.acquire import Store
from ray_envcache.errors import FieldValueError, InheritError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.store.record import ReadyRecord
from tests import support

pytestmark = pytest.mark.host

MODULES = {
    "torch/__init__.py": "WHERE = 'lockfile'\n",
    "torch/lib/deep.py": "X = 1\n",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that our own interpreter, which stands for the cluster's, has."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def preinstall(site: Path, name: str, version: str, modules: dict[str, str]) -> None:
    support.unpack(support.make_wheel(site.parent / "image", name, version, modules=modules), site)


@pytest.fixture
def project(tmp_path: Path, wheels: Path, site: Path) -> Path:
    support.make_wheel(wheels, "torch", "2.4.0", modules=MODULES)
    support.make_wheel(wheels, "nvidia-one", "1.0", modules={"nvidia/one.py": "WHERE = 'lockfile'\n"})
    support.make_wheel(wheels, "nvidia-two", "1.0", modules={"nvidia/two.py": "WHERE = 'lockfile'\n"})
    preinstall(site, "torch", "2.4.0+cu121", {**MODULES, "torch/__init__.py": "WHERE = 'image'\n"})
    preinstall(site, "nvidia-one", "1.0", {"nvidia/one.py": "WHERE = 'image'\n"})
    preinstall(site, "nvidia-other", "1.0", {"nvidia/other.py": "WHERE = 'image'\n"})
    return support.make_project(tmp_path / "project", wheels, ["ray", "torch", "nvidia-one", "nvidia-two"])


def acquire(store: Store, project: Path, **options: Any) -> Lease:
    spec = EnvSpec.parse({"path": str(project), **options})
    return store.acquire(spec, installed_ray(), Holder("test"))


def where(lease: Lease) -> list[str]:
    program = """
    import importlib.metadata, torch, torch.lib.deep
    from nvidia import one, two
    print(torch.WHERE, one.WHERE, two.WHERE, importlib.metadata.version("torch"))
    """
    return support.run_python(program, python=lease.python).split()


def test_named_packages_come_from_the_cluster(store: Store, project: Path) -> None:
    """A build of the locked version counts as it; in a folder of several packages each is taken from its own place."""
    with acquire(store, project, inherit=["Torch", "nvidia-*"]) as lease:
        assert where(lease) == ["image", "image", "lockfile", "2.4.0+cu121"]
        assert (lease.entry.site_packages / "torch").is_symlink()
        assert not (lease.entry.site_packages / "nvidia" / "other.py").exists()
    with acquire(store, project) as plain:
        assert where(plain) == ["lockfile", "lockfile", "lockfile", "2.4.0"]
        assert plain.entry.key != lease.entry.key


def test_a_star_takes_all_that_is_there(store: Store, project: Path, site: Path) -> None:
    """What is missing there is installed."""
    # The real ray needs more than this lockfile has.
    preinstall(site, "ray", support.RAY_VERSION, {"ray/__init__.py": f"__version__ = {support.RAY_VERSION!r}\n"})
    with acquire(store, project, inherit=["*"]) as lease:
        assert where(lease)[:3] == ["image", "image", "lockfile"]


def test_another_version_is_an_error_with_both(store: Store, project: Path, site: Path) -> None:
    """Never silently another version than was locked."""
    preinstall(site, "nvidia-two", "0.9", {"nvidia/two.py": ""})
    with pytest.raises(InheritError, match=r"nvidia-two 1\.0, the cluster's Python has nvidia-two 0\.9") as error:
        acquire(store, project, inherit=["nvidia-*"])
    assert "`inherit` name others alone" in error.value.hint, "a pattern cannot leave out one"
    assert list(store.layout.all_entries()) == []


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("nvidia-two", "not installed in the cluster's Python"), ("numpy", "not in the lockfile"), ("x*", "not in the")],
)
def test_nothing_to_inherit(store: Store, project: Path, pattern: str, says: str) -> None:
    """A name that gives nothing is an error, and says what is missing."""
    with pytest.raises(InheritError, match=says):
        acquire(store, project, inherit=[pattern])


def test_an_upgrade_there_makes_another_environment(store: Store, project: Path, site: Path) -> None:
    """An environment is no good any more when a package it uses from elsewhere was changed."""
    with acquire(store, project, inherit=["torch"]) as lease:
        first = lease.entry
        preinstall(site, "torch", "2.4.0+cu121", {**MODULES, "torch/__init__.py": "WHERE = 'newer image'\n"})
        assert ReadyRecord.read(first) is None
    with acquire(store, project, inherit=["torch"]) as lease:
        assert lease.entry != first
        assert where(lease)[0] == "newer"


def test_helper_has_the_options_of_the_field(project: Path) -> None:
    """What the field can say, the helper can pin; a string where names belong is refused, not taken by letters."""
    wanted = {"inherit": ["base-*"], "install_project": False}
    field = ray_envcache.runtime_env(project, inherit=["base-*"], install_project=False)
    assert wanted.items() <= field["envcache"].items()
    assert field["envcache"]["digest"]
    with pytest.raises(FieldValueError, match="groups"):
        ray_envcache.runtime_env(project, groups="dev")

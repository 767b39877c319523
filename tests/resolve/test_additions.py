"""What the cluster's ray adds: the same for all projects of a host, whatever these say of indexes and versions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import PassingError, RayVersionError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import from_cluster, interpreter
from ray_envcache.resolve.from_cluster import located
from ray_envcache.resolve.interpreter import ClusterRay, Interpreter
from ray_envcache.store.leases import Holder, Lease
from tests import index, support

RAY = ClusterRay(support.RAY_VERSION)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of wheels that is this node's only index. The cluster's ray needs one other package."""
    wheels = tmp_path / "node"
    make_ray(wheels, "of the node")
    support.make_wheel(wheels, "needed", "26.1")
    support.set_index_of_node(tmp_path / "config", wheels, monkeypatch)
    needs = {"ray": ["needed>=26"], "needed": []}
    monkeypatch.setattr(from_cluster, "requires", needs.__getitem__)
    monkeypatch.setattr(from_cluster, "version", {"needed": "26.1"}.__getitem__)
    return wheels


def make_ray(wheels: Path, origin: str) -> None:
    code = f"__version__ = {support.RAY_VERSION!r}\nORIGIN = {origin!r}\n"
    support.make_wheel(wheels, "ray", support.RAY_VERSION, modules={"ray/__init__.py": code})


def project_of(folder: Path, settings: str = "") -> Path:
    """A project whose own index has another ray, and another version of what ray needs."""
    make_ray(folder / "wheels", f"of {folder.name}")
    support.make_wheel(folder / "wheels", "needed", "20.0")
    support.make_wheel(folder / "wheels", "own")
    pyproject = support.make_project(folder, folder / "wheels", ["own"], lock=False)
    pyproject.write_text(pyproject.read_text() + settings)
    support.run_uv("lock", cwd=folder)
    return pyproject


def acquire(store: Store, pyproject: Path) -> Lease:
    return store.acquire(EnvSpec.parse(pyproject), RAY, Holder("test"), finish=False)


def python() -> Interpreter:
    return interpreter.probe(interpreter.base_executable(None))


def test_index_of_a_project_has_no_say(tmp_path: Path, store: Store, node: Path) -> None:
    """Two projects with indexes of their own share one environment, and its ray is from the node's index."""
    assert node.is_dir()
    with (
        acquire(store, project_of(tmp_path / "one")) as one,
        acquire(store, project_of(tmp_path / "other")) as other,
    ):
        assert one.entry == other.entry
        said = support.run_python("import ray, needed; print(ray.ORIGIN, needed.VERSION)", python=one.python)
    assert said.strip() == "of the node 26.1"


@pytest.mark.parametrize(
    "settings",
    [
        'override-dependencies = ["needed==20.0"]',
        'constraint-dependencies = ["needed==20.0"]',
        'exclude-newer = "2020-01-01T00:00:00Z"',
    ],
)
def test_settings_of_a_project_have_no_say(tmp_path: Path, store: Store, node: Path, settings: str) -> None:
    """The cluster's versions are added, whatever a project says of versions."""
    assert node.is_dir()
    with acquire(store, project_of(tmp_path / "project", settings)) as lease:
        assert support.run_python("import needed; print(needed.VERSION)", python=lease.python).strip() == "26.1"


def test_another_ray_on_the_index_is_another_environment(tmp_path: Path, store: Store, node: Path) -> None:
    """What the index has of a version is in the key, not its number alone."""
    pyproject = project_of(tmp_path / "project")
    with acquire(store, pyproject) as before:
        pass
    make_ray(node, "of the node, built again")
    pyproject.write_text(f"{pyproject.read_text()}# planned once more\n")
    with acquire(store, pyproject) as after:
        said = support.run_python("import ray; print(ray.ORIGIN)", python=after.python)
    assert (before.entry.key != after.entry.key, said.strip()) == (True, "of the node, built again")


def test_ray_is_downloaded_once(tmp_path: Path, store: Store, node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the index sends no headers for caches, as many mirrors do: two environments have the same files."""
    (tmp_path / "config/uv/uv.toml").unlink()
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    with index.serve(node) as served:
        monkeypatch.setenv("UV_DEFAULT_INDEX", served.url)
        one, other = (project_of(tmp_path / name) for name in ("one", "other"))
        support.make_wheel(other.parent / "wheels", "more")
        support.run_uv("add", "more", "--no-sync", cwd=other.parent)
        with acquire(store, one) as first, acquire(store, other) as second:
            files = [lease.entry.site_packages / "ray/__init__.py" for lease in (first, second)]
    assert first.key != second.key
    assert served.sent.count(f"ray-{support.RAY_VERSION}-py3-none-any.whl") == 1
    assert files[0].samefile(files[1])


def test_ray_that_no_index_has(node: Path) -> None:
    """The error for a nightly ray says how to use the cluster's own."""
    assert node.is_dir()
    with pytest.raises(RayVersionError, match=r"no version of ray==3\.0\.0\.dev0") as caught:
        located({"ray": "3.0.0.dev0", "needed": "26.1"}, python())
    assert json.dumps(["needed", "ray"]) in caught.value.hint


def test_index_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index out of reach is told from one that does not have the package: the next attempt may succeed."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(PassingError, match=r"127\.0\.0\.1"):
        located({"ray": "2.60.0"}, python())


def test_nothing_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the lockfile has ray, no index is asked."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert located({}, python()) == ()

"""What is fetched is what was built, file by file; and a copy of the bucket needs nothing but uv."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests import support
from tests.build.shapes import ALL, Shape, Shapes
from tests.remote.hosts import Host, objects, tree

pytestmark = pytest.mark.host


@pytest.mark.parametrize("shape", ALL)
def test_fetched_equals_built(shape: str, tmp_path: Path, wheels: Path) -> None:
    """Files, modes and links are the same, of environments and layers, and so is their bytecode."""
    shapes = Shapes(tmp_path / "app", wheels)
    make: Callable[[], Shape] = getattr(shapes, shape)
    bucket = tmp_path / "bucket"
    with shapes.exits:
        options = make()[0]
        first = Host(tmp_path / "first")
        with first.acquired(options):
            pass  # a backend that leaves something in the folder has done so from now on
        first.push(options, f"file://{bucket}")
    second = Host(tmp_path / "second", f"file://{bucket}")
    with first.acquired(options) as built, second.acquired(options) as fetched:
        assert fetched.how == "fetched"
        assert len(fetched.entries) == len(built.entries)
        for old, new in zip(built.entries, fetched.entries, strict=True):
            assert tree(second, new.venv) == tree(first, old.venv)
            assert _bytecode(new.venv) == _bytecode(old.venv)
        support.run_uv("pip", "check", f"--python={fetched.python}", cwd=tmp_path)
    assert {event.text("result") for event in second.events("fetch")} == {""}


def _bytecode(venv: Path) -> set[str]:
    return {path.relative_to(venv).as_posix() for path in venv.rglob("*.pyc")}


@pytest.fixture
def long_folder() -> Iterator[Path]:
    """Where the path of an interpreter is long, scripts begin otherwise."""
    with tempfile.TemporaryDirectory(suffix="l" * 120) as folder:
        yield Path(folder)


def test_scripts_of_long_places(tmp_path: Path, wheels: Path, long_folder: Path) -> None:
    """Scripts run on a host where the path of the store is short, and on one where it is long, from whichever it comes."""
    scripts = {"hello": "#!python\nimport one\nprint(one.__file__)\n", "plain": "#!/bin/sh\necho plain\n"}
    modules = {"one.py": "", **{f"one-1.0.data/scripts/{name}": text for name, text in scripts.items()}}
    support.make_wheel(wheels, "one", modules=modules, scripts={"entry": "one:main"})
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one"])
    with support.short_folder() as short:
        hosts = [Host(short / "a"), Host(long_folder / "b"), Host(short / "c")]
        for number, host in enumerate(hosts):
            url = f"file://{tmp_path}/bucket-{number}"
            with host.acquired(project) as lease:
                assert lease.how == ("fetched" if number else "built")
                said = support.run(lease.entry.bin / "hello")
                assert said == f"{lease.entry.site_packages}/one.py\n"
                assert support.run(lease.entry.bin / "plain") == "plain\n"
                assert (lease.entry.bin / "entry").read_bytes().count(os.fsencode(lease.entry.bin)) == 1
            host.push(project, url)
            for other in hosts[number + 1 :]:
                other.environ["RAY_ENVCACHE_REMOTE"] = url
    wheels_of = [{name for name in objects(tmp_path / f"bucket-{n}") if "/wheels/" in name} for n in range(3)]
    assert wheels_of[0] == wheels_of[1] == wheels_of[2]


def test_a_package_with_others_in_it(tmp_path: Path, wheels: Path) -> None:
    """Some packages bring others, metadata and all, in a folder of their own."""
    vendored = {"one/vendor/a-1.dist-info/RECORD": "a.py,,\n", "one/vendor/a-1.dist-info/METADATA": "Name: a\n"}
    support.make_wheel(wheels, "one", modules={"one/__init__.py": "", **vendored})
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one"])
    first = Host(tmp_path / "first")
    first.push(project, f"file://{tmp_path}/bucket")
    second = Host(tmp_path / "second", f"file://{tmp_path}/bucket")
    with first.acquired(project) as built, second.acquired(project) as fetched:
        assert fetched.how == "fetched"
        assert tree(second, fetched.entry.venv) == tree(first, built.entry.venv)


def test_a_copy_needs_only_uv(tmp_path: Path, wheels: Path) -> None:
    """`uv pip install -r pylock.toml` in a copy of the bucket installs the environment, without us and an index."""
    support.make_wheel(wheels, "one", "1.0+local.1", scripts={"one-run": "one:main"})
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one"])
    (pushed,) = Host(tmp_path / "first").push(project, f"file://{tmp_path}/bucket")
    copy = shutil.copytree(tmp_path / "bucket", tmp_path / "copy")
    shutil.rmtree(wheels)
    shutil.rmtree(tmp_path / "bucket")
    folder = copy / "v1" / pushed.entry.key
    support.run_uv("venv", "-q", tmp_path / "venv", cwd=folder)
    install = ["pip", "install", "-q", "--no-index", "--preview-features=pylock", f"--python={tmp_path}/venv"]
    support.run_uv(*install, "-r", "pylock.toml", cwd=folder, UV_CACHE_DIR=str(tmp_path / "cache"))
    said = support.run_uv("pip", "list", "--format=freeze", f"--python={tmp_path}/venv", cwd=folder)
    assert said.splitlines() == ["one==1.0+local.1", f"ray=={support.RAY_VERSION}"]


def test_inherited_packages_stay_here(tmp_path: Path, wheels: Path) -> None:
    """What the cluster's own Python has is not published; a host that fetches links it from its own."""
    version = metadata.version("packaging")
    support.make_wheel(wheels, "packaging", version)
    support.make_wheel(wheels, "one")
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one", f"packaging=={version}"])
    options = {"path": str(project), "inherit": ["packaging"]}
    first = Host(tmp_path / "first")
    first.push(options, f"file://{tmp_path}/bucket")
    assert not [name for name in objects(tmp_path / "bucket") if "packaging" in name]
    second = Host(tmp_path / "second", f"file://{tmp_path}/bucket")
    with first.acquired(options) as built, second.acquired(options) as fetched:
        assert fetched.how == "fetched"
        assert tree(second, fetched.entry.venv) == tree(first, built.entry.venv)
        assert (fetched.entry.site_packages / "packaging").is_symlink()

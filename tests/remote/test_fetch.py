"""Hosts fetch what one has published; where the bucket has not all of it, or something else, they build."""

from __future__ import annotations

import hashlib
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.errors import DiskFullError
from ray_envcache.remote import fetch
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.record import ReadyRecord
from tests import index, support
from tests.remote.hosts import Host, objects

pytestmark = pytest.mark.host


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    """A project with a package that is built from source, and notes that in a file."""
    code = f"open({str(tmp_path / 'builds')!r}, 'a').write('built' + chr(10))"
    support.make_sdist(wheels, "slow", code=code)
    support.make_wheel(wheels, "one", modules={"one/__init__.py": "", "one/deep.py": "X = 1\n"})
    return support.make_project(tmp_path / "app", wheels, ["ray", "slow", "one"])


def test_one_builds_for_all(tmp_path: Path, wheels: Path, bucket: Path) -> None:
    """One host builds and publishes; others, which reach no index, run the same with bytecode, and build nothing."""
    code = f"open({str(tmp_path / 'builds')!r}, 'a').write('built' + chr(10))"
    support.make_sdist(wheels, "slow", code=code)
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "app"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["ray", "slow"]\n'
        "[tool.uv]\npackage = false\n"
    )
    publisher = Host(tmp_path / "publisher")
    with index.serve(wheels) as served:
        support.run_uv("lock", "-q", cwd=folder, UV_DEFAULT_INDEX=served.url)
        publisher.environ["UV_DEFAULT_INDEX"] = served.url
        pushed = publisher.push(folder, f"file://{bucket}")
    assert [one.uploads for one in pushed] == [4]
    hosts = [Host(tmp_path / f"host-{number}", f"file://{bucket}") for number in range(3)]
    shutil.rmtree(wheels)
    for host in hosts:
        # uv believes it has no network: the bucket is none of its business.
        host.environ |= {"UV_OFFLINE": "1", "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "*"}
        settings = Path(host.environ["HOME"], "config", "uv")
        settings.mkdir(parents=True)
        (settings / "uv.toml").write_text('http-proxy = "http://127.0.0.1:9"\nno-proxy = ["*"]\n')
        host.environ["XDG_CONFIG_HOME"] = str(settings.parent)
        with host.acquired(folder) as lease:
            assert lease.how == "fetched"
            assert len([*lease.entry.site_packages.glob("*/__pycache__/*.pyc")]) >= 1
            support.run_python("import ray, slow", python=lease.python)
            record = ReadyRecord.read(lease.entry)
            assert record is not None
            assert record.fetched
            assert host.state_of(lease) == "sound"
    assert (tmp_path / "builds").read_text() == "built\n"


def test_wheels_are_fetched_once_for_all_keys(tmp_path: Path, wheels: Path, bucket: Path) -> None:
    """A second environment takes from uv's cache what the first one brought, though the bucket has lost it."""
    for name in ("one", "two"):
        support.make_wheel(wheels, name)
    projects = [support.make_project(tmp_path / f"for-{name}", wheels, ["ray", name]) for name in ("one", "two")]
    first = Host(tmp_path / "first")
    for project in projects:
        first.push(project, f"file://{bucket}")
    second = Host(tmp_path / "second", f"file://{bucket}")
    with second.acquired(projects[0]) as lease:
        assert lease.how == "fetched"
    for path in bucket.glob("v1/wheels/*/ray-*.whl"):
        path.unlink()
    with second.acquired(projects[1]) as lease:
        assert lease.how == "fetched"


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + b"x" * 100)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _another(path: Path) -> None:
    path.write_text(path.read_text().replace('version = "1.0"', 'version = "1.1"'))


def _of_another_key(path: Path) -> None:
    path.write_text(path.read_text().replace(f'key = "{path.parent.name}"', f'key = "{"0" * 32}"'))


def _outside(path: Path) -> None:
    path.write_text(path.read_text().replace('python = "cpython', 'python = "../../../../outside'))


@pytest.mark.parametrize(
    ("names", "harm"),
    [
        ("*/pylock.toml", _half),
        ("*/pylock.toml", _another),
        ("*/pylock.toml", _of_another_key),
        ("*/pylock.toml", _outside),
        ("wheels/*/one-*.whl", _half),
        ("wheels/*/one-*.whl", _damage),
        ("wheels/*/one-*.whl", Path.unlink),
        ("bytecode/*.zip", _damage),
        ("bytecode/*.zip", Path.unlink),
    ],
)
def test_what_is_wrong_is_built(
    names: str, harm: Callable[[Path], None], tmp_path: Path, project: Path, bucket: Path
) -> None:
    """A damaged, missing or foreign object is one warning in log and journal, and a build; never a half environment."""
    Host(tmp_path / "first").push(project, f"file://{bucket}")
    found = [*bucket.glob(f"v1/{names}")]
    assert found
    for path in found:
        harm(path)
    second = Host(tmp_path / "second", f"file://{bucket}")
    with second.acquired(project) as lease:
        assert lease.how == "built"
        assert second.state_of(lease) == "sound"
        support.run_python("import ray, slow, one.deep", python=lease.python)
        assert not [*lease.entry.path.glob("pylock.fetched.toml")]
    (failure,) = second.events("fetch")
    assert failure.text("result") == "failed"
    assert failure.text("error")
    assert len((tmp_path / "builds").read_text().splitlines()) == 2


def test_a_miss_is_no_warning(tmp_path: Path, project: Path, bucket: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a bucket has nothing of it, or there is no folder yet, the environment is built without a word."""
    bucket.mkdir()
    host = Host(tmp_path / "host", f"file://{bucket}")
    with caplog.at_level("INFO"), host.acquired(project) as lease:
        assert lease.how == "built"
    assert [text.partition(" ")[0] for text in caplog.messages] == ["Building", "Built"]
    assert not host.events("fetch")


def test_a_full_disk_stays_an_error(
    tmp_path: Path, project: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build would find no room either."""
    Host(tmp_path / "first").push(project, f"file://{bucket}")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "_unpack", full)
    host = Host(tmp_path / "second", f"file://{bucket}")
    with pytest.raises(DiskFullError), host.acquired(project):
        pass
    assert [*(host.root / "v1" / "entries").iterdir()] == []


def test_packs_have_nothing_but_proven_bytecode(tmp_path: Path, project: Path, bucket: Path) -> None:
    """Names in a pack lead nowhere else, and bytecode of another text is not taken."""
    Host(tmp_path / "first").push(project, f"file://{bucket}")
    for path in [*bucket.glob("v1/bytecode/*.zip")]:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("../../../escaped", "x")
            archive.writestr(f"{'0' * 64}.pyc", "x")
        _name_again(bucket, path)
    host = Host(tmp_path / "second", f"file://{bucket}")
    with host.acquired(project) as lease:
        assert lease.how == "fetched"
    assert not [*tmp_path.rglob("escaped")]
    assert not [*tmp_path.rglob(f"{'0' * 64}.pyc")]


def test_packs_that_would_fill_the_memory(tmp_path: Path, project: Path, bucket: Path) -> None:
    """What unpacks to a multiple that bytecode never does is not unpacked: the environment is built."""
    Host(tmp_path / "first").push(project, f"file://{bucket}")
    for path in [*bucket.glob("v1/bytecode/*.zip")]:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"{'0' * 64}.pyc", bytes(50_000_000))
        _name_again(bucket, path)
    host = Host(tmp_path / "second", f"file://{bucket}")
    with host.acquired(project) as lease:
        assert lease.how == "built"
    (failure,) = host.events("fetch")
    assert "no bytecode does" in failure.text("error")


def _name_again(bucket: Path, pack: Path) -> None:
    """Let the one manifest name a pack that was changed, as a hostile writer would."""
    (manifest,), content = bucket.glob("v1/*/pylock.toml"), pack.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    text = re.sub(rf'"{pack.stem}"(\W+size = )\d+', rf'"{digest}"\g<1>{len(content)}', manifest.read_text())
    assert digest in text
    manifest.write_text(text)
    pack.rename(pack.with_name(f"{digest}.zip"))


def test_without_the_library(
    tmp_path: Path, project: Path, bucket: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the extra the error says what to install, and the environment is built."""
    monkeypatch.setitem(__import__("sys").modules, "obstore.store", None)
    host = Host(tmp_path / "host", f"file://{bucket}")
    with caplog.at_level("INFO"), host.acquired(project) as lease:
        assert lease.how == "built"
    (failure,) = host.events("fetch")
    assert "obstore" in failure.text("error")
    assert [text.count("obstore") for text in caplog.messages if "is not fetched, but built" in text] == [1]


def test_editable_layers_stay_here(tmp_path: Path, wheels: Path, bucket: Path) -> None:
    """What is imported from a checkout is neither asked for nor published."""
    project = support.make_project_with_own_package(tmp_path / "app", wheels, ["ray"])
    host = Host(tmp_path / "host", f"file://{bucket}")
    bucket.mkdir()
    with host.active() as store:
        from ray_envcache.field.spec import EnvSpec
        from ray_envcache.store.leases import Holder

        with store.acquire(
            EnvSpec.parse(project), installed_ray(), Holder("test"), editable=True, finish=False
        ) as lease:
            assert lease.how == "built"
    assert objects(bucket) == set()

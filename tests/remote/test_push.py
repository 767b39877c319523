"""Publishing: again costs nothing, what rules removed comes back, what is damaged or editable is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ray_envcache.errors import RemoteError
from ray_envcache.remote.bucket import Bucket
from ray_envcache.remote.push import packages_of, push, write_wheel
from ray_envcache.store.layout import Layout
from tests import support
from tests.remote.hosts import Host, objects

pytestmark = pytest.mark.host


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    return tmp_path / "bucket"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    support.make_wheel(wheels, "one", modules={"one/__init__.py": "", "one/data.txt": "data"})
    return support.make_project(tmp_path / "app", wheels, ["ray", "one"])


def test_layout_of_the_bucket(host: Host, project: Path, bucket: Path) -> None:
    """A manifest by key, wheels and bytecode by their hashes, and nothing else."""
    (pushed,) = host.push(project, f"file://{bucket}")
    names = objects(bucket)
    patterns = [rf"v1/{pushed.entry.key}/pylock\.toml", r"v1/wheels/[0-9a-f]{64}/(one|ray)-[^/]+\.whl"]
    assert all(re.fullmatch("|".join([*patterns, r"v1/bytecode/[0-9a-f]{64}\.zip"]), name) for name in names)
    assert len(names) == pushed.uploads + 1 == 5


def test_again_uploads_nothing(host: Host, project: Path, bucket: Path) -> None:
    """What is there is not uploaded again; what rules of the bucket removed is, and a damaged manifest is written anew."""
    host.push(project, f"file://{bucket}")
    before = objects(bucket)
    (again,) = host.push(project, f"file://{bucket}")
    assert (again.uploads, again.size, again.present) == (0, 0, 4)
    for pattern, uploads in (("v1/wheels/*/one-*.whl", 1), ("v1/bytecode/*.zip", 2), ("v1/*/pylock.toml", 0)):
        for path in bucket.glob(pattern):
            path.unlink()
        (repaired,) = host.push(project, f"file://{bucket}")
        assert repaired.uploads == uploads
        assert objects(bucket) == before
    (manifest,) = bucket.glob("v1/*/pylock.toml")
    text = manifest.read_text()
    manifest.write_text(text[:100])
    host.push(project, f"file://{bucket}")
    assert manifest.read_text() == text


def test_another_host_makes_the_same_wheels(host: Host, project: Path, bucket: Path, tmp_path: Path) -> None:
    """What two hosts have built of one package is one object, whenever and wherever they did."""
    host.push(project, f"file://{bucket}")
    before = {name for name in objects(bucket) if "wheels" in name}
    os.utime(project.parent / "uv.lock", (0, 0))
    Host(tmp_path / "other").push(project, f"file://{bucket}")
    assert {name for name in objects(bucket) if "wheels" in name} == before


def test_a_file_of_two_packages(host: Host, tmp_path: Path, wheels: Path, bucket: Path) -> None:
    """Where packages bring one file with different contents, a host that fetches has the one that was installed."""
    for name in ("left", "right"):
        support.make_wheel(wheels, name, modules={f"{name}.py": "", "both.py": f"FROM = {name!r}\n"})
    project = support.make_project(tmp_path / "app", wheels, ["ray", "left", "right"])
    host.push(project, f"file://{bucket}")
    other = Host(tmp_path / "other", f"file://{bucket}")
    with host.acquired(project) as built, other.acquired(project) as fetched:
        assert fetched.how == "fetched"
        ours, theirs = (lease.entry.site_packages / "both.py" for lease in (built, fetched))
        assert ours.read_text() == theirs.read_text()


def test_what_is_refused(host: Host, project: Path, bucket: Path, tmp_path: Path) -> None:
    """A file that no package has, and a changed one: other hosts would get something else."""
    with host.acquired(project) as lease:
        site = lease.entry.site_packages
        site.chmod(0o755)
        (site / "foreign.py").write_text("")
    with pytest.raises(RemoteError, match=r"foreign\.py` belongs to no package"):
        host.push(project, f"file://{bucket}")
    (site / "foreign.py").unlink()
    (site / "one" / "data.txt").write_text("xxxx")
    with pytest.raises(RemoteError, match="is damaged") as caught:
        host.push(project, f"file://{bucket}")
    assert "verify" in caught.value.hint
    assert not [name for name in objects(bucket) if name.endswith("pylock.toml")]


def test_publishing_in_the_background(
    host: Host, project: Path, bucket: Path, children: list[subprocess.Popen[str]]
) -> None:
    """With the variable what was built is published once it is compiled; what was fetched is not."""
    host.environ |= {"RAY_ENVCACHE_REMOTE": f"file://{bucket}", "RAY_ENVCACHE_REMOTE_PUSH": "1"}
    with host.active() as store:
        from ray_envcache.field.spec import EnvSpec
        from ray_envcache.resolve.interpreter import installed_ray
        from ray_envcache.store.leases import Holder

        with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
            assert lease.how == "built"
    support.wait_until(lambda: len(host.events("push")) == 1, "published")
    assert len(objects(bucket)) == 5


def test_a_failure_in_the_background(host: Host, project: Path, tmp_path: Path) -> None:
    """It is noted in the journal, and the environment is used all the same."""
    (tmp_path / "file").write_text("no folder")
    host.environ |= {"RAY_ENVCACHE_REMOTE": f"file://{tmp_path}/file/bucket", "RAY_ENVCACHE_REMOTE_PUSH": "1"}
    command = [sys.executable, "-m", "ray_envcache", "build", str(project)]
    done = subprocess.run(command, env={**os.environ, **host.environ}, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (noted,) = host.events("push")
    assert noted.text("result") == "failed"


def test_the_command(host: Host, project: Path, bucket: Path, tmp_path: Path) -> None:
    """One line per environment, or JSON; without a place it says which options there are."""
    environ = {**os.environ, **host.environ}
    push_: list[str | Path] = [sys.executable, "-m", "ray_envcache", "push", project]
    done = subprocess.run(push_, env=environ, text=True, capture_output=True, check=False)
    assert (done.returncode, "RAY_ENVCACHE_REMOTE" in done.stderr) == (2, True)
    said = support.run(*push_, "--to", f"file://{bucket}", env=environ)
    assert re.fullmatch(r"[0-9a-f]{32}: 4 uploaded, \S+ \S+; 0 were there\n", said)
    data = json.loads(support.run(*push_, "--json", "--to", f"file://{bucket}", env=environ))
    assert data["schema_version"] == 1
    assert [(one["uploads"], one["bytes"], one["present"]) for one in data["envs"]] == [(0, 0, 4)]


def test_scripts_of_binaries_keep_their_mode(host: Host, tmp_path: Path, wheels: Path) -> None:
    """A program without an interpreter is a file among others, as executable as it was."""
    modules = {"one.py": "", "one-1.0.data/scripts/tool": "#!/bin/sh\necho tool\n"}
    support.make_wheel(wheels, "one", modules=modules)
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one"])
    with host.acquired(project) as lease:
        assert host.state_of(lease) == "sound"
        found = {package.name: package for package in packages_of(lease.entry)}
        with tempfile.TemporaryFile() as file:
            write_wheel(found["one"], lease.entry, file)
            import zipfile

            with zipfile.ZipFile(file) as archive:
                info = archive.getinfo("one-1.0.data/data/bin/tool")
    assert info.external_attr >> 16 == 0o100755
    assert info.date_time == (1980, 1, 1, 0, 0, 0)


def test_nothing_to_publish_to(tmp_path: Path) -> None:
    """An unknown kind of store is an error with the URL, without what is secret in it."""
    with pytest.raises(RemoteError) as caught:
        Bucket("ftp://user:password@host/x", writes=True)
    assert "password" not in str(caught.value)
    for url in ("bucket/prefix", "s3:bucket", "s3:///prefix", "file://folder"):
        with pytest.raises(RemoteError, match="Not a bucket") as caught:
            Bucket(url, writes=True)
        assert "s3://bucket/prefix" in caught.value.hint
    assert push(Layout(tmp_path), [], Bucket(f"file://{tmp_path}/new", writes=True)) == []

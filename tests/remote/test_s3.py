"""Against a real S3 server: hosts fetch from it; where it is down, forbidden, slow or stuck they build, and never hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from ray_envcache.errors import RemoteError
from ray_envcache.remote import bucket as bucket_module
from ray_envcache.remote.bucket import Bucket
from ray_envcache.store.layout import Layout
from ray_envcache.system import testpoints
from tests import support
from tests.remote import gateway
from tests.remote.hosts import Host

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with gateway.serve(tmp_path_factory.mktemp("s3") / "server") as environ:
        yield environ


@pytest.fixture
def s3(server: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The variables of a host; each test has a prefix of its own in the bucket."""
    return {**server, "RAY_ENVCACHE_REMOTE": f"s3://env/{tmp_path.name}"}


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    support.make_wheel(wheels, "large", modules={"large.py": "", "data.bin": os.urandom(1_000_000).hex()})
    return support.make_project(tmp_path / "app", wheels, ["ray", "large"])


def host_with(folder: Path, environ: dict[str, str]) -> Host:
    host = Host(folder)
    host.environ |= environ
    return host


def published(tmp_path: Path, project: Path, s3: dict[str, str]) -> None:
    host_with(tmp_path / "publisher", s3).push(project, s3["RAY_ENVCACHE_REMOTE"])


def test_requests(tmp_path: Path, project: Path, s3: dict[str, str]) -> None:
    """A miss is one request; a hit one for each object; to push again costs no upload."""
    with gateway.relayed(s3) as (relay, environ):
        with host_with(tmp_path / "early", environ).acquired(project) as lease:
            assert lease.how == "built"
        assert [one.partition(" ")[0] for one in relay.requests] == ["GET"]
        relay.requests.clear()
        published(tmp_path, project, environ)
        assert sorted({one.partition(" ")[0] for one in relay.requests}) == ["GET", "HEAD", "PUT"]
        relay.requests.clear()
        late = host_with(tmp_path / "late", environ)
        with late.acquired(project) as lease:
            assert lease.how == "fetched"
            assert late.state_of(lease) == "sound"
        assert [one.partition(" ")[0] for one in relay.requests] == ["GET"] * 5
        relay.requests.clear()
        late.push(project, environ["RAY_ENVCACHE_REMOTE"])
        assert [one.partition(" ")[0] for one in relay.requests] == ["GET", *["HEAD"] * 4]


@pytest.mark.parametrize("trouble", ["down", "forbidden", "stuck", "cut off"])
def test_trouble(
    trouble: str, tmp_path: Path, project: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In all these cases the environment is built, soon, with one line in the journal that has no secret in it."""
    published(tmp_path, project, s3)
    monkeypatch.setitem(bucket_module._READER, "read_timeout", "1s")
    with gateway.relayed(s3) as (relay, environ):
        if trouble == "down":
            environ["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        elif trouble == "forbidden":
            environ["AWS_SECRET_ACCESS_KEY"] = f"{gateway.PASSWORD}-wrong"
        elif trouble == "stuck":
            relay.stops_after = 1
        else:
            relay.stops_after = 500_000
        host, began = host_with(tmp_path / "host", environ), time.monotonic()
        with host.acquired(project) as lease:
            assert lease.how == "built"
        assert time.monotonic() - began < 100
    (failure,) = host.events("fetch")
    assert failure.text("result") == "failed"
    assert gateway.PASSWORD not in str(failure)
    assert gateway.USER not in str(failure)


def test_slow_is_no_trouble(tmp_path: Path, project: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes longer than a time-out, but goes on, is waited for."""
    published(tmp_path, project, s3)
    monkeypatch.setitem(bucket_module._READER, "read_timeout", "2s")
    with gateway.relayed(s3) as (relay, environ):
        relay.bytes_per_second = 300_000
        began = time.monotonic()
        with host_with(tmp_path / "host", environ).acquired(project) as lease:
            assert lease.how == "fetched"
        assert time.monotonic() - began > 2


def test_who_may_read_cannot_publish(tmp_path: Path, project: Path, s3: dict[str, str]) -> None:
    """Publishing fails with an error that names the place, and leaves no manifest."""
    wrong = {**s3, "AWS_SECRET_ACCESS_KEY": "wrong-but-secret"}
    with pytest.raises(RemoteError, match="env") as caught:
        published(tmp_path, project, wrong)
    assert "wrong-but-secret" not in str(caught.value)
    assert "hint" in str(caught.value)


def test_two_publishers_at_once(
    tmp_path: Path, project: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """Both succeed, and what a host fetches is one of theirs, whole."""
    hosts = [host_with(tmp_path / f"publisher-{number}", s3) for number in range(2)]
    started = [host.start(children, "push", project) for host in hosts]
    for child in started:
        _, said = child.communicate(timeout=200)
        assert child.returncode == 0, said
    host = host_with(tmp_path / "host", s3)
    with host.acquired(project) as lease:
        assert lease.how == "fetched"
        assert host.state_of(lease) == "sound"


def test_two_different_builds_at_once(
    tmp_path: Path, wheels: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """A build that never gives the same twice: one publisher comes in the midst of the other, none mixes with it."""
    support.make_sdist(wheels, "slow", code="import os; config_settings = os.urandom(8).hex()")
    project = support.make_project(tmp_path / "app", wheels, ["ray", "slow"])
    first, second = (host_with(tmp_path / f"publisher-{number}", s3) for number in range(2))
    points = tmp_path / "points"
    child = _start_until("push-manifest", partial(first.start, children, "push", project), points)
    second.push(project, s3["RAY_ENVCACHE_REMOTE"])
    (early, late) = (host_with(tmp_path / name, s3) for name in ("early", "late"))
    assert _build_on(early, project) == _build_on(second, project)
    (points / "stop-push-manifest").unlink()
    assert child.wait(timeout=200) == 0
    assert _build_on(late, project) == _build_on(first, project) != _build_on(second, project)


def _build_on(host: Host, project: Path) -> str:
    """Which build of the package a host has, in an environment that is sound."""
    with host.acquired(project) as lease:
        assert host.state_of(lease) == "sound"
        return (lease.entry.site_packages / "slow.py").read_text()


@pytest.mark.parametrize("point", ["fetch-serving", "fetch-installed"])
def test_stopped_hosts(
    point: str, tmp_path: Path, project: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """A process that is stopped while it fetches goes on as if nothing had been; the other of its host waits for it."""
    published(tmp_path, project, s3)
    host, points = host_with(tmp_path / "host", s3), tmp_path / "points"
    stopped = _start_until(point, partial(host.start, children, "build", project), points)
    os.kill(stopped.pid, signal.SIGSTOP)
    (points / f"stop-{point}").unlink()
    other = host.start(children, "build", project)
    time.sleep(3)
    assert other.poll() is None
    os.kill(stopped.pid, signal.SIGCONT)
    for child in (stopped, other):
        _, said = child.communicate(timeout=250)
        assert child.returncode == 0, said
    assert sorted(one.text("result") for one in host.events("setup")) == ["fetched", "waited"]
    with host.acquired(project) as lease:
        assert host.state_of(lease) == "sound"


def _start_until(point: str, start: Callable[..., subprocess.Popen[str]], points: Path) -> subprocess.Popen[str]:
    """Start a command by `start`, which gets its variables; it waits at this point until `stop-<point>` is removed."""
    points.mkdir()
    (points / f"stop-{point}").touch()
    child = start(**{testpoints.FOLDER: str(points)})
    support.wait_until(lambda: (points / f"reached-{point}").exists() or child.poll() is not None, point)
    assert child.poll() is None, child.communicate()[1]
    return child


def _kill_at(point: str, start: Callable[..., subprocess.Popen[str]], points: Path) -> None:
    """Start a command by `start`, and kill it at this point."""
    child = _start_until(point, start, points)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (points / f"stop-{point}").unlink()


@pytest.mark.parametrize("point", ["push-wheel", "push-manifest"])
def test_killed_publishers(
    point: str, tmp_path: Path, project: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """What a publisher that was killed left is no environment, no rubbish in its store, and is used by the next one."""
    publisher = host_with(tmp_path / "publisher", s3)
    _kill_at(point, partial(publisher.start, children, "push", project), tmp_path / "points")
    with host_with(tmp_path / "early", s3).acquired(project) as lease:
        assert lease.how == "built"
    assert not [path for path in publisher.root.iterdir() if path.name.startswith("tmp")]
    (pushed,) = publisher.push(project, s3["RAY_ENVCACHE_REMOTE"])
    assert pushed.present >= 1
    with host_with(tmp_path / "late", s3).acquired(project) as lease:
        assert lease.how == "fetched"


@pytest.mark.parametrize("point", ["fetch-serving", "fetch-installed"])
def test_killed_hosts(
    point: str, tmp_path: Path, project: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """A host that was killed while it fetched has no half environment: the next process sweeps, and fetches."""
    published(tmp_path, project, s3)
    host = host_with(tmp_path / "host", s3)
    _kill_at(point, partial(host.start, children, "build", project), tmp_path / "points")
    layout = Layout(host.root)
    assert [entry.ready.exists() for entry in layout.all_entries()] == [False]
    with host.acquired(project) as lease:
        assert lease.how == "fetched"
        assert [entry.name for entry in layout.all_entries()] == [lease.entry.name]


def test_many_hosts_at_once(
    tmp_path: Path, project: Path, s3: dict[str, str], children: list[subprocess.Popen[str]]
) -> None:
    """Processes of several hosts, two on each, ask at the same moment: each host fetches once, none builds."""
    published(tmp_path, project, s3)
    hosts = [host_with(tmp_path / f"host-{number}", s3) for number in range(3)]
    for child in [host.start(children, "build", project) for host in hosts for _ in range(2)]:
        _, said = child.communicate(timeout=250)
        assert child.returncode == 0, said
    for host in hosts:
        assert min(one.text("result") for one in host.events("setup")) == "fetched"
        assert len(host.events("fetch")) == 1
        assert not host.events("build")


def test_plain_http_is_read_only(tmp_path: Path) -> None:
    """Any web server can hand out a copy of a bucket."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "object").write_text("content")
    server = [sys.executable, "-m", "http.server", "--bind=127.0.0.1", "--directory", str(tmp_path), "0"]
    with subprocess.Popen(
        [*server[:1], "-u", *server[1:]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        try:
            assert child.stdout is not None
            port = child.stdout.readline().split("port ")[1].split()[0]
            found = Bucket(f"http://127.0.0.1:{port}")
            assert found.read("v1/object") == b"content"
            assert found.read("v1/none") is None
            with pytest.raises(RemoteError):
                Bucket(f"http://127.0.0.1:{port}", writes=True).write("v1/new", b"x")
        finally:
            child.kill()

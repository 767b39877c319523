"""Manifests: what is written is read, and signatures say who wrote it and for which environment."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli
from packaging.pylock import Pylock

from ray_envcache.errors import RemoteError
from ray_envcache.remote import bucket
from ray_envcache.remote.bucket import Blob
from tests import support
from tests.remote.hosts import Host

KEY, OTHER = "a" * 32, "b" * 32
PYTHON = "cpython-311-abc"
WHEELS = [Blob(f"v1/wheels/{'1' * 64}/one-1.0+x-py3-none-any.whl", "1" * 64, 10, "one", "1.0+x")]
PACKS = [Blob(f"v1/bytecode/{'2' * 64}.zip", "2" * 64, 20)]
SOME = bucket.manifest_of(KEY, PYTHON, WHEELS, PACKS)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    for name in ("key", "another"):
        support.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name)
    return tmp_path


def test_written_and_read() -> None:
    """The text is a valid pylock.toml with relative paths, and says all that was put in."""
    Pylock.from_dict(tomli.loads(SOME.decode()))
    assert f'path = "../wheels/{"1" * 64}/one-1.0+x-py3-none-any.whl"' in SOME.decode()
    assert bucket.parse(SOME, KEY) == (PYTHON, WHEELS, PACKS, SOME.decode())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"x = 1",
        b"[tool]\nray-envcache = 1",
        SOME.replace(b"size = 10", b'size = "x"'),
        SOME.replace(b"cpython", b"../cpython"),
        SOME.replace(b"packages", b"pakages"),
        bucket.manifest_of(OTHER, PYTHON, WHEELS, PACKS),
    ],
)
def test_damaged(content: bytes) -> None:
    """What is no manifest of the key is an error that says so."""
    with pytest.raises(RemoteError, match=KEY):
        bucket.parse(content, KEY)


def test_signatures(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the key signed, for this environment, is taken; text or path, and where none is trusted all is."""
    monkeypatch.setenv(bucket.SIGN, str(keys / "key"))
    signed = bucket.signed(SOME, KEY)
    assert bucket.parse(signed, KEY).wheels == WHEELS
    bucket.require_signature(signed, OTHER)  # nothing is trusted, so all is
    for trusted in (str(keys / "key.pub"), (keys / "key.pub").read_text()):
        monkeypatch.setenv(bucket.TRUST, trusted)
        bucket.require_signature(signed, KEY)
        wrong = [SOME, signed.replace(b"one", b"two"), signed[:-10], b""]
        wrong += [signed + b"x = 1\n", signed + b"\n", signed.rstrip() + b"\nx = 1\n", signed + signed]
        for content, key in [*((content, KEY) for content in wrong), (signed, OTHER)]:
            with pytest.raises(RemoteError, match=key):
                bucket.require_signature(content, key)
    for trusted in (str(keys / "another.pub"), str(keys / "nothing"), "ssh-nonsense"):
        monkeypatch.setenv(bucket.TRUST, trusted)
        with pytest.raises(RemoteError, match=bucket.TRUST):
            bucket.require_signature(signed, KEY)
    monkeypatch.setenv(bucket.SIGN, str(keys / "key.pub"))
    with pytest.raises(RemoteError, match=bucket.SIGN):
        bucket.signed(SOME, KEY)


@pytest.mark.host
def test_trusted_hosts(keys: Path, tmp_path: Path, wheels: Path) -> None:
    """A host that trusts a key fetches what it signed and builds the rest; a publisher with the key signs what is there."""
    project = support.make_project(tmp_path / "app", wheels, ["ray"])
    url, publisher = f"file://{tmp_path}/bucket", Host(tmp_path / "publisher")
    publisher.push(project, url)
    hosts = [Host(tmp_path / f"host-{number}", url) for number in range(3)]
    for host in hosts:
        host.environ[bucket.TRUST] = str(keys / "key.pub")
    with hosts[0].acquired(project) as lease:
        assert lease.how == "built"
    publisher.environ[bucket.SIGN] = str(keys / "key")
    publisher.push(project, url)
    with hosts[1].acquired(project) as lease:
        assert lease.how == "fetched"
    # Without the key nothing takes the signature away.
    del publisher.environ[bucket.SIGN]
    publisher.push(project, url)
    with hosts[2].acquired(project) as lease:
        assert lease.how == "fetched"

"""Credentials of private indexes: taken from where uv takes them, and left nowhere."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from tests import index, support
from tests.index import PASSWORD, USER

pytestmark = pytest.mark.host

NAMED = {"UV_INDEX_HERE_USERNAME": USER, "UV_INDEX_HERE_PASSWORD": PASSWORD}


@pytest.fixture
def served(wheels: Path) -> Iterator[index.Index]:
    """A private index."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        yield served


def lock(folder: Path, served: index.Index, url: str) -> Path:
    """A project locked against the index, which wants a password from then on."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "project"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["ray", "wanted"]\n'
        f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nname = "here"\nurl = "{url}"\ndefault = true\n'
    )
    support.run_uv("lock", cwd=folder)
    served.locked = True
    return folder


def acquire(store: Store, project: Path) -> Lease:
    return store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"))


def require_untold(root: Path) -> None:
    """Neither the password nor what HTTP makes of it is in any file, or name, of the store."""
    token = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    assert support.files_with([PASSWORD.encode(), token], root) == []
    listed = subprocess.check_output([sys.executable, "-m", "ray_envcache", "list", "--json"], text=True)
    assert PASSWORD not in listed


def test_from_the_environment_of_the_node(
    tmp_path: Path, served: index.Index, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UV_INDEX_<NAME>_USERNAME and _PASSWORD reach uv, and nothing else."""
    project = lock(tmp_path / "project", served, served.url)
    for name, value in NAMED.items():
        monkeypatch.setenv(name, value)
    with acquire(store, project):
        require_untold(store.layout.root)


def test_from_the_env_vars_of_a_runtime_env(tmp_path: Path, served: index.Index, store: Store) -> None:
    """What env_vars say of indexes is uv's for one build only; what they say of anything else is not uv's business."""
    project = lock(tmp_path / "project", served, served.url)
    with uv.variables({**NAMED, "UV_CACHE_DIR": "/nowhere", "PATH": "/nowhere"}), acquire(store, project) as lease:
        key = lease.entry.key
        require_untold(store.layout.root)
    with acquire(store, project) as again:
        assert again.entry.key == key


def test_from_netrc(tmp_path: Path, served: index.Index, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As uv itself reads it."""
    project = lock(tmp_path / "project", served, served.url)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with acquire(store, project):
        require_untold(store.layout.root)


def test_in_the_url_of_an_index(tmp_path: Path, served: index.Index, store: Store) -> None:
    """Unwise, but people do it: the password stays in the file where they wrote it."""
    url = served.url.replace("://", f"://{USER}:{PASSWORD}@")
    with acquire(store, lock(tmp_path / "project", served, url)):
        require_untold(store.layout.root)


def test_in_a_pylock(
    tmp_path: Path, wheels: Path, served: index.Index, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a lockfile has of them, be it of the index or of a file, is neither kept nor told."""
    served.locked = True
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    url = served.url.replace("://", f"://{USER}:{PASSWORD}@")
    packages = "".join(
        f'[[packages]]\nname = "{wheel.name.split("-")[0]}"\nversion = "{wheel.name.split("-")[1]}"\nindex = "{url}"\n'
        f'wheels = [{{ url = "{url.removesuffix("simple")}files/{wheel.name}", '
        f'hashes = {{ sha256 = "{hashlib.sha256(wheel.read_bytes()).hexdigest()}" }} }}]\n'
        for wheel in wheels.iterdir()
    )
    lockfile = tmp_path / "pylock.toml"
    lockfile.write_text(f'lock-version = "1.0"\ncreated-by = "a test"\n{packages}')
    with acquire(store, lockfile):
        require_untold(store.layout.root)


@pytest.mark.parametrize("place", ["variables", "url"])
def test_a_wrong_password_is_in_no_message(
    tmp_path: Path, served: index.Index, store: Store, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Errors name the index, not what was tried there."""
    wrong = "wr0ng-passw0rd"
    url = served.url if place == "variables" else served.url.replace("://", f"://{USER}:{wrong}@")
    project = lock(tmp_path / "project", served, url)
    if place == "variables":
        monkeypatch.setenv("UV_INDEX_HERE_USERNAME", USER)
        monkeypatch.setenv("UV_INDEX_HERE_PASSWORD", wrong)
    with pytest.raises(BuildError, match="401") as caught:
        acquire(store, project)
    assert wrong not in str(caught.value)
    assert list(store.layout.all_entries()) == []


def test_passwords_are_blotted_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever uv says: in URLs, and anywhere else."""
    monkeypatch.setenv("UV_INDEX_HERE_PASSWORD", PASSWORD)
    text = f"GET https://{USER}:{PASSWORD}@example.org/simple and again {PASSWORD}"
    assert uv.without_credentials(text) == "GET https://***@example.org/simple and again ***"

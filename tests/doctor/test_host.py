"""`doctor` on one host: what is right, what is not, and what to do about it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.doctor import cluster
from ray_envcache.doctor.findings import Finding
from ray_envcache.doctor.host import check_lockfile, examine
from ray_envcache.errors import ClusterError
from tests import support
from tests.cli.test_commands import run

pytestmark = pytest.mark.host


def findings() -> dict[str, Finding]:
    """What is found of this host, by name."""
    return {found.name: found for found in examine()}


def test_healthy_host(store: Store) -> None:
    """All is well but the registration, which only `ray start` needs: a line for each check, and exit code 0."""
    done = run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    states = re.findall(r"^(ok|warn|error) +([a-z' ]+?)  ", done.stdout, re.MULTILINE)
    names = ["plugin", "store", "space", "uv's cache", "uv", "python", "ray", "settings", "registration"]
    assert [name for _, name in states] == names
    assert [name for state, name in states if state != "ok"] == ["registration"]
    assert done.stdout.count("hint: ") == 1
    assert f"{store.layout.root}: " in done.stdout


def test_json_of_a_broken_host(tmp_path: Path) -> None:
    """A broken store and a missing project are errors in the documented fields, with exit code 1."""
    (tmp_path / "store").touch()
    done = run("doctor", "--json", tmp_path, RAY_ENVCACHE_DIR=str(tmp_path / "store"))
    assert (done.returncode, done.stderr) == (1, "")
    data = json.loads(done.stdout)
    assert set(data) == {"schema_version", "ok", "findings"}
    assert (data["schema_version"], data["ok"]) == (1, False)
    assert all(set(found) == {"name", "state", "text", "hint"} for found in data["findings"])
    assert {found["name"] for found in data["findings"] if found["state"] == "error"} == {"store", "lockfile"}


def test_lockfile(store: Store, tmp_path: Path, wheels: Path) -> None:
    """A path is checked as far as that goes without building: that it can be built, or why not."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    found = check_lockfile(str(project))
    assert (found.state, found.text) == ("ok", f"{project}: 1 package, fits ray {support.RAY_VERSION}")
    (project.parent / "uv.lock").unlink()
    found = check_lockfile(str(project))
    assert found.state == "error"
    assert "uv lock" in found.hint
    assert [*store.layout.all_entries()] == []


def _file(root: Path) -> None:
    root.touch()


def _writable_by_others(root: Path) -> None:
    Store.open(root)
    root.chmod(0o777)


def _nothing(root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "spoil", "text"),
    [("store", _file, "File exists"), ("store", _writable_by_others, "Others may write"), ("a:b", _nothing, "':'")],
)
def test_unusable_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Path], None], text: str
) -> None:
    """A store that cannot be used is an error with its cause and what to do; the rest is looked at all the same."""
    spoil(tmp_path / name)
    monkeypatch.setenv("RAY_ENVCACHE_DIR", str(tmp_path / name))
    found = findings()
    assert found["store"].state == "error"
    assert text in found["store"].text
    assert found["store"].hint
    assert found["uv"].state == found["ray"].state == "ok"
    assert "space" not in found


def test_store_mounted_noexec(tmp_path: Path) -> None:
    """A store on a mount that forbids to run programs is an error that says so, with exit code 1."""
    script = f"mount -t tmpfs -o noexec tmpfs {tmp_path} && exec {sys.executable} -m ray_envcache doctor"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*command, f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no test mount anything")
    environ = {**os.environ, "RAY_ENVCACHE_DIR": str(tmp_path / "store")}
    done = subprocess.run([*command, script], env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "is mounted noexec: no program or library can be loaded from there\n       hint: mount it" in done.stdout


def test_token(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ray's token is; that it is missing is an error only where it is asked for."""
    assert store.layout.root.is_dir()
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "token" not in findings()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert (findings()["token"].state, f"{tmp_path}/.ray/auth_token" in findings()["token"].text) == ("error", True)
    file = tmp_path / "token"
    file.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    assert (findings()["token"].state, findings()["token"].text) == ("ok", f"{file}, RAY_AUTH_MODE=token")
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert findings()["token"].text == f"{file}, RAY_AUTH_MODE is not set"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert findings()["token"].text == "$RAY_AUTH_TOKEN, RAY_AUTH_MODE=token"


@pytest.mark.parametrize("name", ["PYTHONPATH", "PYTHONHOME"])
def test_inherited_variables_of_python(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """PYTHONPATH and PYTHONHOME, which nodes and workers inherit, are a warning that names the value."""
    assert name not in findings()
    monkeypatch.setenv(name, "/modules/lib")
    found = findings()[name]
    assert found.state == "warn"
    assert found.text.startswith(f"{name}=/modules/lib: ")


def test_readonly_stores(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only stores are named; a missing one is a warning, and a path that cannot be one an error."""
    assert "read-only stores" not in findings()
    lower, gone = tmp_path / "lower", tmp_path / "gone"
    Store.open(lower)
    monkeypatch.setenv("RAY_ENVCACHE_READONLY_DIRS", f"{lower}:{gone}")
    found = findings()["read-only stores"]
    assert (found.state, found.text) == ("warn", f"{lower}; there is no store at {gone}")
    assert f"\nwarn   read-only stores  {lower}; " in run("doctor").stdout
    monkeypatch.setenv("RAY_ENVCACHE_READONLY_DIRS", "relative")
    assert findings()["read-only stores"].state == "error"


def test_space_and_links(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less free space than the policy wants, and a uv that copies instead of linking, are warnings with a reason."""
    monkeypatch.setenv("RAY_ENVCACHE_MIN_FREE_SPACE", "100%")
    monkeypatch.setenv("UV_LINK_MODE", "copy")
    found = findings()
    assert found["space"].state == found["uv's cache"].state == "warn"
    assert "are free: less than 100 % (RAY_ENVCACHE_MIN_FREE_SPACE)" in found["space"].text
    monkeypatch.setenv("RAY_ENVCACHE_MIN_FREE_SPACE", "nonsense")
    found = findings()
    assert (found["space"].state, found["settings"].state) == ("ok", "error")


def test_uv(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing uv, and one that does not run, are errors."""
    uv = tmp_path / "uv"
    monkeypatch.setattr("uv.find_uv_bin", lambda: str(uv))
    assert findings()["uv"].state == "error"
    uv.write_text("#!/bin/sh\necho no >&2; exit 3\n")
    uv.chmod(0o700)
    assert findings()["uv"].text == f"`{uv} --version` fails: no"


def test_address_without_a_listener() -> None:
    """No cluster is one sentence and a hint within seconds, Ray says nothing, and none is started."""
    done = run("doctor", "--address", "127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"error: Cannot ask the cluster at `127.0.0.1:1`: .*Connection refused\nhint: .*\n", done.stderr
    )


@pytest.mark.parametrize(
    ("address", "environment", "text"),
    [
        ("ray://10.0.0.7:10001", "", "`ray://10.0.0.7:10001`: it is an address for Ray Client"),
        ("auto", "ray://10.0.0.7:10001", "`ray://10.0.0.7:10001`: it is an address for Ray Client"),
        ("local", "", "starts a cluster, and finds none"),
        ("auto", "local", "starts a cluster, and finds none"),
        ("nonsense", "", "Cannot ask the cluster at `nonsense`: Invalid address format"),
    ],
)
def test_address_of_no_cluster(monkeypatch: pytest.MonkeyPatch, address: str, environment: str, text: str) -> None:
    """What is not the address of a cluster's GCS is refused, also where it comes from RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", environment)
    with pytest.raises(ClusterError, match=re.escape(text)) as raised:
        cluster._connect(address)
    assert raised.value.hint

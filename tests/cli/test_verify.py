"""`ray-envcache verify`, as a process: tables, JSON, exit codes, and what is a clear sentence."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry
from ray_envcache.system import flock
from tests import support

pytestmark = pytest.mark.host


def run(*arguments: str, code: int = 0, **environ: str) -> tuple[str, str]:
    """Run `ray-envcache verify`; its stdout and stderr."""
    command = [sys.executable, "-m", "ray_envcache", "verify", *arguments]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    assert done.returncode == code, support.describe(command, done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def answers(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("--json", *arguments, code=code)[0])["envs"]
    return found


@pytest.fixture
def project(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    modules = {"wanted/__init__.py": "X = 1\n", **{f"wanted/m{number}.py": "" for number in range(14)}}
    support.make_wheel(wheels, "wanted", modules=modules)
    return support.make_project(tmp_path / "my-project", wheels, ["ray", "wanted"])


@pytest.fixture
def entry(store: Store, project: Path) -> Entry:
    return support.build_finished(store, project)


def test_sound(store: Store, entry: Entry) -> None:
    """Without a key all environments are looked at, with one that; both are noted in the journal."""
    out, err = run()
    assert out.startswith(f"{entry.short} of my-project: sound; ")
    assert err == ""
    (found,) = answers(entry.key[:5], "--quick")
    assert (found["state"], found["differences"], found["repaired"]) == ("sound", [], None)
    noted = [one for one in journal.read(store.layout).events if one.name == "verification"]
    assert [(one.text("key"), one.text("result")) for one in noted] == [(entry.key, "sound")] * 2


def test_damaged_and_repaired(store: Store, entry: Entry) -> None:
    """Ten differences and a count, all of them in JSON, exit code 1; repaired, it is 0, and the next look finds none."""
    for path in (entry.site_packages / "wanted").glob("m*.py"):
        path.unlink()
    out, _ = run(code=1)
    lines = out.splitlines()
    assert "damaged, 14 differences" in lines[0]
    assert lines[1].split() == ["KIND", "PATH", "PACKAGE", "WHAT"]
    assert lines[2].split() == [
        "missing",
        str((entry.site_packages / "wanted" / "m0.py").relative_to(entry.venv)),
        "wanted",
        "-",
    ]
    assert len(lines) == 2 + 10 + 1
    assert lines[-1] == f"and 4 more: `ray-envcache verify --json {entry.short}` shows all"
    (found,) = answers(entry.key, code=1)
    assert len(found["differences"]) == 14
    assert found["differences"][0].keys() == {"kind", "path", "detail", "package"}
    out, err = run("--repair")
    assert f"{entry.short}: repaired, new users get {entry.key}-2" in out
    assert "  in place of the damaged one" in err
    assert "Building the environment of my-project" in err
    assert "sound" in run()[0]
    (old, new) = sorted(answers(entry.key), key=lambda one: str(one["entry"]))
    assert (old["state"], new["state"]) == ("skipped", "sound")
    assert [one.text("key") for one in journal.read(store.layout).events if one.name == "repair"] == [entry.key]
    listed = json.loads(support.run(sys.executable, "-m", "ray_envcache", "list", "--json"))["envs"]
    assert {one["state"] for one in listed} == {"ready", "broken"}


def test_a_repair_that_fails(entry: Entry, project: Path) -> None:
    """Why it failed is an error with a hint, and the exit code is 1."""
    (entry.site_packages / "wanted" / "m1.py").unlink()
    project.unlink()
    _, err = run("--repair", code=1)
    assert f"error: The environment {entry.name} cannot be built again" in err
    assert "hint: `ray-envcache build " in err


def test_what_is_no_failure(store: Store, entry: Entry) -> None:
    """An environment that is being built is a sentence; an unknown or ambiguous key an error; no environment nothing."""
    entry.ready.unlink()
    entry.building.write_text("{}")
    assert run() == ("", "")
    with flock.exclusive_flock(store.layout.builder_flock(entry.key), lambda: None):
        out, err = run(entry.key)
    assert out.startswith(f"{entry.short}: not verified, it is being built, or ")
    assert err == ""
    assert "No environment has a key that starts with `abcdef`" in run("abcdef", code=1)[1]
    (store.layout.entries / f"{entry.key[0]}{'0' * 31}-1").mkdir()
    assert "2 environments have a key that starts with" in run(entry.key[0], code=1)[1]


def test_readonly(entry: Entry, store: Store, tmp_path: Path) -> None:
    """A read-only store is verified too, and never repaired."""
    (entry.site_packages / "wanted" / "m1.py").unlink()
    before = sorted(path for path in store.layout.root.rglob("*"))
    elsewhere = {"RAY_ENVCACHE_DIR": str(tmp_path / "own"), "RAY_ENVCACHE_READONLY_DIRS": str(store.layout.root)}
    assert "damaged, 1 difference;" in run(code=1, **elsewhere)[0]
    _, err = run("--repair", code=1, **elsewhere)
    assert "is read-only here" in err
    assert (
        f"hint: its owner can: RAY_ENVCACHE_DIR={store.layout.root} ray-envcache verify --repair {entry.short}" in err
    )
    assert sorted(path for path in store.layout.root.rglob("*")) == before


def test_progress_on_a_terminal(entry: Entry) -> None:
    """People see a bar; it goes to the terminal on stderr, and not into what a program reads."""
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "ray_envcache", "verify", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=secondary, text=True, check=True)
    os.close(secondary)
    shown = os.read(primary, 100_000).decode()
    os.close(primary)
    assert f"Verifying {entry.short}" in shown
    assert "100%" in shown
    assert json.loads(done.stdout)["envs"][0]["state"] == "sound"

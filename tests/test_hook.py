"""The driver's hook: what it returns to `ray.init`, and how long it keeps what it built."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_envcache import hook
from ray_envcache.acquire import Store
from ray_envcache.errors import FieldValueError
from ray_envcache.field import guard
from ray_envcache.field.registration import HOOK, HOOK_FUNCTION
from ray_envcache.store import leases
from tests import support

pytestmark = pytest.mark.host


@pytest.fixture
def project(tmp_path: Path, wheels: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pyproject.toml of a project that is built already, in the home directory."""
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    monkeypatch.setattr(hook, "HAND_OVER_SECONDS", 0.0)
    found = support.make_project(tmp_path / "project", wheels, ["ray"])
    support.build_finished(store, found)
    return found


def test_pins_and_guards(project: Path) -> None:
    """The field is pinned to the content of the files, guarded, and has no `py_executable` to inherit."""
    env = hook.runtime_env_hook({"envcache": os.fspath(project), "env_vars": {"A": "1"}})
    assert env is not None
    assert env["envcache"]["path"] == os.fspath(project)
    assert env["envcache"]["digest"].startswith("sha256:")
    assert guard.guarded(env) == env
    assert (env["env_vars"], env["py_executable"]) == ({"A": "1"}, "")


@pytest.mark.parametrize("env", [None, {}, {"pip": ["x"]}, {"envcache": None, "env_vars": {}}])
def test_without_the_field(env: dict[str, object] | None) -> None:
    """What has no field comes back as it is: units and pods of an older version name the hook for everybody."""
    assert hook.runtime_env_hook(env) is env


def test_path_in_the_home_directory(project: Path) -> None:
    """A path below `~` is the same on the nodes as here, also where a working_dir is there to start from."""
    for beside in ({}, {"working_dir": os.fspath(project.parent)}):
        env = hook.runtime_env_hook({"envcache": "~/project/pyproject.toml", **beside})
        assert env is not None
        assert env["envcache"]["path"] == os.fspath(project)


def test_working_directory_that_is_gone(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An absolute path needs no current directory."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert hook.runtime_env_hook({"envcache": os.fspath(project)})


def test_rivals_of_the_user(project: Path) -> None:
    """In `ray.init` every `py_executable` is the user's own, and refused beside the field."""
    with pytest.raises(FieldValueError, match="`py_executable` beside `envcache`"):
        hook.runtime_env_hook({"envcache": os.fspath(project), "py_executable": "uv run"})


def test_hook_of_the_user(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that the user registered acts first; our own there is not called twice."""
    monkeypatch.setenv(HOOK, "tests.test_hook.adds_a_variable")
    env = hook.runtime_env_hook({"envcache": os.fspath(project)})
    assert env is not None
    assert env["env_vars"] == {"ADDED": "1"}
    monkeypatch.setenv(HOOK, HOOK_FUNCTION)
    env = hook.runtime_env_hook({"envcache": os.fspath(project)})
    assert env is not None
    assert "env_vars" not in env


def adds_a_variable(runtime_env: dict[str, object]) -> dict[str, object]:
    return {**runtime_env, "env_vars": {"ADDED": "1"}}


def test_hand_over(project: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver keeps the environment for a while, so that no collector takes it before an agent has it."""
    monkeypatch.setattr(hook, "HAND_OVER_SECONDS", 2.0)
    (entry,) = store.layout.all_entries()

    def holders() -> list[str]:
        return [one.kind for _, one in leases.live_leases(store.layout, entry.key)]

    hook.runtime_env_hook({"envcache": os.fspath(project)})
    assert holders() == ["driver"]
    support.wait_until(lambda: holders() == [], "it has given it back")

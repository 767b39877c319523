"""How `ray.init` comes to call our hook: where the field is, and nowhere else."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ray_envcache.field import registration
from tests import support

FIELD = {"envcache": "pyproject.toml"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What our hook was asked, which answers with nothing."""
    asked: list[Any] = []
    hook = ModuleType("ray_envcache.hook")
    hook.runtime_env_hook = asked.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray_envcache.hook", hook)
    return asked


@pytest.fixture
def ask(calls: list[Any]) -> Callable[..., Any]:
    """Ray's function, extended; without our field it answers with what it was asked."""
    worker = ModuleType("worker")
    setattr(worker, registration.WORKER_FUNCTION, lambda *asked: asked)
    registration.extend_in(worker)
    once = getattr(worker, registration.WORKER_FUNCTION)
    registration.extend_in(worker)
    assert getattr(worker, registration.WORKER_FUNCTION) is once
    found: Callable[..., Any] = once
    return found


def test_with_the_field(ask: Callable[..., Any], calls: list[Any]) -> None:
    """Our hook answers where the field is, also one that is wrong: it says why."""
    for env in (FIELD, {"envcache": ""}):
        assert ask(env, False) is None
        assert calls.pop() == env


@pytest.mark.parametrize("env", [None, {}, {"pip": ["x"]}, {"envcache": None}, 5, ["envcache"]])
def test_without_the_field(ask: Callable[..., Any], calls: list[Any], env: Any) -> None:
    """Ray does what it does without us where the field is absent, or where it skips hooks (its client's server)."""
    assert ask(env, False) == (env, False)
    assert ask(FIELD, True) == (FIELD, True)
    assert calls == []


def test_a_ray_without_that_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that has no such function gets our hook by the variable that it documents, beside no other."""
    monkeypatch.setenv(registration.HOOK, "")
    monkeypatch.delenv(registration.HOOK)
    registration.extend_in(ModuleType("worker"))
    assert os.environ[registration.HOOK] == registration.HOOK_FUNCTION
    monkeypatch.setenv(registration.HOOK, "their.hook")
    registration.extend_in(ModuleType("worker"))
    assert os.environ[registration.HOOK] == "their.hook"


@pytest.mark.parametrize("order", ["ray, ray_envcache", "ray_envcache, ray"])
def test_order_of_imports(order: str) -> None:
    """Ray's function is there and extended, whichever is imported first, and no variable of Ray's is set."""
    names = (registration.HOOK, registration.UV_RUN)
    said = support.run_python(
        f"import os, sys, {order}\n"
        f"from {registration.WORKER_MODULE} import {registration.WORKER_FUNCTION} as ask\n"
        f"print(ask.__module__, ask.__wrapped__ is not None, [os.environ.get(name) for name in {names}])\n"
        "from ray._private import ray_constants\n"
        "print(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, [f for f in sys.meta_path if type(f).__name__ == '_WhenImported'])"
    )
    assert said.splitlines() == ["ray._private.worker True [None, None]", "True []"]


UNDER_UV_RUN = """
import json, sys
import ray, ray_envcache
from ray._private.worker import _maybe_modify_runtime_env as of_init
from ray.util.client import _apply_uv_hook_for_client as of_client

env = json.loads(sys.argv[1])
try:
    print(json.dumps([of_client(env), of_init(env, False)]))
except ray_envcache.EnvCacheError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def under_uv_run(program: Path, env: str, *options: str) -> Any:
    """What the program prints as a driver under `uv run`."""
    program.write_text(UNDER_UV_RUN)
    command = ["run", "--no-project", "--python", sys.executable, *options, "python", program.name, env]
    return json.loads(support.run_uv(*command, cwd=program.parent).splitlines()[-1])


def test_under_uv_run(tmp_path: Path) -> None:
    """Importing the package takes `uv run` away from nobody who does not use the field; with it no uv comes to workers."""
    for env in ("{}", '{"env_vars": {"A": "1"}}'):
        for found in under_uv_run(tmp_path / "main.py", env):
            assert found["py_executable"].endswith(" python")
            assert found["working_dir"] == str(tmp_path)
    kind, said = under_uv_run(tmp_path / "main.py", '{"envcache": "nowhere", "py_executable": ""}')
    assert (kind, "nowhere" in said) == ("LockfileError", True)
    kind, said = under_uv_run(tmp_path / "main.py", '{"envcache": "x", "py_executable": "uv run --with emoji"}')
    assert kind == "FieldValueError"
    assert "`py_executable` beside `envcache`" in said

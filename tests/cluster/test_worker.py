"""How Ray starts a worker from an environment: the command that a real bash runs."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray._private.runtime_env import working_dir
from ray._private.runtime_env.context import RuntimeEnvContext

from ray_envcache.cluster import worker
from ray_envcache.field.registration import HOOK, HOOK_FUNCTION, PLUGINS, UV_RUN, exports


def variables(node: dict[str, str], runtime_env: dict[str, Any], in_front: str = "") -> dict[str, str]:
    """The variables of a worker on a node with these, as Ray makes them: by its plugins, its context and bash."""
    context = RuntimeEnvContext(env_vars=dict(runtime_env.get("env_vars", {})))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONPATH", raising=False)
        for name, value in node.items():
            patch.setenv(name, value)
        if "working_dir" in runtime_env:
            working_dir.set_pythonpath_in_context("/working_dir", context)
        context.command_prefix += worker.prefix(runtime_env, node)
        if "py_modules" in runtime_env:
            working_dir.set_pythonpath_in_context("/py_modules", context)
    command = " ".join([*([in_front] if in_front else []), *context.command_prefix, "exec", "env", "-0"])
    environ = {"PATH": os.environ["PATH"], **node, **context.env_vars}
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, check=True)
    assert not done.stderr
    pairs = (pair.split("=", 1) for pair in done.stdout.decode("utf-8", "surrogateescape").split("\0") if pair)
    return {name: value for name, value in pairs if name.startswith(("RAY_", "PYTHON", "DYLD"))}


def test_registration_is_undone() -> None:
    """A worker has neither our plugin nor our hook, which its Python cannot import; Ray's own switches stay."""
    for node in (exports({}), {**exports({}), HOOK: HOOK_FUNCTION}):
        assert variables({**node, UV_RUN: "0"}, {}) == {PLUGINS: "[]", UV_RUN: "0"}
    assert variables({**exports({}), HOOK: "their.hook"}, {})[HOOK] == "their.hook"


nasty = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20
) | st.sampled_from(
    ["'", '"', "a'b\"c", "\n", "a\nb\n", "$(touch x)", "`id`", "&& false", "\\", "'\\''", "!!", "*", "}"]
)


@settings(max_examples=60)
@given(nasty, nasty)
def test_quotes(plugin: str, path: str) -> None:
    """Values of others come out of bash as they went in, and take nothing else with them: quotes, dollars and all."""
    others = [{"class": plugin, "note": [plugin, path]}]
    node = {**exports({PLUGINS: json.dumps(others, ensure_ascii=False)}), HOOK: path, "PYTHONPATH": path}
    after = variables(node, {"working_dir": "gcs://x.zip"})
    assert json.loads(after.pop(PLUGINS)) == others
    assert after == {HOOK: path, "PYTHONPATH": "/working_dir"}


GIVEN = {"env_vars": {"PYTHONPATH": "/users"}}
DIR, MODULES = {"working_dir": "gcs://x.zip"}, {"py_modules": ["gcs://y.zip"]}


@pytest.mark.parametrize("node", [{}, {"PYTHONPATH": "/opt/hpc:/opt/*"}, {"PYTHONPATH": ""}, {"PYTHONPATH": "/users"}])
@pytest.mark.parametrize(
    ("runtime_env", "path"),
    [
        ({}, None),
        (GIVEN, "/users"),
        (DIR, "/working_dir"),
        (MODULES, "/py_modules"),
        ({**DIR, **MODULES}, "/py_modules:/working_dir"),
        ({**DIR, **GIVEN}, "/working_dir:/users"),
        ({**DIR, **MODULES, **GIVEN}, "/py_modules:/working_dir:/users"),
    ],
)
def test_python_path_of_the_node(node: dict[str, str], runtime_env: dict[str, Any], path: str | None) -> None:
    """The node's PYTHONPATH and PYTHONHOME reach no worker; what Ray adds and what the user's env_vars say does."""
    found = variables({**exports({}), **node, "PYTHONHOME": "/opt/python"}, runtime_env)
    assert found.get("PYTHONPATH") == path
    assert "PYTHONHOME" not in found


def test_python_home_of_the_user() -> None:
    """A PYTHONHOME in env_vars is the user's own, and stays."""
    found = variables({**exports({}), "PYTHONHOME": "/opt"}, {"env_vars": {"PYTHONHOME": "/users"}})
    assert found["PYTHONHOME"] == "/users"


def test_library_path_of_macos() -> None:
    """What Ray puts in front of the whole command reaches the worker, not only our first word."""
    assert variables(exports({}), {}, "DYLD_LIBRARY_PATH=/lib")["DYLD_LIBRARY_PATH"] == "/lib"
    assert "DYLD_LIBRARY_PATH" not in variables(exports({}), {})

"""Registration: two variables beside those of others, and the way back for workers."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envcache.errors import FieldValueError
from ray_envcache.field import registration
from ray_envcache.field.registration import (
    CHAINED_HOOK,
    CHAINED_UV_RUN,
    HOOK,
    HOOK_FUNCTION,
    PLUGIN_CLASS,
    PLUGINS,
    UV_RUN,
)
from tests import support

OURS = {"class": PLUGIN_CLASS}
OTHER = {"class": "their.module.Plugin", "priority": 3}


def registered(**environ: str) -> dict[str, str]:
    registration.register(environ)
    return environ


def test_empty_environment() -> None:
    """Registering sets plugin and hook, and takes over from Ray's own hook for `uv run`."""
    environ = registered()
    assert json.loads(environ[PLUGINS]) == [OURS]
    assert (environ[HOOK], environ[UV_RUN], environ[CHAINED_UV_RUN]) == (HOOK_FUNCTION, "0", "1")
    assert CHAINED_HOOK not in environ


@pytest.mark.parametrize("hook", [None, "their.hook"])
@pytest.mark.parametrize("uv_run", [None, "0", "true"])
@pytest.mark.parametrize("plugins", [None, "", [], [OTHER], [OURS, OTHER], ["odd", 1]])
def test_twice_is_once(hook: str | None, uv_run: str | None, plugins: Any) -> None:
    """Registering again changes nothing, whatever was registered before."""
    environ = {"UNRELATED": "x"}
    environ |= {HOOK: hook} if hook else {}
    environ |= {UV_RUN: uv_run} if uv_run else {}
    environ |= {} if plugins is None else {PLUGINS: plugins if plugins == "" else json.dumps(plugins)}
    registration.register(environ)
    once = dict(environ)
    registration.register(environ)
    assert environ == once
    assert environ["UNRELATED"] == "x"
    assert json.loads(environ[PLUGINS]).count(OURS) == 1


def test_others_stay() -> None:
    """Plugins of others stay as they were written, in their order."""
    others = [OTHER, {"class": "another.Plugin"}]
    environ = registered(**{PLUGINS: json.dumps(others)})
    assert json.loads(environ[PLUGINS]) == [*others, OURS]
    assert registration.other_plugins(environ) == others


def test_existing_hook_is_chained() -> None:
    """A hook that was there before ours is kept for ours to call; one set later replaces it."""
    environ = registered(**{HOOK: "their.hook"})
    assert (environ[HOOK], environ[CHAINED_HOOK]) == (HOOK_FUNCTION, "their.hook")
    environ[HOOK] = "later.hook"
    registration.register(environ)
    assert (environ[HOOK], environ[CHAINED_HOOK]) == (HOOK_FUNCTION, "later.hook")


@pytest.mark.parametrize("text", ["{", "{}", "null", '"x"', "1", "[{]", "their.Plugin", "x" * 10**5])
def test_unreadable_value(text: str) -> None:
    """A value that Ray could not read either is an error that names the variable, and nothing is changed."""
    environ = {PLUGINS: text}
    with pytest.raises(FieldValueError, match=PLUGINS) as caught:
        registration.register(environ)
    assert environ == {PLUGINS: text}
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("value", "original"), [(None, True), ("1", True), ("True", True), ("0", False), ("no", False)]
)
def test_original_uv_run(value: str | None, original: bool) -> None:  # noqa: FBT001
    """What the user had said about Ray's hook for `uv run` is remembered."""
    environ = registered(**({} if value is None else {UV_RUN: value}))
    assert registration.original_uv_run(environ) is original


def environ_of_worker(environ: dict[str, str]) -> dict[str, str]:
    """The variables of a command that bash starts behind the prefix, as Ray starts workers."""
    command = " ".join([*registration.worker_prefix(environ), "exec", "env", "-0"])
    done = subprocess.run(
        ["bash", "-c", command], env={"PATH": os.environ["PATH"], **environ}, capture_output=True, check=True
    )
    assert not done.stderr
    pairs = (pair.split("=", 1) for pair in done.stdout.decode("utf-8", "surrogateescape").split("\0") if pair)
    return {name: value for name, value in pairs if name.startswith("RAY_")}


def test_worker_prefix_undoes() -> None:
    """Behind the prefix nothing of ours is left: no plugin, no hook, and Ray's hook for `uv run` is on."""
    assert environ_of_worker(registered()) == {PLUGINS: "[]", UV_RUN: "1"}


nasty = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20
) | st.sampled_from(
    [
        "'",
        '"',
        "a'b\"c",
        "\n",
        "a\nb\n",
        "$(touch x)",
        "`id`",
        "&& false",
        "\\",
        "'\\''",
        "!!",
        "*",
        " ",
        "\x01\x7f",
        "-",
        "é",
    ]
)


@settings(max_examples=60)
@given(nasty, nasty, nasty)
def test_worker_prefix_quotes(plugin: str, hook: str, uv_run: str) -> None:
    """Values of others come out of bash as they went in: quotes, newlines, dollars and all."""
    others = [{"class": plugin, "note": [plugin, hook]}]
    before = {PLUGINS: json.dumps(others, ensure_ascii=False), HOOK: hook, UV_RUN: uv_run}
    after = environ_of_worker(registered(**before))
    assert json.loads(after.pop(PLUGINS)) == others
    assert after == {HOOK: hook, UV_RUN: uv_run}


LOADED = "print(*{name for name in sys.modules if name.split('.')[0] in {'ray', 'click', 'rich', 'ray_envcache'}})"


def test_import_is_light() -> None:
    """Importing the package registers the field and loads neither ray nor a library of the command line."""
    found = support.run_python(
        f"import os, sys, ray_envcache; print(os.environ['{HOOK}']); {LOADED}", environ={HOOK: "their.hook"}
    ).splitlines()
    assert found[0] == HOOK_FUNCTION
    assert set(found[1].split()) == {
        "ray_envcache",
        "ray_envcache.errors",
        "ray_envcache.field",
        "ray_envcache.field.registration",
        "ray_envcache.version",
    }


@pytest.mark.parametrize(
    "module",
    ["acquire", "build.builder", "cluster.agent_build", "cluster.build_process", "build.bytecode", "gc.collector"],
)
def test_runtime_imports_no_command_line(module: str) -> None:
    """What runs in a cluster loads neither click nor rich, nor ray by itself."""
    found = support.run_python(f"import sys, ray_envcache.{module}; {LOADED}").split()
    assert not {name.split(".")[0] for name in found} & {"ray", "click", "rich"}

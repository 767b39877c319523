"""Registration: one variable beside what others say in it, and the way back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ray_envcache.errors import FieldValueError
from ray_envcache.field import registration
from ray_envcache.field.registration import HOOK, HOOK_FUNCTION, PLUGIN_CLASS, PLUGINS, UV_RUN
from tests import support

OURS = {"class": PLUGIN_CLASS}
OTHER = {"class": "their.module.Plugin", "priority": 3}


def registered(**environ: str) -> dict[str, str]:
    registration.register(environ)
    return environ


def test_empty_environment() -> None:
    """Registering sets the plugin, and nothing that a driver without this package would stumble over."""
    environ = registered()
    assert json.loads(environ.pop(PLUGINS)) == [OURS]
    assert environ == {}


@pytest.mark.parametrize("plugins", [None, "", [], [OTHER], [OURS, OTHER], ["odd", 1]])
def test_twice_is_once(plugins: Any) -> None:
    """Registering again changes nothing, whatever was registered before."""
    environ = {"UNRELATED": "x", HOOK: "their.hook", UV_RUN: "true"}
    before = dict(environ)
    environ |= {} if plugins is None else {PLUGINS: plugins if plugins == "" else json.dumps(plugins)}
    registration.register(environ)
    once = dict(environ)
    registration.register(environ)
    assert environ == once
    assert json.loads(environ.pop(PLUGINS)).count(OURS) == 1
    assert environ == before


def test_others_stay() -> None:
    """Plugins of others stay as they were written, in their order."""
    others = [OTHER, {"class": "another.Plugin"}]
    environ = registered(**{PLUGINS: json.dumps(others)})
    assert json.loads(environ[PLUGINS]) == [*others, OURS]
    assert registration.other_plugins(environ) == others


@pytest.mark.parametrize("before", [{}, {HOOK: "their.hook"}, {PLUGINS: json.dumps([OTHER])}, {UV_RUN: "0"}])
def test_without_us(before: dict[str, str]) -> None:
    """Without our plugin, and without our hook where a unit or a pod names it, the variables are as before."""
    assert registration.without_us(registered(**before)) == before
    assert HOOK not in registration.without_us({**before, HOOK: HOOK_FUNCTION})


@pytest.mark.parametrize("text", ["{", "{}", "null", '"x"', "1", "[{]", "their.Plugin", "x" * 10**5])
def test_unreadable_value(text: str) -> None:
    """A value that Ray could not read either is an error that names the variable, and nothing is changed."""
    environ = {PLUGINS: text}
    with pytest.raises(FieldValueError, match=PLUGINS) as caught:
        registration.register(environ)
    assert environ == {PLUGINS: text}
    assert len(str(caught.value)) < 1000


LOADED = "print(*{name for name in sys.modules if name.split('.')[0] in {'ray', 'click', 'rich', 'ray_envcache'}})"


def test_import_is_light() -> None:
    """Importing the package registers the field and loads neither ray nor a library of the command line."""
    found = support.run_python(
        f"import os, sys, ray_envcache; print(os.environ['{PLUGINS}'], os.environ['{HOOK}']); {LOADED}",
        environ={HOOK: "their.hook"},
    ).splitlines()
    assert found[0] == f"{json.dumps([OURS])} their.hook"
    assert set(found[1].split()) == {
        "ray_envcache",
        "ray_envcache.errors",
        "ray_envcache.field",
        "ray_envcache.field.registration",
        "ray_envcache.field.spec",
        "ray_envcache.version",
    }


@pytest.mark.parametrize(
    "module",
    ["acquire", "build.builder", "cluster.building", "build.bytecode", "gc.collector"],
)
def test_runtime_imports_no_command_line(module: str) -> None:
    """What runs in a cluster loads neither click nor rich, nor ray by itself."""
    found = support.run_python(f"import sys, ray_envcache.{module}; {LOADED}").split()
    assert not {name.split(".")[0] for name in found} & {"ray", "click", "rich"}

"""Are the environment variables right? Our settings, and the registration for `ray start`."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterator, Mapping

from ray_envcache.doctor.findings import ERROR, OK, WARN, Finding
from ray_envcache.errors import FieldValueError
from ray_envcache.field import guard, registration
from ray_envcache.gc.policy import VARIABLES, Limits
from ray_envcache.system.testpoints import FOLDER
from ray_envcache.system.texts import is_off, needs_extra, parse_duration, without_credentials

_PREFIX = "RAY_ENVCACHE_"
_REMOTE = ("REMOTE", "REMOTE_PUSH", "REMOTE_SIGN", "REMOTE_TRUST")
_OTHERS = ("DIR", "READONLY_DIRS", "ALLOW_NETWORK_FS", "GC_INTERVAL", *_REMOTE)
SETTINGS = (*(f"{_PREFIX}{name}" for name in _OTHERS), *VARIABLES)
"""The variables that people set."""
_INTERNAL = frozenset({guard.PROBE_ANSWER, FOLDER})


def settings(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A finding for each setting that does not exist or does not parse; if all do, one that names them."""
    names = sorted(name for name in environ if name.startswith(_PREFIX) and name not in _INTERNAL)
    wrong = [finding for name in names if (finding := _setting(name, environ[name]))]
    yield from wrong
    if not wrong:
        text = without_credentials(", ".join(f"{name}={environ[name]}" for name in names))
        yield Finding("settings", OK, text or "the defaults")


def of_python(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A warning for each variable that puts other packages before those of an environment, or instead of them."""
    for name in ("PYTHONPATH", "PYTHONHOME"):
        if environ.get(name):
            text = f"{name}={environ[name]}: programs, nodes and workers inherit it, and may import other packages"
            yield Finding(name, WARN, text, f"unset {name} before a program or a node starts")


def token(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Which token Ray sends, where there is one, or where nodes and drivers are told to ask for one."""
    mode, place = environ.get("RAY_AUTH_MODE"), place_of_token(environ)
    if place == "$RAY_AUTH_TOKEN" or os.path.isfile(place):
        yield Finding("token", OK, f"{place}, RAY_AUTH_MODE={mode or 'is not set'}")
    elif mode == "token":
        hint = "`ray get-auth-token --generate` makes one; all nodes and drivers of a cluster need the same"
        yield Finding("token", ERROR, f"RAY_AUTH_MODE=token, and there is none at {place}", hint)


def place_of_token(environ: Mapping[str, str]) -> str:
    """Where Ray looks for its token: the variable itself, or a path."""
    if environ.get("RAY_AUTH_TOKEN"):
        return "$RAY_AUTH_TOKEN"
    return environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")


def registered(environ: Mapping[str, str]) -> Finding:
    """Whether `ray start` in a shell with these variables makes a node that knows the field."""
    name = "registration"
    try:
        others = registration.other_plugins(environ)
    except FieldValueError as error:
        return Finding(name, ERROR, error.message, error.hint)
    for other in others:
        if not _is_importable(other):
            text = f"{registration.PLUGINS} names `{other}`, which this Python cannot import: nodes would die of it"
            return Finding(name, ERROR, text, f"install it here, or take it out of {registration.PLUGINS}")
    if registration.PLUGIN_CLASS in environ.get(registration.PLUGINS, ""):
        return Finding(name, OK, "nodes that `ray start` makes from this shell know the field")
    text = "nodes that `ray start` makes from this shell do not know the field; those of `ray.init` do"
    return Finding(name, WARN, text, 'eval "$(ray-envcache env)" before ray start')


def _setting(name: str, value: str) -> Finding | None:
    if name not in SETTINGS:
        known = [one.removeprefix(_PREFIX) for one in SETTINGS]
        near = difflib.get_close_matches(name.removeprefix(_PREFIX), known, n=1)
        hint = f"did you mean {_PREFIX}{near[0]}?" if near else f"the settings are {', '.join(SETTINGS)}"
        return Finding("settings", WARN, f"There is no setting {name}: it has no effect", hint)
    try:
        _parse(name, value)
    except FieldValueError as error:
        message = error.message if name in error.message else f"{name}: {error.message}"
        return Finding("settings", ERROR, message, error.hint)
    return None


def _parse(name: str, value: str) -> None:
    if name == f"{_PREFIX}GC_INTERVAL" and value.strip() and not is_off(value):
        parse_duration(value)
    if name in {f"{_PREFIX}ALLOW_NETWORK_FS", f"{_PREFIX}REMOTE_PUSH"} and value not in {"", "0", "1"}:
        raise FieldValueError(f"Neither 0 nor 1: `{value}`", "1 allows it, anything else does not")
    if name == f"{_PREFIX}REMOTE" and value and importlib.util.find_spec("obstore") is None:
        raise FieldValueError("The remote tier needs the library obstore", needs_extra("remote"))
    Limits.from_environ({name: value})


def _is_importable(plugin: object) -> bool:
    """Whether the package of a plugin's class is installed. Does not import it, because an import may do anything."""
    named = plugin.get("class") if isinstance(plugin, dict) else None
    try:
        return isinstance(named, str) and importlib.util.find_spec(named.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False

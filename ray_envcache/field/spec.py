"""The field value: what a user writes under `envcache`, and its validated form. Pure: reads no file."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_envcache.errors import FieldValueError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,254}[A-Za-z0-9])?"  # as PEP 508, and short enough for a file name
_PATTERN = r"[A-Za-z0-9*](?:[A-Za-z0-9._*-]{0,254}[A-Za-z0-9*])?"  # a name with stars
_VERSION = r"3(?:\.[0-9]{1,2}(?:\.[0-9]{1,2})?)?"
_DIGEST = (
    r"sha256:[0-9a-f]{64}", "of the form sha256:<64 hex digits>", "ray_envcache.runtime_env(path) computes it"
)  # fmt: skip
_FORMS = {
    "digest": _DIGEST,
    "content": _DIGEST,
    "package": (
        _NAME, "the name of one package", 'write {"package": "name"}, as the member\'s pyproject.toml has it'
    ),
}  # fmt: skip
_UNUSABLE = "[\x00-\x1f\x7f-\x9f\ud800-\udfff]"  # control characters, and bytes that are not text
_MAX_PATH = 4096  # PATH_MAX of Linux, bytes
_MAX_SHOWN = 200

FIELD = "envcache"
SHAPE = 'a path such as "pyproject.toml", or {"path": ..., "extras": [...], "groups": [...], "python": ...}'


class EnvSpec(NamedTuple):
    """A validated field value. `extras` and `groups` are normalized and sorted: their order means nothing.

    `all_extras` to `all_packages` mean what the options of uv of these names do. The default group `dev` counts with
    `dev` only, or where it is named.

    `python` is a version ("3.12", "3.12.4") the cluster's Python must have, or the absolute path of an interpreter
    of the cluster's version. `package` is a member of the workspace. `no_build` refuses what has no wheel.
    `digest` pins the content of the project files: "sha256:...". Local packages are installed with `install_project`;
    `content` pins theirs. `inherit` are names, or patterns of names, of packages to use from the cluster's Python
    instead of installing them.
    """

    path: str
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    package: str | None = None
    no_build: bool = False
    python: str | None = None
    digest: str | None = None
    install_project: bool = True
    content: str | None = None
    inherit: tuple[str, ...] = ()
    all_extras: bool = False
    no_extras: tuple[str, ...] = ()
    all_groups: bool = False
    no_groups: tuple[str, ...] = ()
    only_groups: tuple[str, ...] = ()
    default_groups: bool = True
    dev: bool = False
    all_packages: bool = False

    @classmethod
    def parse(cls, value: Any) -> EnvSpec:
        """The spec of a field value of any type. Raises FieldValueError where it is not valid."""
        if isinstance(value, str | os.PathLike):
            value = {"path": os.fspath(value)}
        if not isinstance(value, dict):
            raise FieldValueError(f"The envcache field is of type `{type(value).__name__}`", f"write {SHAPE}")
        _refuse_unknown(value)
        defaults = cls._field_defaults.items()
        others: dict[str, Any] = {
            name: _flag(value, name, default=default) for name, default in defaults if isinstance(default, bool)
        }
        lists = [name for name, default in defaults if default == ()]
        others.update({name: _names(value, name, _PATTERN if name == "inherit" else _NAME) for name in lists})
        package = _text(value, "package")
        return cls(
            path=_path(value.get("path")),
            package=package and _normalized(package),
            python=_python(value.get("python")),
            digest=_text(value, "digest"),
            content=_text(value, "content"),
            **others,
        )

    def to_field(self) -> dict[str, Any]:
        """The field value as JSON; `EnvSpec.parse` of it gives this spec again."""
        chosen = {name: value for name, value in self._asdict().items() if value != self._field_defaults.get(name)}
        return {name: [*value] if isinstance(value, tuple) else value for name, value in chosen.items()}

    def selection(self) -> dict[str, Any]:
        """The options that choose packages or interpreter, without path and digest."""
        return {name: value for name, value in self.to_field().items() if name not in _NO_CHOICE}

    def expanded(self) -> EnvSpec:
        """The same selection with the home directory in place of a leading `~`."""
        return self._replace(path=os.path.expanduser(self.path))


OPTIONS = EnvSpec._fields
_NO_CHOICE = {"path", "digest", "install_project", "content"}

_RIVALS = ("pip", "uv", "conda", "image_uri", "container")
_PLAIN_UV_RUN = r"(?:\S*/)?uv run(?: --python \S+)?(?: python)?"


def set_by_ray(py_executable: Any) -> bool:
    """Whether Ray sets this `py_executable` for a driver under a `uv run` without options: it chooses no packages."""
    return bool(re.fullmatch(_PLAIN_UV_RUN, str(py_executable)))


def refuse_combinations(runtime_env: Mapping[str, Any]) -> None:
    """Raise FieldValueError where other fields of the runtime_env choose an interpreter too."""
    for rival in _RIVALS:
        if runtime_env.get(rival):
            raise FieldValueError(
                f"`{rival}` beside `{FIELD}` in one runtime_env: both choose what workers run",
                f"add the packages of `{rival}` to pyproject.toml and run `uv lock`, or leave `{FIELD}` out",
            )
    if runtime_env.get("py_executable"):
        raise FieldValueError(
            f"`py_executable` beside `{FIELD}` in one runtime_env: both choose what workers run",
            f"leave `py_executable` out, and choose packages by `extras` and `groups` of `{FIELD}`. Ray sets it where "
            "the driver runs under `uv run`: import ray_envcache there, and give tasks ray_envcache.runtime_env(path)",
        )


def _refuse_unknown(value: dict[Any, Any]) -> None:
    for name in value:
        if name not in OPTIONS:
            close = difflib.get_close_matches(str(name)[:100], OPTIONS, n=1)
            meant = f"did you mean `{close[0]}`?" if close else f"the options are {', '.join(OPTIONS)}"
            raise FieldValueError(f"Unknown option in the envcache field: `{_shown(name)}`", meant)


def _path(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise FieldValueError(f"The envcache field has no usable path: `{_shown(value)}`", f"write {SHAPE}")
    if re.search(_UNUSABLE, value) or len(value.encode()) > _MAX_PATH:
        raise FieldValueError(
            f"The path in the envcache field is too long or has control characters: `{_shown(value)}`",
            "name the project's pyproject.toml, its folder, or uv.lock",
        )
    return value


def _names(value: dict[Any, Any], option: str, form: str = _NAME) -> tuple[str, ...]:
    names = value.get(option)
    if names is None:
        return ()
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _not_valid(option, "a list of names", names, f'write {{"{option}": ["name"]}}')
    for name in names:
        if not re.fullmatch(form, name):
            raise FieldValueError(
                f"Not a valid name in `{option}` of the envcache field: `{_shown(name)}`",
                "letters, digits, `-`, `_` and `.`, as in pyproject.toml",
            )
    return tuple(sorted({_normalized(name) for name in names}))


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _python(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and (re.fullmatch(_VERSION, value) or os.path.isabs(value)):  # a string from JSON
        return _path(value)
    raise FieldValueError(
        f"`python` in the envcache field is neither a version of Python 3 nor an absolute path: `{_shown(value)}`",
        'write {"python": "3.12"} or {"python": "/usr/bin/python3.12"}',
    )


def _flag(value: dict[Any, Any], option: str, *, default: bool) -> bool:
    flag = value.get(option, default)
    if isinstance(flag, bool):
        return flag
    raise _not_valid(option, "true or false", flag, "leave out the quotes")


def _text(value: dict[Any, Any], option: str) -> str | None:
    """A text of the form that the option has."""
    text, (form, described, hint) = value.get(option), _FORMS[option]
    if text is None or (isinstance(text, str) and re.fullmatch(form, text)):
        return text
    raise _not_valid(option, described, text, hint)


def _not_valid(option: str, form: str, value: Any, hint: str) -> FieldValueError:
    return FieldValueError(f"`{option}` in the envcache field is not {form}: `{_shown(value)}`", hint)


def _shown(value: Any) -> str:
    """`value` for a message: as Python writes it, but neither deep nor long."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 3, _MAX_SHOWN, _MAX_SHOWN
    text = short.repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."

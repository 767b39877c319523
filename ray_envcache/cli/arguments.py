"""What commands take: paths, sizes, durations."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import click

from ray_envcache.errors import FieldValueError
from ray_envcache.system.texts import is_off

SWITCHED_OFF = object()
"""The value of a limit that was given as "off"."""

Callback = Callable[[click.Context, click.Parameter, str | None], Any]


def parsed(parse: Callable[[str], Any]) -> Callback:
    """A click callback that parses a value with `parse`; its FieldValueError becomes an error of usage."""

    def callback(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except FieldValueError as error:
            raise click.BadParameter(f"{error.message}; {error.hint}") from error

    return callback


def limit(parse: Callable[[str], Any]) -> Callback:
    """A click callback for a limit that "off" switches off."""
    return parsed(lambda text: SWITCHED_OFF if is_off(text) else parse(text))


def absolute(path: str) -> str:
    """The absolute path of what a person named. Raises FieldValueError if the working directory is gone."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        raise FieldValueError(
            f"Where is `{path}`? The working directory was removed", "cd to a directory that exists"
        ) from error


tmpdir_option = click.option(
    "--tmpdir", metavar="DIR", help="With --sessions: look here instead of $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray."
)


def refuse_without_sessions(*given: object) -> None:
    """Raise UsageError if an option that needs --sessions was given without it."""
    if any(value is not None for value in given):
        raise click.UsageError("--tmpdir and --older-than are about session directories: add --sessions")

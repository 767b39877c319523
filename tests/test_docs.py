"""The README against the code: what exists is documented, and what is documented exists."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

import ray_envcache
from ray_envcache.cli.main import cli
from ray_envcache.field.spec import OPTIONS

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
PACKAGE = "".join(path.read_text("utf-8") for path in Path(ray_envcache.__file__).parent.rglob("*.py"))

CONTEXT = click.Context(cli)
COMMANDS = {name: command for name in cli.list_commands(CONTEXT) if (command := cli.get_command(CONTEXT, name))}


def _options() -> list[tuple[str, str]]:
    return [
        (name, option)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
        if option.startswith("--")
    ]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_command_is_documented(command: str) -> None:
    """Every command has help, and a row in the reference."""
    assert f"`ray-envcache {command}" in README or f"`{command} " in README
    assert COMMANDS[command].help


@pytest.mark.parametrize(("command", "option"), _options())
def test_option_is_documented(command: str, option: str) -> None:
    """Every option of a command is in the README, and says what it does."""
    assert option in README, f"ray-envcache {command} {option}"
    (found,) = [one for one in COMMANDS[command].params if option in one.opts]
    assert isinstance(found, click.Option)
    assert found.help


@pytest.mark.parametrize("option", OPTIONS)
def test_option_of_the_field_is_documented(option: str) -> None:
    """Every option of the field has a row."""
    assert re.search(rf"^\|.*`{option}`.*\|", README, re.MULTILINE)


def test_variables() -> None:
    """The variables of the README are those of the code."""
    internal = {f"RAY_ENVCACHE_{name}" for name in ("TEST_POINTS", "PROBE", "RUN", "RUN_ABOUT")}
    documented = set(re.findall(r"RAY_ENVCACHE_[A-Z_]+[A-Z]", README))
    spelled = set(re.findall(r"RAY_ENVCACHE_[A-Z_]+[A-Z]", PACKAGE)) - internal
    # The limits of the policy are put together from their names.
    assert documented >= spelled - {"RAY_ENVCACHE_"}
    for name in documented:
        assert name in PACKAGE or f'"{name.removeprefix("RAY_ENVCACHE_")}"' in PACKAGE, name


@pytest.mark.parametrize("name", ray_envcache.__all__)
def test_public_names_are_there(name: str) -> None:
    """What the package offers can be imported, is documented, and is in the README unless it is a type."""
    found = getattr(ray_envcache, name)
    assert found.__doc__
    assert isinstance(found, type) or f"ray_envcache.{name}" in README

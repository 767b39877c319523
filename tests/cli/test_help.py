"""The help of every command, as people read it."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from click.testing import CliRunner

from ray_envcache.cli.main import cli

CONTEXT = click.Context(cli)
COMMANDS = [[], *([name] for name in cli.list_commands(CONTEXT))]


def help_of(command: list[str]) -> str:
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="ray-envcache")
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_ends_with_an_example(command: list[str]) -> None:
    """The last line of each help is an example on one line, and the command line can parse it."""
    last = help_of(command).rstrip().splitlines()[-1]
    assert last.startswith("  Example: ")
    example = re.search(r"ray-envcache ([^);]+)", last)
    assert example
    name, *arguments = shlex.split(example[1].rstrip('"'))
    assert command in ([], [name])
    found = cli.get_command(CONTEXT, name)
    assert found
    found.make_context(name, arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_names_the_actor(command: list[str]) -> None:
    """No help says nobody, somebody, whoever or whatever instead of the name of an actor."""
    assert not re.search(r"nobody|somebody|anybody|whoever|whatever", help_of(command), re.IGNORECASE)


def test_help_of_all_cuts_no_sentence() -> None:
    """The list of commands has the first sentence of each, whole."""
    assert "..." not in help_of([]).partition("Commands:")[2]

"""The pages' examples: shell lines as a real shell runs them, commands that exist, values that the field accepts."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from ray_envcache.cli.main import cli
from ray_envcache.field import registration
from ray_envcache.field.spec import EnvSpec
from tests import support

REPOSITORY = Path(__file__).parents[1]
PAGES = {name: (REPOSITORY / name / "README.md").read_text("utf-8") for name in (".", "ray_envcache", "examples")}
VARIABLES = registration.exports({})
STORE = "RAY_ENVCACHE_DIR"


def blocks(*languages: str) -> list[tuple[str, str]]:
    """All blocks of code in these languages, each with its page."""
    wanted = "|".join(languages)
    pattern = re.compile(rf"^```(?:{wanted})\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(name, block) for name, page in PAGES.items() for block in pattern.findall(page)]


def node_starts() -> list[tuple[str, str]]:
    """The blocks that start a node, each with its page."""
    return [(page, block) for page, block in blocks("sh") if re.search("^ray start", block, re.MULTILINE)]


def started(shell: str, command: str, programs: Path, **before: str) -> dict[str, str]:
    """Ours of the variables of `ray start`, as a real shell starts it by `command` where the caller had `before`."""
    ours = {*VARIABLES, STORE}
    found = support.variables_of_ray_start(shell, command, programs, before)
    return {name: value for name, value in found.items() if name in ours}


def test_node_starts_are_found() -> None:
    """The README and the recipes start a node."""
    assert {page for page, _ in node_starts()} == {".", "examples"}


@pytest.mark.parametrize(("page", "command"), node_starts())
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_shell(shell: str, page: str, command: str, tmp_path: Path) -> None:
    """What a real shell makes of the command: `ray start` with exactly the variables, quotes and all."""
    found = started(shell, command, tmp_path, **{STORE: "/of/the/shell"})
    assert found == {**VARIABLES, STORE: "/of/the/shell"}, page


def test_shell_keeps_what_was_there(tmp_path: Path) -> None:
    """A plugin of the caller's is not lost on the way through `ray-envcache env`; twice is once."""
    theirs = [{"class": "their.Plugin", "note": 'it\'s "quoted" $HOME'}]
    before = {registration.PLUGINS: json.dumps(theirs)}
    (_, command), *_ = node_starts()
    once = started("bash", command, tmp_path, **before)
    assert once == registration.exports(before)
    assert started("bash", command, tmp_path, **once) == once


def commands() -> list[str]:
    """Each call of `ray-envcache` in a block, up to where the shell ends it."""
    text = "\n".join(block for _, block in [*blocks("sh"), *blocks("dockerfile")])
    # In a block of output too, behind its prompt.
    text += "".join(f"\n{call}" for _, block in blocks("text") for call in re.findall(r"^\$ (.*)", block, re.MULTILINE))
    calls = re.findall(r"(?:^|\(|DIR=\S+ )ray-envcache ([a-z][^#|)&\\\n]*)", text, re.MULTILINE)
    return sorted({call.strip().rstrip('"') for call in calls})


def test_commands_are_found() -> None:
    """The next test sees them."""
    assert {"env", "build /app", "why 125a8", "run -- python main.py", "gc --sessions --older-than 1d"} <= set(
        commands()
    )


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command: str) -> None:
    """Each command of the pages is one, with these options and values."""
    name, *arguments = shlex.split(command)
    found = cli.get_command(click.Context(cli), name)
    assert found, name
    found.make_context(name, arguments)


def test_python() -> None:
    """Each example parses, and calls of the package what there is."""
    import ray_envcache

    found = blocks("python")
    assert len(found) >= 8
    for page, block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray_envcache":
                assert hasattr(ray_envcache, node.attr), page


def field_values() -> list[Any]:
    """The values of the field in the examples: Python's, JSON on a command line, and YAML."""
    nodes = [node for _, block in blocks("python") for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Dict)]
    texts = [text for _, block in blocks("sh") for text in re.findall(r"--runtime-env-json '([^']+)'", block)]
    documents = [yaml.safe_load(block) for _, block in blocks("yaml")]
    envs = [one["runtime_env"] for document in documents for one in document["applications"]]
    found = [ast.literal_eval(node) for node in nodes] + [json.loads(text) for text in texts] + envs
    return [env["envcache"] for env in found if "envcache" in env]


def test_field_values() -> None:
    """The field accepts each of them."""
    values = field_values()
    assert len(values) >= 4
    assert {EnvSpec.parse(value).path for value in values} == {"pyproject.toml", "/app/pyproject.toml"}

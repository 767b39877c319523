"""What the examples start on a node, as their tool would: the environment, and a command for a shell."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
ROLES = ("head", "worker")
RECIPES = ("ray-start", "compose", "cluster-launcher")


class Node(NamedTuple):
    """A command that starts a node, and the variables that it is started with."""

    environ: dict[str, str]
    command: str


def node(recipe: str, role: str) -> Node:
    """The node of that role in a recipe."""
    if recipe == "ray-start":
        unit = EXAMPLES / "ray-start" / f"ray-{role}.service"
        return Node(unit_environ(unit), unit_of(unit)["ExecStart"])
    if recipe == "compose":
        service = document("compose/compose.yaml")["services"][role]
        return Node(service["environment"], service["command"])
    return Node({}, document("cluster-launcher/cluster.yaml")[f"{role}_start_ray_commands"][-1])


def document(path: str) -> Any:
    """A YAML file of the examples."""
    return yaml.safe_load((EXAMPLES / path).read_text())


def unit_of(unit: Path) -> configparser.SectionProxy:
    """The section Service of a unit of systemd."""
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read_string(unit.read_text())
    return parsed["Service"]


def unit_environ(unit: Path) -> dict[str, str]:
    """The variables of a unit: as systemd reads them, in words with a shell's quotes. A `%` would be a specifier."""
    lines = [line[12:] for line in unit.read_text().splitlines() if line.startswith("Environment=")]
    assert not any("%" in line for line in lines)
    return dict(word.split("=", 1) for line in lines for word in shlex.split(line))

"""The floors: imports go down only, and the runtime path carries no library of the command line."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import ray_envcache

PACKAGE = Path(ray_envcache.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py")}

# A module may import what stands on a floor below its own: at the top, in a function, or for annotations.
FLOORS = (
    ("errors",),
    (
        "_fs",
        "_process",
        "_identity",
        "_hold",
        "_forks",
        "_pyc",
        "_check",
        "_flock",
        "_disk",
        "_testpoints",
        "units",
        "_secrets",
    ),
    ("spec", "interpreter", "registration", "layout", "policy", "requirements", "guard", "probe", "findings"),
    ("_uv", "entry", "root", "holders", "project", "shared_bytecode", "donors"),
    ("exports", "doctor_environ", "lower"),
    ("lockfile", "leases", "sizes", "clock", "content", "plan", "mentions", "session_dirs", "companion"),
    ("key", "cluster_ray", "venv_files", "pins", "sessions", "tmpdir", "inherit"),
    ("environment", "doctor_nodes"),
    ("bytecode", "builder", "evict", "inventory", "session_gc", "planning"),
    ("layers",),
    ("collector",),
    ("room", "autogc"),
    ("store", "run_tmpdir"),
    ("progress", "tables", "agent_client", "agent_build", "runner", "doctor"),
    ("cli_sessions", "cli_run", "cli_build", "cli_doctor"),
    ("hook", "plugin", "cli_store", "doctor_cluster"),
    # Imports the modules of its commands by their names.
    ("cli",),
    # Runs before any other module of the package: at its top it may import the lowest ones only, see below.
    ("__init__", "__main__"),
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}

IMPORTS_RAY = {"hook", "plugin", "doctor_cluster"}
IMPORTS_COMMAND_LINE = {"cli", "cli_build", "cli_store", "cli_run", "cli_sessions", "cli_doctor", "tables", "progress"}


class Import(NamedTuple):
    module: str
    target: str
    at_top: bool


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        # `from package import module` imports the module; of other names, the package they come from.
        whole = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name if name.removeprefix("ray_envcache.") in MODULES else str(node.module) for name in whole)


def _imports(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    for node in ast.walk(tree):
        for target in _targets(node):
            yield Import(module, target, node in tree.body)


ALL = [found for module in sorted(MODULES) for found in _imports(module)]
OURS = [
    found._replace(target=found.target.partition(".")[2]) for found in ALL if found.target.startswith("ray_envcache.")
]


def _importers(*libraries: str) -> set[str]:
    return {found.module for found in ALL if found.target.split(".")[0] in libraries}


def test_every_module_has_a_floor() -> None:
    """Each module stands on exactly one floor."""
    assert sorted(MODULES) == sorted(name for floor in FLOORS for name in floor)


@pytest.mark.parametrize("module", sorted(MODULES.keys() & FLOOR_OF.keys()))
def test_imports_go_down(module: str) -> None:
    """A module imports from floors below its own only, also in functions and for annotations: so there are no cycles."""
    wrong = [
        found.target for found in OURS if found.module == module and FLOOR_OF.get(found.target, 99) >= FLOOR_OF[module]
    ]
    assert not wrong


def test_importing_the_package() -> None:
    """The package itself, which is imported before any module of it, begins with the registration alone."""
    assert {found.target for found in OURS if found.module == "__init__" and found.at_top} == {"errors", "registration"}
    assert {found.target for found in OURS if found.module == "registration"} == {"errors"}


def test_only_the_top_imports_ray() -> None:
    """Only the top floor imports ray."""
    assert _importers("ray") == IMPORTS_RAY
    assert set(FLOORS[-3]) >= IMPORTS_RAY


def test_only_the_command_line_imports_click_and_rich() -> None:
    """Only what talks to people imports click or rich, and of that the driver's hook takes the progress alone."""
    assert _importers("click", "rich") <= IMPORTS_COMMAND_LINE
    users = {found.module for found in OURS if found.target in IMPORTS_COMMAND_LINE}
    assert users == {"cli_build", "cli_run", "cli_sessions", "cli_store", "cli_doctor", "hook", "__main__"}
    assert not [found for found in OURS if found.module == "hook" and found.target in {"cli", "tables"}]
    assert not [
        found
        for found in OURS
        if found.target == "progress" and found.module not in {"cli_build", "cli_run"} and found.at_top
    ]


def test_rich_is_not_imported_with_progress() -> None:
    """The progress display imports rich only where it shows something on a terminal."""
    assert not [
        found for found in ALL if found.module == "progress" and found.at_top and found.target.startswith("rich")
    ]


def test_the_hold_needs_the_standard_library_only() -> None:
    """The hold runs in foreign interpreters: it imports three modules of the standard library, and nothing at its top."""
    found = [one for one in ALL if one.module == "_hold"]
    assert {one.target for one in found} == {"fcntl", "os", "time"}
    assert not any(one.at_top for one in found)
    assert len(MODULES["_hold"].read_text().splitlines()) < 60


@pytest.mark.parametrize("module", sorted(MODULES.keys() & {name for floor in FLOORS[:3] for name in floor}))
def test_low_floors_are_light(module: str) -> None:
    """The low floors import, at their top, the standard library and flocks alone."""
    allowed = {*sys.stdlib_module_names, "ray_envcache", "filelock"}
    assert {found.target.split(".")[0] for found in ALL if found.module == module and found.at_top} <= allowed

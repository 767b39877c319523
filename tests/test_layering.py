"""The order of the house: a folder imports those above it only, and each library has its rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ray_envcache

PACKAGE = Path(ray_envcache.__file__).parent

# In the order of an environment's life. Each may import what stands before it: at its top, in a function, for a type.
ROOMS = (
    *("errors", "version", "inside", "system", "field", "checkout", "resolve", "store", "survey", "sessions", "gc"),
    *("remote", "build", "acquire", "doctor", "cluster", "plugin", "hook", "api", "cli", "__init__", "__main__"),
)
# The agent's warm path must not import these: they are imported in functions, and nothing else is.
BEHIND_A_BOUNDARY = ("ray_envcache.build", "ray_envcache.gc", "ray_envcache.doctor")
LIBRARIES = {
    "ray": {"cluster", "plugin", "hook", "doctor/cluster"},
    "click": {"cli"},
    "prometheus_client": {"survey/statistics"},
    "rich": {"cli", "build/progress"},
}


class Import(NamedTuple):
    place: str  # such as "store/leases"
    room: str
    target: str
    in_function: bool


def _imports(path: Path) -> Iterator[Import]:
    place = path.relative_to(PACKAGE).with_suffix("").as_posix()
    room, tree = place.partition("/")[0], ast.parse(path.read_text("utf-8"))
    inner = {id(each) for node in ast.walk(tree) if isinstance(node, _FUNCTIONS) for each in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(place, room, alias.name, id(node) in inner) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (Import(place, room, f"{node.module}.{alias.name}", id(node) in inner) for alias in node.names)


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FILES = sorted(PACKAGE.rglob("*.py"))
ALL = [found for path in FILES for found in _imports(path)]
OURS = [found for found in ALL if found.target.startswith("ray_envcache.")]


def test_imports_go_up_the_list_only() -> None:
    """A room imports from itself and from rooms before it; so no two rooms import each other."""
    order = {room: number for number, room in enumerate(ROOMS)}
    assert {found.room for found in ALL} <= order.keys()
    wrong = [one for one in OURS if order.get(one.target.split(".")[1], 99) > order[one.room]]
    assert not wrong


def test_folders_are_few_and_flat() -> None:
    """Each folder has 3 to 11 modules, none has a folder of its own, and the root has doors only."""
    folders = {path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    sizes = {folder.name: len([*folder.glob("*.py")]) - 1 for folder in folders}
    assert all(3 <= size <= 11 for size in sizes.values()), sizes
    assert not [inner for folder in folders for inner in folder.glob("*/*.py")]


def test_libraries_stay_in_their_rooms() -> None:
    """Ray is imported by what Ray starts, click and rich by what people see, and `inside` needs no library at all."""
    for library, rooms in LIBRARIES.items():
        users = {one for one in ALL if one.target.split(".")[0] == library}
        assert all(one.room in rooms or one.place in rooms for one in users), library
    assert {one.target.split(".")[0] for one in ALL if one.room == "inside"} <= {*sys.stdlib_module_names, "packaging"}


def test_importing_the_package() -> None:
    """`import ray_envcache`, which comes before every module of it, registers the field and loads no more than that."""
    top = {one.target for one in OURS if one.place == "__init__" and not one.in_function}
    assert {target.split(".")[1] for target in top} <= {"errors", "version", "field"} | {"hook", "api", "sessions"}


def test_imports_in_functions_are_boundaries() -> None:
    """Imports stand at the top of a file, but for the boundaries of the warm path and what runs on other machines."""
    lazy = [one for one in OURS if one.in_function and not one.target.startswith(BEHIND_A_BOUNDARY)]
    assert {one.place for one in lazy} <= {"__init__", "acquire"}
    assert len({(one.place, one.target) for one in ALL if one.in_function}) <= 40


def test_the_hold_needs_next_to_nothing() -> None:
    """The hold runs at the start of every interpreter: four modules of the standard library, none at its top."""
    found = [one for one in ALL if one.place == "inside/hold"]
    assert {one.target for one in found} == {"fcntl", "os", "sys", "time"}
    assert all(one.in_function for one in found)

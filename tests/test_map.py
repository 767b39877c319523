"""The map in the package's README: it names every folder as the folder names itself, and files that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import ray_envcache

PACKAGE = Path(ray_envcache.__file__).parent
MAP = (PACKAGE / "README.md").read_text("utf-8")


def test_each_folder_has_its_line() -> None:
    """The table has the docstring of each folder, in the order of the layering test."""
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", MAP, re.MULTILINE))
    inits = {path.parent.name: path for path in PACKAGE.glob("*/__init__.py")}
    assert rows == {name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for name, path in inits.items()}


def test_promises_name_what_exists() -> None:
    """All eight promises are there, and each module and test that the index names is a file."""
    rows = re.findall(r"^\| (\d) (.*?) \| (.*?) \| (.*?) \|$", MAP, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, 9))
    for _, promise, kept, tested in rows:
        modules, tests = re.findall(r"`([\w/]+\.py)`", kept), re.findall(r"`([\w/]+\.py)`", tested)
        assert modules, promise
        assert tests, promise
        assert all((PACKAGE / module).is_file() for module in modules), promise
        assert all((PACKAGE.parent / test).is_file() for test in tests), promise

"""What of uv's export is read further: the wheels that may fit."""

from __future__ import annotations

from typing import Any

import pytest

from ray_envcache.resolve.export import without_foreign

TAGS = frozenset({"cp311-cp311-manylinux_2_17_x86_64", "cp311-abi3-manylinux_2_17_x86_64", "py3-none-any"})
FITTING = [
    "one-1.0-py3-none-any.whl",
    "one-1.0-py2.py3-none-any.whl",
    "one-1.0-7-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    "one-1.0-cp39.cp311-abi3-manylinux_2_17_x86_64.whl",
    "One-1.0-PY3-None-Any.WHL",
]
FOREIGN = [
    "one-1.0-cp311-cp311-win_amd64.whl",
    "one-1.0-cp310-cp310-manylinux_2_17_x86_64.whl",
    "one-1.0-cp311-cp311-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
    "py3-none-any-1.0-cp312-cp312-manylinux_2_17_x86_64.whl",
]
DOUBTFUL = ["one-1.0-cp312-cp312-win_amd64.whl?token=1", "one"]


def url(file: str) -> dict[str, Any]:
    return {"url": f"https://example.org/packages/{file}", "hashes": {}}


@pytest.mark.parametrize("spell", [url, lambda file: {"name": file, "url": "x"}, lambda file: {"path": f"../{file}"}])
def test_wheels_for_others_are_left_aside(spell: Any) -> None:
    """Told by their names, whichever way the lockfile has those; what is no name of a wheel is kept."""
    kept = [spell(file) for file in (*FITTING, *DOUBTFUL)]
    package = {"name": "one", "sdist": {"url": "x"}, "wheels": [*kept, *(spell(file) for file in FOREIGN)]}
    assert without_foreign(TAGS, package) == {**package, "wheels": kept}


def test_where_none_fits() -> None:
    """Then all stay, so that packaging says what it looked for; and a package without wheels is as it was."""
    package = {"name": "one", "wheels": [url(file) for file in FOREIGN]}
    assert without_foreign(TAGS, package) == package
    assert without_foreign(TAGS, {"name": "one", "directory": {}}) == {"name": "one", "directory": {}}

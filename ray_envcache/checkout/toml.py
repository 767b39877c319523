"""TOML files, read so that an error names the file, the cause and a way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomli

from ray_envcache.errors import LockfileError


def read(path: Path, hint: str) -> dict[str, Any]:
    """The content of the file. Raises LockfileError with `hint` where it cannot be read."""
    try:
        return parse(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LockfileError(f"Cannot read `{path}`: {error}", hint) from error


def parse(text: str) -> dict[str, Any]:
    """The content of the text. Raises ValueError, or RecursionError where it is nested too deep."""
    return tomli.loads(text)


def table_in(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The table within tables, {} where there is none."""
    for key in keys:
        found = table.get(key)
        table = found if isinstance(found, dict) else {}
    return table

"""The table for people, and the JSON with every sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Result, Row, number

SCHEMA_VERSION = 1
_VERDICTS = {True: "met", False: "MISSED", None: ""}


def table(result: Result) -> str:
    """The rows of one measure: what, found, spread, target, verdict, and what it was made of."""
    lines = [f"\n{result.name} ({result.seconds:.0f} s)"]
    cells = [_cells(row) for row in result.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for one, row in zip(cells, result.rows, strict=True):
        shown = "  ".join(cell.ljust(width) for cell, width in zip(one, widths, strict=True))
        lines.append(f"  {shown}  {row.detail}".rstrip())
    lines += [f"  note: {note}" for note in result.notes]
    # The JSON has all of it.
    lines += [f"  FAILED: {failure[:100]} ... {failure[-200:]}" for failure in result.failures]
    return "\n".join(lines)


def write(path: Path, machine: dict[str, Any], options: dict[str, Any], results: Iterable[Result]) -> None:
    """Write everything that was found."""
    measures = [result.to_json() for result in results]
    data = {"schema_version": SCHEMA_VERSION, "machine": machine, "options": options, "measures": measures}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def _cells(row: Row) -> list[str]:
    spread = f"{number(row.spread[0])}..{number(row.spread[1])}" if row.spread else ""
    target = "" if row.target is None else f"{'<=' if row.goal == 'at most' else '>='} {row.target:g}"
    return [row.what, f"{number(row.value)} {row.unit}".strip(), spread, target, _VERDICTS[row.met]]

"""`prefetch`: have every node of a cluster set up environments, and show what came of each."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_envcache.cli import tables
from ray_envcache.cli.build import field_options, spec_of
from ray_envcache.cli.doctor import print_faults
from ray_envcache.doctor.findings import ask, node_name
from ray_envcache.hook import pinned_field
from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.system.texts import printable

_COLUMNS = ("NODE", "HOST", "ENVIRONMENT", "STATE", "KEY", "SECONDS", "BYTECODE")


@click.command(epilog="Example: ray-envcache prefetch --address auto training serving")
@click.option("--address", default="auto", metavar="ADDR", help='The cluster: host:port of its GCS; default: "auto".')
@click.option("--follow", is_flag=True, help="Go on with nodes that join, until interrupted.")
@click.option("--timeout", type=click.IntRange(1), default=7200, metavar="SECONDS", help="Per node; default: 7200.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@field_options
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
def prefetch(*, address: str, follow: bool, timeout: int, as_json: bool, paths: list[str], **options: Any) -> None:
    """Make environments ready on every node of a cluster, with proof.

    PATH and the options are those of `build`. Each node, also one without CPUs, finds or builds each environment,
    completes its bytecode and starts a worker from it. The exit code is 1 where one is not ready on one node, or where
    nodes of the same platform have different keys.
    """
    specs = [spec_of(path=path, **options) for path in paths]
    fields = {spec.path: pinned_field(spec.to_field()) for spec in specs}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    console = Console(stderr=True)

    def enter(row: dict[str, Any]) -> None:
        rows[row["node_id"], row["path"]] = row
        if not console.is_terminal:
            click.echo(printable(" ".join(_cells(row))), err=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how supervisors interrupt
    with suppress(KeyboardInterrupt), Live(get_renderable=lambda: _table(rows), console=console, transient=True):
        ask(address, enter, timeout=timeout, fields=fields, follow=follow and os.getpid())
    found = [*rows.values()]
    ready = sum(row["ok"] for row in found)
    ok = 0 < ready == len(found)
    if as_json:
        tables.print_json({"ok": ok, "environments": found})
    else:
        tables.print_table(_COLUMNS, map(_cells, found), numeric={"SECONDS"})
        print_faults({(row["node_id"], str(row["findings"])): row for row in found}.values())  # each fault once
        tables.say(f"{ready} of {len(found)} ready")
    sys.exit(0 if ok else 1)


def _table(rows: Mapping[Any, dict[str, Any]]) -> Table:
    table = Table(*_COLUMNS, box=None)
    for row in sorted(rows.values(), key=lambda row: row["ok"]):  # a terminal may be too short for those that are ready
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in _cells(row)))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = "failed" if row["findings"] else row["how"] or "running"
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
    bytecode = {None: "-", True: "complete", False: "missing"}[row["bytecode"]]
    name, key = node_name(row["ip"], row["node_id"]), (row["key"] or "-")[:SHOWN_DIGITS]
    return name, row["host"], row["path"], state, key, seconds, bytecode

"""`doctor` and `prefetch`: whether a host, or each node of a cluster, is set up, and has its environments."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import click
import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ray_envcache.cli import tables
from ray_envcache.cli.build import absolute, field_options, spec_of
from ray_envcache.doctor.findings import ERROR, OK, ask, latest, node_name
from ray_envcache.doctor.host import check_lockfile, examine, registered
from ray_envcache.hook import pinned_field
from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.system.texts import printable

_COLORS = {"ok": "green", "warn": "yellow", "error": "red"}
_CHECKS = ("plugin", "store", "space", "uv")
"""The checks that the table of nodes shows. Ray starts no node with another Ray or Python than its head has."""
_PREFETCHED = ("NODE", "HOST", "ENVIRONMENT", "STATE", "KEY", "SECONDS", "BYTECODE")


@click.command(epilog="Example: ray-envcache doctor --address auto")
@click.option("--address", metavar="ADDR", help='Ask the nodes of this cluster: "auto", or host:port of its GCS.')
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=30, show_default=True, metavar="SECONDS",
    help="With --address: how long a node may take to answer.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", required=False)
def doctor(*, address: str | None, timeout: float, as_json: bool, path: str | None) -> None:
    """Check that this host, or every node of a cluster, is set up.

    On this host it checks the store, uv, Python, Ray and the environment variables, and that the lockfile at PATH, or
    the one of that folder, can be built. With --address it asks every node of the cluster; `ray-envcache prefetch` has
    each set up environments.
    """
    if address and path:
        raise click.UsageError(f"PATH is for this host. To try it on every node: ray-envcache prefetch {path}")
    answers: list[dict[str, Any]] = []
    if address:
        ask(address, answers.append, timeout=timeout)
    data = answers[0] if address else _look_at_host(path and absolute(path))
    failed = any(map(_has_error, data.get("nodes", [data])))
    if as_json:
        tables.print_json({"ok": not failed, **data})
    elif address:
        _print_cluster(data)
    else:
        _print_findings(data["findings"])
    sys.exit(1 if failed else 0)


def _look_at_host(path: str | None) -> dict[str, Any]:
    # The variables that the shell gave us: in os.environ is the registration, because we import the package.
    shell = psutil.Process().environ()
    found = [*examine(), registered(shell), *([check_lockfile(path)] if path else [])]
    return {"findings": [asdict(one) for one in found]}


def _print_findings(findings: Iterable[dict[str, str]], place: str = "") -> None:
    for found in findings:
        state = click.style(f"{found['state']:5}", fg=_COLORS.get(found["state"]))
        click.echo(f"{state}  {place or format(found['name'], '18')}{_printable(found['text'])}")
        if found["hint"] and found["state"] != OK:
            click.echo(f"       hint: {_printable(found['hint'])}")


def _printable(text: str) -> str:
    # The text of a node comes from another machine.
    return "\n       ".join(printable(line) for line in text.splitlines())


def _print_cluster(data: dict[str, Any]) -> None:
    """Print the nodes of a cluster, what is wrong with each, and a line of totals."""
    nodes = data["nodes"]
    tables.print_table(("NODE", "HOST", *map(str.upper, _CHECKS)), map(_row, nodes), numeric=())
    _print_faults(nodes)
    bad = sum(map(_has_error, nodes))
    click.echo(f"{tables.count(len(nodes), 'node')} of {data['address']}, {bad} with errors")


def _print_faults(nodes: Iterable[dict[str, Any]]) -> None:
    """Print what is not in order on nodes: their findings as JSON has them."""
    for node in nodes:
        wrong = [found for found in node["findings"] if found["state"] != OK]
        _print_findings(wrong, place=f"{node_name(node['ip'], node['node_id'])}: ")


def _row(node: dict[str, Any]) -> Sequence[str]:
    # The first of a name is what the node says; comparisons come after it.
    found = {one["name"]: one for one in reversed(node["findings"])}
    cells = [_cell(found[name]) if name in found else "-" for name in _CHECKS]
    return (node_name(node["ip"], node["node_id"]), node["host"], *cells)


def _cell(found: dict[str, str]) -> str:
    return ERROR if found["state"] == ERROR else found["text"].partition(": ")[0]


def _has_error(found: dict[str, Any]) -> bool:
    return any(one["state"] == ERROR for one in found["findings"])


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
    answers: list[dict[str, Any]] = []
    console = Console(stderr=True)

    def enter(row: dict[str, Any]) -> None:
        answers.append(row)
        if not console.is_terminal:
            click.echo(printable(" ".join(_cells(row))), err=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how supervisors interrupt
    with suppress(KeyboardInterrupt), Live(get_renderable=lambda: _table(answers), console=console, transient=True):
        ask(address, enter, timeout=timeout, fields=fields, follow=follow and os.getpid())
    found = latest(answers)
    ready = sum(row["ok"] for row in found)
    ok = 0 < ready == len(found)
    if as_json:
        tables.print_json({"ok": ok, "environments": found})
    else:
        tables.print_table(_PREFETCHED, map(_cells, found), numeric={"SECONDS"})
        _print_faults({(row["node_id"], str(row["findings"])): row for row in found}.values())  # each fault once
        tables.say(f"{ready} of {len(found)} ready")
    sys.exit(0 if ok else 1)


def _table(answers: Iterable[dict[str, Any]]) -> Table:
    table = Table(*_PREFETCHED, box=None)
    # What is not ready comes first: a terminal may be too short for all.
    for row in sorted(latest(answers), key=lambda row: row["ok"]):
        table.add_row(*(Text(printable(cell), overflow="fold") for cell in _cells(row)))
    return table


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = "failed" if row["findings"] else row["how"] or "running"
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
    bytecode = {None: "-", True: "complete", False: "missing"}[row["bytecode"]]
    name, key = node_name(row["ip"], row["node_id"]), (row["key"] or "-")[:SHOWN_DIGITS]
    return name, row["host"], row["path"], state, key, seconds, bytecode

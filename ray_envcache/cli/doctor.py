"""`doctor`: check that this host, or every node of a cluster, is set up."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import click
import psutil

from ray_envcache.cli import tables
from ray_envcache.cli.build import absolute
from ray_envcache.doctor.findings import ERROR, OK, ask, node_name
from ray_envcache.doctor.host import check_lockfile, examine, registered

_COLORS = {"ok": "green", "warn": "yellow", "error": "red"}
_COLUMNS = ("plugin", "store", "space", "uv")
"""The checks that the table of nodes shows. Ray starts no node with another Ray or Python than its head has."""


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
        print_cluster(data)
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
        click.echo(f"{state}  {place or format(found['name'], '14')}{_printable(found['text'])}")
        if found["hint"] and found["state"] != OK:
            click.echo(f"       hint: {_printable(found['hint'])}")


def _printable(text: str) -> str:
    # The text of a node comes from another machine: no control characters, and letters this terminal may lack.
    return "\n       ".join(tables.shown(line) for line in text.splitlines())


def print_cluster(data: dict[str, Any]) -> None:
    """Print the nodes of a cluster, what is wrong with each, and a line of totals."""
    nodes = data["nodes"]
    tables.print_table(("NODE", "HOST", *map(str.upper, _COLUMNS)), map(_row, nodes), numeric=())
    print_faults(nodes)
    bad = sum(map(_has_error, nodes))
    click.echo(f"{tables.count(len(nodes), 'node')} of {data['address']}, {bad} with errors")


def print_faults(nodes: Iterable[dict[str, Any]]) -> None:
    """Print what is not in order on nodes: their findings as JSON has them."""
    for node in nodes:
        wrong = [found for found in node["findings"] if found["state"] != OK]
        _print_findings(wrong, place=f"{node_name(node['ip'], node['node_id'])}: ")


def _row(node: dict[str, Any]) -> Sequence[str]:
    # The first of a name is what the node says; comparisons come after it.
    found = {one["name"]: one for one in reversed(node["findings"])}
    cells = [_cell(found[name]) if name in found else "-" for name in _COLUMNS]
    return (node_name(node["ip"], node["node_id"]), node["host"], *cells)


def _cell(found: dict[str, str]) -> str:
    return ERROR if found["state"] == ERROR else found["text"].partition(": ")[0]


def _has_error(found: dict[str, Any]) -> bool:
    return any(one["state"] == ERROR for one in found["findings"])

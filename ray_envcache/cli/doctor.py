"""`doctor`: check that this host, or every node of a cluster, is set up."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import psutil

from ray_envcache.cli import tables
from ray_envcache.cli.build import absolute
from ray_envcache.doctor import variables
from ray_envcache.doctor.findings import ERROR, OK, SAYS, node_name
from ray_envcache.doctor.host import check_lockfile, examine
from ray_envcache.errors import ClusterError, EnvCacheError
from ray_envcache.field.guard import guarded
from ray_envcache.field.registration import UV_RUN
from ray_envcache.field.spec import FIELD
from ray_envcache.hook import pinned_field
from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.system import children
from ray_envcache.system.texts import format_size

_COLORS = {"ok": "green", "warn": "yellow", "error": "red"}


@click.command(epilog="Example: ray-envcache doctor --address auto .")
@click.option("--address", metavar="ADDR", help='Ask the nodes of this cluster: "auto", or host:port of its GCS.')
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=30, show_default=True, metavar="SECONDS",
    help="With --address: how long a node may take to answer.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", required=False)
def doctor(*, address: str | None, timeout: float, as_json: bool, path: str | None) -> None:
    """Check that this host, or every node of a cluster, is set up.

    On this host it checks the store, uv, Python, Ray and the environment variables. With --address it asks every node
    of the cluster. PATH is a lockfile or its folder, as for `build`: this host checks that it can be built, and each
    node of a cluster sets up its environment, which may take as long as a build.
    """
    path = path and absolute(path)
    data = _ask_cluster(address, timeout, path) if address else _look_at_host(path)
    failed = any(found["state"] == ERROR for one in data.get("nodes", [data]) for found in one["findings"])
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
    facts = asdict(examine())
    more = [variables.registered(shell), *([check_lockfile(path)] if path else [])]
    return {**facts, "findings": [*facts["findings"], *map(asdict, more)]}


def _ask_cluster(address: str, timeout: float, path: str | None) -> dict[str, Any]:
    """Ask in a process of its own, because Ray ends a driver whose cluster stops answering. Raises EnvCacheError."""
    runtime_env = guarded({FIELD: pinned_field({"path": path})}) if path else None
    request = {"address": address, "timeout": timeout, "runtime_env": runtime_env}
    argv = [sys.executable, "-m", "ray_envcache.doctor.cluster", json.dumps(request)]
    # `-m` imports what lies in the working directory first: so not in a folder of the user.
    # Started below `uv run`, Ray would otherwise run the probes by `uv run` too.
    environ = {**os.environ, UV_RUN: "0"}
    done = children.run(argv, environ=environ, cwd=Path("/"), on_line=_pass_on)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        end = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ClusterError(
            f"Ray ended with status {done.returncode} while it talked to `{address}`:\n{end}",
            "is the cluster's head running? See Ray's logs there",
        ) from None
    if "error" in answer:
        raise EnvCacheError.from_json(answer["error"])
    return answer


def _pass_on(line: str) -> None:
    if line.startswith(SAYS):
        click.echo(line, err=True)


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
    built = any(node["seconds"] is not None for node in nodes)
    columns = ("NODE", "HOST", "PLUGIN", "STORE", "FREE", "RAY", "PYTHON", "UV", *(("KEY", "SECONDS") if built else ()))
    rows = [_row(node)[: len(columns)] for node in nodes]
    tables.print_table(columns, rows, numeric={"FREE", "SECONDS"})
    for node in nodes:
        wrong = [found for found in node["findings"] if found["state"] != OK]
        _print_findings(wrong, place=f"{_name(node)}: ")
    bad = sum(any(found["state"] == ERROR for found in node["findings"]) for node in nodes)
    click.echo(f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} of {data['address']}, {bad} with errors")


def _row(node: dict[str, Any]) -> Sequence[str]:
    free, seconds = node["free_bytes"], node["seconds"]
    # A node that answered without the plugin still said which Python it has.
    plugin = node["plugin"] or ("not loaded" if node["python"] else "-")
    unusable = any((found["name"], found["state"]) == ("store", ERROR) for found in node["findings"])
    return (
        _name(node), node["host"], plugin, "unusable" if unusable else node["store"] or "-",
        "-" if free is None else format_size(free), node["ray"] or "-", node["python"] or "-", node["uv"] or "-",
        (node["key"] or "-")[:SHOWN_DIGITS], "-" if seconds is None else f"{seconds:.1f}",
    )  # fmt: skip


def _name(node: dict[str, Any]) -> str:
    return node_name(node["ip"], node["node_id"])

"""What `doctor` does."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import psutil

from ray_envcache.cli import tables
from ray_envcache.doctor import variables
from ray_envcache.doctor.findings import ERROR, OK
from ray_envcache.doctor.host import check_lockfile, examine
from ray_envcache.doctor.nodes import SAYS, node_name
from ray_envcache.errors import ClusterError, EnvCacheError
from ray_envcache.system import children

SCHEMA_VERSION = 1
_MODULE = "ray_envcache.doctor.cluster"  # by name: it imports ray
_COLORS = {"ok": "green", "warn": "yellow", "error": "red"}


@click.command
@click.option("--address", metavar="ADDR", help='Ask the nodes of this cluster: "auto", or host:port of its GCS.')
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=30, show_default=True, metavar="SECONDS",
    help="With --address: how long a node may take to answer.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", required=False)
def doctor(*, address: str | None, timeout: float, as_json: bool, path: str | None) -> None:
    """Check that this host, or every node of a cluster, is set up.

    Without an address it looks at this host: the store, uv, Python, Ray, the variables. With one it asks every node
    of the cluster what it has. PATH, a lockfile or its folder as in `build`, is checked too: on a cluster every node
    sets up its environment, which may take as long as a build.
    """
    data = _of_cluster(address, timeout, path) if address else _of_host(path)
    failed = any(found["state"] == ERROR for found in _findings(data))
    if as_json:
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "ok": not failed, **data}, indent=2))
    elif address:
        _print_cluster(data)
    else:
        _print_findings(data["findings"])
    sys.exit(1 if failed else 0)


def _of_host(path: str | None) -> dict[str, Any]:
    # What we were started with: in our own variables there is the registration, since we import the package.
    shell = psutil.Process().environ()
    facts = asdict(examine())
    more = [variables.registered(shell), *([check_lockfile(path)] if path else [])]
    return {**facts, "findings": [*facts["findings"], *map(asdict, more)]}


def _of_cluster(address: str, timeout: float, path: str | None) -> dict[str, Any]:
    request = {"address": address, "timeout": timeout, "path": path and os.path.abspath(path)}
    argv = [sys.executable, "-m", _MODULE, json.dumps(request)]
    # In no folder of the user: `-m` imports first what lies there.
    done = children.run(argv, environ=os.environ, cwd=Path("/"), on_line=_pass_on)
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise _silence(address, done) from None
    if "error" in answer:
        raise EnvCacheError.from_json(answer["error"])
    return answer


def _pass_on(line: str) -> None:
    if line.startswith(SAYS):
        click.echo(line, err=True)


def _silence(address: str, done: children.Completed) -> ClusterError:
    if done.returncode == -signal.SIGALRM:
        return ClusterError(f"The cluster at `{address}` stopped answering", "are its head and its GCS alive?")
    end = "\n".join(done.stderr.strip().splitlines()[-5:])
    return ClusterError(f"Ray ended with status {done.returncode} instead of an answer:\n{end}", "see Ray's logs")


def _findings(data: dict[str, Any]) -> list[dict[str, str]]:
    """The findings of a host, or of all nodes."""
    return [found for one in data.get("nodes", [data]) for found in one["findings"]]


def _print_findings(findings: Iterable[dict[str, str]], place: str = "") -> None:
    for found in findings:
        state = click.style(f"{found['state']:5}", fg=_COLORS.get(found["state"]))
        click.echo(f"{state}  {place or format(found['name'], '14')}{_printable(found['text'])}")
        if found["hint"] and found["state"] != OK:
            click.echo(f"       hint: {_printable(found['hint'])}")


def _printable(text: str) -> str:
    # What nodes say comes from other machines: no control characters, and any letters.
    return "\n       ".join(tables.shown(line, sys.stdout) for line in text.splitlines())


def _print_cluster(data: dict[str, Any]) -> None:
    nodes = data["nodes"]
    tables.print_nodes(nodes, sys.stdout)
    for node in nodes:
        wrong = [found for found in node["findings"] if found["state"] != OK]
        _print_findings(wrong, place=f"{node_name(node['ip'], node['node_id'])}: ")
    bad = sum(any(found["state"] == ERROR for found in node["findings"]) for node in nodes)
    click.echo(f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} of {data['address']}, {bad} with errors")

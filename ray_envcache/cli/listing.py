"""`list`: the environments of the store, or Ray's session directories. Imports nothing that builds or collects."""

from __future__ import annotations

import os

import click

from ray_envcache.cli import tables
from ray_envcache.sessions import directories
from ray_envcache.sessions.liveness import judge_sessions
from ray_envcache.store import readonly
from ray_envcache.survey import inventory
from ray_envcache.system.texts import printable

tmpdir_option = click.option(
    "--tmpdir", metavar="DIR", help="With --sessions: look here instead of $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray."
)


def refuse_without_sessions(*given: object) -> None:
    """Raise UsageError if an option that needs --sessions was given without it."""
    if any(value is not None for value in given):
        raise click.UsageError("--tmpdir and --older-than are about session directories: add --sessions")


@click.command("list", epilog="Example: ray-envcache list --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and times in UTC.")
@click.option("--sessions", is_flag=True, help="Show Ray's session directories instead: alive or dead, size, age.")
@tmpdir_option
def list_(*, as_json: bool, sessions: bool, tmpdir: str | None) -> None:
    """Show the environments, their users and their size."""
    if sessions:
        _show_sessions(tmpdir, as_json=as_json)
        return
    refuse_without_sessions(tmpdir)
    layout, below = readonly.opened()
    found = inventory.survey(layout, below)
    if as_json:
        roots = {"root": os.fspath(layout.root), "readonly_roots": [os.fspath(one.root) for one in below]}
        tables.print_json({**roots, "envs": [tables.status_as_json(status) for status in found]})
    else:
        tables.print_environments(found)
    for root in readonly.missing_stores(layout, os.environ):
        click.echo(f"note: {readonly.VARIABLE} names `{root}`, where there is no store", err=True)


def _show_sessions(tmpdir: str | None, *, as_json: bool) -> None:
    temps = directories.temp_dirs(tmpdir, os.environ)
    found = judge_sessions(temps)
    paths = [os.fspath(temp) for temp in temps]
    if as_json:
        tables.print_json({"temp_dirs": paths, "sessions": [tables.session_as_json(one) for one in found]})
    else:
        tables.print_sessions(found)
        places = ", ".join(map(printable, paths)) or "nowhere: no directory of Ray's is there"
        click.echo(f"Looked in {places}", err=True)

"""`list`: the environments of the store, or Ray's session directories. Imports nothing that builds or removes."""

from __future__ import annotations

import os
import sys

import click

from ray_envcache.cli import tables
from ray_envcache.cli.arguments import refuse_without_sessions, tmpdir_option
from ray_envcache.cli.sessions import show
from ray_envcache.store import readonly
from ray_envcache.survey import inventory


@click.command("list", epilog="Example: ray-envcache list --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and times in UTC.")
@click.option("--sessions", is_flag=True, help="Show Ray's session directories instead: alive or dead, size, age.")
@tmpdir_option
def list_(*, as_json: bool, sessions: bool, tmpdir: str | None) -> None:
    """Show the environments, their users and their size."""
    if sessions:
        show(tmpdir, tables.print_json if as_json else None)
        return
    refuse_without_sessions(tmpdir)
    layout, below = readonly.opened()
    found = inventory.survey(layout, below)
    if as_json:
        roots = {"root": os.fspath(layout.root), "readonly_roots": [os.fspath(one.root) for one in below]}
        tables.print_json({**roots, "envs": [tables.status_as_json(status) for status in found]})
    else:
        tables.print_environments(found, sys.stdout)
    for root in readonly.missing_stores(layout, os.environ):
        click.echo(f"note: {readonly.VARIABLE} names `{root}`, where there is no store", err=True)

"""The commands `list --sessions` and `gc --sessions`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ray_envcache.cli import tables
from ray_envcache.sessions import directories, run_directory
from ray_envcache.sessions.collector import SessionReport, collect_sessions
from ray_envcache.sessions.directories import Session
from ray_envcache.sessions.liveness import judge_sessions
from ray_envcache.sessions.short_path import sweep_links
from ray_envcache.system.texts import printable, utc

PrintJson = Callable[[dict[str, Any]], None]


def show(tmpdir: str | None, print_json: PrintJson | None) -> None:
    """Print the sessions as a table, or as JSON through `print_json`."""
    temps = directories.temp_dirs(tmpdir, os.environ)
    found = judge_sessions(temps)
    if print_json:
        print_json({"temp_dirs": _paths(temps), "sessions": [_as_json(one) for one in found]})
    else:
        tables.print_sessions(found, sys.stdout)
        places = ", ".join(map(printable, _paths(temps))) or "nowhere: no directory of Ray's is there"
        click.echo(f"Looked in {places}", err=True)


def collect(
    tmpdir: str | None, older_than: float | None, *, dry_run: bool, others: list[str], print_json: PrintJson | None
) -> None:
    """Remove dead sessions, unused links of `short_tmpdir`, and directories of killed runs.

    Raises UsageError for `others`, options that have nothing to do with sessions.
    """
    if others:
        raise click.UsageError(f"--sessions is about session directories: leave out {', '.join(others)}")
    temps = directories.temp_dirs(tmpdir, os.environ)
    report = collect_sessions(temps, older_than=older_than or 0.0, dry_run=dry_run)
    if not dry_run:
        sweep_links()
        run_directory.sweep(directories.run_dirs(tmpdir, os.environ))
    if print_json:
        print_json({"dry_run": dry_run, "temp_dirs": _paths(temps), **_report_as_json(report)})
    else:
        tables.print_session_report(report, sys.stdout, dry_run=dry_run)
    for one in report.failed:
        click.echo(f"error: Cannot remove {printable(one.name)}: {printable(one.why)}", err=True)
    if report.failed:
        sys.exit(1)


def _report_as_json(report: SessionReport) -> dict[str, Any]:
    lists = {
        name: [_as_json(one) for one in getattr(report, name)] for name in ("removed", "kept", "alive", "in_doubt")
    }
    failed = [[one.name, one.why] for one in report.failed]
    return {**lists, "failed": failed, "freed_bytes": report.freed_bytes}


def _as_json(one: Session) -> dict[str, Any]:
    data = {name: value for name, value in asdict(one).items() if name not in {"pid", "going", "changed"}}
    times = {f"{name}_at": utc(when) if (when := data.pop(name)) else None for name in ("started", "last_written")}
    return {**data, **times}


def _paths(temps: list[Path]) -> list[str]:
    return [os.fspath(temp) for temp in temps]

"""`why`, `pin`, `unpin`, `rm`, `purge` and `gc`: what keeps environments, and what removes them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.cli import tables
from ray_envcache.gc.collector import Collected, collect
from ray_envcache.gc.evict import evict, with_layers
from ray_envcache.gc.policy import Limits, parse_limit
from ray_envcache.sessions import directories, run_directory
from ray_envcache.sessions.collector import collect_sessions
from ray_envcache.store import journal, pins, roots
from ray_envcache.store.layout import Entry
from ray_envcache.survey import inventory
from ray_envcache.system.texts import format_size, parse_duration, printable


@click.command(epilog="Example: ray-envcache why 125a8")
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(*, key: str, as_json: bool) -> None:
    """Show what keeps an environment: its users and its pin.

    KEY is the start of a key, as `list` shows it. Users are clusters, and processes that run from the environment.
    """
    store = Store.open()
    found = [inventory.status(store.layout, one) for one in store.find(key)]
    if as_json:
        tables.print_json({"envs": [tables.status_as_json(status) for status in found]})
        return
    for status in found:
        tables.print_users(status)


@click.command(epilog="Example: ray-envcache pin 125a8")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def pin(*, keys: tuple[str, ...]) -> None:
    """Keep environments until `unpin`.

    Until then `gc`, `rm` and `purge` leave them alone, used or not. KEY is the start of a key, as `list` shows it.
    """
    store = Store.open()
    for key in keys:
        entry = store.find(key)[0]
        pins.pin(store.layout, entry)
        click.echo(f"Pinned {entry.short}", err=True)


@click.command(epilog="Example: ray-envcache unpin 125a8")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def unpin(*, keys: tuple[str, ...]) -> None:
    """Undo `pin`.

    KEY is the start of a key, as `list` shows it.
    """
    store = Store.open()
    for key in keys:
        entry = store.find(key)[0]
        was_pinned = pins.unpin(store.layout, entry.key)
        click.echo(f"{'Unpinned' if was_pinned else 'Was not pinned:'} {entry.short}", err=True)


@click.command(epilog="Example: ray-envcache rm 125a8")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def rm(*, keys: tuple[str, ...]) -> None:
    """Remove environments by key.

    KEY is the start of a key, as `list` shows it. An environment that is in use or pinned stays, and the error says
    why. The layers that lie on it go first: they cannot be used without it.
    """
    store = Store.open()
    for entry in with_layers(store.layout, [entry for key in keys for entry in _removable(store.find(key))]):
        gone = evict(store.layout, entry)
        click.echo(f"Removed {entry.short}, freed {format_size(gone.reclaimable)}", err=True)


@click.command(epilog="Example: ray-envcache purge --yes")
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(*, yes: bool) -> None:
    """Remove the journal, and all environments not in use or pinned."""
    store = Store.open()
    if not yes:
        _confirm(f"Remove all environments in {store.layout.root}?")
    report = collect(store.layout, Limits(everything=True))
    journal.remove(store.layout)
    _finish_collection(report, as_json=False, dry_run=False)
    for layout in store.readonly:
        click.echo(f"The read-only store at {layout.root} stays as it is", err=True)


@click.command(epilog="Example: ray-envcache gc --dry-run --unused-for 2d")
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed; of sessions also what stays.")
@click.option("--unused-for", metavar="14d", help="Remove what was unused this long.")
@click.option("--max-used-space", metavar="50GB|30%", help="Shrink the store to this.")
@click.option("--min-free-space", metavar="10%", help="Free the disk up to this.")
@click.option("--reserved-space", metavar="20GB", help="Never shrink the store below this.")
@click.option("--all", "everything", is_flag=True, help="Remove everything that is neither in use nor pinned.")
@click.option("--sessions", is_flag=True, help="Remove Ray's session directories of dead clusters instead.")
@click.option("--older-than", metavar="1d", help="With --sessions: not written to for so long.")
@click.option(
    "--tmpdir", metavar="DIR", help="With --sessions: look here instead of $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def gc(*, dry_run: bool, everything: bool, as_json: bool, sessions: bool, **limits: Any) -> None:
    """Remove environments that are no longer used. Made for cron.

    What is in use or pinned stays. The command never waits for a user of an environment, and no user waits for it. If
    another collector is at work it does nothing, and that is no error.

    Without options it removes what was unused for 14 days, and more, least recently used first, while less than 10 %
    of the disk, or 20 GB of a large one, is free. RAY_ENVCACHE_UNUSED_FOR, RAY_ENVCACHE_MAX_USED_SPACE,
    RAY_ENVCACHE_MIN_FREE_SPACE and RAY_ENVCACHE_RESERVED_SPACE change that; the value "off" switches a limit off.
    """
    older_than, tmpdir = limits.pop("older_than"), limits.pop("tmpdir")
    given = {name: parse_limit(name, value) for name, value in limits.items() if value is not None}
    if sessions:
        others = [f"--{name.replace('_', '-')}" for name in given] + ["--all"] * everything
        if others:
            raise click.UsageError(f"--sessions is about session directories: leave out {', '.join(others)}")
        age = 0.0 if older_than is None else parse_duration(older_than)
        _collect_sessions(tmpdir, age, dry_run=dry_run, as_json=as_json)
        return
    if older_than is not None or tmpdir is not None:
        raise click.UsageError("--tmpdir and --older-than are about session directories: add --sessions")
    chosen = replace(Limits.from_environ(os.environ), everything=everything, **given)
    report = collect(roots.opened()[0], chosen, dry_run=dry_run)
    _finish_collection(report, as_json=as_json, dry_run=dry_run)


def _collect_sessions(tmpdir: str | None, older_than: float, *, dry_run: bool, as_json: bool) -> None:
    """Remove dead sessions, and directories of killed runs."""
    temps = directories.temp_dirs(tmpdir, os.environ)
    found = collect_sessions(temps, older_than=older_than, dry_run=dry_run)
    if not dry_run:
        run_directory.sweep(directories.run_dirs(tmpdir, os.environ))
    if as_json:
        places = [os.fspath(temp) for temp in temps]
        tables.print_json({"dry_run": dry_run, "temp_dirs": places, **tables.sessions_as_json(found)})
    else:
        tables.print_sessions(found, dry_run=dry_run)
    _exit_if_failed([(one.name, one.why) for one in found if one.state == "failed"])


def _removable(found: list[Entry]) -> list[Entry]:
    """The entries of one key that are in our own store; if there are none, all of them, for `evict` to refuse."""
    return [entry for entry in found if not entry.readonly] or found


def _finish_collection(report: Collected, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        tables.print_json({"dry_run": dry_run, **asdict(report), "freed_bytes": report.freed_bytes})
    else:
        tables.print_report(report, dry_run=dry_run)
    _exit_if_failed(report.failed)


def _exit_if_failed(failed: Iterable[tuple[str, str]]) -> None:
    for name, reason in failed:
        click.echo(f"error: Cannot remove {printable(name)}: {printable(reason)}", err=True)
    if failed:
        sys.exit(1)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Not a terminal to ask on: add --yes")
    click.confirm(question, abort=True, err=True)

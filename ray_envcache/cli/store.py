"""What the commands do that look at the store, and clean it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ray_envcache.acquire import Store
from ray_envcache.cli import tables
from ray_envcache.cli.sessions import collect as collect_sessions
from ray_envcache.cli.sessions import show
from ray_envcache.errors import FieldValueError
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import VARIABLES, Limits
from ray_envcache.store import inventory, pins, readonly
from ray_envcache.store.layout import Entry, default_root
from ray_envcache.system.units import format_size, is_off, parse_duration, parse_space, utc

if TYPE_CHECKING:
    from ray_envcache.acquire import Store
    from ray_envcache.gc.collector import Collected

SCHEMA_VERSION = 1
_SWITCHED_OFF = object()
_TOLD = ("pid", "kind", "cluster", "job", "command", "since")

TIMER = """\
# crontab -e: every hour, quiet unless something fails
17 * * * * {in_cron} gc > /dev/null # ray-envcache-gc

# or systemd, as the store's user:
#   mkdir -p ~/.config/systemd/user, save the two files there, then
#   systemctl --user daemon-reload && systemctl --user enable --now ray-envcache-gc.timer
#   (loginctl enable-linger keeps it running while you are logged out)

# ~/.config/systemd/user/ray-envcache-gc.service
[Unit]
Description=Remove Ray environments that nobody uses

[Service]
Type=oneshot
{variables}ExecStart={in_systemd} gc
Nice=10
IOSchedulingClass=idle

# ~/.config/systemd/user/ray-envcache-gc.timer
[Unit]
Description=Remove Ray environments that nobody uses, every hour

[Timer]
OnCalendar=hourly
RandomizedDelaySec=10m
Persistent=true

[Install]
WantedBy=timers.target"""


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """A click callback from one of our parsers."""

    def callback(_context: click.Context, _option: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else parse(value)
        except FieldValueError as error:
            raise click.BadParameter(f"{error.message}; {error.hint}") from error

    return callback


def _limit(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """The same for a limit, which can also be switched off."""
    return _parsed(lambda text: _SWITCHED_OFF if is_off(text) else parse(text))


_tmpdir_option = click.option(
    "--tmpdir", metavar="DIR", help="With --sessions: look here, not in $RAY_TMPDIR/ray, $TMPDIR/ray or /tmp/ray."
)


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: bytes as integers, UTC times.")
@click.option("--sessions", is_flag=True, help="Show Ray's session directories instead: alive or dead, size, age.")
@_tmpdir_option
def list_(*, as_json: bool, sessions: bool, tmpdir: str | None) -> None:
    """Show the environments: their users, and the disk they take."""
    if sessions:
        show(tmpdir, _print_json if as_json else None)
        return
    _refuse_without_sessions(tmpdir)
    layout, below = readonly.opened()
    found = inventory.survey(layout, below)
    if as_json:
        roots = {"root": os.fspath(layout.root), "readonly_roots": [os.fspath(one.root) for one in below]}
        _print_json({**roots, "envs": [_as_json(status) for status in found]})
    else:
        tables.print_environments(found, sys.stdout)
    for root in readonly.missing_stores(layout, os.environ):
        click.echo(f"note: {readonly.VARIABLE} names `{root}`, where there is no store", err=True)


@click.command()
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(*, key: str, as_json: bool) -> None:
    """Show what keeps an environment.

    That is: the processes and clusters that use it, and its pin.
    """
    store = _opened()
    found = [inventory.status(store.layout, entry) for entry in store.find(key)]
    if as_json:
        _print_json({"envs": [_as_json(status) for status in found]})
        return
    for status in found:
        tables.print_users(status, sys.stdout)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def pin(*, keys: tuple[str, ...]) -> None:
    """Keep environments, whatever gc is asked for."""
    store = _opened()
    for key in keys:
        entry = store.find(key)[0]
        pins.pin(store.layout, entry)
        click.echo(f"Pinned {entry.key[: tables.KEY_LENGTH]}", err=True)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def unpin(*, keys: tuple[str, ...]) -> None:
    """Give pinned environments free."""
    store = _opened()
    for key in keys:
        entry = store.find(key)[0]
        freed = pins.unpin(store.layout, entry.key)
        click.echo(f"{'Unpinned' if freed else 'Was not pinned:'} {entry.key[: tables.KEY_LENGTH]}", err=True)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def rm(*, keys: tuple[str, ...]) -> None:
    """Remove environments by the start of their KEY.

    Refuses what is in use or pinned, and says why.
    """
    store = _opened()
    for entry in [entry for key in keys for entry in _removable(store.find(key))]:
        gone = evict(store.layout, entry)
        click.echo(f"Removed {entry.key[: tables.KEY_LENGTH]}, freed {format_size(gone.freed)}", err=True)


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(*, yes: bool) -> None:
    """Remove all that is neither in use nor pinned."""
    store = _opened()
    if not yes:
        _confirm(f"Remove all environments in {store.layout.root}?")
    _finish_collection(collect(store.layout, Limits(everything=True)), as_json=False, dry_run=False)
    for layout in store.lower:
        click.echo(f"The read-only store at {layout.root} stays as it is", err=True)


@click.command()
@click.option("-n", "--dry-run", is_flag=True, help="Only show what would be removed.")
@click.option(
    "--unused-for", callback=_limit(parse_duration), metavar="14d", help="Remove what nobody used for so long."
)
@click.option("--max-used-space", callback=_limit(parse_space), metavar="50GB|30%", help="Shrink the store to this.")
@click.option("--min-free-space", callback=_limit(parse_space), metavar="10%", help="Free the disk up to this.")
@click.option(
    "--reserved-space", callback=_limit(parse_space), metavar="20GB", help="Never shrink the store below this."
)
@click.option("--all", "everything", is_flag=True, help="Remove everything that is neither in use nor pinned.")
@click.option("--sessions", is_flag=True, help="Remove Ray's session directories of dead clusters instead.")
@click.option(
    "--older-than", callback=_parsed(parse_duration), metavar="1d", help="With --sessions: not written for so long."
)
@_tmpdir_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--print-timer", is_flag=True, help="Print a systemd user timer and a crontab line, and do nothing.")
def gc(*, dry_run: bool, everything: bool, as_json: bool, print_timer: bool, sessions: bool, **limits: Any) -> None:
    """Remove environments that nobody needs. Made for cron.

    Never removes what is in use or pinned, and waits for nobody.

    Without options the defaults apply: unused for 14 days, or less than 10 % of the disk free (least recently used
    first). They can be set with RAY_ENVCACHE_UNUSED_FOR, RAY_ENVCACHE_MAX_USED_SPACE, RAY_ENVCACHE_MIN_FREE_SPACE and
    RAY_ENVCACHE_RESERVED_SPACE; "off", there or as an option, switches one off. Another collector at work is no error.
    """
    if print_timer:
        click.echo(_timer(os.environ))
        return
    older_than, tmpdir = limits.pop("older_than"), limits.pop("tmpdir")
    given = {name: value for name, value in limits.items() if value is not None}
    if sessions:
        others = [f"--{name.replace('_', '-')}" for name in given] + ["--all"] * everything
        printer = _print_json if as_json else None
        collect_sessions(tmpdir, older_than, dry_run=dry_run, others=others, print_json=printer)
        return
    _refuse_without_sessions(older_than, tmpdir)
    limited = {name: None if value is _SWITCHED_OFF else value for name, value in given.items()}
    chosen = replace(Limits.from_environ(os.environ), everything=everything, **limited)
    report = collect(readonly.opened()[0], chosen, dry_run=dry_run)
    _finish_collection(report, as_json=as_json, dry_run=dry_run)


def _opened() -> Store:
    return Store.open()


def _refuse_without_sessions(*given: object) -> None:
    """Raise where options that need --sessions came without it."""
    if any(value is not None for value in given):
        raise click.UsageError("--tmpdir and --older-than are about session directories: add --sessions")


def _as_json(status: inventory.Status) -> dict[str, Any]:
    data = status._asdict()
    del data["base_path"]
    users = [{name: getattr(user, name) for name in _TOLD} for user in data.pop("users")]
    last_used = data.pop("last_used")
    return {**data, "holders": users, "last_used_at": utc(last_used)}


def _removable(found: list[Entry]) -> list[Entry]:
    """Of the entries of one key those that are ours; where all are of lower stores, these, to be refused."""
    return [entry for entry in found if not entry.readonly] or found


def _print_json(data: dict[str, Any]) -> None:
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=2))


def _finish_collection(report: Collected, *, as_json: bool, dry_run: bool) -> None:
    if as_json:
        _print_json({"dry_run": dry_run, **asdict(report), "freed_bytes": report.freed_bytes})
    else:
        tables.print_report(report, sys.stdout, dry_run=dry_run)
    for name, reason in report.failed:
        click.echo(f"error: Cannot remove {name}: {reason}", err=True)
    if report.failed:
        sys.exit(1)


def _confirm(question: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("Not a terminal to ask on: add --yes")
    click.confirm(question, abort=True, err=True)


def _timer(environ: Mapping[str, str]) -> str:
    """What cron and systemd need: the full path, and what was chosen for this store and its limits."""
    script = os.path.abspath(sys.argv[0])
    command = [script] if os.path.basename(script) == "ray-envcache" else [sys.executable, "-m", "ray_envcache"]
    names = ("RAY_ENVCACHE_ALLOW_NETWORK_FS", *VARIABLES)
    variables = {name: environ[name] for name in names if name in environ}
    # Also where it is the usual one: that depends on variables of the shell too.
    variables["RAY_ENVCACHE_DIR"] = os.fspath(default_root())
    chosen = [f"{name}={value}" for name, value in sorted(variables.items())]
    # Cron ends a line at a %, and systemd replaces what follows one. Both take quotes; systemd no others than these.
    in_cron = shlex.join(["env", *chosen, *command]).replace("%", "\\%")
    in_systemd = " ".join(_quoted(word.replace("$", "$$")) for word in command)
    lines = "".join(f"Environment={_quoted(one)}\n" for one in chosen)
    return TIMER.format(in_cron=in_cron, in_systemd=in_systemd, variables=lines)


def _quoted(word: str) -> str:
    """A word as systemd takes it."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return word if escaped == word and word.isascii() and not set(word) & set(" '\t") else f'"{escaped}"'

"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.system.texts import format_duration, format_size, from_utc, printable, utc

if TYPE_CHECKING:
    from ray_envcache.gc.collector import Collected
    from ray_envcache.sessions.directories import Session
    from ray_envcache.store.leases import Holder
    from ray_envcache.survey.inventory import Status
    from ray_envcache.survey.uv_cache import UvCache

JSON_SCHEMA = 1
"""The version of what `--json` prints: another number where a field goes or changes its meaning."""

_YOUNG = "dead but younger"


def print_json(data: dict[str, Any]) -> None:
    """Print an answer of a command to programs."""
    click.echo(json.dumps({"schema_version": JSON_SCHEMA, **data}, indent=2))


def status_as_json(status: Status) -> dict[str, Any]:
    """One environment, as `list --json` and `why --json` show it."""
    data = status._asdict()
    del data["base_path"]
    users = [asdict(user) for user in data.pop("users")]
    last_used = utc(data.pop("last_used"))
    return {**data, "holders": users, "last_used_at": last_used}


def sessions_as_json(found: list[Session]) -> dict[str, Any]:
    """What became of session directories, by their states, as `gc --sessions --json` shows it."""
    lists = {
        state.replace(" ", "_"): [_session_as_json(one) for one in found if one.state == state]
        for state in ("removed", "kept", "alive", "in doubt")
    }
    failed = [(one.name, one.why) for one in found if one.state == "failed"]
    return {**lists, "failed": failed, "freed_bytes": _freed_bytes(found)}


def _session_as_json(one: Session) -> dict[str, Any]:
    data = asdict(one)
    del data["changed"]
    times = {f"{name}_at": utc(when) if (when := data.pop(name)) else None for name in ("started", "last_written")}
    return {**data, **times}


def _freed_bytes(found: list[Session]) -> int:
    return sum(one.reclaimable_bytes for one in found if one.state == "removed")


def print_environments(found: list[Status], *, of: int, grouped: bool) -> None:
    """Print environments of a store that has so many (`of`), and a line of their totals.

    With `grouped` layers follow what they lie on.
    """
    columns = ("KEY", "PROJECT", "PYTHON", "RAY", "STATE", "USERS", "SIZE", "RECLAIMABLE", "CREATED", "LAST USED")
    rows = [_environment(one) for one in (_layers_below_their_environments(found) if grouped else found)]
    print_table(columns, rows, numeric={"SIZE", "RECLAIMABLE", "USERS"})
    ours, lower = [one for one in found if not one.readonly], [one for one in found if one.readonly]
    total, reclaimable = sum(one.size_bytes for one in ours), sum(one.reclaimable_bytes for one in ours)
    # A file that several environments share is in the size of each, and is freed with the last of them.
    shared, least = (" (shared files counted in each)", "at least ") if len(ours) > 1 else ("", "")
    counted = count(len(ours), "environment")
    below = f"; in read-only stores {len(lower)}, {format_size(sum(one.size_bytes for one in lower))}" if lower else ""
    shown = f"{len(found)} of {of} shown: " if len(found) < of else ""
    say(f"{shown}{counted}, {format_size(total)}{shared}, {least}{format_size(reclaimable)} reclaimable{below}")


def print_uv_caches(found: Iterable[UvCache]) -> None:
    """Print a line for each cache of uv."""
    for one in found:
        whose = "of the store" if one.own else "of yours"
        size, shared = format_size(one.size_bytes), format_size(one.shared_bytes)
        say(f"uv's cache {whose} at {one.path}: {size}, {shared} of it in environments too")


def _environment(one: Status) -> Sequence[str]:
    state = one.state + (", pinned" if one.pinned else "") + (", read-only" if one.readonly else "")
    # "?": in use by a process that has no number here, as in another container.
    users = str(len(one.users)) if one.users else ("?" if one.in_use else "-")
    project = ("└ " if one.base else "") + (one.project or "-")
    least = "" if one.exact else "at least "
    return (
        one.key[:SHOWN_DIGITS], project, one.python or "-", one.ray or "-", state, users,
        format_size(one.size_bytes), least + format_size(one.reclaimable_bytes),
        _ago(_seconds(one.created_at)), _ago(one.last_used),
    )  # fmt: skip


def _layers_below_their_environments(found: list[Status]) -> list[Status]:
    layers: dict[str | None, list[Status]] = {}
    for one in found:
        if one.base:
            layers.setdefault(one.base_path, []).append(one)
    ordered = [each for one in found if not one.base for each in (one, *layers.pop(one.path, ()))]
    # A layer whose environment is missing or broken comes last.
    return ordered + [layer for alone in layers.values() for layer in alone]


def print_users(status: Status) -> None:
    """Print what keeps one environment."""
    reasons = count(len(status.users), "user") + (", pinned" if status.pinned else "")
    say(f"{status.key[:SHOWN_DIGITS]} of {status.project or '-'}: {status.state}, {reasons}")
    if status.users:
        print_users_of(status.users)
    elif status.in_use:
        say("in use by a process that cannot be named from here, such as one of another container")
    elif status.readonly:
        say("no process of this host uses it; a read-only store is never collected from here")
    elif not status.pinned:
        say("nothing keeps it: the next `ray-envcache gc` removes it when it is old enough")


def print_users_of(users: Iterable[Holder]) -> None:
    """Print a table of users."""
    print_table(("PID", "KIND", "COMMAND", "CLUSTER", "JOB", "SINCE"), map(_user, users), numeric={"PID"})


def _user(user: Holder) -> Sequence[str]:
    cluster = user.cluster or ("- (dead)" if user.command.startswith("ray::") else "-")
    return (str(user.pid), user.kind, user.command, cluster, user.job or "-", _ago(_seconds(user.since)))


def print_report(report: Collected, *, dry_run: bool) -> None:
    """Print what a collection did, or would do: a line for each environment, and a line of totals."""
    if report.skipped:
        say(f"Nothing done: {report.skipped}")
        return
    verb = "Would remove" if dry_run else "Removed"
    for one in report.removed:
        what = f"{one.key[:SHOWN_DIGITS]} of {one.project}, {format_size(one.freed_bytes)}"
        say(f"{verb} {what}: {one.reason}")
    least = "" if all(one.exact for one in report.removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(report.freed_bytes)}"
    stays = f"{report.in_use} in use, {report.pinned} pinned, {len(report.failed)} failed"
    say(f"{verb} {count(len(report.removed), 'environment')}, {freed}; {stays}")


def print_sessions(found: list[Session], *, dry_run: bool) -> None:
    """Print what a collection of sessions did: a line for each that goes or is in doubt, then totals.

    With `dry_run` what it would do, and a line for each that stays, too.
    """
    verb = "Would remove" if dry_run else "Removed"
    removed = [one for one in found if one.state == "removed"]
    for one in removed:
        say(f"{verb} {one.path}, {format_size(one.reclaimable_bytes)}: {one.why}")
    for one in found:
        if one.state == "in doubt" or (dry_run and one.state != "removed"):
            say(f"Kept {one.path}, {_YOUNG if one.state == 'kept' else one.state}: {one.why}")
    least = "" if all(one.exact for one in removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(_freed_bytes(found))}"
    counts = Counter(one.state for one in found)
    stays = f"{counts['alive']} alive, {counts['in doubt']} in doubt"
    kept = f", {counts['kept']} {_YOUNG}" if counts["kept"] else ""
    say(f"{verb} {count(len(removed), 'session')}, {freed}; {stays}{kept}, {counts['failed']} failed")


def count(number: int, noun: str) -> str:
    """A number of things, as people write it."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], numeric: Collection[str]) -> None:
    """Print rows below the names of their columns; without rows nothing. No cell is ever cut: people copy from here.

    By hand, because rich takes half a second for 1,000 rows.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    sides = [">" if name in numeric else "<" for name in columns]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))

    def line(row: Sequence[str]) -> str:
        return form.format(*row).rstrip()

    click.secho(line(columns), file=sys.stdout, bold=True)
    click.echo("\n".join(map(line, cells)), file=sys.stdout)


def say(text: str) -> None:
    """Print a line."""
    # Names and paths in it come from other people's files.
    click.echo(printable(text), file=sys.stdout)


def _seconds(moment: str | None) -> float:
    return from_utc(moment) if moment else 0.0


def _ago(moment: float) -> str:
    return f"{format_duration(max(time.time() - moment, 0))} ago" if moment else "-"

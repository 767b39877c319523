"""Tables for people."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, TextIO

import click

from ray_envcache.doctor.findings import ERROR
from ray_envcache.doctor.nodes import node_name
from ray_envcache.system.units import format_duration, format_size, printable

if TYPE_CHECKING:
    from ray_envcache.gc.collector import Collected
    from ray_envcache.sessions.collector import Report as SessionReport
    from ray_envcache.sessions.liveness import Session
    from ray_envcache.store.inventory import Status, User

KEY_LENGTH = 12
"""Digits of a key that people see; commands take any unambiguous start."""

_BELOW = "└"


def print_environments(found: list[Status], stream: TextIO) -> None:
    """The environments of a store with a footer of totals."""
    columns = ("KEY", "PROJECT", "PYTHON", "RAY", "STATE", "USERS", "SIZE", "RECLAIMABLE", "CREATED", "LAST USED")
    rows = [_environment(one) for one in _layers_below_their_environments(found)]
    _print_table(columns, rows, stream, numeric={"SIZE", "RECLAIMABLE", "USERS"})
    ours, lower = [one for one in found if not one.readonly], [one for one in found if one.readonly]
    total, reclaimable = sum(one.size_bytes for one in ours), sum(one.reclaimable_bytes for one in ours)
    # Files that several environments have are in the size of each; only all of these together free them.
    shared, least = (" (shared files counted in each)", "at least ") if len(ours) > 1 else ("", "")
    count = _count(len(ours), "environment")
    below = f"; in read-only stores {len(lower)}, {format_size(sum(one.size_bytes for one in lower))}" if lower else ""
    _say(f"{count}, {format_size(total)}{shared}, {least}{format_size(reclaimable)} reclaimable{below}", stream)


def _environment(one: Status) -> Sequence[str]:
    state = one.state + (", pinned" if one.pinned else "") + (", read-only" if one.readonly else "")
    # In use by nobody we can name: a process of another container.
    users = str(len(one.users)) if one.users else ("?" if one.in_use else "-")
    project = (f"{_BELOW} " if one.base else "") + (one.project or "-")
    least = "" if one.exact else "at least "
    return (
        one.key[:KEY_LENGTH], project, one.python or "-", one.ray or "-", state, users,
        format_size(one.size_bytes), least + format_size(one.reclaimable_bytes),
        _ago(_seconds(one.created_at)), _ago(one.last_used),
    )  # fmt: skip


def _layers_below_their_environments(found: list[Status]) -> list[Status]:
    layers: dict[str | None, list[Status]] = {}
    for one in found:
        if one.base:
            layers.setdefault(one.base_path, []).append(one)
    ordered = [each for one in found if not one.base for each in (one, *layers.pop(one.path, ()))]
    # A layer whose environment is gone or broken stands alone.
    return ordered + [layer for alone in layers.values() for layer in alone]


def print_users(status: Status, stream: TextIO) -> None:
    """What keeps one environment."""
    reasons = _count(len(status.users), "user") + (", pinned" if status.pinned else "")
    _say(f"{status.key[:KEY_LENGTH]} of {status.project or '-'}: {status.state}, {reasons}", stream)
    if status.users:
        columns = ("PID", "KIND", "COMMAND", "CLUSTER", "JOB", "SINCE")
        _print_table(columns, map(_user, status.users), stream, numeric={"PID"})
    elif status.in_use:
        _say("in use by processes that cannot be named from here, such as those of another container", stream)
    elif status.readonly:
        _say("nobody here uses it; what is in a read-only store stays, whatever is collected here", stream)
    elif not status.pinned:
        _say("nothing keeps it: the next `ray-envcache gc` takes it when it is old enough", stream)


def _user(user: User) -> Sequence[str]:
    cluster = user.cluster or ("- (dead)" if user.command.startswith("ray::") else "-")
    return (str(user.pid), user.kind, user.command, cluster, user.job or "-", _ago(_seconds(user.since)))


def print_report(report: Collected, stream: TextIO, *, dry_run: bool) -> None:
    """What a collection did, or would do: a line for each environment, and one that sums up."""
    if report.skipped:
        _say(f"Nothing done: {report.skipped}", stream)
        return
    verb = "Would remove" if dry_run else "Removed"
    for one in report.removed:
        what = f"{one.key[:KEY_LENGTH]} of {one.project}, {format_size(one.freed_bytes)}"
        _say(f"{verb} {what}: {one.reason}", stream)
    least = "" if all(one.exact for one in report.removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(report.freed_bytes)}"
    stays = f"{report.in_use} in use, {report.pinned} pinned, {len(report.failed)} failed"
    logical = format_size(report.logical_bytes)
    _say(f"{verb} {_count(len(report.removed), 'environment')}, {freed} ({logical} logical); {stays}", stream)


def print_sessions(found: list[Session], stream: TextIO) -> None:
    """The session directories of Ray with a footer of totals."""
    columns = ("SESSION", "STATE", "SIZE", "AGE", "LAST WRITTEN", "HOLDS", "WHY")
    # In one directory, mostly; where there are several, names alone would not tell which is meant.
    is_told = len({os.path.dirname(one.path) for one in found}) > 1
    _print_table(columns, (_session(one, is_told=is_told) for one in found), stream, numeric={"SIZE"})
    dead = [one for one in found if one.state == "dead"]
    total, freed = sum(one.size_bytes for one in found), sum(one.reclaimable_bytes for one in dead)
    _say(f"{_count(len(found), 'session')}, {format_size(total)}; {len(dead)} dead, {format_size(freed)}", stream)


def _session(one: Session, *, is_told: bool) -> Sequence[str]:
    age = format_duration(max(time.time() - one.started, 0)) if one.started else "-"
    name = one.path if is_told else one.name
    return (name, one.state, format_size(one.size_bytes), age, _ago(one.last_written), _holds(one), one.why)


def _holds(one: Session) -> str:
    venvs = [_count(one.venvs, "venv")] if one.venvs else []
    return ", ".join([f"logs {format_size(one.logs_bytes)}", *venvs])


def print_session_report(report: SessionReport, stream: TextIO, *, dry_run: bool) -> None:
    """What a collection of sessions did, or would do: a line for each that goes or is in doubt, one that sums up."""
    verb = "Would remove" if dry_run else "Removed"
    for one in report.removed:
        _say(f"{verb} {one.path}, {format_size(one.reclaimable_bytes)}: {one.why}", stream)
    for one in report.in_doubt:
        _say(f"Kept {one.path}, in doubt: {one.why}", stream)
    least = "" if all(one.exact for one in report.removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(report.freed_bytes)}"
    stays = f"{len(report.alive)} alive, {len(report.in_doubt)} in doubt"
    kept = f", {len(report.kept)} dead but younger" if report.kept else ""
    counted = _count(len(report.removed), "session")
    _say(f"{verb} {counted}, {freed}; {stays}{kept}, {len(report.failed)} failed", stream)


def print_nodes(nodes: list[dict[str, Any]], stream: TextIO) -> None:
    """The nodes of a cluster, as `doctor_nodes.NodeReport` has them; key and seconds where environments were built."""
    built = any(node["seconds"] is not None for node in nodes)
    columns = ("NODE", "HOST", "PLUGIN", "STORE", "FREE", "RAY", "PYTHON", "UV", *(("KEY", "SECONDS") if built else ()))
    rows = [_node(node_name(node["ip"], node["node_id"]), node)[: len(columns)] for node in nodes]
    _print_table(columns, rows, stream, numeric={"FREE", "SECONDS"})


def _node(name: str, node: dict[str, Any]) -> Sequence[str]:
    free, seconds = node["free_bytes"], node["seconds"]
    return (
        name, node["host"], _plugin(node), _store(node), "-" if free is None else format_size(free),
        node["ray"] or "-", node["python"] or "-", node["uv"] or "-", (node["key"] or "-")[:KEY_LENGTH],
        "-" if seconds is None else f"{seconds:.1f}",
    )  # fmt: skip


def _plugin(node: dict[str, Any]) -> str:
    # Who answered at all has a Python.
    return node["plugin"] or ("not loaded" if node["python"] else "-")


def _store(node: dict[str, Any]) -> str:
    unusable = any((found["name"], found["state"]) == ("store", ERROR) for found in node["findings"])
    return "unusable" if unusable else node["store"] or "-"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], stream: TextIO, numeric: Collection[str]
) -> None:
    """Columns below their names, nothing at all where there are no rows. No cell is ever cut: people copy from here.

    By hand: a thousand rows take rich half a second.
    """
    cells = [[shown(cell, stream) for cell in row] for row in rows]
    if not cells:
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    sides = [">" if name in numeric else "<" for name in columns]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))

    def line(row: Sequence[str]) -> str:
        return form.format(*row).rstrip()

    click.secho(line(columns), file=stream, bold=True)
    click.echo("\n".join(map(line, cells)), file=stream)


def _say(text: str, stream: TextIO) -> None:
    # Names and paths in it are others'.
    click.echo(shown(text, stream), file=stream)


def shown(text: str, stream: TextIO) -> str:
    """The text as `stream` can have it: no control characters, and codes in place of letters that it has not."""
    text = printable(text)
    if text.isascii():  # nearly always: of thousands of cells
        return text
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.replace(_BELOW, "+").encode(encoding, "backslashreplace").decode(encoding)
    return text


def _seconds(moment: str | None) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp() if moment else 0.0


def _ago(moment: float) -> str:
    return f"{format_duration(max(time.time() - moment, 0))} ago" if moment else "-"

"""Tables for people."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_envcache.collector import Report
from ray_envcache.findings import ERROR
from ray_envcache.inventory import Status
from ray_envcache.session_gc import Report as SessionReport
from ray_envcache.sessions import Session
from ray_envcache.units import format_duration, format_size

KEY_LENGTH = 12
"""Digits of a key that people see; commands take any unambiguous start."""

_UNLIMITED_WIDTH = 250


def print_environments(found: list[Status], stream: TextIO) -> None:
    """The environments of a store with a footer of totals."""
    table = _table(
        ("KEY", "PROJECT", "PYTHON", "RAY", "STATE", "USERS", "SIZE", "RECLAIMABLE", "CREATED", "LAST USED"),
        {"SIZE", "RECLAIMABLE", "USERS"},
    )
    for one in _layers_below_their_environments(found):
        state = one.state + (", pinned" if one.pinned else "") + (", read-only" if one.readonly else "")
        # In use by nobody we can name: a process of another container.
        users = str(len(one.users)) if one.users else ("?" if one.in_use else "-")
        project = ("└ " if one.base else "") + (one.project or "-")
        least = "" if one.exact else "at least "
        table.add_row(
            one.key[:KEY_LENGTH], project, one.python or "-", one.ray or "-", state, users,
            format_size(one.size_bytes), least + format_size(one.reclaimable_bytes),
            _ago(_seconds(one.created_at)), _ago(one.last_used),
        )  # fmt: skip
    console = _console(stream)
    if found:
        console.print(table)
    ours, lower = [one for one in found if not one.readonly], [one for one in found if one.readonly]
    total, reclaimable = sum(one.size_bytes for one in ours), sum(one.reclaimable_bytes for one in ours)
    # Files that several environments have are in the size of each; only all of these together free them.
    shared, least = (" (shared files counted in each)", "at least ") if len(ours) > 1 else ("", "")
    count = _count(len(ours), "environment")
    below = f"; in read-only stores {len(lower)}, {format_size(sum(one.size_bytes for one in lower))}" if lower else ""
    console.print(f"{count}, {format_size(total)}{shared}, {least}{format_size(reclaimable)} reclaimable{below}")


def _layers_below_their_environments(found: list[Status]) -> list[Status]:
    layers = [one for one in found if one.base]
    bases = [one for one in found if not one.base]
    ordered = [each for base in bases for each in (base, *(layer for layer in layers if layer.base_path == base.path))]
    # A layer whose environment is gone or broken stands alone.
    return [*ordered, *(layer for layer in layers if layer not in ordered)]


def print_users(status: Status, stream: TextIO) -> None:
    """What keeps one environment."""
    console = _console(stream)
    reasons = _count(len(status.users), "user") + (", pinned" if status.pinned else "")
    console.print(f"{status.key[:KEY_LENGTH]} of {status.project or '-'}: {status.state}, {reasons}")
    if status.users:
        table = _table(("PID", "KIND", "COMMAND", "CLUSTER", "JOB", "SINCE"), {"PID"})
        for user in status.users:
            cluster = user.cluster or ("- (dead)" if user.command.startswith("ray::") else "-")
            since = _ago(_seconds(user.since))
            table.add_row(str(user.pid), user.kind, user.command, cluster, user.job or "-", since)
        console.print(table)
    elif status.in_use:
        console.print("in use by processes that cannot be named from here, such as those of another container")
    elif status.readonly:
        console.print("nobody here uses it; what is in a read-only store stays, whatever is collected here")
    elif not status.pinned:
        console.print("nothing keeps it: the next `ray-envcache gc` takes it when it is old enough")


def print_report(report: Report, stream: TextIO, *, dry_run: bool) -> None:
    """What a collection did, or would do: a line for each environment, and one that sums up."""
    console = _console(stream)
    if report.skipped:
        console.print(f"Nothing done: {report.skipped}")
        return
    verb = "Would remove" if dry_run else "Removed"
    for one in report.removed:
        console.print(f"{verb} {one.key[:KEY_LENGTH]} of {one.project}, {format_size(one.freed_bytes)}: {one.reason}")
    least = "" if all(one.exact for one in report.removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(report.freed_bytes)}"
    stays = f"{report.in_use} in use, {report.pinned} pinned, {len(report.failed)} failed"
    logical = format_size(report.logical_bytes)
    console.print(f"{verb} {_count(len(report.removed), 'environment')}, {freed} ({logical} logical); {stays}")


def print_sessions(found: list[Session], stream: TextIO) -> None:
    """The session directories of Ray with a footer of totals."""
    table = _table(("SESSION", "STATE", "SIZE", "AGE", "LAST WRITTEN", "HOLDS", "WHY"), {"SIZE"})
    for one in found:
        age = format_duration(max(time.time() - one.started, 0)) if one.started else "-"
        cells = (one.name, one.state, format_size(one.size_bytes), age, _ago(one.last_written), _holds(one), one.why)
        # Names are Ray's only as long as nobody else makes one: no control characters, no markup.
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console = _console(stream)
    if found:
        console.print(table)
    dead = [one for one in found if one.state == "dead"]
    total, freed = sum(one.size_bytes for one in found), sum(one.reclaimable_bytes for one in dead)
    console.print(f"{_count(len(found), 'session')}, {format_size(total)}; {len(dead)} dead, {format_size(freed)}")


def _holds(one: Session) -> str:
    venvs = [_count(one.venvs, "venv")] if one.venvs else []
    return ", ".join([f"logs {format_size(one.logs_bytes)}", *venvs])


def print_session_report(report: SessionReport, stream: TextIO, *, dry_run: bool) -> None:
    """What a collection of sessions did, or would do: a line for each that goes or is in doubt, one that sums up."""
    console = _console(stream)
    verb = "Would remove" if dry_run else "Removed"
    for one in report.removed:
        console.print(Text(f"{verb} {printable(one.path)}, {format_size(one.reclaimable_bytes)}: {one.why}"))
    for one in report.in_doubt:
        console.print(Text(f"Kept {printable(one.path)}, in doubt: {printable(one.why)}"))
    least = "" if all(one.exact for one in report.removed) else "at least "
    freed = f"{'free' if dry_run else 'freed'} {least}{format_size(report.freed_bytes)}"
    stays = f"{len(report.alive)} alive, {len(report.in_doubt)} in doubt"
    kept = f", {len(report.kept)} dead but younger" if report.kept else ""
    console.print(
        f"{verb} {_count(len(report.removed), 'session')}, {freed}; {stays}{kept}, {len(report.failed)} failed"
    )


def print_nodes(nodes: list[dict[str, Any]], stream: TextIO) -> None:
    """The nodes of a cluster, as `doctor_nodes.NodeReport` has them; key and seconds where environments were built."""
    built = any(node["seconds"] is not None for node in nodes)
    columns = ("NODE", "HOST", "PLUGIN", "STORE", "FREE", "RAY", "PYTHON", "UV", *(("KEY", "SECONDS") if built else ()))
    table = _table(columns, {"FREE", "SECONDS"})
    for node in nodes:
        free = node["free_bytes"]
        cells = [
            node_name(node), node["host"], _plugin(node), _store(node), "-" if free is None else format_size(free),
            node["ray"] or "-", node["python"] or "-", node["uv"] or "-",
        ]  # fmt: skip
        if built:
            seconds = node["seconds"]
            cells += [(node["key"] or "-")[:KEY_LENGTH], "-" if seconds is None else f"{seconds:.1f}"]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    _console(stream).print(table)


def node_name(node: dict[str, Any]) -> str:
    """A node for people: its address, and of its id what tells it from others at that address."""
    return f"{node['ip']} ({node['node_id'][:8]})"


def _plugin(node: dict[str, Any]) -> str:
    # Who answered at all has a Python.
    return node["plugin"] or ("not loaded" if node["python"] else "-")


def _store(node: dict[str, Any]) -> str:
    unusable = any((found["name"], found["state"]) == ("store", ERROR) for found in node["findings"])
    return "unusable" if unusable else node["store"] or "-"


def printable(text: str) -> str:
    """Take the teeth out of control characters."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(columns: Iterable[str], numeric: set[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left", no_wrap=True)
    return table


def _console(stream: TextIO) -> Console:
    # In a pipe nothing is cut: whoever reads it wants all of it.
    return Console(file=stream, width=None if stream.isatty() else _UNLIMITED_WIDTH, highlight=False)


def _seconds(moment: str | None) -> float:
    return datetime.fromisoformat(moment.replace("Z", "+00:00")).timestamp() if moment else 0.0


def _ago(moment: float) -> str:
    return f"{format_duration(max(time.time() - moment, 0))} ago" if moment else "-"

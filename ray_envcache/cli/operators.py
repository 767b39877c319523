"""`stats`, `metrics` and `log`: views of the journal, for those who run a machine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from ray_envcache.cli import tables
from ray_envcache.errors import UnknownKeyError
from ray_envcache.store import journal, readonly
from ray_envcache.store.journal import Event, Journal
from ray_envcache.store.layout import SHOWN_DIGITS, Entry, Layout, newest_first
from ray_envcache.survey import inventory
from ray_envcache.survey.metrics import exposition
from ray_envcache.survey.statistics import Statistics, statistics
from ray_envcache.system import files
from ray_envcache.system.texts import format_duration, format_size, parse_duration, utc, without_credentials


@click.command(epilog="Example: ray-envcache stats --since 7d")
@click.option("--since", metavar="7d", help="Count from so long ago; default: all that the journal has.")
@click.option("--project", metavar="NAME", default="", help="Count what was done for one project, as `list` names it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and times in UTC.")
def stats(*, since: str | None, project: str, as_json: bool) -> None:
    """Show what the store did: set-ups, builds, savings, removals.

    Of the environments handed out, the hit rate is the share that was there already. Saved is what the clusters would
    have without sharing, a copy each, less what was built. A cluster counts once for each environment and each layer,
    so does each `run`. It is an upper bound: each copy is taken to occupy what its files count, though uv may link
    them, and to take as long as the last build here, though uv may have the wheels already; waits are subtracted.
    """
    begin = "" if since is None else utc(max(time.time() - parse_duration(since), 0))
    layout, below = readonly.opened()
    noted = journal.read(layout)
    found = statistics(noted, (layout, *below), begin, project)
    if as_json:
        tables.print_json({"project": project or None, **asdict(found), **_passed_over(noted)})
    else:
        _print_statistics(found)
    _tell_passed_over(noted)


def _print_statistics(found: Statistics) -> None:
    if not found.begins_at:
        tables.say("The journal is empty")
        return
    results = ", ".join(f"{count} {result}" for result, count in found.setups.items())
    rate = "-" if found.hit_rate is None else f"{found.hit_rate:.0%}"
    tables.say(f"Since {found.begins_at}")
    tables.say(f"Set-ups: {results}; hit rate {rate}")
    waits = f"waits: {found.setups['waited']}, {format_duration(found.wait_seconds)}"
    tables.say(f"Builds:  {found.builds}, {format_duration(found.build_seconds)}; {waits}")
    saved = f"{format_size(found.saved_bytes)} and {format_duration(found.saved_seconds)}"
    tables.say(f"Saved:   at most {saved}; copies not made: {found.saved_copies}")
    tables.say(f"Removed: {found.removed}, freed {format_size(found.freed_bytes)}; collections: {found.collections}")
    slowest = [(one.key[:SHOWN_DIGITS], one.project or "-", f"{one.seconds:.1f}", one.at) for one in found.slowest]
    tables.print_table(("SLOWEST BUILDS", "PROJECT", "SECONDS", "AT"), slowest, {"SECONDS"})
    often = [(one.project or "-", str(one.builds), str(one.keys), f"{one.seconds:.1f}") for one in found.most_often]
    tables.print_table(("MOST BUILDS", "BUILDS", "KEYS", "SECONDS"), often, {"BUILDS", "KEYS", "SECONDS"})


@click.command("metrics", epilog="Example: ray-envcache metrics --output /var/lib/node_exporter/envcache.prom")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Replace this file, whole."
)
def metrics_(*, output: Path | None) -> None:
    """Print the store's numbers for Prometheus.

    Counters never go back while the journal is there, gauges are of this moment. With --output a file that all users
    may read is replaced at once: for the textfile collector of node_exporter.
    """
    layout, below = readonly.opened()
    noted = journal.read(layout)
    text = exposition(noted, layout, inventory.survey(layout, below))
    if output is None:
        click.echo(text, nl=False)
    else:
        files.write_whole(output, text.encode(), mode=0o644, replace=True)
    _tell_passed_over(noted)


@click.command(epilog="Example: ray-envcache log 125a8")
@click.argument("key")
@click.option("--lines", type=click.IntRange(0), default=20, metavar="N", help="So many of the log; default: 20.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log(*, key: str, lines: int, as_json: bool) -> None:
    """Show the history of an environment, and the end of its build log.

    KEY is the start of a key, as `list` shows it; it may be of an environment that was removed.
    """
    layout, below = readonly.opened()
    noted = journal.read(layout)
    full, entries = _known(key, noted, (layout, *below))
    events = [event for event in noted.events if full in (event.text("key"), event.text("base"))]
    tail = [line for entry in entries[:1] for line in _tail(entry, lines)]
    if as_json:
        told = [{"at": event.at, "event": event.name, **event.fields} for event in events]
        tables.print_json({"key": full, "events": told, "build_log": tail, **_passed_over(noted)})
    else:
        columns = ("AT", "EVENT", "RESULT", "KIND", "PROJECT", "SECONDS", "SIZE", "CLUSTER", "REASON")
        tables.print_table(columns, map(_row, events), {"SECONDS", "SIZE"})
        tables.say(f"{tables.count(len(events), 'event')} of {full[:SHOWN_DIGITS]}")
        if tail:
            tables.say(f"{entries[0].build_log} ends with:")
        for line in tail:
            tables.say(line)
    _tell_passed_over(noted)


def _known(prefix: str, noted: Journal, stores: Iterable[Layout]) -> tuple[str, list[Entry]]:
    """The one key that starts so, of an environment that is or was in the store, and its entries that are."""
    entries = [entry for store in stores for entry in newest_first(store.all_entries())]
    keys = {event.text(name) for event in noted.events for name in ("key", "base")}
    found = {key for key in {*keys, *(entry.key for entry in entries)} if key and key.startswith(prefix)}
    if len(found) != 1:
        trouble = f"{len(found)} environments have" if found else "No environment of the store or its journal has"
        raise UnknownKeyError(
            f"{trouble} a key that starts with `{prefix}`", "ray-envcache list and ray-envcache stats show keys"
        )
    (full,) = found
    return full, [entry for entry in entries if entry.key == full]


def _tail(entry: Entry, lines: int) -> list[str]:
    """The last lines of what uv said; none where the entry was built without a word."""
    try:
        with entry.build_log.open(encoding="utf-8", errors="replace") as file:
            return [without_credentials(line.rstrip("\n")) for line in deque(file, maxlen=lines)]
    except FileNotFoundError:
        return []


def _row(event: Event) -> Sequence[str]:
    seconds, size = event.number("seconds"), event.number("bytes")
    texts = [event.text(name) or "-" for name in ("result", "kind", "project")]
    reason = event.text("reason") or event.text("error") or "-"
    numbers = (f"{seconds:.1f}" if seconds else "-", format_size(size) if size else "-")
    return (event.at, event.name, *texts, *numbers, event.text("cluster") or "-", reason)


def _passed_over(noted: Journal) -> dict[str, int]:
    return {"broken_lines": noted.broken, "newer_lines": noted.newer}


def _tell_passed_over(noted: Journal) -> None:
    if noted.broken or noted.newer:
        lines = f"broken ones ({noted.broken}), and those of a newer version of ray-envcache ({noted.newer})"
        click.echo(f"note: passed over lines of the journal: {lines}", err=True)

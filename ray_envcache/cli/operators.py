"""`stats`, `metrics`, `log` and `verify`, for those who run a machine: what a store did, and whether it is sound."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.build.progress import observer
from ray_envcache.cli import tables
from ray_envcache.doctor.repair import Repaired, chosen, repair
from ray_envcache.errors import EnvCacheError
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal
from ray_envcache.store.journal import Event, Journal
from ray_envcache.store.layout import SHOWN_DIGITS, Entry, only_key
from ray_envcache.survey import inventory
from ray_envcache.survey.statistics import Statistics, exposition, statistics
from ray_envcache.survey.verification import Verified, verify
from ray_envcache.system import files
from ray_envcache.system.texts import format_duration, format_size, parse_duration, utc

DIFFERENCES = 10
"""How many differences of an environment people see; `--json` has all."""


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
    store = Store.open()
    noted = _history(store)
    found = statistics(noted, store.entries(), begin, project)
    if as_json:
        tables.print_json({"project": project or None, **asdict(found)})
    else:
        _print_statistics(found)


def _print_statistics(found: Statistics) -> None:
    if not found.begins_at:
        tables.say("The journal is empty")
        return
    results = ", ".join(f"{count} {result}" for result, count in found.setups.items())
    rate = "-" if found.hit_rate is None else f"{found.hit_rate:.0%}"
    tables.say(f"Since {found.begins_at}")
    tables.say(f"Set-ups: {results}; hit rate {rate}")
    counts, waits = found.counts, f"waits: {found.setups['waited']}, {format_duration(found.wait_seconds)}"
    tables.say(f"Builds:  {counts['builds']}, {format_duration(counts['build_seconds'])}; {waits}")
    saved = f"{format_size(found.saved_bytes)} and {format_duration(found.saved_seconds)}"
    tables.say(f"Saved:   at most {saved}; copies not made: {found.saved_copies}")
    freed = f"freed {format_size(counts['freed_bytes'])}; collections: {counts['collections']}"
    tables.say(f"Removed: {counts['removals']}, {freed}")
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
    store = Store.open()
    noted = _history(store)
    text = exposition(noted, store.layout, inventory.survey(store.layout))
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        files.write_whole(output, text.encode(), mode=0o644, replace=True)
    except OSError as error:
        hint = "name a file in a folder that is there, in which you may write"
        raise EnvCacheError(f"Cannot write `{output}`: {error.strerror}", hint) from error


@click.command(epilog="Example: ray-envcache log 125a8")
@click.argument("key")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def log(*, key: str, as_json: bool) -> None:
    """Show the history of an environment, and where its build log is.

    KEY is the start of a key, as `list` shows it; it may be of an environment that was removed.
    """
    store = Store.open()
    noted, entries = _history(store), store.entries()
    in_journal = (event.text(name) for event in noted.events for name in ("key", "base"))
    full = only_key(key, [*in_journal, *(entry.key for entry in entries)])
    events = [event for event in noted.events if full in (event.text("key"), event.text("base"))]
    logs = [entry.build_log for entry in entries if entry.key == full and entry.build_log.exists()]
    if as_json:
        told = [{"at": event.at, "event": event.name, **event.fields} for event in events]
        paths = [*map(os.fspath, logs)]
        tables.print_json({"key": full, "events": told, "build_logs": paths})
    else:
        columns = ("AT", "EVENT", "RESULT", "KIND", "PROJECT", "SECONDS", "SIZE", "CLUSTER", "REASON")
        tables.print_table(columns, map(_row, events), {"SECONDS", "SIZE"})
        tables.say(f"{tables.count(len(events), 'event')} of {full[:SHOWN_DIGITS]}")
        for path in logs:
            tables.say(f"What uv said: {path}")


def _row(event: Event) -> Sequence[str]:
    seconds, size = event.number("seconds"), event.number("bytes")
    texts = [event.text(name) or "-" for name in ("result", "kind", "project")]
    reason = event.text("reason") or event.text("error") or "-"
    numbers = (f"{seconds:.1f}" if seconds else "-", format_size(size) if size else "-")
    return (event.at, event.name, *texts, *numbers, event.text("cluster") or "-", reason)


def _history(store: Store) -> Journal:
    """The journal; stderr says how many of its lines say nothing here."""
    found = journal.read(store.layout)
    if found.passed_over:
        lines = tables.count(found.passed_over, "line")
        click.echo(f"note: passed over {lines} of the journal, torn or of a newer ray-envcache", err=True)
    return found


@click.command("verify", epilog="Example: ray-envcache verify 125a8")
@click.argument("keys", nargs=-1, metavar="[KEY...]")
@click.option("--quick", is_flag=True, help="Look at sizes and times only.")
@click.option("--repair", "repairs", is_flag=True, help="Build a sound environment in place of each damaged one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all differences.")
def verify_(*, keys: tuple[str, ...], quick: bool, repairs: bool, as_json: bool) -> None:
    """Compare environments with what was installed.

    That is files, links, modes and bytecode. KEY is the start of a key, as `list` shows it; without one all are
    verified, those of read-only stores too. The hashes are those of the packages. The exit code is 1 where something
    differs and was not repaired.

    A repair builds the same environment beside the damaged one. New users get it at once; processes that run from the
    damaged one are shown, and keep it until they end. Then `gc` removes it.
    """
    store, answers, damaged = Store.open(), [], False
    for entry in chosen(store, keys):
        found = _verified(entry, quick=quick)
        count, seconds = len(found.differences), round(found.seconds, 3)
        about = {"key": entry.key, "project": found.project, "result": found.state}
        journal.note(store.layout, "verification", **about, differences=count, files=found.files, seconds=seconds)
        if not as_json:
            _print_verified(found)
        done = _repaired(store, found) if repairs and found.differences else None
        if done and not as_json:
            _print_repaired(done)
        damaged |= bool(found.differences) and done is None
        answers.append(_verified_as_json(found, done))
    if as_json:
        tables.print_json({"envs": answers})
    sys.exit(1 if damaged else 0)


def _verified(entry: Entry, *, quick: bool) -> Verified:
    """What a comparison of the entry finds; with a progress bar, where stderr is a terminal."""
    shown = sys.stderr if sys.stderr.isatty() else StringIO()
    with click.progressbar(length=1, label=f"Verifying {entry.short}", file=shown) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done)

        return verify(entry, advance, quick=quick)


def _repaired(store: Store, found: Verified) -> Repaired | None:
    """What the repair of an entry did; None where it failed, and stderr says why: others are still to be repaired."""
    try:
        with observer(sys.stderr) as shown:
            return repair(store, found, installed_ray(), shown)
    except EnvCacheError as error:
        click.echo(f"error: {error}", err=True)
        return None


def _print_verified(found: Verified) -> None:
    what = f"{found.entry.short} of {found.project}" if found.project else found.entry.short
    if found.state == "skipped":
        tables.say(f"{what}: not verified, {found.reason}")
        return
    count = len(found.differences)
    result = f"damaged, {count:,} {'difference' if count == 1 else 'differences'}" if count else "sound"
    size = format_size(found.bytes)
    tables.say(f"{what}: {result}; {found.files:,} files and folders, {size} in {found.seconds:.1f} s")
    rows = [(one.kind, one.path, one.package or "-", one.detail or "-") for one in found.differences[:DIFFERENCES]]
    tables.print_table(("KIND", "PATH", "PACKAGE", "WHAT"), rows, ())
    if count > DIFFERENCES:
        tables.say(f"and {count - DIFFERENCES:,} more: `ray-envcache verify --json {found.entry.short}` shows all")


def _print_repaired(done: Repaired) -> None:
    tables.say(f"{done.damaged.short}: repaired, new users get {done.sound.name}")
    if done.unpacked:
        tables.say(f"uv's cache had the damaged files too: unpacked anew {', '.join(done.unpacked)}")
    if done.bytecode:
        tables.say(f"the store's shared bytecode had {done.bytecode} of the damaged files: compiled anew")
    if done.users:
        tables.say("still run from the damaged one, and keep it until they end:")
        tables.print_users_of(done.users)


def _verified_as_json(found: Verified, done: Repaired | None) -> dict[str, Any]:
    entry, data = found.entry, found._asdict()
    data |= {"entry": entry.name, "differences": [one._asdict() for one in found.differences]}
    users = [asdict(user) for user in done.users] if done else []
    repaired = done and {**done._asdict(), "damaged": entry.name, "sound": done.sound.name, "users": users}
    return {"key": entry.key, **data, "repaired": repaired}

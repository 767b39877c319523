"""What the journal tells of a store's work: set-ups, builds, what sharing saved, and what was removed.

Sharing saved what the clusters would have had without it, a copy each, less what was really built. A cluster counts
once for an environment, however often and on however many nodes it asks, and so does each `ray-envcache run`; a build
in a driver or in CI is no use yet. Layers count apart from the environments they lie on. It is an upper bound: a copy
is taken to occupy what its files count, and to take as long as its last build here, but uv may link files from its
cache and find wheels there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ray_envcache.store.journal import Event, Journal
from ray_envcache.store.layout import Entry
from ray_envcache.store.record import MeasuredRecord, ReadyRecord

RESULTS = ("found", "lower", "fetched", "built", "waited", "refused", "failed")
"""How a set-up may end; "lower": it was found in a read-only store."""
_THERE = ("found", "lower")
_HANDED_OUT = ("found", "lower", "fetched", "built", "waited")
SHOWN = 5
"""How many of the slowest builds, and of the projects with most builds, are shown."""


@dataclass(frozen=True)
class Build:
    """One build."""

    key: str
    project: str
    seconds: float
    at: str


@dataclass(frozen=True)
class Builds:
    """The builds for one project: where `keys` are fewer, what was built before had been removed."""

    project: str
    builds: int
    keys: int
    seconds: float


@dataclass
class Statistics:
    """Numbers of a span of time. Seconds of waits are those of the whole set-up."""

    begins_at: str
    setups: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0))
    hit_rate: float | None = None
    builds: int = 0
    build_seconds: float = 0.0
    wait_seconds: float = 0.0
    saved_copies: int = 0
    saved_bytes: int = 0
    saved_seconds: float = 0.0
    removed: int = 0
    freed_bytes: int = 0
    collections: int = 0
    slowest: list[Build] = field(default_factory=list)
    most_often: list[Builds] = field(default_factory=list)


@dataclass
class _Known:
    """Of a key what one copy costs, without those below it; of a key or a path its project."""

    size: int = 0
    seconds: float = 0.0
    project: str = ""


def statistics(journal: Journal, entries: Sequence[Entry], since: str = "", project: str = "") -> Statistics:
    """The numbers since a moment (UTC ISO 8601), of one project where it is named.

    What was swept together with environments of all projects counts only without `project`.
    """
    known = _known(journal.events, entries)
    recent = [event for event in journal.events if event.at >= since]
    events = [
        event for event in recent if not project or known[event.text("key") or event.text("path")].project == project
    ]
    found = Statistics(begins_at=max(since, journal.events[0].at) if journal.events else since)
    _count_setups(found, events)
    _count_builds(found, (event for event in events if event.name == "build"))
    _count_savings(found, events, known)
    for event in events:
        found.removed += event.name == "removal"
        found.collections += event.name == "collection"
        found.freed_bytes += int(event.number("freed_bytes") + event.number("swept_bytes"))
    return found


def _known(events: Iterable[Event], entries: Sequence[Entry]) -> defaultdict[str, _Known]:
    """By key and by path, as the last event and the records tell it."""
    found: defaultdict[str, _Known] = defaultdict(_Known)
    for event in events:
        for name in filter(None, (event.text("key"), event.text("path"))):
            found[name].project = event.text("project") or found[name].project
        if event.name == "build":
            found[event.text("key")].seconds = event.number("seconds")
        elif event.name == "removal":
            found[event.text("key")].size = int(event.number("bytes"))
    for entry in entries:
        one = found[entry.key]
        if ready := ReadyRecord.read(entry):
            one.seconds, one.project = ready.build_seconds, ready.project
        if measured := MeasuredRecord.read(entry):
            one.size = measured.size_bytes
    return found


def _count_setups(found: Statistics, events: Iterable[Event]) -> None:
    for event in events:
        if event.name == "setup" and (result := event.text("result")) in RESULTS:
            found.setups[result] += 1
            found.wait_seconds += event.number("seconds") if result == "waited" else 0
    handed_out = sum(found.setups[result] for result in _HANDED_OUT)
    if handed_out:
        found.hit_rate = sum(found.setups[result] for result in _THERE) / handed_out


def _count_builds(found: Statistics, events: Iterable[Event]) -> None:
    builds = [Build(one.text("key"), one.text("project"), one.number("seconds"), one.at) for one in events]
    found.builds, found.build_seconds = len(builds), sum(one.seconds for one in builds)
    found.slowest = sorted(builds, key=lambda one: -one.seconds)[:SHOWN]
    of_project: defaultdict[str, list[Build]] = defaultdict(list)
    for one in builds:
        of_project[one.project].append(one)
    often = [
        Builds(name, len(those), len({one.key for one in those}), sum(one.seconds for one in those))
        for name, those in of_project.items()
    ]
    found.most_often = sorted(often, key=lambda one: (-one.builds, one.project))[:SHOWN]


def _count_savings(found: Statistics, events: Iterable[Event], known: dict[str, _Known]) -> None:
    users: defaultdict[str, set[str]] = defaultdict(set)
    builds: defaultdict[str, int] = defaultdict(int)
    for number, event in enumerate(events):
        builds[event.text("key")] += event.name == "build"
        if event.name == "setup" and event.text("result") in _HANDED_OUT and (user := _user(event, number)):
            for key in filter(None, (event.text("key"), event.text("base"))):
                users[key].add(user)
    for key, those in users.items():
        copies = max(len(those) - builds[key], 0)
        found.saved_copies += copies
        found.saved_bytes += copies * known[key].size
        found.saved_seconds += copies * known[key].seconds
    found.saved_seconds = max(found.saved_seconds - found.wait_seconds, 0.0)


def _user(event: Event, number: int) -> str:
    """The cluster that a set-up was for, or the run; "" for one that only makes ready."""
    return event.text("cluster") or (f"run {number}" if event.text("kind") == "run" else "")

"""A store in numbers, from its journal: for people what it did and what sharing saved, and counters for Prometheus.

Sharing saved what the clusters would have had without it, a copy each, less what was really built. A cluster counts
once for an environment, however often and on however many nodes it asks, and so does each `ray-envcache run`; a build
in a driver or in CI is no use yet. Layers count apart from the environments they lie on. It is an upper bound: a copy
is taken to occupy what its files count, and to take as long as its last build here, but uv may link files from its
cache and find wheels there.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_envcache.errors import EnvCacheError
from ray_envcache.store.journal import Event, Journal, Totals, summed
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord, read_record
from ray_envcache.survey.inventory import Status
from ray_envcache.system import disk
from ray_envcache.system.disk import DiskUse
from ray_envcache.system.texts import needs_extra

if TYPE_CHECKING:
    from prometheus_client import Metric

RESULTS = ("found", "lower", "fetched", "built", "waited", "refused", "failed")
"""How a set-up may end; "lower": it was found in a read-only store."""
_THERE = ("found", "lower")
_HANDED_OUT = ("found", "lower", "fetched", "built", "waited")
STATES = ("ready", "building", "broken")
SHOWN = 5
"""How many of the slowest builds, and of the projects with most builds, are shown."""

_RESULT = "How: found, lower (in a read-only store), fetched, built, waited (for another builder), refused, failed."
COUNTERS = {
    "builds": ("Environments and layers that were built.", "build count"),
    "build_seconds": ("Seconds that successful builds took.", "build seconds"),
    "removals": ("Environments and layers that were removed.", "removal count"),
    "freed_bytes": ("Bytes that removals and collections freed.", "removal freed_bytes", "collection swept_bytes"),
    "collections": ("Runs of the collector.", "collection count"),
    "collection_failures": ("What a collection could not remove.", "collection failed"),
    "verifications": ("Verifications of environments.", "verification count"),
    "repairs": ("Repairs of environments.", "repair count"),
}
"""What is counted beside set-ups: what it is, and the sums of the journal that it adds up."""
_TYPE = re.compile(r"^# TYPE (\S+_(bytes|seconds)(?:_total)?) .*$", re.MULTILINE)


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


@dataclass(frozen=True)
class Statistics:
    """Numbers of a span of time; `counts` by the names in COUNTERS. Seconds of waits are those of the whole set-up."""

    begins_at: str
    setups: dict[str, int]
    hit_rate: float | None
    wait_seconds: float
    counts: dict[str, float]
    saved_copies: int
    saved_bytes: int
    saved_seconds: float
    slowest: list[Build]
    most_often: list[Builds]


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
    totals, copies = summed(events), _copies(events)
    setups = {result: int(totals.get(f"setup {result} count", 0)) for result in RESULTS}
    handed_out, there = (sum(setups[result] for result in results) for results in (_HANDED_OUT, _THERE))
    waited = totals.get("setup waited seconds", 0)
    builds = [
        Build(one.text("key"), one.text("project"), one.number("seconds"), one.at)
        for one in events
        if one.name == "build"
    ]
    return Statistics(
        begins_at=max(since, journal.events[0].at) if journal.events else since,
        setups=setups,
        hit_rate=there / handed_out if handed_out else None,
        wait_seconds=waited,
        counts=_counts(totals),
        saved_copies=copies.total(),
        saved_bytes=sum(count * known[key].size for key, count in copies.items()),
        saved_seconds=max(sum(count * known[key].seconds for key, count in copies.items()) - waited, 0),
        slowest=sorted(builds, key=lambda one: -one.seconds)[:SHOWN],
        most_often=_most_often(builds),
    )


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
        if use := read_record(DiskUse, entry.measured):
            one.size = use.size
    return found


def _counts(totals: Totals) -> dict[str, float]:
    return {name: sum(totals.get(one, 0) for one in sums) for name, (_, *sums) in COUNTERS.items()}


def _most_often(builds: list[Build]) -> list[Builds]:
    found = []
    for project, count in Counter(one.project for one in builds).most_common(SHOWN):
        those = [one for one in builds if one.project == project]
        found.append(Builds(project, count, len({one.key for one in those}), sum(one.seconds for one in those)))
    return found


def _copies(events: Sequence[Event]) -> Counter[str]:
    """By key how many copies were not made: one for each cluster and run that used it, less its builds."""
    uses = {
        (key, user)
        for number, event in enumerate(events)
        if event.name == "setup" and event.text("result") in _HANDED_OUT
        # A set-up that is for no cluster and no run only makes ready.
        if (user := event.text("cluster") or (f"run {number}" if event.text("kind") == "run" else ""))
        for key in (event.text("key"), event.text("base"))
        if key
    }
    copies = Counter(key for key, _ in uses)
    copies.subtract(event.text("key") for event in events if event.name == "build")
    return +copies


def exposition(journal: Journal, layout: Layout, found: list[Status]) -> str:
    """The text for a store whose environments are `found`. Raises EnvCacheError where prometheus_client is missing."""
    try:
        from prometheus_client import generate_latest
        from prometheus_client.registry import Collector
    except ModuleNotFoundError as error:
        raise EnvCacheError(
            f"`metrics` needs the package prometheus-client: {error}", needs_extra("metrics")
        ) from error

    class Numbers(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from _counters(journal.totals)
            yield from _gauges(layout, found)

    # node_exporter reads the older format, which has no UNIT: there it is a comment.
    return _TYPE.sub(r"\g<0>\n# UNIT \1 \2", generate_latest(Numbers()).decode())


def _counters(totals: Totals) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily as Family

    setups = Family("ray_envcache_setups", f"Set-ups of environments. {_RESULT}", labels=["result"])
    seconds = Family("ray_envcache_setup_seconds", f"Seconds that set-ups took. {_RESULT}", labels=["result"])
    # Of the known results only: labels are not taken from what any process may have written.
    for result in RESULTS:
        setups.add_metric([result], totals.get(f"setup {result} count", 0))
        seconds.add_metric([result], totals.get(f"setup {result} seconds", 0))
    yield from (setups, seconds)
    for name, value in _counts(totals).items():
        yield Family(f"ray_envcache_{name}", COUNTERS[name][0], value)


def _gauges(layout: Layout, ours: list[Status]) -> Iterator[Metric]:
    from prometheus_client.core import GaugeMetricFamily as Gauge

    states = Gauge("ray_envcache_environments", "Environments and layers in the store.", labels=["state"])
    for state in STATES:
        states.add_metric([state], sum(one.state == state for one in ours))
    in_use, pinned = sum(one.in_use for one in ours), sum(one.pinned for one in ours)
    size, reclaimable = sum(one.size_bytes for one in ours), sum(one.reclaimable_bytes for one in ours)
    space = disk.free_space(layout.root)
    yield states
    yield Gauge("ray_envcache_environments_in_use", "Of these, in use now.", in_use)
    yield Gauge("ray_envcache_environments_pinned", "Of these, pinned.", pinned)
    yield Gauge("ray_envcache_environments_bytes", "Their sizes; a shared file counts in each.", size)
    yield Gauge("ray_envcache_reclaimable_bytes", "Bytes that removing all would free, at least.", reclaimable)
    yield Gauge("ray_envcache_disk_free_bytes", "Free bytes on the disk of the store.", space.free)
    yield Gauge("ray_envcache_disk_size_bytes", "All bytes of the disk of the store.", space.total)

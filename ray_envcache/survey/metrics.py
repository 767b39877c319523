"""A store in numbers for Prometheus: counters from its journal, gauges of what lies there. No key, no project."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_envcache.errors import EnvCacheError
from ray_envcache.store.journal import Journal
from ray_envcache.store.layout import Layout
from ray_envcache.survey.inventory import Status
from ray_envcache.survey.statistics import RESULTS
from ray_envcache.system import disk
from ray_envcache.system.texts import needs_extra

if TYPE_CHECKING:
    from prometheus_client import Metric

STATES = ("ready", "building", "broken")
_RESULT = "How: found, lower (in a read-only store), fetched, built, waited (for another builder), refused, failed."
_TYPE = re.compile(r"^# TYPE (\S+_(bytes|seconds)(?:_total)?) .*$", re.MULTILINE)


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


def _counters(totals: dict[str, float]) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily as Counter

    setups = Counter("ray_envcache_setups", f"Set-ups of environments. {_RESULT}", labels=["result"])
    seconds = Counter("ray_envcache_setup_seconds", f"Seconds that set-ups took. {_RESULT}", labels=["result"])
    # Of the known results only: labels are not taken from what any process may have written.
    for result in RESULTS:
        setups.add_metric([result], totals.get(f"setup {result} count", 0))
        seconds.add_metric([result], totals.get(f"setup {result} seconds", 0))

    def total(event: str, field: str = "count") -> float:
        """The sum over all results of an event."""
        return sum(totals[name] for name in totals if name.startswith(f"{event} ") and name.endswith(f" {field}"))

    freed = total("removal", "freed_bytes") + total("collection", "swept_bytes")
    yield from (setups, seconds)
    yield Counter("ray_envcache_builds", "Environments and layers that were built.", total("build"))
    yield Counter("ray_envcache_build_seconds", "Seconds that successful builds took.", total("build", "seconds"))
    yield Counter("ray_envcache_removals", "Environments and layers that were removed.", total("removal"))
    yield Counter("ray_envcache_freed_bytes", "Bytes that removals and collections freed.", freed)
    yield Counter("ray_envcache_collections", "Runs of the collector.", total("collection"))
    failures = total("collection", "failed")
    yield Counter("ray_envcache_collection_failures", "What a collection could not remove.", failures)
    yield Counter("ray_envcache_verifications", "Verifications of environments.", total("verification"))
    yield Counter("ray_envcache_repairs", "Repairs of environments.", total("repair"))


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

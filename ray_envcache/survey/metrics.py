"""A store in numbers for Prometheus: counters from its journal, gauges of what lies there. No key, no project."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ray_envcache.store.journal import Journal
from ray_envcache.store.layout import Layout
from ray_envcache.survey.inventory import Status
from ray_envcache.survey.statistics import RESULTS
from ray_envcache.system import disk

STATES = ("ready", "building", "broken")
_RESULT = "How: found, lower (in a read-only store), fetched, built, waited (for another builder), refused, failed."


class Metric(NamedTuple):
    """One metric. The name has neither prefix nor suffix; `values` by the value of its label, "" without a label."""

    kind: Literal["counter", "gauge"]
    name: str
    unit: str
    text: str
    values: dict[str, float]
    label: str = ""


def metrics(journal: Journal, layout: Layout, found: Iterable[Status]) -> list[Metric]:
    """All metrics of a store, whose environments are `found`."""
    ours = [one for one in found if not one.readonly]
    return [*_counters(journal), *_gauges(layout, ours)]


def _counters(journal: Journal) -> Iterator[Metric]:
    def by_result(field: str) -> dict[str, float]:
        """Of the known results only: labels are not taken from what any process may have written."""
        return {result: journal.totals.get(f"setup {result} {field}", 0) for result in RESULTS}

    def total(event: str, field: str = "count") -> dict[str, float]:
        """The sum over all results of an event."""
        wanted = (name for name in journal.totals if name.startswith(f"{event} ") and name.endswith(f" {field}"))
        return {"": sum(map(journal.totals.__getitem__, wanted))}

    setups, seconds = by_result("count"), by_result("seconds")
    freed = total("removal", "freed_bytes")[""] + total("collection", "swept_bytes")[""]
    yield Metric("counter", "setups", "", f"Set-ups of environments. {_RESULT}", setups, "result")
    yield Metric("counter", "setup", "seconds", f"Seconds that set-ups took. {_RESULT}", seconds, "result")
    yield Metric("counter", "builds", "", "Environments and layers that were built.", total("build"))
    yield Metric("counter", "build", "seconds", "Seconds that successful builds took.", total("build", "seconds"))
    yield Metric("counter", "removals", "", "Environments and layers that were removed.", total("removal"))
    yield Metric("counter", "freed", "bytes", "Bytes that removals and collections freed.", {"": freed})
    yield Metric("counter", "collections", "", "Runs of the collector.", total("collection"))
    failures = total("collection", "failed")
    yield Metric("counter", "collection_failures", "", "What a collection could not remove.", failures)
    yield Metric("counter", "verifications", "", "Verifications of environments.", total("verification"))
    yield Metric("counter", "repairs", "", "Repairs of environments.", total("repair"))


def _gauges(layout: Layout, ours: list[Status]) -> Iterator[Metric]:
    states = {state: float(sum(one.state == state for one in ours)) for state in STATES}
    in_use, pinned = sum(one.in_use for one in ours), sum(one.pinned for one in ours)
    size, reclaimable = sum(one.size_bytes for one in ours), sum(one.reclaimable_bytes for one in ours)
    space = disk.free_space(layout.root)
    yield Metric("gauge", "environments", "", "Environments and layers in the store.", states, "state")
    yield Metric("gauge", "environments_in_use", "", "Of these, in use now.", {"": in_use})
    yield Metric("gauge", "environments_pinned", "", "Of these, pinned.", {"": pinned})
    yield Metric("gauge", "environments", "bytes", "Their sizes; a shared file counts in each.", {"": size})
    yield Metric("gauge", "reclaimable", "bytes", "Bytes that removing all would free, at least.", {"": reclaimable})
    yield Metric("gauge", "disk_free", "bytes", "Free bytes on the disk of the store.", {"": space.free})
    yield Metric("gauge", "disk_size", "bytes", "All bytes of the disk of the store.", {"": space.total})

"""All measures, by name: each fills a `Result` from a `Bench`."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.bench import Bench
from tests.benchmarks.measure import Result
from tests.benchmarks.measures import agent, builds, clusters, disk, growth, remote, store

Measure = Callable[[Bench, Result], None]

MEASURES: dict[str, Measure] = {
    "first": clusters.first,
    "cold": clusters.cold,
    "edit": clusters.edit,
    "worker": clusters.worker,
    "clusters": clusters.many,
    "disk": disk.disk,
    "builds": disk.builds,
    "inodes": disk.inodes,
    "build": builds.build,
    "fetch": remote.fetch,
    "bytecode": builds.bytecode,
    "import": builds.first_import,
    "create": agent.create,
    "plugin": agent.plugin,
    "memory": agent.memory,
    "cpu": agent.cpu,
    "gc": store.gc,
    "list": store.list_entries,
    "growth-clusters": growth.clusters,
    "growth-entries": growth.entries,
    "growth-packages": growth.packages,
    "growth-workers": growth.workers,
}
